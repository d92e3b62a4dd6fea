"""Every kernel that dispatch launches, each with launches that stand for the rest.

This is the one place where kernels register: what compiles, inspects or tests them ahead of time
walks ``KERNELS``. The launches come from the planner that dispatch itself uses, on tensors without
memory, so they cannot drift from what users run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auxkern.backends.triton.heads_draw.kernels import heads_draw_kernel
from auxkern.backends.triton.heads_loss import cases as heads_loss_cases
from auxkern.backends.triton.heads_loss.kernels import (
    heads_combine_kernel,
    heads_forward_kernel,
    heads_gradient_kernel,
    heads_scale_kernel,
)
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_draw import cases as logits_draw_cases
from auxkern.backends.triton.logits_draw.kernels import (
    adjust_kernel,
    choose_kernel,
    draw_kernel,
    filter_kernel,
    sum_kernel,
)
from auxkern.backends.triton.logits_loss import launches as logits_loss
from auxkern.backends.triton.logits_loss.kernels import backward_kernel, combine_kernel, forward_kernel

VOCABULARIES = {"SmolLM2": 49152, "GPT-2": 50257, "Llama-3": 128256, "Gemma": 262144}
_MULTIPROCESSORS = 132  # H100 SXM; decides how rows are split, not what is compiled
_ROWS, _FEW_ROWS = 8192, 4  # a training batch, and one whose rows are split

_H, _B, _F = torch.float16, torch.bfloat16, torch.float32
_SUMS = ((_H,), (_B,), (_F,), (_H, _H), (_B, _B), (_F, _F), (_H, _F), (_B, _F), (_B,) * 3, (_H,) * 8)


@dataclass(frozen=True)
class Case:
    """One launch that stands for many.

    Attributes:
        label: what is special about it, such as "fp16+fp32, smooth".
        model: key of ``VOCABULARIES``.
        rows: N.
        launch: as dispatch would launch it.
    """

    label: str
    model: str
    rows: int
    launch: Launch


@dataclass(frozen=True)
class Kernel:
    """A registered kernel.

    Attributes:
        function: the ``triton.jit`` entry point.
        cases: yields representative launches for a model of ``VOCABULARIES``.
        vectors: whether, on contiguous logits, its traffic must move 16 bytes at a time.
        dot: whether it multiplies matrices and must use tensor cores.
        any_row: whether ``vectors`` holds for rows that begin anywhere, not only at 16-byte boundaries.
    """

    function: Any
    cases: Callable[[str], Iterator[Case]]
    vectors: bool
    dot: bool = False
    any_row: bool = True

    @property
    def name(self) -> str:
        return self.function.fn.__name__


def _named(dtypes: tuple[torch.dtype, ...]) -> str:
    short = {_H: "fp16", _B: "bf16", _F: "fp32"}
    names = [short[dtype] for dtype in dtypes]
    return f"{len(names)} x {names[0]}" if len(names) > 2 else "+".join(names)


def _logits(rows: int, V: int, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    return [torch.empty(1, rows, V, dtype=dtype, device="meta") for dtype in dtypes]


def _target(rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.int64, device="meta")


def _forward_launches(
    model: str, rows: int, dtypes: tuple[torch.dtype, ...], *, cap: float = 0.0, smooth: bool = False,
    stats: bool = False,
) -> list[Launch]:  # fmt: skip
    V, terms = VOCABULARIES[model], len(dtypes)
    values = _logits(rows, V, dtypes)
    settings = ([1.0] * terms, [cap] * terms, V, -100, smooth, stats)
    return logits_loss.forward(values, _target(rows), *settings, _MULTIPROCESSORS)[1]


def _forward_cases(model: str) -> Iterator[Case]:
    for dtypes in _SUMS:
        yield Case(_named(dtypes), model, _ROWS, _forward_launches(model, _ROWS, dtypes)[0])
    for label, options in (
        ("softcap", {"cap": 30.0}),
        ("smooth", {"smooth": True}),
        ("stats", {"stats": True}),
        ("smooth, stats", {"smooth": True, "stats": True}),
    ):
        for dtypes in ((_B, _B), (_H, _F)):
            launch = _forward_launches(model, _ROWS, dtypes, **options)[0]
            yield Case(f"{_named(dtypes)}, {label}", model, _ROWS, launch)


def _combine_cases(model: str) -> Iterator[Case]:
    plain = _forward_launches(model, _FEW_ROWS, (_H, _F))[1]
    yield Case("fp16+fp32", model, _FEW_ROWS, plain)
    full = _forward_launches(model, _FEW_ROWS, (_H, _F), smooth=True, stats=True)[1]
    yield Case("fp16+fp32, smooth, stats", model, _FEW_ROWS, full)


def _backward_launch(
    model: str, dtypes: tuple[torch.dtype, ...], wanted: list[int], *, cap: float = 0.0, cut: int = 0
) -> Launch:
    V, terms = VOCABULARIES[model], len(dtypes)
    values = _logits(_ROWS, V, dtypes)
    row = torch.empty(_ROWS, device="meta")
    settings = ([1.0] * terms, [cap] * terms, V - cut, wanted)
    return logits_loss.backward(values, _target(_ROWS), row, row, row, row, *settings, _MULTIPROCESSORS)[1]


def _backward_cases(model: str) -> Iterator[Case]:
    for dtypes in _SUMS:
        last = len(dtypes) - 1
        yield Case(_named(dtypes), model, _ROWS, _backward_launch(model, dtypes, [last]))
    for dtypes in ((_B, _B), (_H, _F)):
        both = _backward_launch(model, dtypes, [0, 1])
        yield Case(f"{_named(dtypes)}, both wanted", model, _ROWS, both)
        capped = _backward_launch(model, dtypes, [1], cap=30.0)
        yield Case(f"{_named(dtypes)}, softcap", model, _ROWS, capped)
    shared = _backward_launch(model, (_H, _F), [1], cut=47)
    yield Case("fp16+fp32, vocab_size < V", model, _ROWS, shared)


def _of(
    launches: Callable[[int], Iterator[tuple[str, Launch]]], rows: int
) -> Callable[[str], Iterator[Case]]:
    def cases(model: str) -> Iterator[Case]:
        for label, launch in launches(VOCABULARIES[model]):
            yield Case(label, model, rows, launch)

    return cases


KERNELS = (
    Kernel(forward_kernel, _forward_cases, vectors=True),
    Kernel(combine_kernel, _combine_cases, vectors=False),
    Kernel(backward_kernel, _backward_cases, vectors=True),
    Kernel(
        heads_forward_kernel,
        _of(heads_loss_cases.forward_cases, heads_loss_cases.ROWS),
        vectors=False,
        dot=True,
    ),
    Kernel(heads_combine_kernel, _of(heads_loss_cases.combine_cases, heads_loss_cases.ROWS), vectors=False),
    Kernel(heads_scale_kernel, _of(heads_loss_cases.scale_cases, heads_loss_cases.ROWS), vectors=False),
    Kernel(
        heads_gradient_kernel,
        _of(heads_loss_cases.gradient_cases, heads_loss_cases.ROWS),
        vectors=False,
        dot=True,
    ),
    Kernel(
        draw_kernel, _of(logits_draw_cases.draw_cases, logits_draw_cases.ROWS), vectors=True, any_row=False
    ),
    Kernel(choose_kernel, _of(logits_draw_cases.choose_cases, logits_draw_cases.ROWS), vectors=False),
    Kernel(sum_kernel, _of(logits_draw_cases.sum_cases, logits_draw_cases.ROWS), vectors=True, any_row=False),
    Kernel(adjust_kernel, _of(logits_draw_cases.adjust_cases, logits_draw_cases.ROWS), vectors=False),
    Kernel(filter_kernel, _of(logits_draw_cases.filter_cases, logits_draw_cases.ROWS), vectors=False),
    Kernel(
        heads_draw_kernel,
        _of(logits_draw_cases.head_draw_cases, logits_draw_cases.ROWS),
        vectors=False,
        dot=True,
    ),
)
