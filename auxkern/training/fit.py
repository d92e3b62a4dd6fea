"""Whether the models of a pair can take the examples of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from auxkern.model.base import positions_for
from auxkern.model.modeling import DEFAULT, AuxTunedForCausalLM
from auxkern.model.text import IGNORED
from auxkern.training.examples import Items


def check_fit(model: Any, encoded: Items, place: Callable[[int], str]) -> None:
    """Looks at every example before the first step; ids beyond a table end a run, on a GPU without a word.

    Args:
        model: an ``AuxTunedForCausalLM``; of another module nothing is known but that it needs labels.
        encoded: with input_ids, labels and condition_ids.
        place: what a message calls the example of an index.

    Raises:
        ValueError: an example has ids beyond the vocabulary, more tokens than a model has positions for,
            or no condition where the auxiliary needs one; or nothing is to be learnt from any.
    """
    fits = _Fits(model) if isinstance(model, AuxTunedForCausalLM) else None
    labels = False
    for i in range(len(encoded)):
        example = encoded[i]
        labels = labels or any(label != IGNORED for label in _listed(example["labels"])[1:])
        problem = None if fits is None else fits.problem(example)
        if problem:
            raise ValueError(f"{place(i)}: {problem}")
    if not labels:
        raise ValueError(
            f"nothing is to be learnt from {len(encoded):,} examples, of which the first is {place(0)}: all "
            f"labels after the start are {IGNORED}"
        )


def check_padding(model: AuxTunedForCausalLM, pad_id: int) -> None:
    """Looks whether the base has the id that fills batches.

    Raises:
        ValueError: it has not.
    """
    V = model.config.vocab_size
    if not 0 <= pad_id < V:
        raise ValueError(
            f"the tokenizer's padding token has the id {pad_id}, but the base has 0 to {V - 1}; make "
            "pad_token one that it has, such as the end token"
        )


def checked_lengths(lm: Any, encoded: Items) -> list[int]:
    """Tokens of each sequence, once the base is known to have positions for all of them.

    Raises:
        ValueError: it has not.
    """
    lengths = [len(encoded[i]["input_ids"]) for i in range(len(encoded))]
    most, longest = positions_for(lm), max(lengths, default=0)
    if most is not None and longest > most:
        raise ValueError(
            f"sequence {lengths.index(longest)} has {longest} tokens, but the base has positions for {most}; "
            f"encode with max_length={most} or less"
        )
    return lengths


class _Fits:
    """What a pair can take, and what is wrong with an example that it cannot."""

    def __init__(self, model: AuxTunedForCausalLM) -> None:
        self.V = model.config.vocab_size
        self.positions = positions_for(model.lm)
        traits = model.auxiliary_traits(DEFAULT)
        self.needs_condition = traits.needs_condition
        # An encoder reads the condition apart, and positions of the T5 family are relative.
        together = None if self.needs_condition else traits.transformer_config
        self.auxiliary_positions = getattr(together, "max_position_embeddings", None)

    def problem(self, example: Mapping[str, Any]) -> str | None:
        ids, condition = _listed(example["input_ids"]), _listed(example.get("condition_ids", ()))
        for name, some in (("prompt and text", ids), ("the condition", condition)):
            if some and not (min(some) >= 0 and max(some) < self.V):
                worst = max(some) if max(some) >= self.V else min(some)
                return f"{name} have the id {worst}, but the base has 0 to {self.V - 1}; is it its tokenizer?"
        if self.needs_condition and not condition:
            return "the condition is empty, and the auxiliary's encoder has nothing to read; give it one"
        T, K = len(ids), len(condition)
        if self.positions is not None and self.positions < T:
            return (
                f"{T} tokens, but the base has positions for {self.positions}; pass max_length (--max-length)"
            )
        if self.auxiliary_positions is not None and self.auxiliary_positions < K + T:
            return (
                f"{K} tokens of the condition and {T} of prompt and text, but the auxiliary has positions "
                f"for {self.auxiliary_positions}; raise max_position_embeddings in auxiliary_config, or cut "
                "the text"
            )
        return None


def _listed(ids: Any) -> list[int]:
    listed: list[int] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    return listed
