"""Small layers and products that the parts of an auxiliary share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PRODUCTS = 1 << 22  # most that ``row_products`` holds at a time


class ZeroLinear(nn.Linear):
    """A linear layer whose weight and bias start at exactly zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def row_products(query: Tensor, keys: Tensor) -> Tensor:
    """Dot products of (B, T, d) and (B, K, d), (B, T, K); without gradients, row by row.

    A library's product of small matrices adds in an order that changes with their number, and a text
    would depend on what it is written with.
    """
    if torch.is_grad_enabled():
        return query @ keys.transpose(1, 2)
    B, T, d = query.shape
    step = max(1, _PRODUCTS // max(1, B * keys.shape[1] * d))
    parts = [(query[:, t : t + step, None] * keys[:, None]).sum(-1) for t in range(0, T, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
