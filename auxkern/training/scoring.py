"""Batches of a training run, each rank's share of them, and the nll of the pair and of the LM alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from auxkern.model.base import lm_term
from auxkern.model.inputs import PairInputs
from auxkern.model.text import IGNORED
from auxkern.ops.cross_entropy import cross_entropy
from auxkern.training.checkpoint import Score
from auxkern.training.collator import moved
from auxkern.training.examples import ExampleSet
from auxkern.training.ranks import Ranks
from auxkern.training.signals import StopSignals

Collate = Callable[[list[Any]], dict[str, Any]]
# Parts of a validation set, few enough to keep and enough to resample.
_PARTS = 40
SummedNll = Callable[[ExampleSet, Sequence[int], dict[str, Any]], float]


class Batch(NamedTuple):
    """Arguments of the model, their place among the batches of all ranks, and which examples they are."""

    arguments: dict[str, Any]
    place: int
    indices: Sequence[int]


class Scorer:
    """What a model and its LM alone give to examples.

    Args:
        model: as ``auxkern.training.loop.train`` takes it.
        collate: list of examples -> batch of tensors.
        ranks: that share the batches.
        device: of the batches.
    """

    def __init__(self, model: Any, collate: Collate, ranks: Ranks, device: torch.device) -> None:
        self._model, self._collate, self._ranks, self._device = model, collate, ranks, device

    def batches(self, groups: Sequence[Sequence[int]], example: Callable[[int], Any]) -> list[Batch]:
        """The batches among ``groups`` that are this rank's; one that does not count has no labels."""
        own = []
        for place, group, counts in self._ranks.mine(groups):
            batch = moved(self._collate([example(i) for i in group]), self._device)
            if not counts:
                batch["labels"] = torch.full_like(batch["labels"], IGNORED)
            own.append(Batch(batch, place, group))
        return own

    @torch.no_grad()
    def score(self, chosen: ExampleSet, size: int, summed: SummedNll, stop: StopSignals) -> Score | None:
        """Nll of the labels of a set, in batches of at most ``size``; None if a signal came."""
        count = len(chosen.examples)
        size = min(size, math.ceil(count / _PARTS))
        groups = [range(start, min(start + size, count)) for start in range(0, count, size)]
        parts = min(len(groups), _PARTS)
        sums, labels = [0.0] * parts, [0.0] * parts
        for start in range(0, len(groups), self._ranks.count):
            if self._ranks.any(stop.requested):
                return None
            some = groups[start : start + self._ranks.count]
            ((batch, place, indices),) = self.batches(some, chosen.examples.__getitem__)
            part = (start + place) * parts // len(groups)
            sums[part] += summed(chosen, indices, batch)
            labels[part] += label_count(batch)
        totals = self._ranks.total(*sums, *labels)
        return Score(totals[:parts], totals[parts:])

    def pair(self, chosen: ExampleSet, indices: Sequence[int], batch: dict[str, Any]) -> float:
        """Summed nll that the model gives a batch's labels."""
        one = torch.tensor(1, device=self._device)
        return float(self._model(**batch, num_items_in_batch=one, return_logits=False).loss)

    def lm_alone(self, chosen: ExampleSet, indices: Sequence[int], batch: dict[str, Any]) -> float:
        """That of the LM alone, for examples ``indices`` of a set."""
        if chosen.lm_nll is None:
            return _base_nll(self._model, batch)
        total = 0.0
        for index, labels in zip(indices, batch["labels"].cpu(), strict=True):
            nll = chosen.lm_nll(index)
            # Position t holds the nll of token t + 1.
            total += nll[:-1][labels[1 : len(nll)] != IGNORED].double().sum().item()
        return total

    def knows_lm(self, chosen: ExampleSet) -> bool:
        """Whether ``lm_alone`` can say it."""
        return chosen.lm_nll is not None or hasattr(self._model, "lm")


def label_count(batch: Mapping[str, Any]) -> int:
    """Labels of a batch that are scored."""
    # Nothing predicts position 0.
    return int((batch["labels"][:, 1:] != IGNORED).sum().item())


@torch.no_grad()
def _base_nll(model: Any, batch: Mapping[str, Any]) -> float:
    """Summed nll that the base alone gives the labels; it runs unless its states are cached."""
    states, logits = batch.get("lm_states"), None
    own_logits = model.config.lm_term == "logits"
    if states is None or own_logits:
        inputs = PairInputs(batch["input_ids"], batch["attention_mask"])
        states, logits, *_ = model.run_lm(inputs, [], None, use_cache=False)
    term = lm_term(model.lm, states[:, :, 0], logits)
    V = model.config.vocab_size
    return float(cross_entropy([term], batch["labels"], shift=True, reduction="sum", vocab_size=V))
