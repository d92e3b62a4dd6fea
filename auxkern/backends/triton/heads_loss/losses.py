"""Losses and gradients of sums of output heads: rows by chunks, gradients by products.

Kernels leave, of each chunk of C rows, the gradient of the heads' products for one unit of each
row's loss. It lies in [-1, 1], whatever the loss is multiplied by, so that 16 bits hold it; what it
has to be multiplied by stays in float32 until the products with hidden states and weights are done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auxkern.backends.triton.heads import HeadsSum, heads_sum
from auxkern.backends.triton.heads_loss import launches, products
from auxkern.backends.triton.launch import TritonKernels
from auxkern.core.loss import Coefficients, Loss, RowLosses, RowSlopes
from auxkern.core.sums import Rows, Sum, Wanted, chunks_of_rows, clear

_MAX_HEADS = 4
_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True)
class _ProductGradients:
    """The gradient of a sum of heads with respect to their products, for one unit of each row's loss.

    d row[n] / d (hidden[n] @ weight[v] + bias[v]) of a head is ``scale * unit[n] * dz[i][n, v] / magnified``,
    where the scale may be the row's own.
    """

    dz: list[Tensor]  # of each head in question (C, V), 16-bit or float32; one tensor may stand for more
    unit: Tensor  # (C,) float32, finite; 1 without z-loss
    magnified: float  # a power of 2 that keeps the products above underflow


class HeadsLoss(TritonKernels):
    """Sums of nothing but heads, whose logits are made tile by tile and never held as a whole."""

    heads_way = "tiles"

    def heads_refusal(self, sum: Sum) -> str | None:
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
        asking = [i for i, gradients in enumerate(wanted) if gradients]
        present = target != loss.ignore_index
        if weight is None or not asking:
            # Nothing has V columns: as many rows as where that has 16 bits.
            for rows in chunks_of_rows(present, sum.chunk_rows or _chunk_rows(sum.V, torch.float16)):
                tiles = heads_sum(sum.rows(rows).heads, sum.V, loss.stats)
                losses, _, kernels = launches.forward(tiles, target[rows].contiguous(), loss, None)
                self.run(kernels, target.device)
                result.store(rows, losses.summed())
            return result
        gradients, dtype = (
            _HeadGradients.of(sum, wanted, asking, weight),
            launches.gradient_dtype(sum, wanted),
        )
        for rows in chunks_of_rows(present, sum.chunk_rows or _chunk_rows(sum.V, dtype)):
            some, y, factor = sum.rows(rows), target[rows].contiguous(), weight[rows]
            counts = (y != loss.ignore_index) & (factor != 0)
            losses, of_products = self._with_products(some, y, counts, loss, asking, dtype)
            result.store(rows, losses)
            gradients.add(some, rows, of_products, torch.where(counts, factor, 0.0))
        gradients.rescale()
        return result

    def heads_gradients(self, sum: Sum, target: Tensor, slopes: RowSlopes, wanted: Wanted) -> None:
        clear(wanted)
        asking = [i for i, gradients in enumerate(wanted) if gradients]
        weight = torch.where(slopes.counts, slopes.g, 0.0).float()
        gradients = _HeadGradients.of(sum, wanted, asking, weight)
        dtype = launches.gradient_dtype(sum, wanted)
        for rows in chunks_of_rows(slopes.counts, sum.chunk_rows or _chunk_rows(sum.V, dtype)):
            some, factor = sum.rows(rows), weight[rows]
            counts = slopes.counts[rows] & (factor != 0)
            tiles, y = heads_sum(some.heads, sum.V, False), target[rows].contiguous()
            of_products = self._made_again(tiles, y, slopes.rows(rows, counts), asking, dtype)
            gradients.add(some, rows, of_products, torch.where(counts, factor, 0.0))
        gradients.rescale()

    def _with_products(
        self, sum: Sum, target: Tensor, counts: Tensor, loss: Loss, asking: list[int], dtype: torch.dtype
    ) -> tuple[RowLosses, _ProductGradients]:
        """The rows of a chunk, and the gradients of the products of the heads in ``asking``.

        Args:
            counts: (C,) bool: not ignored, and of a weight that is not 0.
            dtype: of those gradients.
        """
        tiles = heads_sum(sum.heads, sum.V, loss.stats)
        e = tiles.buffer(launches.e_dtype(dtype)) if launches.one_write(tiles, asking) else None
        losses, tops, kernels = launches.forward(tiles, target, loss, e)
        self.run(kernels, target.device)
        slopes = RowSlopes(losses.nll, losses.sums, counts, loss, sum.V)
        if e is None:
            return losses.summed(), self._made_again(tiles, target, slopes, asking, dtype)
        magnified = launches.MAGNIFIED[dtype]
        coefficients, unit = _unit_coefficients(slopes, magnified)
        d, launch = launches.scale(tiles, target, e, tops, coefficients, dtype)
        self.run([launch], target.device)
        return losses.summed(), _ProductGradients([d] * len(asking), unit, magnified)

    def _made_again(
        self, tiles: HeadsSum, target: Tensor, slopes: RowSlopes, asking: list[int], dtype: torch.dtype
    ) -> _ProductGradients:
        """Gradients of the heads' products, from their hidden states."""
        magnified = launches.MAGNIFIED[dtype]
        coefficients, unit = _unit_coefficients(slopes, magnified)
        groups = [tiles.slope_of(i) for i in asking]
        distinct = list(dict.fromkeys(groups))
        gradients, launch = launches.gradient(tiles, target, coefficients, distinct, dtype)
        self.run([launch], target.device)
        return _ProductGradients([gradients[distinct.index(group)] for group in groups], unit, magnified)


