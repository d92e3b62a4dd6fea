"""Launches of the sampling kernels that stand for the rest; ``kernels.py`` registers them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from auxkern.backends.triton import sampling_plans
from auxkern.backends.triton.launch import Launch
from auxkern.ops.registry import Draws

ROWS = 64  # a decoding batch
_MULTIPROCESSORS = 132  # H100 SXM; decides how rows are split, not what is compiled
_H, _B, _F = torch.float16, torch.bfloat16, torch.float32
_SUMS = {"bf16+bf16": (_B, _B), "fp16+fp32": (_H, _F), "fp32+fp32": (_F, _F), "bf16": (_B,)}


def draws_of(*, plain: bool, history: int = 0) -> Draws:
    """Parameters of ``ROWS`` rows, on tensors without memory."""

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(ROWS, *shape, device="meta")

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(ROWS, *shape, dtype=torch.int64, device="meta")

    return Draws(
        temperature=floats(),
        top_k=integers(),
        top_p=floats(),
        log_min_p=floats(),
        repetition=floats(),
        presence=floats(),
        frequency=floats(),
        seed=integers(),
        position=integers(),
        prompt=integers(0),
        history=integers(history),
        added_ids=integers(0),
        added=floats(0),
        bias_ids=integers(0),
        bias=floats(0),
        row_scales=[],
        plain=plain,
    )


def launches(
    V: int, dtypes: tuple[torch.dtype, ...], draws: Draws, *, logprob: bool = False, scaled: bool = False
) -> list[Launch]:
    """The launches of one call on logits of these dtypes."""
    values = [torch.empty(1, ROWS, V, dtype=dtype, device="meta") for dtype in dtypes]
    scales = [torch.empty(ROWS, device="meta") if scaled else None for _ in dtypes]
    chosen = Draws(**{**vars(draws), "row_scales": scales})
    settings = ([1.0] * len(values), [0.0] * len(values), V, chosen, logprob, _MULTIPROCESSORS)
    return sampling_plans.sample(values, *settings)[1]


def draw_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Labels and launches of ``draw_kernel``."""
    for name, dtypes in _SUMS.items():
        yield name, launches(V, dtypes, draws_of(plain=True))[0]
    yield "bf16+bf16, logprob", launches(V, (_B, _B), draws_of(plain=True), logprob=True)[0]
    yield "fp16+fp32, row scales", launches(V, (_H, _F), draws_of(plain=True), scaled=True)[0]


def choose_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Of ``choose_kernel``."""
    for logprob in (False, True):
        label = "logprob" if logprob else "plain"
        yield label, launches(V, (_B, _B), draws_of(plain=True), logprob=logprob)[1]


def sum_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Of ``sum_kernel``."""
    for name, dtypes in _SUMS.items():
        yield name, launches(V, dtypes, draws_of(plain=False))[0]


def adjust_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Of ``adjust_kernel``."""
    yield "history", launches(V, (_B, _B), draws_of(plain=True, history=512))[1]


def filter_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Of ``filter_kernel``."""
    for logprob in (False, True):
        label = "logprob" if logprob else "plain"
        yield label, launches(V, (_B, _B), draws_of(plain=False), logprob=logprob)[-1]
