"""Attention over a cache that is not trained, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from auxkern.backends.cpu.abi import DTYPES, CAttention, Native

_WIDTH = 16  # what a head's width is a multiple of, for every instruction set


class CachedAttention(Native):
    """Attention that reads only the columns that a position sees."""

    def attention_refusal(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
        if self.products_refusal is not None:
            return self.products_refusal
        if any(t.dtype != torch.float32 or t.stride(-1) != 1 for t in (query, key, value)):
            return "it takes float32 with rows that are contiguous"
        if 0 in (query.shape[1], query.shape[3]) or key.shape[2] < query.shape[2]:
            return "there are no heads, or fewer columns than positions"
        if query.shape[-1] % _WIDTH or value.shape[-1] != query.shape[-1]:
            return f"heads have a width of {query.shape[-1]}, which is no multiple of {_WIDTH}"
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
            return "the mask is not one of bools for all heads"
        return None

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, out: Tensor
    ) -> None:
        attention = CAttention(
            B=query.shape[0],
            T=query.shape[2],
            P=key.shape[2],
            D=query.shape[3],
            heads=query.shape[1],
            key_heads=key.shape[1],
            query=query.data_ptr(),
            query_strides=query.stride()[:3],
            key=key.data_ptr(),
            key_strides=key.stride()[:3],
            value=value.data_ptr(),
            value_strides=value.stride()[:3],
            scale=scale,
            cache_dtype=DTYPES[key.dtype],
            out=out.data_ptr(),
        )
        if mask is not None:
            attention.mask, attention.mask_strides = mask.data_ptr(), _mask_strides(mask, query, key)
        self.library.auxkern_attention_forward(attention, self.execution())


def _mask_strides(mask: Tensor, query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """Of sequence, position and column; 0 where one entry stands for all."""
    sizes = (query.shape[0], query.shape[2], key.shape[2])
    places = (0, 2, 3)
    strides = [mask.stride(i) if mask.shape[i] == size else 0 for i, size in zip(places, sizes, strict=True)]
    return strides[0], strides[1], strides[2]
