"""Sums of output heads and sparse terms on a CPU: native products by segments of the vocabulary.

For each chunk of C rows the kernel keeps e = exp(z - reference), once, together with what every
segment adds up to. The rows' losses and what e has to be multiplied by follow from these sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auxkern.backends.chunked import RowKernels
from auxkern.backends.cpu.abi import (
    DTYPES,
    CEntries,
    CHead,
    CHeadRows,
    CHeadsGradient,
    Native,
    address,
    float32,
)
from auxkern.core.backend import Route
from auxkern.core.loss import Coefficients, Loss, RowLosses, RowSlopes
from auxkern.core.sums import Rows, Sum, Wanted, chunks_of_rows, clear, empty
from auxkern.core.terms import Head, Sparse

IDS = 1024  # of a segment: AUXKERN_HEADS_IDS
MAX_HEADS = 8
_GRANULE = 16  # of the rows' stride
_CHUNK_BYTES = 16 << 20
# Fewer rows would wait for weights to come from memory; the hidden states of more do not fit a cache.
_FEWEST_ROWS, _MOST_ROWS = 64, 512


@dataclass(frozen=True)
class _Entries:
    """Sparse values of some rows by rising id; of equal ids, in the order given."""

    ids: Tensor  # (E,) int64
    rows: Tensor  # (E,) int64
    values: Tensor  # (E,) float32, contiguous
    order: Tensor  # (E,) their places in the order given


@dataclass(frozen=True)
class _Kept:
    """What the forward kernel leaves of C rows, and what the backward kernel reads again; S segments."""

    heads: Array[CHead]
    rows: CHeadRows
    sum: Sum
    target: Tensor  # (C,) int64
    entries: _Entries
    maximum: Tensor  # (S, C) float32, close to the segment's maximum
    total: Tensor  # (S, C) float32, sum of exp(z - maximum) over all ids but the target
    z_target: Tensor  # (C,) float32; -inf without a target
    back: list[Tensor | None]  # of each head (S, D, stride), where d_hidden is wanted
    tensors: list[Tensor]  # whose memory the structures point to

    def losses(self) -> RowLosses:
        """In float64 from the segments' sums; the target apart, so that 1 - p does not cancel."""
        z_target, maximum = self.z_target.double(), self.maximum.double()
        row_max = torch.maximum(maximum.amax(0), z_target)
        nothing = row_max == -torch.inf
        others = (self.total.double() * (maximum - row_max.masked_fill(nothing, 0)).exp()).sum(0)
        gap = (row_max - z_target).masked_fill(nothing, torch.inf)
        log_sum = torch.where(gap == 0, others.log1p(), (others + (-gap).exp()).log())
        none = z_target.new_empty(0)
        return RowLosses(
            gap + log_sum, row_max, log_sum, none, none.long(), none.view(0, 0), row_max + log_sum
        )


