"""Launches of these kernels that stand for the rest; ``../kernels.py`` registers them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from auxkern.backends.triton import cases
from auxkern.backends.triton.cases import B, F, H, Kernel, named
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_loss import launches
from auxkern.backends.triton.logits_loss.kernels import backward_kernel, combine_kernel, forward_kernel
from auxkern.backends.triton.losses import Coefficients
from auxkern.backends.triton.sums import LogitsSum

_ROWS, _FEW_ROWS = 8192, 4  # a training batch, and one whose rows are split
_SUMS = ((H,), (B,), (F,), (H, H), (B, B), (F, F), (H, F), (B, F), (B,) * 3, (H,) * 8)


def _logits(rows: int, V: int, dtypes: tuple[torch.dtype, ...], cap: float) -> LogitsSum:
    terms = len(dtypes)
    return LogitsSum(cases.values_of(rows, V, dtypes), [1.0] * terms, [cap] * terms, V)


def _forward_launches(
    V: int, rows: int, dtypes: tuple[torch.dtype, ...], *, cap: float = 0.0, smooth: bool = False,
    stats: bool = False,
) -> list[Launch]:  # fmt: skip
    logits, target = _logits(rows, V, dtypes, cap), cases.target_of(rows)
    return launches.forward(logits, target, -100, smooth, stats, cases.MULTIPROCESSORS)[1]


def _forward_cases(V: int) -> Iterator[tuple[str, Launch]]:
    for dtypes in _SUMS:
        yield named(*dtypes), _forward_launches(V, _ROWS, dtypes)[0]
    for label, options in (
        ("softcap", {"cap": 30.0}),
        ("smooth", {"smooth": True}),
        ("stats", {"stats": True}),
        ("smooth, stats", {"smooth": True, "stats": True}),
    ):
        for dtypes in ((B, B), (H, F)):
            yield f"{named(*dtypes)}, {label}", _forward_launches(V, _ROWS, dtypes, **options)[0]


def _combine_cases(V: int) -> Iterator[tuple[str, Launch]]:
    yield "fp16+fp32", _forward_launches(V, _FEW_ROWS, (H, F))[1]
    yield "fp16+fp32, smooth, stats", _forward_launches(V, _FEW_ROWS, (H, F), smooth=True, stats=True)[1]


def _backward_launch(
    V: int, dtypes: tuple[torch.dtype, ...], wanted: list[int], *, cap: float = 0.0, cut: int = 0
) -> Launch:
    logits, target = _logits(_ROWS, V, dtypes, cap), cases.target_of(_ROWS)
    logits = replace(logits, vocab_size=V - cut)
    coefficients = Coefficients(*[cases.float_row(_ROWS)] * 4)
    return launches.backward(logits, target, coefficients, wanted, cases.MULTIPROCESSORS)[1]


def _backward_cases(V: int) -> Iterator[tuple[str, Launch]]:
    for dtypes in _SUMS:
        yield named(*dtypes), _backward_launch(V, dtypes, [len(dtypes) - 1])
    for dtypes in ((B, B), (H, F)):
        yield f"{named(*dtypes)}, both wanted", _backward_launch(V, dtypes, [0, 1])
        yield f"{named(*dtypes)}, softcap", _backward_launch(V, dtypes, [1], cap=30.0)
    yield "fp16+fp32, vocab_size < V", _backward_launch(V, (H, F), [1], cut=47)


KERNELS = (
    Kernel(forward_kernel, _forward_cases, _ROWS, vectors=True),
    Kernel(combine_kernel, _combine_cases, _FEW_ROWS),
    Kernel(backward_kernel, _backward_cases, _ROWS, vectors=True),
)
