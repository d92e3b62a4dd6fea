"""Sums of output heads and sparse terms on a backend that makes their logits by segments of the vocabulary.

For each chunk of C rows the backend keeps e = exp(z - reference), once, together with what every
segment adds up to. The rows' losses and what e has to be multiplied by follow from these sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auxkern.core.loss import RowSlopes, RowSums
from auxkern.ops.head_chunks import HeadInputs
from auxkern.ops.registry import Entries, Rows, SegmentGradients, Segments

_CHUNK_BYTES = 16 << 20
# Fewer rows would wait for weights to come from memory; the hidden states of more do not fit a cache.
_FEWEST_ROWS, _MOST_ROWS = 64, 512


@dataclass(frozen=True)
class SparseInputs:
    """A sparse term of all rows, and where the gradient of its values is collected.

    Attributes:
        ids, values: (N, K), K at least 1.
        d_values: (N, K) of any float dtype, or None where none is wanted.
    """

    ids: Tensor
    values: Tensor
    d_values: Tensor | None


def chunk_rows(V: int) -> int:
    """Rows whose (C, V) float32 exponentials take at most 16 MiB, but from 64 to 512, in steps of 64."""
    fitting = _CHUNK_BYTES // (4 * V) // _FEWEST_ROWS * _FEWEST_ROWS
    return min(_MOST_ROWS, max(_FEWEST_ROWS, fitting))


@dataclass(frozen=True)
class SegmentInputs:
    """The terms, and the ``registry.BackendWithSegments`` that takes them."""

    backend: Any
    heads: Sequence[HeadInputs]
    sparse: Sequence[SparseInputs]

    def rows_and_gradients(
        self,
        target: Tensor,
        row_weight: Tensor | None,
        chunks: Sequence[Any],
        V: int,
        z_loss: float,
        e: Tensor,
    ) -> list[tuple[Any, Rows]]:
        """(rows, what they hold) of each chunk; fills the gradients of the inputs if there is a weight.

        Args:
            target: (N,) int64, those of the chunks in [0, V).
            row_weight: (N,) d loss / d row, float32, or None for no gradients.
            chunks: slices or indices of rows.
            e: float32, ``backend.segments_e_size`` of the longest chunk; not used without a weight.
        """
        found = []
        for number, rows in enumerate(chunks):
            weight = None if row_weight is None else row_weight[rows]
            entries, y = _entries(self.sparse, rows), target[rows].contiguous()
            live = None if weight is None or bool(weight.all()) else weight != 0
            segments = self.backend.segments_forward(
                [head.rows(rows) for head in self.heads],
                entries,
                y,
                live,
                V,
                [weight is not None and head.d_hidden is not None for head in self.heads],
                None if weight is None else e,
            )
            made = _rows(segments)
            found.append((rows, made))
            if weight is not None:
                counts = torch.ones_like(y, dtype=torch.bool) if live is None else live
                sums = RowSums(made.nll, made.row_max, made.log_sum)
                slopes = RowSlopes(weight.double(), sums, counts, 0.0, z_loss, V)
                coefficients = slopes.coefficients(torch.float64)
                self._backward(segments, rows, entries, coefficients, number > 0)
            del segments  # before the next chunk's are made
        return found

    def add_gradients(
        self, target: Tensor, slopes: RowSlopes, chunks: Sequence[Any], V: int, e: Tensor
    ) -> None:
        """Adds to the gradients of the inputs, from what the rows' logits add up to.

        Args:
            target: (N,) int64, those of the chunks in [0, V) or ``NO_TARGET``.
            slopes: without label smoothing.
            e: float32, ``backend.segments_e_size`` of the longest chunk.
        """
        coefficients = slopes.coefficients(torch.float64)
        for rows in chunks:
            entries = _entries(self.sparse, rows)
            live = (slopes.counts & (slopes.g != 0))[rows]
            segments = self.backend.segments_forward(
                [head.rows(rows) for head in self.heads],
                entries,
                target[rows].contiguous(),
                None if bool(live.all()) else live,
                V,
                [head.d_hidden is not None for head in self.heads],
                e,
            )
            self._backward(segments, rows, entries, [c[rows] for c in coefficients], True)
            del segments  # before the next chunk's are made

    def _backward(
        self,
        segments: Segments,
        rows: Any,
        entries: Entries,
        coefficients: Sequence[Tensor],
        accumulate: bool,
    ) -> None:
        row_max, exp_coefficient, _, at_target = coefficients
        gradients = SegmentGradients(
            [head.d_weight for head in self.heads],
            [head.d_bias for head in self.heads],
            want_values=any(s.d_values is not None for s in self.sparse),
            accumulate=accumulate,
        )
        back, d_values = self.backend.segments_backward(
            segments, row_max, exp_coefficient, at_target, gradients
        )
        for head, d_hidden in zip(self.heads, back, strict=True):
            if head.d_hidden is not None:
                head.d_hidden[rows] = d_hidden.to(head.d_hidden.dtype)
        _store_values(self.sparse, rows, entries, d_values)


def _entries(sparse: Sequence[SparseInputs], rows: Any) -> Entries:
    """The sparse terms' entries of some rows by rising id; of equal ids, in the order given."""
    if not sparse:
        none = torch.empty(0, dtype=torch.int64)
        return Entries(none, none, torch.empty(0, dtype=torch.float32), none)
    ids = torch.cat([s.ids[rows].long() for s in sparse], 1)
    values = torch.cat([s.values[rows].float() for s in sparse], 1)
    by_id, order = ids.reshape(-1).sort(stable=True)
    return Entries(by_id, order // ids.shape[1], values.reshape(-1)[order].contiguous(), order)


def _store_values(
    sparse: Sequence[SparseInputs], rows: Any, entries: Entries, d_values: Tensor | None
) -> None:
    if d_values is None:
        return
    unsorted = torch.empty_like(d_values)
    unsorted[entries.order] = d_values
    K = sum(s.ids.shape[1] for s in sparse)
    parts = unsorted.view(-1, K).split([s.ids.shape[1] for s in sparse], 1)
    for term, part in zip(sparse, parts, strict=True):
        if term.d_values is not None:
            term.d_values[rows] = part.to(term.d_values.dtype)


def _rows(segments: Segments) -> Rows:
    """Losses in float64 from the segments' sums; the target apart, so that 1 - p does not cancel."""
    z_target = segments.z_target.double()
    maximum = segments.maximum.double()
    row_max = torch.maximum(maximum.amax(0), z_target)
    empty = row_max == -torch.inf
    others = (segments.total.double() * (maximum - row_max.masked_fill(empty, 0)).exp()).sum(0)
    gap = (row_max - z_target).masked_fill(empty, torch.inf)
    log_sum = torch.where(gap == 0, others.log1p(), (others + (-gap).exp()).log())
    none = z_target.new_empty(0)
    return Rows(gap + log_sum, row_max, log_sum, none, none.long(), none.view(0, 0))
