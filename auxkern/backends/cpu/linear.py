"""Linear layers that are not trained, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from auxkern.backends.cpu.abi import DTYPES, CLinear, Native, address


class Products(Native):
    """Products with weights of fp32 or half precision, summed in float32."""

    def linear_refusal(self, x: Tensor, weight: Tensor) -> str | None:
        if self.products_refusal is not None:
            return self.products_refusal
        if x.dtype != torch.float32:
            return f"its products are made in float32, not {x.dtype}"
        return None if weight.stride(1) == 1 and weight.shape[1] else "a weight's rows are not contiguous"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, accumulate: bool) -> None:
        if y.numel() == 0:
            return
        # Bound to names: a temporary would be freed before the kernel reads it.
        x = x if x.stride(1) == 1 else x.contiguous()
        bias = None if bias is None else bias.float().contiguous()
        layer = CLinear(
            M=y.shape[0],
            N=y.shape[1],
            K=x.shape[1],
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=address(bias),
            y=y.data_ptr(),
            x_stride=x.stride(0),
            weight_stride=weight.stride(0),
            y_stride=y.stride(0),
            dtype=DTYPES[weight.dtype],
            accumulate=accumulate,
        )
        self.library.auxkern_linear_forward(layer, self.execution())
