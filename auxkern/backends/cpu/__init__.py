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
    Attention,
    Execution,
    Gradient,
    Linear,
    Term,
    check,
    library_path,
    load,
    torch_thread_pool,
)
from auxkern.ops.registry import Draws, Entries, HeadRows, Rows, SegmentGradients, Segments

_LIBRARY = "a library's products are faster than plain code"
_WIDTH = 16  # what a head's width is a multiple of, for every instruction set


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
            return _LIBRARY
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

    def linear_refusal(self, x: Tensor, weight: Tensor) -> str | None:
        if not self._own_products:
            return _LIBRARY
        if x.dtype != torch.float32:
            return f"its products are made in float32, not {x.dtype}"
        return None if weight.stride(1) == 1 and weight.shape[1] else "a weight's rows are not contiguous"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, accumulate: bool) -> None:
        if y.numel() == 0:
            return
        # Bound to names: a temporary would be freed before the kernel reads it.
        x = x if x.stride(1) == 1 else x.contiguous()
        bias = None if bias is None else bias.float().contiguous()
        layer = Linear(
            M=y.shape[0],
            N=y.shape[1],
            K=x.shape[1],
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            y=y.data_ptr(),
            x_stride=x.stride(0),
            weight_stride=weight.stride(0),
            y_stride=y.stride(0),
            dtype=DTYPES[weight.dtype],
            accumulate=accumulate,
        )
        check(self._library.auxkern_linear_forward(layer, self._execution()))

    def attention_refusal(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
        if not self._own_products:
            return _LIBRARY
        if any(t.dtype != torch.float32 or t.stride(-1) != 1 for t in (query, key, value)):
            return "it takes float32 with rows that are contiguous"
        if 0 in (query.shape[1], query.shape[3]) or key.shape[2] < query.shape[2]:
            return "there are no heads, or fewer columns than positions"
        if query.shape[-1] % _WIDTH or value.shape[-1] != query.shape[-1]:
            return f"heads have a width of {query.shape[-1]}, which is no multiple of {_WIDTH}"
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
            return "the mask is not one of bools for all heads"
        return None

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, out: Tensor
    ) -> None:
        attention = Attention(
            B=query.shape[0],
            T=query.shape[2],
            P=key.shape[2],
            D=query.shape[3],
            heads=query.shape[1],
            key_heads=key.shape[1],
            query=query.data_ptr(),
            query_strides=query.stride()[:3],
            key=key.data_ptr(),
            key_strides=key.stride()[:3],
            value=value.data_ptr(),
            value_strides=value.stride()[:3],
            scale=scale,
            out=out.data_ptr(),
        )
        if mask is not None:
            attention.mask, attention.mask_strides = mask.data_ptr(), _mask_strides(mask, query, key)
        check(self._library.auxkern_attention_forward(attention, self._execution()))

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


def _mask_strides(mask: Tensor, query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """Of sequence, position and column; 0 where one entry stands for all."""
    sizes = (query.shape[0], query.shape[2], key.shape[2])
    places = (0, 2, 3)
    strides = [mask.stride(i) if mask.shape[i] == size else 0 for i, size in zip(places, sizes, strict=True)]
    return strides[0], strides[1], strides[2]


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
