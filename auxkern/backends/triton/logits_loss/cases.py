"""Launches of these kernels that stand for the rest; ``../kernels.py`` registers them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from auxkern.backends.triton import cases
from auxkern.backends.triton.cases import B, F, H, Kernel, named
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_loss import launches
from auxkern.backends.triton.logits_loss.kernels import (
    backward_kernel,
    combine_kernel,
    count_kernel,
    forward_kernel,
    fused_kernel,
)
from auxkern.core.loss import Loss
from auxkern.core.sums import Sum, Wanted

_PLAIN, _FULL = Loss(), Loss(label_smoothing=0.1, stats=True)
_ROWS, _FEW_ROWS = 8192, 4  # a training batch, and one whose rows are split
_SUMS = ((H,), (B,), (F,), (H, H), (B, B), (F, F), (H, F), (B, F), (B,) * 3, (H,) * 8)


def _forward_launches(
    V: int,
    gpu: Gpu,
    rows: int,
    dtypes: tuple[torch.dtype, ...],
    *,
    cap: float | None = None,
    loss: Loss = _PLAIN,
) -> list[Launch]:
    logits, target = cases.logits_of(rows, V, dtypes, cap=cap), cases.target_of(rows)
    return launches.forward(logits, target, loss, gpu)[1]


def _forward_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    for dtypes in _SUMS:
        yield named(*dtypes), _forward_launches(V, gpu, _ROWS, dtypes)[0]
    for label, options in (
        ("softcap", (30.0, _PLAIN)),
        ("smooth", (None, Loss(label_smoothing=0.1))),
        ("stats", (None, Loss(stats=True))),
        ("smooth, stats", (None, _FULL)),
    ):
        for dtypes in ((B, B), (H, F)):
            launch = _forward_launches(V, gpu, _ROWS, dtypes, cap=options[0], loss=options[1])[0]
            yield f"{named(*dtypes)}, {label}", launch


def _combine_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    yield "fp16+fp32", _forward_launches(V, gpu, _FEW_ROWS, (H, F))[1]
    yield "fp16+fp32, smooth, stats", _forward_launches(V, gpu, _FEW_ROWS, (H, F), loss=_FULL)[1]


def _asking(
    V: int, dtypes: tuple[torch.dtype, ...], places: Sequence[int], *, cap: float | None = None, cut: int = 0
) -> tuple[Sum, Wanted]:
    """Logits, and memory for the gradients of the terms in ``places``."""
    logits = replace(cases.logits_of(_ROWS, V, dtypes, cap=cap), V=V - cut)
    return logits, [
        {"values": torch.empty_like(term.values)} if i in places else {}
        for i, term in enumerate(logits.logits)
    ]


def _backward_launch(
    V: int,
    gpu: Gpu,
    dtypes: tuple[torch.dtype, ...],
    places: Sequence[int],
    *,
    cap: float | None = None,
    cut: int = 0,
    ready: bool = False,
) -> Launch:
    logits, wanted = _asking(V, dtypes, places, cap=cap, cut=cut)
    slopes = cases.slopes_of(_ROWS, V - cut, ready=ready)
    return launches.backward(logits, cases.target_of(_ROWS), slopes, wanted, gpu)


def _fused_launch(
    V: int,
    gpu: Gpu,
    dtypes: tuple[torch.dtype, ...],
    places: Sequence[int],
    *,
    loss: Loss = _PLAIN,
    cut: int = 0,
) -> Launch:
    logits, wanted = _asking(V, dtypes, places, cut=cut)
    target, weight = cases.target_of(_ROWS), cases.float_row(_ROWS)
    return launches.fused(logits, target, loss, weight, wanted, gpu)[1][0]


def _backward_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    for dtypes in _SUMS:
        yield named(*dtypes), _backward_launch(V, gpu, dtypes, [len(dtypes) - 1])
    for dtypes in ((B, B), (H, F)):
        yield f"{named(*dtypes)}, both wanted", _backward_launch(V, gpu, dtypes, [0, 1])
        yield f"{named(*dtypes)}, softcap", _backward_launch(V, gpu, dtypes, [1], cap=30.0)
    yield "fp16+fp32, vocab_size < V", _backward_launch(V, gpu, (H, F), [1], cut=47)
    yield "bf16+bf16, ready", _backward_launch(V, gpu, (B, B), [1], ready=True)


def _fused_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    for dtypes in _SUMS:
        yield named(*dtypes), _fused_launch(V, gpu, dtypes, [len(dtypes) - 1])
    for dtypes in ((B, B), (H, F)):
        yield f"{named(*dtypes)}, both wanted", _fused_launch(V, gpu, dtypes, [0, 1])
        yield f"{named(*dtypes)}, smooth, stats", _fused_launch(V, gpu, dtypes, [1], loss=_FULL)
    yield "fp16+fp32, vocab_size < V", _fused_launch(V, gpu, (H, F), [1], cut=47)


def _count_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    yield "targets", launches.count(cases.target_of(_ROWS), -100, gpu)[1][0]


KERNELS = (
    Kernel(forward_kernel, _forward_cases, _ROWS, vectors=True),
    Kernel(combine_kernel, _combine_cases, _FEW_ROWS),
    Kernel(backward_kernel, _backward_cases, _ROWS, vectors=True),
    # Twice over V; its loop over rows, which reads where they begin and end, counts as another.
    Kernel(fused_kernel, _fused_cases, _ROWS, vectors=True, passes=3),
    Kernel(count_kernel, _count_cases, _ROWS),
)
