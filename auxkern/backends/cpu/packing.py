"""Products with packed weights, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, byref
from dataclasses import replace

import torch
from torch import Tensor

from auxkern.backends.cpu.abi import (
    DTYPES,
    NOT_FINITE,
    CPackedSizes,
    CProduct,
    CProductCall,
    CWeightRows,
    Native,
    address,
    float32,
)
from auxkern.core.packed import ACTIVATIONS, KINDS, PackedWeight, StoredRows

_STORE, _ADD, _GATE = range(3)


class PackedProducts(Native):
    """Products with weights that were packed once, in float32, bfloat16 or int8."""

    def pack_refusal(self) -> str | None:
        return None

    def pack(self, weights: Sequence[Tensor], like: PackedWeight) -> PackedWeight:
        rows = (CWeightRows * len(weights))()
        for c, weight in zip(rows, weights, strict=True):
            c.weight, c.dtype = weight.data_ptr(), DTYPES[weight.dtype]
            c.rows, (c.row_stride, c.column_stride) = weight.shape[0], weight.stride()
        packed, is_finite = self._pack(rows, like)
        if not is_finite:
            raise ValueError(
                "weight holds NaN or infinite values, which int8 cannot keep; "
                "pass compute='float32' or 'bfloat16', or mend the weight"
            )
        return packed

    def pack_stored(self, stored: Sequence[StoredRows], like: PackedWeight) -> PackedWeight:
        blocks = [part.blocks if part.blocks.stride(1) == 1 else part.blocks.contiguous() for part in stored]
        rows = (CWeightRows * len(blocks))()
        for c, part in zip(rows, blocks, strict=True):
            c.weight, c.rows, c.row_stride = part.data_ptr(), part.shape[0], part.stride(0)
        packed, is_finite = self._pack(rows, like)
        if not is_finite:
            raise ValueError(
                f"a {stored[0].kind} weight has scales or minima that are NaN or infinite; "
                "its file is damaged, get it again"
            )
        return packed

    def _pack(self, rows: Array[CWeightRows], like: PackedWeight) -> tuple[PackedWeight, bool]:
        """The packed weight, and whether all its numbers could be kept."""
        product = c_product(like, None)
        sizes = CPackedSizes()
        self.library.auxkern_packed_size(product, byref(sizes))
        values = torch.empty(sizes.bytes, dtype=torch.uint8, device="cpu")
        scales = float32(sizes.scales)
        status = self.library.auxkern_pack(
            product, rows, len(rows), values.data_ptr(), scales.data_ptr(), self.execution()
        )
        return replace(like, values=values, scales=scales), status != NOT_FINITE

    def packed_linear(
        self,
        x: Tensor,
        packed: PackedWeight,
        bias: Tensor | None,
        y: Tensor,
        accumulate: bool,
        activation: str = "identity",
    ) -> None:
        if y.numel() == 0:
            return
        # Bound to names: a temporary would be freed before the kernel reads it.
        x = x if x.stride(1) == 1 else x.contiguous()
        bias = None if bias is None else bias.float().contiguous()
        call = CProductCall(
            M=y.shape[0],
            x=x.data_ptr(),
            y=y.data_ptr(),
            x_stride=x.stride(0),
            y_stride=y.stride(0),
            columns=y.shape[1],
            row_group=packed.row_group,
            epilogue=_GATE if packed.gated else _ADD if accumulate else _STORE,
            activation=ACTIVATIONS.index(activation),
        )
        self.library.auxkern_product_forward(c_product(packed, bias), call, self.execution())


def c_product(packed: PackedWeight, bias: Tensor | None) -> CProduct:
    """A packed weight as kernels take it.

    Args:
        bias: (N,) float32 contiguous or None; it and the packed weight must outlive the value.
    """
    return CProduct(
        N=packed.N,
        K=packed.K,
        group=packed.group,
        values=packed.values.data_ptr(),
        scales=packed.scales.data_ptr(),
        bias=address(bias),
        kind=KINDS.index(packed.kind),
        turns=2 if packed.gated else 1,
    )
