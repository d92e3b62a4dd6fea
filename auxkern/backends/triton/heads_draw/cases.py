"""Launches of this kernel that stand for the rest; ``../kernels.py`` registers them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from auxkern.backends.triton import cases
from auxkern.backends.triton.cases import WIDTHS, B, F, H, Kernel
from auxkern.backends.triton.entries.cases import sparse_of
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.heads_draw import launches
from auxkern.backends.triton.heads_draw.kernels import heads_choose_kernel, heads_draw_kernel
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_draw.cases import ROWS, draws_of
from auxkern.backends.triton.logits_draw.launches import RowDraws
from auxkern.core.sums import Sum


def _launches(
    V: int,
    gpu: Gpu,
    widths: Sequence[int],
    dtypes: Sequence[torch.dtype],
    *,
    rows: int = ROWS,
    cap: float | None = None,
    write: bool = False,
    logprob: bool = False,
    hidden: torch.dtype | None = None,
    pointer: bool = False,
) -> list[Launch]:
    """The launch that draws from heads, or that writes their logits, and what follows it."""
    terms = cases.heads_of(rows, V, widths, dtypes, cap=cap, hidden=hidden).terms
    summed = Sum((*terms, sparse_of(rows)) if pointer else terms, V)
    draws = draws_of(plain=not write, rows=rows)
    return launches.plan(summed, RowDraws.of(summed, draws), logprob, gpu, gpu.exact)[1]


def _draw_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    for name, widths in WIDTHS.items():
        yield f"bf16 {name}", _launches(V, gpu, widths, (B, B))[0]
    widths = WIDTHS["768+256"]
    yield "fp16 768+256", _launches(V, gpu, widths, (H, H))[0]
    yield "bf16, 512 rows", _launches(V, gpu, widths, (B, B), rows=512)[0]
    yield "bf16, logprob", _launches(V, gpu, widths, (B, B), logprob=True)[0]
    yield "bf16, writes z", _launches(V, gpu, widths, (B, B), write=True)[0]
    yield "bf16, softcap", _launches(V, gpu, widths, (B, B), cap=30.0)[0]
    yield "fp16+fp32", _launches(V, gpu, widths, (H, F))[0]
    yield "fp32xbf16+fp32", _launches(V, gpu, widths, (B, F), hidden=F)[0]
    # The package's own case.
    yield "fp32xbf16+fp32, pointer", _launches(V, gpu, widths, (B, F), hidden=F, pointer=True)[1]


def _choose_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    for label, logprob in (("plain", False), ("logprob", True)):
        yield label, _launches(V, gpu, WIDTHS["768+256"], (B, B), logprob=logprob)[1]


KERNELS = (
    Kernel(heads_draw_kernel, _draw_cases, ROWS, dot=True),
    Kernel(heads_choose_kernel, _choose_cases, ROWS),
)