class Segments(Native, RowKernels):
    """Losses and gradients of heads and sparse terms, their logits never written."""

    def route(self, sum: Sum, loss: Loss) -> Route:
        if sum.is_logits:
            return super().route(sum, loss)
        reason = self._segments_refusal(sum, loss)
        if reason is None:
            return Route("segments", fused=True, rescales=True)
        return replace(super().route(sum, loss), refusals={"segments": reason})

    def _segments_refusal(self, sum: Sum, loss: Loss) -> str | None:
        """Why no kernel takes this sum; None if one does."""
        heads = sum.heads
        if self.products_refusal is not None:
            return self.products_refusal
        if loss.stats or loss.smooth:
            option = "return_stats" if loss.stats else "label_smoothing"
            return f"{option} needs the logits themselves"
        if sum.logits:
            return "there are logits beside the heads"
        if any(head.packed is not None for head in heads):
            return "a head's weight is packed, whose product gives whole logits"
        if not heads:
            return "there are no heads"
        if len(heads) > MAX_HEADS:
            return f"there are {len(heads)} heads; kernels take {MAX_HEADS} at most"
        for head in heads:
            if head.softcap:
                return "a soft cap needs each head's logits apart"
            if head.weight.stride(1) != 1 or head.weight.shape[1] == 0:
                return "a weight's rows are not contiguous"
            if head.hidden.dtype not in DTYPES or head.weight.dtype not in DTYPES:
                return f"there are no kernels for {head.hidden.dtype} and {head.weight.dtype}"
        return None

    def losses(
        self, sum: Sum, target: Tensor, loss: Loss, weight: Tensor | None, wanted: Wanted
    ) -> RowLosses:
        if sum.is_logits or self._segments_refusal(sum, loss):
            return super().losses(sum, target, loss, weight, wanted)
        weight = weight if any(wanted) else None
        result = RowLosses.empty(target, torch.float32, len(sum.terms), loss).cleared()
        chunks = chunks_of_rows(target != loss.ignore_index, sum.chunk_rows or _chunk_rows(sum.V))
        # The first chunk writes the gradients of weights, later ones add.
        clear(wanted, sum.V if chunks else 0)
        e = None if weight is None else _exponentials(target, chunks, sum.V)
        wanted = [{}] * len(sum.terms) if weight is None else wanted
        for number, rows in enumerate(chunks):
            factor = None if weight is None else weight[rows]
            live = None if factor is None or bool(factor.all()) else factor != 0
            kept = self._forward(sum.rows(rows), target[rows].contiguous(), live, wanted, e)
            losses = kept.losses()
            result.store(rows, losses)
            if factor is not None:
                counts = torch.ones_like(factor, dtype=torch.bool) if live is None else live
                slopes = RowSlopes(factor.double(), losses.sums, counts, loss, sum.V)
                self._backward(kept, slopes.coefficients(torch.float64), rows, wanted, number > 0)
            del kept  # before the next chunk's is made
        return result

    def gradients(self, sum: Sum, target: Tensor, slopes: RowSlopes, wanted: Wanted) -> None:
        if sum.is_logits or self._segments_refusal(sum, slopes.loss.without_stats):
            super().gradients(sum, target, slopes, wanted)
            return
        chunks = chunks_of_rows(slopes.counts, sum.chunk_rows or _chunk_rows(sum.V))
        clear(wanted)
        coefficients = slopes.coefficients(torch.float64)
        e = _exponentials(target, chunks, sum.V)
        for rows in chunks:
            live = (slopes.counts & (slopes.g != 0))[rows]
            some, y = sum.rows(rows), target[rows].contiguous()
            kept = self._forward(some, y, None if bool(live.all()) else live, wanted, e)
            self._backward(kept, Coefficients(*[c[rows] for c in coefficients]), rows, wanted, True)
            del kept  # before the next chunk's is made

    def _forward(
        self, sum: Sum, target: Tensor, live: Tensor | None, wanted: Wanted, e: Tensor | None
    ) -> _Kept:
        """What the segments of C rows add up to.

        Args:
            live: (C,) bool: False where the gradient is 0 whatever the row holds.
            wanted: says which heads want the gradient of their hidden states.
            e: float32 memory for the exponentials, kept until the gradients are made.
        """
        C, V, heads = target.shape[0], sum.V, sum.heads
        S, stride = -(-V // IDS), _stride(C)
        maximum, total, z_target = float32(S, stride), float32(S, stride), float32(C).fill_(-torch.inf)
        by_id, order = target.sort(stable=True)
        elsewhere = int(torch.searchsorted(by_id, 0))  # NO_TARGET comes first
        by_id, order = by_id[elsewhere:], order[elsewhere:]
        entries = _entries(sum)
        tensors = [by_id, order, maximum, total, *(t for t in (live, e) if t is not None)]
        back = [
            float32(S, term.hidden.shape[1], stride) if "hidden" in gradients else None
            for term, gradients in zip(sum.terms, wanted, strict=True)
            if isinstance(term, Head)
        ]
        listed = (CHead * len(heads))()
        for head, c_head, its in zip(heads, listed, back, strict=True):
            hidden = head.hidden.float().contiguous()
            bias = None if head.bias is None else head.bias[:V].float().contiguous()
            tensors += [hidden] if bias is None else [hidden, bias]
            c_head.hidden, c_head.weight = hidden.data_ptr(), head.weight.data_ptr()
            c_head.bias, c_head.back = address(bias), address(its)
            c_head.weight_stride, c_head.D = head.weight.stride(0), head.weight.shape[1]
            c_head.dtype, c_head.scale = DTYPES[head.weight.dtype], head.scale
        rows = CHeadRows(C=C, stride=stride)
        rows.targets = CEntries(by_id.numel(), by_id.data_ptr(), order.data_ptr())
        rows.sparse = CEntries(entries.ids.numel(), entries.ids.data_ptr(), entries.rows.data_ptr())
        rows.values, rows.live, rows.e = entries.values.data_ptr(), address(live), address(e)
        rows.segment_max, rows.segment_sum = maximum.data_ptr(), total.data_ptr()
        rows.z_target = z_target.data_ptr()
        self.library.auxkern_heads_forward(listed, len(listed), rows, V, self.execution())
        sums = (maximum[:, :C], total[:, :C], z_target)
        return _Kept(listed, rows, sum, target, entries, *sums, back, tensors)

    def _backward(
        self, kept: _Kept, coefficients: Coefficients, rows: Rows, wanted: Wanted, accumulate: bool
    ) -> None:
        """Bring the gradients of a chunk to its inputs.

        Args:
            coefficients: of the chunk's rows, float64.
            rows: those of the chunk.
            accumulate: add to what the weights' and biases' gradients hold.
        """
        C, stride, terms = kept.rows.C, kept.rows.stride, kept.sum.terms
        of_heads = [its for term, its in zip(terms, wanted, strict=True) if isinstance(term, Head)]
        of_sparse = [its for term, its in zip(terms, wanted, strict=True) if isinstance(term, Sparse)]
        coefficient = float32(kept.maximum.shape[0], stride)
        coefficient[:, C:] = 0
        # A row without gradient may hold NaN, and NaN times 0 is not 0.
        factor = coefficients.exp_coefficient
        shares = factor * (kept.maximum.double() - coefficients.row_max).exp()
        coefficient[:, :C] = torch.where(factor == 0, 0.0, shares)
        at_target = coefficients.target_gradient.float()
        d_values = float32(kept.rows.sparse.count) if any(of_sparse) else None
        for c_head, gradients in zip(kept.heads, of_heads, strict=True):
            c_head.d_weight, c_head.d_bias = address(gradients.get("weight")), address(gradients.get("bias"))
        request = CHeadsGradient(coefficient.data_ptr(), at_target.data_ptr(), address(d_values), accumulate)
        if d_values is not None or any("weight" in its or "bias" in its for its in of_heads):
            self.library.auxkern_heads_backward(
                kept.heads, len(kept.heads), kept.rows, kept.sum.V, request, self.execution()
            )
        for head, back, gradients in zip(kept.sum.heads, kept.back, of_heads, strict=True):
            if back is not None:
                d_hidden = _d_hidden(kept, head, back, coefficient, at_target)
                gradients["hidden"][rows] = d_hidden.to(gradients["hidden"].dtype)
        if d_values is not None:
            _store_values(kept, d_values, rows, of_sparse)


def _chunk_rows(V: int) -> int:
    """Rows whose (C, V) float32 exponentials take at most 16 MiB, but from 64 to 512, in steps of 64."""
    fitting = _CHUNK_BYTES // (4 * V) // _FEWEST_ROWS * _FEWEST_ROWS
    return min(_MOST_ROWS, max(_FEWEST_ROWS, fitting))


def _stride(C: int) -> int:
    return -(-C // _GRANULE) * _GRANULE


def _exponentials(target: Tensor, chunks: Sequence[Rows], V: int) -> Tensor:
    """Float32 memory for the (V, stride) exponentials of the longest chunk."""
    longest = max((target[rows].shape[0] for rows in chunks), default=0)
    return empty(torch.Size((V * _stride(longest),)), torch.float32, target.device)


def _entries(sum: Sum) -> _Entries:
    if not sum.sparse:
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        return _Entries(none, none, float32(0), none)
    ids, values = sum.entries()
    by_id, order = ids.reshape(-1).sort(stable=True)
    return _Entries(by_id, order // ids.shape[1], values.reshape(-1)[order].contiguous(), order)


def _store_values(kept: _Kept, d_values: Tensor, rows: Rows, wanted: Wanted) -> None:
    """Bring (E,) gradients by rising id to the sparse terms' values."""
    unsorted = torch.empty_like(d_values)
    unsorted[kept.entries.order] = d_values
    widths = [term.ids.shape[1] for term in kept.sum.sparse]
    parts = unsorted.view(-1, sum(widths)).split(widths, 1)
    for gradients, part in zip(wanted, parts, strict=True):
        if gradients:
            gradients["values"][rows] = part.to(gradients["values"].dtype)


def _d_hidden(kept: _Kept, head: Head, back: Tensor, coefficient: Tensor, at_target: Tensor) -> Tensor:
    """(C, D): the segments' shares, and the target's."""
    total = back[0] * coefficient[0]
    for share, factor in zip(back[1:], coefficient[1:], strict=True):
        total.addcmul_(share, factor)
    d_hidden, weight = total[:, : kept.rows.C].T, head.weight
    if kept.rows.targets.count < kept.rows.C:
        here = (kept.target >= 0).nonzero()[:, 0]
        d_hidden = d_hidden.contiguous()
        d_hidden[here] += at_target[here, None] * weight[kept.target[here]].float()
    else:
        d_hidden = d_hidden.addcmul(at_target[:, None], weight[kept.target].float())
    return d_hidden.mul_(head.scale)
