"""One rank's part of a sum whose vocabulary is cut: what its ids add up to, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from auxkern.core.loss import RowSlopes, row_dtype
from auxkern.ops import head_chunks, head_segments, logit_chunks
from auxkern.ops.library import loaded
from auxkern.ops.linear_cross_entropy import head_inputs, segment_inputs
from auxkern.ops.parallel.vocabulary import VocabularyShard, local_ids, own_entries
from auxkern.ops.parts import HEAD, HEAD_WITH_BIAS, LOGITS, SPARSE, TENSORS, Part, empty, flat_parts
from auxkern.ops.registry import Rows

IGNORED = -100  # a target that is ignored; those of this rank count from 0


@dataclass(frozen=True)
class Share:
    """The terms of a sum on one rank, but for their tensors.

    The tensors are those of ``parts.flat_inputs``: logits, weights and biases of this rank's ids; hidden
    states and sparse terms as all ranks have them, with ids from 0 to V.

    Attributes:
        kinds, scales, softcaps: of each term, as ``parts.flat_inputs`` gives them.
        shard: of this rank.
        size: ids of this rank that count.
        chunk_rows: rows whose logits exist at a time, with heads; None for the default.
        backend: its name.
    """

    kinds: list[int]
    scales: list[float]
    softcaps: list[float]
    shard: VocabularyShard
    size: int
    chunk_rows: int | None
    backend: str

    def terms(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Share, Sequence[Tensor]]]:
        """Each term as a sum of its own, and its tensors; in float64 if the whole sum is."""
        double = row_dtype(tensors) == torch.float64
        places = zip(self._firsts(), self.kinds, self.scales, self.softcaps, strict=True)
        for first, kind, scale, softcap in places:
            own = list(tensors[first : first + TENSORS[kind]])
            if double:
                own = [t.double() if t.is_floating_point() else t for t in own]
            yield replace(self, kinds=[kind], scales=[scale], softcaps=[softcap]), own

    def is_whole(self, index: int) -> bool:
        """Whether tensor ``index`` is the same on all ranks, so that its gradient is a sum over them."""
        first, kind = max(pair for pair in zip(self._firsts(), self.kinds, strict=True) if pair[0] <= index)
        return kind == SPARSE or (kind != LOGITS and index == first)

    def _firsts(self) -> list[int]:
        """Where the tensors of each term begin."""
        return [0, *accumulate(TENSORS[kind] for kind in self.kinds)][:-1]

    def _sparse(self) -> list[int]:
        """Where the tensors of sparse terms begin."""
        return [first for first, kind in zip(self._firsts(), self.kinds, strict=True) if kind == SPARSE]

    def rows(self, tensors: Sequence[Tensor], target: Tensor, want_smooth: bool, want_argmax: bool) -> Rows:
        """What this rank's ids add up to in each row; ``argmax`` counts from its first id.

        Args:
            target: (N,) ids from this rank's first one, ``NO_TARGET`` or ``IGNORED``.
        """
        kernel, parts = self._parts(tensors)
        V = self.size
        if not target.numel():
            return _collected([], 0, want_smooth, want_argmax, row_dtype(tensors), target)
        if all(kind == LOGITS for kind in self.kinds):
            values = [part.tensors[0] for part in parts]
            found: Rows = kernel.cross_entropy_forward(
                values, target, self.scales, self.softcaps, V, IGNORED, want_smooth, want_argmax
            )
            return found
        # Ways ask for smoothing by its amount; without gradients any will do.
        options = (V, IGNORED, 0.5 if want_smooth else 0.0, 0.0, want_argmax)
        heads = head_inputs(kernel, parts, {})
        segments = None if want_smooth or want_argmax or heads else segment_inputs(kernel, parts, {})
        if heads:
            chunks = self._chunks(target, head_chunks.chunk_rows(V, [head.head for head in heads]))
            made = head_chunks.rows_and_gradients(kernel, heads, target, None, chunks, *options)
        elif segments:
            chunks = self._chunks(target, head_segments.chunk_rows(V))
            made = segments.rows_and_gradients(target, None, chunks, V, 0.0, target.new_empty(0).float())
        else:
            chunks = self._chunks(target, None)
            dtype = row_dtype(tensors)
            made = logit_chunks.rows_and_gradients(kernel, parts, target, None, chunks, *options, dtype, {})
        return _collected(made, len(target), want_smooth, want_argmax, row_dtype(tensors), target)

    def gradients(
        self, tensors: Sequence[Tensor], target: Tensor, slopes: RowSlopes, wanted: Sequence[int]
    ) -> dict[int, Tensor]:
        """Gradients of the tensors in ``wanted``; of hidden states and sparse values this rank's part.

        Args:
            target: as in ``rows``.
            slopes: of the rows, from what all ids add up to.
        """
        kernel, parts = self._parts(tensors)
        V, dtype = self.size, row_dtype(tensors)
        if all(kind == LOGITS for kind in self.kinds) and target.numel():
            values = [part.tensors[0] for part in parts]
            coefficients = slopes.coefficients(dtype)
            dz = kernel.cross_entropy_backward(
                values, target, *coefficients, self.scales, self.softcaps, V, list(wanted)
            )
            return dict(zip(wanted, dz, strict=True))
        gradients = _zeros(parts, wanted, dtype)
        heads = head_inputs(kernel, parts, gradients)
        segments = None if heads or slopes.label_smoothing else segment_inputs(kernel, parts, gradients)
        if heads:
            chunks = self._chunks(target, head_chunks.chunk_rows(V, [head.head for head in heads]))
            head_chunks.add_gradients(kernel, heads, target, slopes, chunks, V)
        elif segments:
            chunks = self._chunks(target, head_segments.chunk_rows(V))
            longest = max((target[rows].shape[0] for rows in chunks), default=0)
            e = empty(torch.Size((kernel.segments_e_size(longest, V),)), torch.float32, target.device)
            segments.add_gradients(target, slopes, chunks, V, e)
        else:
            chunks = self._chunks(target, None)
            logit_chunks.add_gradients(
                kernel, parts, target, slopes.coefficients(dtype), chunks, V, gradients
            )
        self._mask_foreign_entries(tensors, gradients)
        return gradients

    def _parts(self, tensors: Sequence[Tensor]) -> tuple[Any, list[Part]]:
        """The backend, and the terms with this rank's ids; entries of other ranks add 0 to its first."""
        local = list(tensors)
        for first in self._sparse():
            local[first], local[first + 1] = own_entries(tensors[first], tensors[first + 1], self.shard)
        kernel = loaded(self.backend, [t for t in tensors if t.is_floating_point()])
        return kernel, flat_parts(local, self.kinds, self.scales, self.softcaps)

    def _mask_foreign_entries(self, tensors: Sequence[Tensor], gradients: dict[int, Tensor]) -> None:
        for first in self._sparse():
            if first + 1 in gradients:
                here, _ = local_ids(tensors[first], self.shard)
                gradient = gradients[first + 1]
                gradients[first + 1] = torch.where(here.view(gradient.shape), gradient, 0.0)

    def _chunks(self, target: Tensor, size: int | None) -> list[Any]:
        """``logit_chunks.chunks_of_rows`` of the size asked for, the way's own, or the buffers'."""
        C = self.chunk_rows or size or logit_chunks.default_chunk_rows(self.size, target.device)
        return logit_chunks.chunks_of_rows(target, IGNORED, C)


