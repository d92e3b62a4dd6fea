"""Launches of these kernels that stand for the rest; ``../kernels.py`` registers them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from auxkern.backends.triton import cases
from auxkern.backends.triton.cases import B, F, H, Kernel, named
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_loss import launches
from auxkern.backends.triton.logits_loss.kernels import backward_kernel, combine_kernel, forward_kernel
from auxkern.core.loss import Loss

_PLAIN, _FULL = Loss(), Loss(label_smoothing=0.1, stats=True)
_ROWS, _FEW_ROWS = 8192, 4  # a training batch, and one whose rows are split
_SUMS = ((H,), (B,), (F,), (H, H), (B, B), (F, F), (H, F), (B, F), (B,) * 3, (H,) * 8)


def _forward_launches(
    V: int, rows: int, dtypes: tuple[torch.dtype, ...], *, cap: float | None = None, loss: Loss = _PLAIN
) -> list[Launch]:
    logits, target = cases.logits_of(rows, V, dtypes, cap=cap), cases.target_of(rows)
    return launches.forward(logits, target, loss, cases.MULTIPROCESSORS)[1]


def _forward_cases(V: int) -> Iterator[tuple[str, Launch]]:
    for dtypes in _SUMS:
        yield named(*dtypes), _forward_launches(V, _ROWS, dtypes)[0]
    for label, options in (
        ("softcap", (30.0, _PLAIN)),
        ("smooth", (None, Loss(label_smoothing=0.1))),
        ("stats", (None, Loss(stats=True))),
        ("smooth, stats", (None, _FULL)),
    ):
        for dtypes in ((B, B), (H, F)):
            launch = _forward_launches(V, _ROWS, dtypes, cap=options[0], loss=options[1])[0]
            yield f"{named(*dtypes)}, {label}", launch


def _combine_cases(V: int) -> Iterator[tuple[str, Launch]]:
    yield "fp16+fp32", _forward_launches(V, _FEW_ROWS, (H, F))[1]
    yield "fp16+fp32, smooth, stats", _forward_launches(V, _FEW_ROWS, (H, F), loss=_FULL)[1]


def _backward_launch(
    V: int,
    dtypes: tuple[torch.dtype, ...],
    places: Sequence[int],
    *,
    cap: float | None = None,
    cut: int = 0,
) -> Launch:
    logits = replace(cases.logits_of(_ROWS, V, dtypes, cap=cap), V=V - cut)
    wanted = [
        {"values": torch.empty_like(term.values)} if i in places else {}
        for i, term in enumerate(logits.logits)
    ]
    rows, target = cases.coefficients_of(_ROWS), cases.target_of(_ROWS)
    return launches.backward(logits, target, rows, wanted, cases.MULTIPROCESSORS)


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