def _chunk_rows(V: int, dtype: torch.dtype) -> int:
    """Rows whose (C, V) gradient of this dtype takes about 512 MiB, 64 at least."""
    return max(64, _CHUNK_BYTES // (dtype.itemsize * V) // 64 * 64)


def _unit_coefficients(slopes: RowSlopes, magnified: float) -> tuple[Coefficients, Tensor]:
    """Coefficients of a dz that fits a 16-bit number, and the (C,) factor that it is short of.

    ``slopes.g`` is not looked at: it comes in when the products with hidden states and weights are done.
    """
    lse = slopes.sums.row_max + slopes.sums.log_sum
    steepness = (1.0 + (2 * slopes.loss.z_loss * lse).abs()).float()
    # A row that is NaN says so in dz; its factor is finite, lest it spoil the other rows.
    steepness = torch.where(steepness.isfinite(), steepness, 1.0)
    return replace(slopes, g=magnified / steepness).coefficients(torch.float32), steepness


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
        alike = _largest(weight)
        scales = [sum.heads[i].scale for i in asking]
        largest = [_largest(weight * s) if isinstance(s, Tensor) else alike for s in scales]
        return cls(wanted, asking, largest)

    def add(self, sum: Sum, rows: Rows, gradients: _ProductGradients, weight: Tensor) -> None:
        """Bring the gradients of a chunk's products to the heads' inputs, for rows of this weight (C,)."""
        for i, dz, largest in zip(self.asking, gradients.dz, self.largest, strict=True):
            head = sum.heads[i]
            rows_own = isinstance(head.scale, Tensor)
            its = weight * head.scale if rows_own else weight
            # Largest of all rows 1 if the loss has no z-loss: exact in 16 bits where rows weigh the same.
            share = torch.where(weight != 0, its / largest * gradients.unit, 0.0)
            factor = (1.0 if rows_own else float(head.scale)) / gradients.magnified
            if "hidden" in self.wanted[i]:
                d_hidden = self.wanted[i]["hidden"]
                back = products.times(dz, head.weight[: sum.V], head.hidden.dtype)
                back *= (share * largest * factor)[:, None]
                d_hidden[rows] = back.to(d_hidden.dtype)
            if "weight" in self.wanted[i]:
                d_weight, dtype = self.wanted[i]["weight"][: sum.V], head.weight.dtype
                products.add_transposed(d_weight, dz, head.hidden, share, factor, dtype)
            if "bias" in self.wanted[i]:
                products.add_columns(self.wanted[i]["bias"][: sum.V], dz, share, factor)

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
