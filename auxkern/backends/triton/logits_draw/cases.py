"""Launches of these kernels that stand for the rest; ``../kernels.py`` registers them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from auxkern.backends.triton import cases
from auxkern.backends.triton.cases import B, F, H, Kernel, named
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_draw import launches
from auxkern.backends.triton.logits_draw.kernels import (
    adjust_kernel,
    choose_kernel,
    draw_kernel,
    seen_kernel,
    sum_kernel,
)
from auxkern.core.draws import ROW_NUMBERS, Draws

ROWS = 64  # a decoding batch
_SUMS = ((B, B), (H, F), (F, F), (B,))


def draws_of(*, plain: bool, history: int = 0, rows: int = ROWS, shared: bool = False) -> Draws:
    """Parameters of some rows, on tensors without memory; numbers of all rows where they are shared."""

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(rows, *shape, device="meta")

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(rows, *shape, dtype=torch.int64, device="meta")

    each: dict[str, float | torch.Tensor] = {}
    for number in ROW_NUMBERS:
        one = 3 if number.dtype == torch.int64 else 0.7
        each[number.name] = one if shared else floats().to(number.dtype or F)
    return Draws(
        numbers=each,
        seed=integers(),
        position=integers(),
        prompt=integers(0),
        history=integers(history),
        bias_ids=integers(0),
        bias=floats(0),
        plain=plain,
    )


def _launches(
    V: int,
    gpu: Gpu,
    dtypes: tuple[torch.dtype, ...],
    draws: Draws,
    *,
    logprob: bool = False,
    scaled: bool = False,
) -> list[Launch]:
    """The launches of one call on logits of these dtypes."""
    scale = cases.float_row(ROWS) if scaled else 1.0
    logits = cases.logits_of(ROWS, V, dtypes, scale=scale)
    return launches.plan(logits, launches.RowDraws.of(logits, draws), logprob, gpu)[1]


def _draw_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    plain = draws_of(plain=True)
    for dtypes in _SUMS:
        yield named(*dtypes), _launches(V, gpu, dtypes, plain)[0]
    yield "bf16+bf16, logprob", _launches(V, gpu, (B, B), plain, logprob=True)[0]
    yield "fp16+fp32, row scales", _launches(V, gpu, (H, F), plain, scaled=True)[0]
    yield "bf16+bf16, one temperature", _launches(V, gpu, (B, B), draws_of(plain=True, shared=True))[0]


def _choose_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    for label, logprob in (("plain", False), ("logprob", True)):
        yield label, _launches(V, gpu, (B, B), draws_of(plain=True), logprob=logprob)[1]


def _sum_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    for dtypes in _SUMS:
        yield named(*dtypes), _launches(V, gpu, dtypes, draws_of(plain=False))[0]


def _seen_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    yield "history", _launches(V, gpu, (B, B), draws_of(plain=True, history=512))[1]


def _adjust_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    yield "history", _launches(V, gpu, (B, B), draws_of(plain=True, history=512))[2]
    yield "one penalty", _launches(V, gpu, (B, B), draws_of(plain=True, history=512, shared=True))[2]


KERNELS = (
    # Of each part of a row a program leaves two numbers, if log-probabilities are wanted.
    Kernel(draw_kernel, _draw_cases, ROWS, vectors=True, any_row=False, sums=True),
    # The bounds, twice; they also decide what two loops over groups read, which counts as reading them.
    Kernel(choose_kernel, _choose_cases, ROWS, passes=4),
    Kernel(sum_kernel, _sum_cases, ROWS, vectors=True, any_row=False),
    Kernel(seen_kernel, _seen_cases, ROWS),
    Kernel(adjust_kernel, _adjust_cases, ROWS),
)
