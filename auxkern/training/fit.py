"""Whether the models of a pair can take the examples of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from auxkern.model.base import positions_for
from auxkern.model.modeling import AuxTunedForCausalLM
from auxkern.model.pair_terms import DEFAULT
from auxkern.model.text import IGNORED
from auxkern.training.examples import Items


def check_fit(model: Any, encoded: Items, place: Callable[[int], str]) -> None:
    """Looks at every example before the first step; ids beyond a table end a run, on a GPU without a word.

    Args:
        model: an ``AuxTunedForCausalLM``; of another module nothing is known but that it needs labels.
        encoded: with input_ids, labels and condition_ids, and those of auxiliaries held frozen.
        place: what a message calls the example of an index.

    Raises:
        ValueError: an example has ids beyond the vocabulary, more tokens than a model has positions for,
            no condition where an auxiliary needs one, or none for one that is held frozen; or nothing is to
            be learnt from any.
    """
    labels = False
    for i in range(len(encoded)):
        example = encoded[i]
        labels = labels or any(label != IGNORED for label in _listed(example["labels"])[1:])
        problem = _problem(model, example) if isinstance(model, AuxTunedForCausalLM) else None
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


def _problem(model: AuxTunedForCausalLM, example: Mapping[str, Any]) -> str | None:
    """Why a pair cannot take an example; None if it can."""
    ids, frozen = _listed(example["input_ids"]), example.get("frozen", {})
    held = model.config.on_top_of
    if frozen.keys() != held.keys():
        return (
            f"it has conditions for {list(frozen)}, but the auxiliaries held frozen are {list(held)}; pass "
            "encode what hold_frozen returned"
        )
    if foreign := _foreign(model, "prompt and text", ids):
        return foreign
    T, before, positions = len(ids), len(model.base_prefix), positions_for(model.lm)
    if positions is not None and positions < before + T:
        behind = f" behind {before} of base_prefix_ids" if before else ""
        return (
            f"{T} tokens{behind}, but the base has positions for {positions}; pass max_length (--max-length)"
        )
    if problem := _of_auxiliary(model, DEFAULT, _listed(example.get("condition_ids", ())), T):
        return problem
    for name, given in frozen.items():
        if problem := _of_auxiliary(model, name, _listed(given["condition_ids"]), T):
            return f"{name}, held frozen: {problem}"
    return None


def _foreign(model: AuxTunedForCausalLM, what: str, ids: list[int]) -> str | None:
    V = model.config.vocab_size
    if not ids or (min(ids) >= 0 and max(ids) < V):
        return None
    worst = max(ids) if max(ids) >= V else min(ids)
    return f"{what} have the id {worst}, but the base has 0 to {V - 1}; is it its tokenizer?"


def _of_auxiliary(model: AuxTunedForCausalLM, name: str, condition: list[int], T: int) -> str | None:
    """Why an auxiliary cannot take a condition before T tokens; None if it can."""
    traits, K = model.auxiliary_traits(name), len(condition)
    if foreign := _foreign(model, "the condition", condition):
        return foreign
    if traits.needs_condition and not condition:
        return "the condition is empty, and the auxiliary's encoder has nothing to read; give it one"
    # An encoder reads the condition apart, and positions of the T5 family are relative.
    together = None if traits.needs_condition else traits.transformer_config
    positions = getattr(together, "max_position_embeddings", None)
    if positions is not None and positions < K + T:
        return (
            f"{K} tokens of the condition and {T} of prompt and text, but the auxiliary has positions for "
            f"{positions}; raise max_position_embeddings in auxiliary_config, or cut the text"
        )
    return None


def _listed(ids: Any) -> list[int]:
    listed: list[int] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    return listed