def _collected(
    made: list[tuple[Any, Rows]],
    N: int,
    want_smooth: bool,
    want_argmax: bool,
    dtype: torch.dtype,
    target: Tensor,
) -> Rows:
    """Rows of all N, from those of chunks; 0 (argmax -1) where no chunk has a row."""

    def zeros(n: int) -> Tensor:
        return target.new_zeros(n, dtype=dtype)

    argmax = target.new_full((N if want_argmax else 0,), -1)
    rows = Rows(zeros(N), zeros(N), zeros(N), zeros(N if want_smooth else 0), argmax, zeros(0).view(0, 0))
    for chunk, found in made:
        rows.nll[chunk] = found.nll.to(dtype)
        rows.row_max[chunk] = found.row_max.to(dtype)
        rows.log_sum[chunk] = found.log_sum.to(dtype)
        if want_smooth:
            rows.smooth[chunk] = found.smooth.to(dtype)
        if want_argmax:
            rows.argmax[chunk] = found.argmax
    return rows


def _zeros(parts: Sequence[Part], wanted: Sequence[int], dtype: torch.dtype) -> dict[int, Tensor]:
    """Where gradients are collected: of logits in their dtype, of all else in the rows'."""
    gradients = {}
    for part in parts:
        for i, tensor in enumerate(part.tensors):
            if part.first + i not in wanted:
                continue
            whole = part.kind in (HEAD, HEAD_WITH_BIAS) and i > 0
            shape = tensor.shape if whole else torch.Size((tensor.shape[:-1].numel(), tensor.shape[-1]))
            own = tensor.dtype if part.kind == LOGITS else dtype
            gradients[part.first + i] = empty(shape, own, tensor.device).zero_()
    return gradients
