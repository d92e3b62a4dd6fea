"""What a base reads before every text: the same tokens, whose keys and values are computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from auxkern.model.base import LmOutput, output_device, run_base
from auxkern.model.native import compute_of
from auxkern.model.order import padding_first, padding_last

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


class ReadBehind(NamedTuple):
    """What a model made of a batch behind a prefix.

    Attributes:
        outputs: (B, T, ...) each, at the batch's own columns.
        cache: of the prefix and the batch, padding first; None unless asked for.
        mask: (B, columns of the cache) int64.
    """

    outputs: tuple[Tensor, ...]
    cache: Any
    mask: Tensor


def read_behind(
    before: PrefixStates,
    values: Tensor,
    mask: Tensor,
    run: Callable[[Tensor, Tensor, Any], tuple[tuple[Tensor, ...], Any]],
    *,
    told: Tensor | None = None,
    keeps: bool = True,
) -> ReadBehind:
    """Reads a batch behind a prefix of P tokens, so that no padding stands between them.

    A row's numbers then depend neither on the padding that the others bring nor, in a cache, on where it is.

    Args:
        before: the model's states of the prefix.
        values: (B, T, ...) what is read: ids or vectors.
        mask: (B, T) int64, padding on either side.
        run: the model, of values (B, T', ...), a mask (B, P + T') and a cache that holds the prefix: what it
            makes, (B, T', ...) each, and the cache.
        told: (B,) bool, the rows that stand behind the prefix; None for all. The others see nothing of it.
        keeps: whether the cache is wanted.
    """
    order = padding_last(mask)
    shown = torch.ones(len(mask), len(before), dtype=mask.dtype, device=mask.device)
    shown = shown if told is None else shown * told[:, None]
    seen = torch.cat([shown, order.mask], 1)
    outputs, cache = run(order.take(values), seen, before.cache(len(mask)))
    restored = tuple(order.restore(one) for one in outputs)
    if not keeps:
        return ReadBehind(restored, None, seen)
    closed = padding_first(seen)
    index = closed.positions[:, None, :, None]
    for layer in cache.layers:
        layer.keys, layer.values = (one.take_along_dim(index, 2) for one in (layer.keys, layer.values))
    return ReadBehind(restored, cache, closed.mask)


def base_behind(
    before: PrefixStates,
    lm: Any,
    ids: Tensor,
    mask: Tensor,
    *,
    layers: Sequence[int] = (),
    want_logits: bool = False,
    told: Tensor | None = None,
    keeps: bool = True,
) -> LmOutput:
    """A pass of the base, or of its first layers, behind a prefix; see ``run_base`` and ``read_behind``."""

    def run(ids: Tensor, mask: Tensor, cache: Any) -> tuple[tuple[Tensor, ...], Any]:
        output = run_base(
            lm, ids, mask, layers=list(layers), cache=cache, use_cache=True, want_logits=want_logits
        )
        made = (output.states,) if output.logits is None else (output.states, output.logits)
        return made, output.cache

    (states, *logits), cache, columns = read_behind(before, ids, mask, run, told=told, keeps=keeps)
    return LmOutput(states, next(iter(logits), None), cache, columns)
