"""Sums of output heads on a backend that makes their logits itself: rows by chunks, gradients by products.

A backend leaves, of each chunk of C rows, the gradient of the heads' products for one unit of each
row's loss. It lies in [-1, 1], whatever the loss is multiplied by, so that 16 bits hold it; what it
has to be multiplied by stays in float32 until the products with hidden states and weights are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auxkern.core.loss import RowSlopes
from auxkern.ops.registry import HeadGradients, HeadRows, Rows

_CHUNK_BYTES = 512 << 20
_BLOCK_IDS = 8192  # ids of a weight or of a gradient that are converted to float32 at a time


@dataclass(frozen=True)
class HeadInputs:
    """A head of all rows, and where its gradients are collected; None where none is wanted.

    Attributes:
        head: of N rows.
        d_hidden: (N, D) of any float dtype.
        d_weight, d_bias: float32, shaped like the weight and the bias; zeros at the start.
    """

    head: HeadRows
    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None

    @property
    def wanted(self) -> bool:
        """Whether any gradient is."""
        return any(d is not None for d in (self.d_hidden, self.d_weight, self.d_bias))

    def rows(self, rows: Any) -> HeadRows:
        """The head of some rows."""
        head = self.head
        return HeadRows(head.hidden[rows], head.weight, head.bias, head.scale, head.softcap)


def chunk_rows(V: int, heads: Sequence[HeadRows]) -> int:
    """Rows whose (C, V) gradient takes about 512 MiB, 64 at least: 2 bytes a logit, or 4 in float32."""
    half = all(x.dtype.itemsize == 2 for head in heads for x in (head.hidden, head.weight))
    return max(64, _CHUNK_BYTES // ((2 if half else 4) * V) // 64 * 64)


def rows_and_gradients(
    backend: Any,
    inputs: Sequence[HeadInputs],
    target: Tensor,
    row_weight: Tensor | None,
    chunks: Sequence[Any],
    V: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_stats: bool,
) -> list[tuple[Any, Rows]]:
    """(rows, what they hold) of each chunk; fills the gradients of ``inputs`` if there is a weight.

    Args:
        backend: a ``registry.BackendWithHeads`` that takes these heads.
        target: (N,) int64.
        row_weight: (N,) d loss / d row, float32, or None for no gradients.
        chunks: slices or indices of rows.
    """
    wanted = [i for i, head in enumerate(inputs) if head.wanted]
    found = []
    if row_weight is None or not wanted:
        for rows in chunks:
            heads = [head.rows(rows) for head in inputs]
            settings = (V, ignore_index, label_smoothing > 0, want_stats)
            found.append((rows, backend.heads_forward(heads, target[rows].contiguous(), *settings)))
        return found
    largest = row_weight.abs().amax()
    largest = torch.where(largest == 0, 1.0, largest)
    for rows in chunks:
        heads, y, weight = [head.rows(rows) for head in inputs], target[rows].contiguous(), row_weight[rows]
        counts = (y != ignore_index) & (weight != 0)
        made, gradients = backend.heads_forward_gradient(
            heads, y, counts, V, ignore_index, label_smoothing, z_loss, want_stats, wanted
        )
        found.append((rows, made))
        _add_products(inputs, wanted, rows, gradients, torch.where(counts, weight, 0.0), largest)
    _rescale(inputs, largest)
    return found


def add_gradients(
    backend: Any,
    inputs: Sequence[HeadInputs],
    target: Tensor,
    slopes: RowSlopes,
    chunks: Sequence[Any],
    V: int,
) -> None:
    """Fills the gradients of ``inputs`` from what the rows' logits add up to.

    Args:
        backend: a ``registry.BackendWithHeads`` that takes these heads.
        target: (N,) int64 in [0, V), or another id where the row's target is none of these.
    """
    wanted = [i for i, head in enumerate(inputs) if head.wanted]
    weight = torch.where(slopes.counts, slopes.g, 0.0).float()
    largest = weight.abs().amax()
    largest = torch.where(largest == 0, 1.0, largest)
    for rows in chunks:
        heads = [head.rows(rows) for head in inputs]
        counts = slopes.counts[rows] & (weight[rows] != 0)
        gradients = backend.heads_gradient(
            heads, target[rows].contiguous(), slopes.rows(rows, counts), V, wanted
        )
        _add_products(inputs, wanted, rows, gradients, torch.where(counts, weight[rows], 0.0), largest)
    _rescale(inputs, largest)


def _add_products(
    inputs: Sequence[HeadInputs],
    wanted: Sequence[int],
    rows: Any,
    gradients: HeadGradients,
    weight: Tensor,
    largest: Tensor,
) -> None:
    """Bring the gradients of the heads' products to their inputs, for rows of this weight (C,)."""
    # Largest of all rows 1 if the loss has no z-loss: exact in 16 bits where rows weigh the same.
    share = torch.where(weight != 0, weight / largest * gradients.unit, 0.0)
    for i, dz in zip(wanted, gradients.products, strict=True):
        _add(inputs[i], rows, dz, share, largest, inputs[i].head.scale / gradients.magnified)


