"""Decoding from a real LM's logits: tokens beside the reference's, then a measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from auxkern.bench.results import CaseResult
from auxkern.bench.runner import Effort, Progress, measure_inputs
from auxkern.bench.sample import OPERATOR, inputs_of, ours, tied

COMPARED = ("temperature only", "top-k 50 + top-p 0.9")
MEASURED = "top-k 50 + top-p 0.9"


class Positions(NamedTuple):
    """Both models' logits at some positions.

    Attributes:
        lm, aux: (N, V) float32.
    """

    lm: Tensor
    aux: Tensor


class TokenAgreement(NamedTuple):
    """Tokens of a backend beside the reference's.

    Attributes:
        rows: how many rows.
        equal: how many have the reference's token.
        tied: how many others have a token that scores alike in float32.
    """

    rows: int
    equal: int
    tied: int

    @property
    def passed(self) -> bool:
        return self.equal + self.tied == self.rows

    def __str__(self) -> str:
        return f"{self.equal} of {self.rows} tokens are the reference's, {self.tied} tie with it"


def every_position(lm: Tensor, aux: Tensor, counted: Tensor) -> Positions:
    """The positions (B, T) of logits (B, T, V) where ``counted`` is true, in order."""
    return Positions(lm[counted], aux[counted])


def last_positions(lm: Tensor, aux: Tensor, counted: Tensor) -> Positions:
    """The last position of each sequence where ``counted`` (B, T) is true: what decoding draws from."""
    T = counted.shape[1]
    last = (counted * torch.arange(1, T + 1, device=counted.device)).argmax(1)
    rows = torch.arange(counted.shape[0], device=counted.device)
    return Positions(lm[rows, last], aux[rows, last])


def compare(positions: Positions, backends: Sequence[str]) -> dict[tuple[str, str], TokenAgreement]:
    """Each backend's tokens beside the reference's, by (filters, backend), with those of ``COMPARED``."""
    found = {}
    for filters in COMPARED:
        inputs = inputs_of(list(positions), filters)
        exact = OPERATOR.exact(inputs)
        for backend in backends:
            tokens = ours(backend).run(inputs)
            found[filters, backend] = TokenAgreement(
                rows=tokens.numel(),
                equal=int((tokens == exact.tokens).sum()),
                tied=int(tied(inputs, exact, tokens).sum()),
            )
    return found


def facts(agreements: dict[tuple[str, str], TokenAgreement]) -> dict[str, str]:
    """What was compared, in words."""
    return {f"sample, {filters}, {backend}": str(found) for (filters, backend), found in agreements.items()}


def measurement(
    positions: Positions, model: str, backends: Sequence[str], effort: Effort
) -> Callable[[Progress], CaseResult]:
    """A job that measures ``auxkern.sample`` beside Hugging Face's pipeline, with the filters ``MEASURED``.

    Args:
        positions: what to draw from.
        model: what tables call it.
        backends: of auxkern.
        effort: how long to measure.
    """

    def measure(progress: Progress) -> CaseResult:
        inputs, device = inputs_of(list(positions), MEASURED), positions.lm.device
        N, V = positions.lm.shape
        case = CaseResult("sample", model, V, N, "float32", terms=2, filters=MEASURED)
        implementations = OPERATOR.implementations(device, torch.float32, backends)
        return measure_inputs(OPERATOR, inputs, case, implementations, device, effort, progress)

    return measure
