"""Native CPU kernels through ctypes: the passing of pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import c_void_p

import torch
from torch import Tensor

from auxkern.backends.cpu import heads as _heads
from auxkern.backends.cpu import sampling as _sampling
from auxkern.backends.cpu.library import (
    DTYPES,
    ISAS,
    Execution,
    Gradient,
    Term,
    check,
    library_path,
    load,
    torch_thread_pool,
)
from auxkern.ops.registry import Draws, Entries, HeadRows, Rows, SegmentGradients, Segments


class Cpu:
    """The native kernels, at one instruction set.

    Args:
        isa: "best" (of this CPU), "generic", "avx2" or "avx512".
        own_threads: start threads for each call even where torch's pool could be used.
        own_products: make heads' products here even in plain code, where a library's are twice as
            fast (N 256, D 576 + 256, V 49,152: 952 ms and 520; with AVX2 413 and 497).

    Raises:
        OSError: the native library is missing, does not load, or is of another version.
        ValueError: there is no such instruction set, or this CPU lacks it.
    """

    name = "cpu"

    def __init__(self, isa: str = "best", *, own_threads: bool = False, own_products: bool = False) -> None:
        if isa not in ISAS:
            raise ValueError(f"isa is {isa!r}; choose one of {', '.join(map(repr, ISAS))}")
        self.path = library_path()
        self._library = load(self.path)
        if isa != "best" and not self._library.auxkern_has_isa(ISAS[isa]):
            raise ValueError(f"isa is {isa!r}, which this CPU or build lacks; isa='best' runs anywhere")
        number = ISAS[isa] or self._library.auxkern_best_isa()
        self.isa = next(name for name, value in ISAS.items() if value == number)
        self._own_products = own_products or self.isa != "generic"
        self._parallel = None if own_threads else torch_thread_pool()
        self.threading = "own threads" if self._parallel is None else "torch's OpenMP pool"

    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        if device.type != "cpu":
            return f"its kernels run on CPU tensors, these are on {device}"
        for dtype in dtypes:
            if dtype not in DTYPES:
                return f"it has no kernels for {dtype}; the reference backend has"
        return None

    def cross_entropy_forward(
        self,
        values: list[Tensor],
        target: Tensor,
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        ignore_index: int,
        want_smooth: bool,
        want_stats: bool,
    ) -> Rows:
        terms = _terms(values, scales, softcaps)
        return self._forward(terms, values, target, vocab_size, ignore_index, want_smooth, want_stats, None)

    def cross_entropy_forward_gradient(
        self,
        values: list[Tensor],
        target: Tensor,
        row_weight: Tensor,
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        want_stats: bool,
        wanted: list[int],
        out: list[Tensor | None] | None = None,
    ) -> tuple[Rows, list[Tensor]]:
        gradients, pointers = _gradients(values, wanted, out)
        row_weight = row_weight.contiguous()
        request = Gradient(row_weight.data_ptr(), label_smoothing, z_loss, pointers)
        terms = _terms(values, scales, softcaps)
        want_smooth = label_smoothing > 0
        rows = self._forward(
            terms, values, target, vocab_size, ignore_index, want_smooth, want_stats, request
        )
        return rows, gradients

    def _forward(
        self,
        terms: ctypes.Array[Term],
        values: list[Tensor],
        target: Tensor,
        vocab_size: int,
        ignore_index: int,
        want_smooth: bool,
        want_stats: bool,
        gradient: Gradient | None,
    ) -> Rows:
        N = target.shape[0]
        smooth, stats = N if want_smooth else 0, N if want_stats else 0

        def row(*shape: int) -> Tensor:
            # Said in full: the program's default dtype and device may be others.
            return torch.empty(shape, dtype=torch.float32, device="cpu")

        rows = Rows(
            nll=row(N),
            row_max=row(N),
            log_sum=row(N),
            smooth=row(smooth),
            argmax=target.new_empty(stats),
            term_nll=row(len(values) if stats else 0, stats),
        )
        status = self._library.auxkern_cross_entropy_forward(
            terms,
            len(terms),
            target.data_ptr(),
            N,
            vocab_size,
            ignore_index,
            *(t.data_ptr() if t.numel() else None for t in rows.tensors()),
            gradient,
            self._execution(),
        )
        check(status)
        return rows

    def cross_entropy_backward(
        self,
        values: list[Tensor],
        target: Tensor,
        row_max: Tensor,
        exp_coefficient: Tensor,
        constant: Tensor,
        target_gradient: Tensor,
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        wanted: list[int],
    ) -> list[Tensor]:
        gradients, pointers = _gradients(values, wanted)
        # Bound to names first: a temporary would be freed before the kernel reads it.
        rows = [t.contiguous() for t in (row_max, exp_coefficient, constant, target_gradient)]
        status = self._library.auxkern_cross_entropy_backward(
            _terms(values, scales, softcaps),
            len(values),
            target.data_ptr(),
            target.shape[0],
            vocab_size,
            *(t.data_ptr() for t in rows),
            pointers,
            self._execution(),
        )
        check(status)
        return gradients

    def segments_refusal(self, heads: list[HeadRows]) -> str | None:
        if not self._own_products:
            return "a library's products are faster than plain code"
        return _heads.refusal(heads)

    def segments_e_size(self, C: int, V: int) -> int:
        return _heads.e_size(C, V)

    def segments_forward(
        self,
        heads: list[HeadRows],
        entries: Entries,
        target: Tensor,
        live: Tensor | None,
        vocab_size: int,
        want_back: list[bool],
        e: Tensor | None,
    ) -> Segments:
        execution = self._execution()
        return _heads.forward(
            self._library, execution, heads, entries, target, live, vocab_size, want_back, e
        )

    def segments_backward(
        self,
        segments: Segments,
        row_max: Tensor,
        exp_coefficient: Tensor,
        target_gradient: Tensor,
        gradients: SegmentGradients,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        sums = (row_max, exp_coefficient, target_gradient)
        return _heads.backward(self._library, self._execution(), segments, *sums, gradients)

    def sample(
        self,
        values: list[Tensor],
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        draws: Draws,
        want_logprob: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        terms = _terms(values, scales, softcaps)
        return _sampling.draw(self._library, self._execution(), terms, vocab_size, draws, want_logprob)

    def _execution(self) -> Execution:
        return Execution(torch.get_num_threads(), ISAS[self.isa], self._parallel)


def _terms(values: list[Tensor], scales: list[float], softcaps: list[float]) -> ctypes.Array[Term]:
    terms = (Term * len(values))()
    for term, x, scale, softcap in zip(terms, values, scales, softcaps, strict=True):
        term.values = x.data_ptr()
        term.width, term.inner = x.shape[2], x.shape[1]
        term.stride_outer, term.stride_inner, term.stride_column = x.stride()
        term.dtype, term.scale, term.softcap = DTYPES[x.dtype], scale, softcap
    return terms


def _gradients(
    values: list[Tensor], wanted: list[int], out: list[Tensor | None] | None = None
) -> tuple[list[Tensor], ctypes.Array[c_void_p]]:
    """Gradients of the wanted terms, not filled, and a pointer for every term (null: not wanted)."""
    given = out or [None] * len(wanted)
    gradients = [
        values[i].new_empty(values[i].shape) if own is None else own
        for i, own in zip(wanted, given, strict=True)
    ]
    pointers = (c_void_p * len(values))()
    for i, gradient in zip(wanted, gradients, strict=True):
        pointers[i] = gradient.data_ptr()
    return gradients, pointers


BACKEND = Cpu()