def _rescale(inputs: Sequence[HeadInputs], largest: Tensor) -> None:
    """Give gradients of weights and biases the factor that ``_add`` left out."""
    for head in inputs:
        for gradient in (head.d_weight, head.d_bias):
            if gradient is not None:
                gradient.mul_(largest)


def _add(inputs: HeadInputs, rows: Any, dz: Tensor, share: Tensor, largest: Tensor, factor: float) -> None:
    """Bring dz (C, V) to a head's inputs; weights' gradients are short of ``largest`` until the end."""
    V, head = dz.shape[1], inputs.head
    if inputs.d_hidden is not None:
        back = _times(dz, head.weight[:V])
        back *= (share * largest * factor)[:, None]
        inputs.d_hidden[rows] = back.to(inputs.d_hidden.dtype)
    if inputs.d_weight is not None:
        # A row without gradient may hold NaN, and NaN times 0 is not 0.
        hidden = torch.where(share[:, None] == 0, 0.0, head.hidden[rows] * share[:, None])
        _add_transposed(inputs.d_weight[:V], dz, hidden.to(dz.dtype), factor)
    if inputs.d_bias is not None:
        for v in range(0, V, _BLOCK_IDS):
            block = dz[:, v : v + _BLOCK_IDS].float() * share[:, None]
            inputs.d_bias[v : min(v + _BLOCK_IDS, V)].add_(block.sum(0), alpha=factor)


def _times(dz: Tensor, weight: Tensor) -> Tensor:
    """(C, D) float32 = dz (C, V) @ weight (V, D), summed in float32."""
    if dz.dtype == weight.dtype == torch.float32:
        return dz @ weight
    if dz.dtype == weight.dtype and dz.is_cuda:
        return torch.mm(dz, weight, out_dtype=torch.float32)
    back = torch.zeros((dz.shape[0], weight.shape[1]), device=dz.device)
    for v in range(0, weight.shape[0], _BLOCK_IDS):
        back.addmm_(dz[:, v : v + _BLOCK_IDS].float(), weight[v : v + _BLOCK_IDS].float())
    return back


def _add_transposed(d_weight: Tensor, dz: Tensor, hidden: Tensor, factor: float) -> None:
    """d_weight (V, D) float32 += factor * dz (C, V).T @ hidden (C, D), summed in float32."""
    if dz.dtype == torch.float32:
        d_weight.addmm_(dz.T, hidden, alpha=factor)
    elif dz.is_cuda:
        torch.addmm(d_weight, dz.T, hidden, out_dtype=torch.float32, alpha=factor, out=d_weight)
    else:
        d_weight.addmm_(dz.T.float(), hidden.float(), alpha=factor)
