"""Launches of this kernel that stand for the rest; ``../kernels.py`` registers them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from auxkern.backends.triton import cases
from auxkern.backends.triton.cases import WIDTHS, B, F, H, Kernel
from auxkern.backends.triton.heads_draw import launches
from auxkern.backends.triton.heads_draw.kernels import heads_draw_kernel
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_draw.cases import ROWS, draws_of


def _launch(
    V: int,
    widths: Sequence[int],
    dtypes: Sequence[torch.dtype],
    *,
    rows: int = ROWS,
    cap: float | None = None,
    write: bool = False,
    logprob: bool = False,
    hidden: torch.dtype | None = None,
) -> Launch:
    """The launch that draws from heads, or that writes their logits."""
    heads = cases.heads_of(rows, V, widths, dtypes, cap=cap, hidden=hidden)
    return launches.plan(heads, draws_of(plain=not write, rows=rows), logprob, cases.MULTIPROCESSORS, "ieee")[
        1
    ][0]


def _draw_cases(V: int) -> Iterator[tuple[str, Launch]]:
    for name, widths in WIDTHS.items():
        yield f"bf16 {name}", _launch(V, widths, (B, B))
    widths = WIDTHS["768+256"]
    yield "fp16 768+256", _launch(V, widths, (H, H))
    yield "bf16, 16 rows", _launch(V, widths, (B, B), rows=16)
    yield "bf16, 512 rows", _launch(V, widths, (B, B), rows=512)
    yield "bf16, logprob", _launch(V, widths, (B, B), logprob=True)
    yield "bf16, writes z", _launch(V, widths, (B, B), write=True)
    yield "bf16, softcap", _launch(V, widths, (B, B), cap=30.0)
    yield "fp16+fp32", _launch(V, widths, (H, F))
    yield "fp32xbf16+fp32", _launch(V, widths, (B, F), hidden=F)  # the package's own case


KERNELS = (Kernel(heads_draw_kernel, _draw_cases, ROWS, dot=True),)
