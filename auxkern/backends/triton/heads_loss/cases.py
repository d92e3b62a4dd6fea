"""Launches of these kernels that stand for the rest; ``../kernels.py`` registers them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from auxkern.backends.triton import cases
from auxkern.backends.triton.cases import WIDTHS, B, F, H, Kernel, named
from auxkern.backends.triton.entries import launches as entry_launches
from auxkern.backends.triton.entries.cases import sparse_of
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.heads import HeadsSum, heads_sum
from auxkern.backends.triton.heads_loss import launches
from auxkern.backends.triton.heads_loss.kernels import (
    heads_combine_kernel,
    heads_forward_kernel,
    heads_gradient_kernel,
    heads_scale_kernel,
)
from auxkern.backends.triton.heads_loss.launches import NOTHING_ADDED, AddedEntries
from auxkern.backends.triton.launch import Launch
from auxkern.core.loss import Loss
from auxkern.core.sums import Sum

ROWS = 4096  # a chunk


def sum_of(
    V: int,
    widths: Sequence[int],
    dtypes: Sequence[torch.dtype],
    *,
    cap: float | None = None,
    stats: bool = False,
    scales: Sequence[float | Tensor] = (1.0, 1.0, -1.0),
    hidden: torch.dtype | None = None,
    crowded: bool = False,
    gpu: Gpu = cases.H100,
) -> HeadsSum:
    """``ROWS`` rows of a sum of heads; ``crowded`` for a smooth loss or beside entries."""
    heads = cases.heads_of(ROWS, V, widths, dtypes, cap=cap, scales=scales, hidden=hidden).heads
    return heads_sum(heads, V, stats, gpu.exact, crowded=crowded, choices=gpu.configs)


def pointer_beside(heads: HeadsSum, *, store: bool) -> AddedEntries:
    """A sparse term, whose gradient may be wanted."""
    entries, _ = entry_launches.order(
        Sum((sparse_of(ROWS),), heads.V), heads.tiles, heads.config.ids, heads.choices
    )
    return AddedEntries(entries, store)


def forward_launches(
    heads: HeadsSum, *, smooth: bool = False, stats: bool = False, added: AddedEntries = NOTHING_ADDED
) -> list[Launch]:
    """A forward pass without e."""
    loss = Loss(label_smoothing=0.1 if smooth else 0.0, stats=stats)
    return launches.forward(heads, cases.target_of(ROWS), loss, None, added)[2]


def one_write_launch(heads: HeadsSum, added: AddedEntries = NOTHING_ADDED) -> Launch:
    """The forward kernel that writes e, in float32 where a head has nothing else."""
    whole = any(head.hidden.dtype == head.weight.dtype == F for head in heads.heads)
    e = heads.buffer(F if whole else H)
    return launches.forward(heads, cases.target_of(ROWS), Loss(), e, added)[2][0]


def scale_launch(heads: HeadsSum, dtype: torch.dtype) -> Launch:
    """The kernel that turns e into dz."""
    tops = torch.empty(heads.tiles, ROWS, device="meta")
    e = heads.buffer(launches.e_dtype(dtype))
    return launches.scale(heads, cases.target_of(ROWS), e, tops, cases.coefficients_of(ROWS), dtype)[1]


def gradient_launch(
    heads: HeadsSum,
    dtype: torch.dtype,
    wanted: tuple[int, ...] = (1,),
    added: AddedEntries = NOTHING_ADDED,
) -> Launch:
    """The kernel that makes dz from the hidden states again."""
    slopes = list(dict.fromkeys(heads.slope_of(i) for i in wanted))
    return launches.gradient(heads, cases.target_of(ROWS), cases.coefficients_of(ROWS), slopes, dtype, added)[
        1
    ]


def _forward_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    of = partial(sum_of, V, gpu=gpu)
    for dtype in (H, B):
        for name, widths in WIDTHS.items():
            heads = of(widths, (dtype, dtype))
            yield f"{named(dtype)} {name}", forward_launches(heads)[0]
            if dtype == B:
                yield f"bf16 {name}, writes e", one_write_launch(heads)
    widths = WIDTHS["768+256"]
    yield "fp16+fp32 768+256", forward_launches(of(widths, (H, F)))[0]
    # A frozen model in 16 bits, its float32 states, and an auxiliary in float32: the package's own case.
    for dtype in (H, B):
        mixed = of(widths, (dtype, F), hidden=F)
        yield f"fp32x{named(dtype, F)} 768+256", forward_launches(mixed)[0]
    for dtype in (H, B):
        # Beside them a pointer: the recipe's own sum, in evaluation and in training.
        recipe = of(widths, (dtype, F), hidden=F, crowded=True)
        pointer = pointer_beside(recipe, store=False)
        yield f"fp32x{named(dtype)}+sparse", forward_launches(recipe, added=pointer)[0]
        pointer = pointer_beside(recipe, store=True)
        yield f"fp32x{named(dtype)}+sparse, e", one_write_launch(recipe, pointer)
    narrow = of(widths, (H, F), crowded=True)
    yield "fp16+fp32+sparse", forward_launches(narrow, added=pointer_beside(narrow, store=True))[0]
    half = of(widths, (B, B), crowded=True)
    yield "bf16+sparse, e", one_write_launch(half, pointer_beside(half, store=True))
    separate = of(widths, (B, F), stats=True)
    pointer = pointer_beside(separate, store=False)
    yield "bf16+sparse, stats", forward_launches(separate, smooth=True, stats=True, added=pointer)[0]
    for dtype in (H, B):
        yield f"fp32x{named(dtype)}, writes e", one_write_launch(of(widths, (dtype, dtype), hidden=F))
        yield f"{named(dtype)}xfp32, writes e", one_write_launch(of(widths, (F, F), hidden=dtype))
    yield "fp32 768+256, writes e", one_write_launch(of(widths, (F, F)))
    yield "bf16, softcap", forward_launches(of(widths, (B, B), cap=30.0))[0]
    yield "bf16, smooth", forward_launches(of(widths, (B, B), crowded=True), smooth=True)[0]
    separate = of(widths, (B, B), stats=True)
    yield "bf16, smooth, stats", forward_launches(separate, smooth=True, stats=True)[0]
    own = cases.float_row(ROWS)
    yield "bf16, row scales", forward_launches(of(widths, (B, B), scales=(own, 1.0)))[0]
    both = of(widths, (B, F), scales=(own, own), cap=30.0)
    yield "row scales, softcap", forward_launches(both)[0]
    three = of((768, 256, 256), (B, B, B))
    yield "3 x bf16 768+256+256", forward_launches(three)[0]


def _combine_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    of = partial(sum_of, V, gpu=gpu)
    widths = WIDTHS["768+256"]
    yield "bf16", forward_launches(of(widths, (B, B)))[1]
    separate = of(widths, (B, B), stats=True)
    yield "bf16, stats", forward_launches(separate, stats=True)[1]
    yield "bf16, smooth, stats", forward_launches(separate, smooth=True, stats=True)[1]


def _scale_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    of = partial(sum_of, V, gpu=gpu)
    for dtype in (H, B, F):
        yield named(dtype), scale_launch(of(WIDTHS["768+256"], (dtype, dtype)), dtype)


def _gradient_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    of = partial(sum_of, V, gpu=gpu)
    for dtype in (H, B, F):
        narrow = of((256, 256), (dtype, dtype))
        yield f"{named(dtype)} 256+256", gradient_launch(narrow, dtype)
    yield "fp32xbf16 256+256", gradient_launch(of((256, 256), (B, B), hidden=F), F)
    half = of((256, 256), (B, B), crowded=True)
    pointer = pointer_beside(half, store=True)
    yield "bf16+sparse", gradient_launch(half, B, added=pointer)
    own = cases.float_row(ROWS)
    yield "bf16, row scales", gradient_launch(of((256, 256), (B, B), scales=(own, 1.0)), B)
    capped = of(WIDTHS["768+256"], (B, B), cap=30.0)
    yield "bf16, softcap", gradient_launch(capped, B)
    yield "bf16, softcap, both wanted", gradient_launch(capped, B, (0, 1))


KERNELS = (
    Kernel(heads_forward_kernel, _forward_cases, ROWS, dot=True),
    Kernel(heads_combine_kernel, _combine_cases, ROWS, passes=7),
    Kernel(heads_scale_kernel, _scale_cases, ROWS),
    Kernel(heads_gradient_kernel, _gradient_cases, ROWS, dot=True),
)
