"""Launches of these kernels that stand for the rest; ``../kernels.py`` registers them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from auxkern.backends.triton import cases
from auxkern.backends.triton.cases import B, Kernel
from auxkern.backends.triton.configs import DEFAULT
from auxkern.backends.triton.filters.kernels import (
    finish_kernel,
    gather_kernel,
    histogram_kernel,
    peak_kernel,
)
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_draw import launches
from auxkern.backends.triton.logits_draw.cases import ROWS, draws_of


def _cases(index: int, *logprobs: bool) -> Callable[[int, Gpu], Iterator[tuple[str, Launch]]]:
    """Of the launch so far from the end of a filtered draw."""

    def its(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
        logits = cases.logits_of(ROWS, V, (B, B))
        given = launches.RowDraws.of(logits, draws_of(plain=False))
        for logprob in logprobs:
            planned = launches.plan(logits, given, logprob, gpu)[1]
            yield "logprob" if logprob else "plain", planned[index]
        alike = launches.RowDraws.of(logits, draws_of(plain=False, shared=True))
        yield "rows alike", launches.plan(logits, alike, False, gpu)[1][index]

    return its


KERNELS = (
    Kernel(peak_kernel, _cases(-4, False), ROWS, vectors=True, any_row=False),
    Kernel(histogram_kernel, _cases(-3, False), ROWS),
    Kernel(gather_kernel, _cases(-2, False, True), ROWS),
    # Of lists, or of a row where one is too long: their span; top-k, top-p, and which of equal logits, a
    # search of 8 digits each; the mass that top-k keeps; the draw: 27, of which AMD's compiler unrolls
    # 24. A tile holds the lists of a peaked row.
    Kernel(finish_kernel, _cases(-1, False, True), ROWS, passes=51, columns=DEFAULT.filter.finish_block),
)
