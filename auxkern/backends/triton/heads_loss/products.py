"""Products that bring the gradient of a sum of heads to their hidden states, weights and biases.

Where that gradient, dz, has 16 bits, so has all that it is multiplied by. In float32, which the gradient of a
float32 tensor is held to, it is cut into parts beside a 16-bit operand, as kernels cut hidden states beside a
weight: tensor cores make these products too. Of the largest entry of such a gradient, dz rounded to bfloat16
leaves an error of 3e-4, two parts of it 9e-7 and three 2e-8, where torch's in float32 is 7e-7.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from auxkern.backends.triton.heads import PARTS

_BLOCK_IDS = 8192  # ids of a weight or of a gradient that are converted at a time
# Brings parts of numbers in [-1, 1] above the underflow of float16.
_RAISED = {torch.float16: 2.0**14, torch.bfloat16: 1.0, torch.float32: 1.0}


def times(dz: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, D) float32 = dz @ weight, summed in float32.

    Args:
        dz: (C, V) of 16 bits, or float32 in [-1, 1].
        weight: (V, D).
        dtype: what the result is rounded to in the end.
    """
    narrow, parts = _cut(dz.dtype, weight.dtype, dtype)
    back = torch.zeros((dz.shape[0], weight.shape[1]), device=dz.device)
    for ids in _blocks(dz, narrow == dz.dtype == weight.dtype):
        right = weight[ids].to(narrow)
        for left in _parts(dz[:, ids], narrow, parts):
            _add_product(back, left, right)
    return back if dz.dtype == narrow else back.div_(_RAISED[narrow])


def add_transposed(
    d_weight: Tensor, dz: Tensor, hidden: Tensor, share: Tensor, factor: float, dtype: torch.dtype
) -> None:
    """d_weight += factor * dz.T @ (share * hidden), summed in float32.

    Args:
        d_weight: (V, D) float32.
        dz: as in ``times``.
        hidden: (C, D); of a row with share 0 it may hold NaN.
        share: (C,) float32 factors of rows.
        factor: of all of them.
        dtype: what the sum is rounded to in the end.
    """
    narrow, parts = _cut(dz.dtype, hidden.dtype, dtype)
    if hidden.dtype == narrow != dz.dtype:
        # The rows' factors go to dz, so that hidden states keep their bits, and dz remains in [-1, 1].
        largest = share.abs().amax()
        rows = (share / torch.where(largest == 0, 1.0, largest))[:, None]
        right = torch.where(rows == 0, 0.0, hidden)
        for ids in _blocks(dz):
            product = torch.zeros((ids.stop - ids.start, hidden.shape[1]), device=dz.device)
            for left in _parts(dz[:, ids] * rows, narrow, parts):
                _add_product(product, left.T, right)
            d_weight[ids].add_(product.mul_(largest), alpha=factor / _RAISED[narrow])
        return
    # NaN times 0 is not 0.
    right = torch.where(share[:, None] == 0, 0.0, hidden * share[:, None]).to(narrow)
    for ids in _blocks(dz, narrow == dz.dtype):
        _add_product(d_weight[ids], dz[:, ids].to(narrow).T, right, factor)


def add_columns(d_bias: Tensor, dz: Tensor, share: Tensor, factor: float) -> None:
    """d_bias (V,) float32 += factor * the sums of dz (C, V) over its rows, times their share (C,)."""
    for ids in _blocks(dz):
        d_bias[ids].add_((dz[:, ids].float() * share[:, None]).sum(0), alpha=factor)


def _cut(dz: torch.dtype, operand: torch.dtype, result: torch.dtype) -> tuple[torch.dtype, int]:
    """(dtype in which dz is multiplied by an operand, parts of it) for a result of this dtype.

    A float32 operand beside a result in float16 would need a power for each of its columns.
    """
    if dz != torch.float32:
        return dz, 1
    if operand == torch.float32:
        return (torch.bfloat16 if result == torch.bfloat16 else torch.float32), 1
    return operand, 1 if result in (operand, torch.bfloat16) else PARTS[operand]


def _blocks(dz: Tensor, whole: bool = False) -> Iterator[slice]:
    """The V ids in pieces, or at once where nothing is converted."""
    V = dz.shape[1]
    step = V if whole else _BLOCK_IDS
    for first in range(0, V, step):
        yield slice(first, min(first + step, V))


def _parts(dz: Tensor, dtype: torch.dtype, count: int) -> Iterator[Tensor]:
    """dz, or tensors of this dtype that add up to it, raised."""
    if dz.dtype == dtype:
        yield dz
        return
    rest = dz * _RAISED[dtype]
    for i in range(count):
        part = rest.to(dtype)
        yield part
        if i + 1 < count:
            rest -= part


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
    """total += factor * left @ right, in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right, alpha=factor)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, alpha=factor, out=total)
    else:
        total.addmm_(left.float(), right.float(), alpha=factor)
