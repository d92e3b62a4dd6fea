"""Losses and gradients of sums of output heads: rows by chunks, gradients by products.

Kernels leave, of each chunk of C rows, the gradient of the heads' products for one unit of each
row's loss. It lies in [-1, 1], whatever the loss is multiplied by, so that 16 bits hold it; what it
has to be multiplied by stays in float32 until the products with hidden states and weights are done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auxkern.backends.triton.entries import launches as entry_launches
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.heads import HeadsSum, heads_sum
from auxkern.backends.triton.heads_loss import launches, products
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.running import TritonKernels
from auxkern.core.loss import Coefficients, Loss, RowLosses, RowSlopes
from auxkern.core.sums import Rows, Sum, Wanted, chunks_of_rows, clear
from auxkern.core.terms import Head, Sparse

_MAX_HEADS = 4
_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True)
class _Unit:
    """dz for one unit of each row's loss, which fits a 16-bit number.

    d row[n] / d z[n, v] is ``size[n] * dz[n, v] / magnified``.

    Attributes:
        coefficients: of dz.
        size: (C,) float32, finite; 1 without z-loss.
        magnified: a power of 2 that keeps products of dz above underflow.
    """

    coefficients: Coefficients
    size: Tensor
    magnified: float

    @classmethod
    def of(cls, slopes: RowSlopes, dtype: torch.dtype) -> _Unit:
        """For a dz of this dtype.

        ``slopes.g`` is not looked at: it comes in when the products with hidden states and weights are done.
        """
        magnified = launches.MAGNIFIED[dtype]
        lse = slopes.sums.row_max + slopes.sums.log_sum
        steepness = (1.0 + (2 * slopes.loss.z_loss * lse).abs()).float()
        # A row that is NaN says so in dz; its factor is finite, lest it spoil the other rows.
        steepness = torch.where(steepness.isfinite(), steepness, 1.0)
        return cls(replace(slopes, g=magnified / steepness).coefficients(torch.float32), steepness, magnified)


@dataclass(frozen=True)
class _Asked:
    """The gradients that are wanted of a sum, at least one.

    Attributes:
        heads: places among the heads of those that want any.
        sparse: of each sparse term, as a backend's ``wanted``.
        gradients: of the heads.
        dtype: of dz.
    """

    heads: list[int]
    sparse: Wanted
    gradients: _HeadGradients
    dtype: torch.dtype

    @classmethod
    def of(cls, sum: Sum, wanted: Wanted, weight: Tensor) -> _Asked | None:
        """Of all rows, of this weight (N,); None if nothing is wanted."""
        if not any(wanted):
            return None
        of_heads = [its for term, its in zip(sum.terms, wanted, strict=True) if isinstance(term, Head)]
        of_sparse = [its for term, its in zip(sum.terms, wanted, strict=True) if isinstance(term, Sparse)]
        heads = [i for i, its in enumerate(of_heads) if its]
        # Nothing has V columns without a dz: as many rows as where that has 16 bits.
        dtype = launches.gradient_dtype(sum, of_heads) if heads else torch.float16
        return cls(heads, of_sparse, _HeadGradients.of(sum, of_heads, heads, weight), dtype)


@dataclass(frozen=True)
class _Chunk:
    """Some rows of a sum as kernels take them.

    Attributes:
        sum: of the C rows.
        tiles: its heads.
        added: its sparse terms.
        target: (C,), contiguous.
    """

    sum: Sum
    tiles: HeadsSum
    added: launches.AddedEntries
    target: Tensor

    @classmethod
    def of(
        cls, sum: Sum, target: Tensor, loss: Loss, asked: _Asked | None, gpu: Gpu
    ) -> tuple[_Chunk, list[Launch]]:
        """The chunk, and the launches that come before its tiles."""
        adds = any(term.ids.shape[1] for term in sum.sparse)
        precision, crowded = gpu.float32_products, loss.smooth or adds
        tiles = heads_sum(sum.heads, sum.V, loss.stats, precision, crowded=crowded, choices=gpu.configs)
        if not adds:
            return cls(sum, tiles, launches.NOTHING_ADDED, target), []
        entries, launch = entry_launches.order(sum, tiles.tiles, tiles.config.ids, gpu.configs)
        store = asked is not None and any(asked.sparse)
        return cls(sum, tiles, launches.AddedEntries(entries, store), target), [launch]

    def buffer(self, asked: _Asked) -> Tensor | None:
        """Memory for e where dz is made of that."""
        if not asked.heads or not launches.one_write(self.tiles, asked.heads):
            return None
        return self.tiles.buffer(launches.e_dtype(asked.dtype))


class HeadsLoss(TritonKernels):
    """Heads, beside sparse terms or alone, whose logits are made tile by tile and never held as a whole."""

    heads_way, heads_way_adds = "tiles", True

    def heads_refusal(self, sum: Sum) -> str | None:
        """Why kernels cannot take the heads; None if they can.

        No width is left to a library's products: in the model they are ahead by less than it knows
        (``python -m auxkern.inspect.ways``).
        """
        heads = sum.heads
        if len(heads) > _MAX_HEADS:
            return f"there are {len(heads)} heads; kernels take {_MAX_HEADS} at most"
        if any(head.hidden.shape[1] == 0 for head in heads):
            return "a head has hidden states of width 0"
        if self.interpreted and any(torch.bfloat16 in (h.hidden.dtype, h.weight.dtype) for h in heads):
            return "Triton's interpreter multiplies the bits of bfloat16 matrices, not their values"
        return None

    def heads_losses(
        self, sum: Sum, target: Tensor, loss: Loss, weight: Tensor | None, wanted: Wanted
    ) -> RowLosses:
        result = RowLosses.empty(target, torch.float32, len(sum.terms), loss).cleared()
        clear(wanted)
        asked = None if weight is None else _Asked.of(sum, wanted, weight)
        for rows in chunks_of_rows(target != loss.ignore_index, _chunk_of(sum, asked)):
            some, y = sum.rows(rows), target[rows].contiguous()
            chunk, kernels = _Chunk.of(some, y, loss, asked, self.gpu(y.device))
            e = None if asked is None else chunk.buffer(asked)
            losses, tops, forward = launches.forward(chunk.tiles, chunk.target, loss, e, chunk.added)
            self.run([*kernels, *forward], target.device)
            if asked is not None and weight is not None:
                factor = weight[rows]
                counts = (chunk.target != loss.ignore_index) & (factor != 0)
                slopes = RowSlopes(losses.nll, losses.sums, counts, loss, sum.V)
                unit = _Unit.of(slopes, asked.dtype)
                dz = self._product_gradients(chunk, unit, asked, None if e is None else (e, tops))
                self._collect(asked, chunk, rows, unit, dz, torch.where(counts, factor, 0.0))
            losses = losses.summed()
            if loss.stats and sum.sparse:
                losses = losses._replace(term_nll=self._term_nll(chunk, losses.term_nll, loss))
            result.store(rows, losses)
        if asked is not None:
            asked.gradients.rescale()
        return result

    def heads_gradients(self, sum: Sum, target: Tensor, slopes: RowSlopes, wanted: Wanted) -> None:
        clear(wanted)
        weight = torch.where(slopes.counts, slopes.g, 0.0).float()
        asked = _Asked.of(sum, wanted, weight)
        if asked is None:
            return
        for rows in chunks_of_rows(slopes.counts, _chunk_of(sum, asked)):
            some, y = sum.rows(rows), target[rows].contiguous()
            chunk, kernels = _Chunk.of(some, y, slopes.loss, asked, self.gpu(y.device))
            factor = weight[rows]
            counts = slopes.counts[rows] & (factor != 0)
            unit = _Unit.of(slopes.rows(rows, counts), asked.dtype)
            if not asked.heads:
                # Nobody wants a dz, but z at the entries.
                kernels += launches.forward(chunk.tiles, chunk.target, Loss(), None, chunk.added)[2][:1]
            self.run(kernels, target.device)
            dz = self._product_gradients(chunk, unit, asked, None)
            self._collect(asked, chunk, rows, unit, dz, torch.where(counts, factor, 0.0))
        asked.gradients.rescale()

    def _product_gradients(
        self, chunk: _Chunk, unit: _Unit, asked: _Asked, e: tuple[Tensor, Tensor] | None
    ) -> list[Tensor]:
        """dz (C, V) of each head that wants a gradient: one tensor may stand for more.

        Args:
            e: what the forward pass wrote, and the tiles' maxima; None to make z from hidden states again.
        """
        if not asked.heads:
            return []
        if e is not None:
            d, launch = launches.scale(chunk.tiles, chunk.target, *e, unit.coefficients, asked.dtype)
            self.run([launch], d.device)
            return [d] * len(asked.heads)
        groups = [chunk.tiles.slope_of(i) for i in asked.heads]
        distinct = list(dict.fromkeys(groups))
        made, launch = launches.gradient(
            chunk.tiles, chunk.target, unit.coefficients, distinct, asked.dtype, chunk.added
        )
        self.run([launch], chunk.target.device)
        return [made[distinct.index(group)] for group in groups]

    def _collect(
        self, asked: _Asked, chunk: _Chunk, rows: Rows, unit: _Unit, dz: list[Tensor], weight: Tensor
    ) -> None:
        """Bring dz of a chunk to the tensors that want a gradient, for rows of this weight (C,)."""
        asked.gradients.add(chunk.sum, rows, dz, unit, weight)
        if chunk.added.store and chunk.added.entries is not None:
            factor = weight * (unit.size / unit.magnified)
            d, launch = entry_launches.gradient(chunk.added.entries, chunk.target, unit.coefficients, factor)
            self.run([launch], d.device)
            for its, part in zip(
                asked.sparse, d.split([t.ids.shape[1] for t in chunk.sum.sparse], 1), strict=True
            ):
                if its:
                    its["values"][rows] = part.to(its["values"].dtype)

    def _term_nll(self, chunk: _Chunk, of_heads: Tensor, loss: Loss) -> Tensor:
        """(I, C) of all terms, from (heads, C)."""
        heads = iter(of_heads)
        result = []
        for term in chunk.sum.terms:
            if isinstance(term, Sparse):
                nll, kernels = entry_launches.term_nll(
                    term, chunk.sum.V, chunk.target, loss, chunk.tiles.choices
                )
                self.run(kernels, nll.device)
                result.append(nll)
            else:
                result.append(next(heads))
        return torch.stack(result)


def _chunk_of(sum: Sum, asked: _Asked | None) -> int:
    """Rows of a chunk: where nothing has V columns as many as where dz has 16 bits."""
    return sum.chunk_rows or _chunk_rows(sum.V, torch.float16 if asked is None else asked.dtype)


def _chunk_rows(V: int, dtype: torch.dtype) -> int:
    """Rows whose (C, V) gradient of this dtype takes about 512 MiB, 64 at least."""
    return max(64, _CHUNK_BYTES // (dtype.itemsize * V) // 64 * 64)


@dataclass(frozen=True)
class _HeadGradients:
    """Where the gradients of a sum of heads are collected, over its chunks.

    Attributes:
        wanted: of each head.
        asking: the heads that want any.
        largest: of each head in ``asking``, 0-d, of the rows' weights, times the rows' scales where the head
            has these. Gradients of weights and biases are short of it until ``rescale``, so that a row's
            share is exact in 16 bits where rows weigh the same.
    """

    wanted: Wanted
    asking: list[int]
    largest: list[Tensor]

    @classmethod
    def of(cls, sum: Sum, wanted: Wanted, asking: list[int], weight: Tensor) -> _HeadGradients:
        """For rows of this weight (N,)."""
        if not asking:
            return cls(wanted, asking, [])
        alike = _largest(weight)
        scales = [sum.heads[i].scale for i in asking]
        largest = [_largest(weight * s) if isinstance(s, Tensor) else alike for s in scales]
        return cls(wanted, asking, largest)

    def add(self, sum: Sum, rows: Rows, dz: list[Tensor], unit: _Unit, weight: Tensor) -> None:
        """Bring the gradients of a chunk's products to the heads' inputs, for rows of this weight (C,).

        Args:
            dz: (C, V) of each head in ``asking``, 16-bit or float32.
        """
        for i, d, largest in zip(self.asking, dz, self.largest, strict=True):
            head = sum.heads[i]
            rows_own = isinstance(head.scale, Tensor)
            its = weight * head.scale if rows_own else weight
            # Largest of all rows 1 if the loss has no z-loss: exact in 16 bits where rows weigh the same.
            share = torch.where(weight != 0, its / largest * unit.size, 0.0)
            factor = (1.0 if rows_own else float(head.scale)) / unit.magnified
            if "hidden" in self.wanted[i]:
                d_hidden = self.wanted[i]["hidden"]
                back = products.times(d, head.weight[: sum.V], head.hidden.dtype)
                back *= (share * largest * factor)[:, None]
                d_hidden[rows] = back.to(d_hidden.dtype)
            if "weight" in self.wanted[i]:
                d_weight, dtype = self.wanted[i]["weight"][: sum.V], head.weight.dtype
                products.add_transposed(d_weight, d, head.hidden, share, factor, dtype)
            if "bias" in self.wanted[i]:
                products.add_columns(self.wanted[i]["bias"][: sum.V], d, share, factor)

    def rescale(self) -> None:
        """Give gradients of weights and biases the factor that ``add`` left out."""
        for i, largest in zip(self.asking, self.largest, strict=True):
            for name in ("weight", "bias"):
                if name in self.wanted[i]:
                    self.wanted[i][name].mul_(largest)


def _largest(factors: Tensor) -> Tensor:
    """0-d, magnitude of the largest of the rows' factors; 1 if all are 0."""
    largest = factors.abs().amax()
    return torch.where(largest == 0, 1.0, largest)
