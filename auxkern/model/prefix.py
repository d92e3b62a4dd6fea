"""What a base reads before every text: the same tokens, whose keys and values are computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from auxkern.model.base import output_device, run_base
from auxkern.model.native import compute_of

_ATTENDING = (DynamicLayer, DynamicSlidingWindowLayer)


class PrefixStates(NamedTuple):
    """Keys and values of P tokens.

    Attributes:
        layers: keys and values (1, heads, P, head width) of each layer of the base.
    """

    layers: list[tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def last(self, count: int) -> PrefixStates:
        """Of the last so many layers."""
        return PrefixStates(self.layers[len(self.layers) - count :])

    def first(self, count: int) -> PrefixStates:
        """Of the first so many layers."""
        return PrefixStates(self.layers[:count])

    def cache(self, B: int) -> DynamicCache:
        """A new cache of B sequences that have read these tokens."""
        cache = DynamicCache()
        for place, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(B, -1, -1, -1), values.expand(B, -1, -1, -1), place)
        return cache


class BasePrefix:
    """The tokens of a prefix, and the base's states of them, computed where they are first asked for.

    Args:
        lm: the base.
        ids: (P) tokens, the start token first; none for no prefix.
    """

    def __init__(self, lm: Any, ids: Sequence[int]) -> None:
        self._lm, self.ids = lm, tuple(ids)
        self._made: tuple[Any, PrefixStates] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self, base: str) -> str:
        """64 hexadecimal digits that name what a base computes behind the prefix.

        Args:
            base: the fingerprint of the base, which is returned where there is no prefix.
        """
        return hashlib.sha256(f"{base} {self.ids}".encode()).hexdigest() if self.ids else base

    @torch.no_grad()
    def states(self) -> PrefixStates:
        """The base's keys and values, of its present device, dtype and compute.

        Raises:
            ValueError: a layer of the base keeps something else than keys and values of all tokens.
        """
        lm = self._lm
        made_for = (output_device(lm), next(lm.parameters()).dtype, compute_of(lm))
        if self._made is None or self._made[0] != made_for:
            ids = torch.tensor([self.ids], device=made_for[0])
            cache = run_base(lm, ids, cache=DynamicCache(), use_cache=True).cache
            self._made = made_for, PrefixStates([_attended(lm, layer) for layer in cache.layers])
        return self._made[1]


def _attended(lm: Any, layer: Any) -> tuple[Tensor, Tensor]:
    if type(layer) not in _ATTENDING or layer.keys is None or layer.keys.dim() != 4:
        raise ValueError(
            f"{type(lm).__name__} keeps a {type(layer).__name__} in its cache, so that texts cannot share "
            "base_prefix_ids; use a base whose layers all attend, or write the prefix in every prompt"
        )
    return layer.keys, layer.values


def with_prefix(mask: Tensor, length: int) -> Tensor:
    """A mask (B, P) with so many real tokens before it."""
    return nn.functional.pad(mask, (length, 0), value=1) if length else mask
