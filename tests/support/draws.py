"""Draws of the Triton backend against the reference's, for tests of the kernels that draw tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import auxkern
from auxkern import Sample, SamplingParams


def logits(N: int, V: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))).to(dtype)


def seeds(N: int) -> Tensor:
    return torch.arange(N) * 2**40 - 3


def both(terms: Any, params: SamplingParams | None = None, **options: Any) -> tuple[Sample, Sample]:
    found = [
        auxkern.sample(terms, params, position=2**35 + 1, return_logprobs=True, backend=name, **options)
        for name in ("triton", "reference")
    ]
    return found[0], found[1]


def assert_equal(terms: Any, params: SamplingParams | None = None, **options: Any) -> None:
    made, wanted = both(terms, params, **options)
    assert torch.equal(made.tokens, wanted.tokens)
    assert torch.equal(made.status, wanted.status)
    # float32 sums of V exponentials against float64's.
    torch.testing.assert_close(
        made.processed_logprob, wanted.processed_logprob, rtol=0, atol=2e-5, equal_nan=True
    )


PARAMS = {
    "plain": {},
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.4},
    "top-k": {"top_k": 9},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
}
