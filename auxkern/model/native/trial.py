"""Whether a native step makes of random input what the layer's own forward makes of it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from auxkern.model.caches import CACHE_NAME
from auxkern.model.native.layer import LayerStep
from auxkern.model.native.structures import Structure, UnknownLayerError

# Of what a layer adds to its input, relative to the largest: both sides sum thousands of products in
# float32, in different orders, and are some 1e-6 off; another formula, or a part left out, is off by far
# more.
_TOLERANCE = 2e-5
_ULPS = 4 * 2**-24  # of the output, which rounds the sum with the input
_SIZE = (2, 5)
_PADDING = 2  # columns before the first sequence


@torch.no_grad()
def returns_tuple(layer: nn.Module, structure: Structure, step: LayerStep, width: int) -> bool:
    """Compares a layer with its native step in float32, on a padded batch and on one more token of it.

    Args:
        layer: in evaluation mode.
        structure: its own.
        step: its own, in float32.
        width: D.

    Returns:
        Whether it returns a tuple.

    Raises:
        UnknownLayerError: the layer cannot be described, or the two differ.
    """
    turned = _turned(getattr(layer, structure.attention)) if structure.rotary else None
    random = torch.Generator().manual_seed(0)
    B, T = _SIZE
    caches = DynamicCache(), DynamicCache()
    as_tuple = False
    for past, new in ((0, T), (T, 1)):
        x = torch.randn(B, new, width, generator=random)
        options = _options(layer, _mask(past, new), turned, random)
        own = type(layer).forward(layer, x, **options, **{CACHE_NAME: caches[0]})
        as_tuple = isinstance(own, tuple)
        ours = step.run(layer, x, (), {**options, CACHE_NAME: caches[1]})
        if ours is None:
            raise UnknownLayerError("it is called in a way that the native step does not take")
        # What padding makes of itself is nobody's affair.
        real = torch.ones(B, new, dtype=torch.bool)
        real[0, : max(0, _PADDING - past)] = False
        _compare(x[real], (own[0] if as_tuple else own)[real], ours[real])
    return as_tuple


def _turned(attention: Any) -> int:
    """Numbers of a head that positions turn."""
    return int(getattr(attention, "rotary_ndims", attention.head_dim))


def _options(layer: nn.Module, mask: Tensor, turned: int | None, random: torch.Generator) -> dict[str, Any]:
    options: dict[str, Any] = {"attention_mask": mask}
    if turned is not None:
        # Any angles: a layer that takes them in another order differs.
        angles = torch.rand(_SIZE[0], mask.shape[2], turned, generator=random) * 6
        options["position_embeddings"] = (angles.cos(), angles.sin())
    taken = inspect.signature(type(layer).forward).parameters
    anything = any(one.kind is one.VAR_KEYWORD for one in taken.values())
    return {name: value for name, value in options.items() if anything or name in taken}


def _mask(past: int, new: int) -> Tensor:
    mask = (
        torch.ones(new, past + new, dtype=torch.bool).tril(past).expand(_SIZE[0], 1, new, past + new).clone()
    )
    mask[0, :, :, :_PADDING] = False
    return mask


def _compare(x: Tensor, own: Tensor, ours: Tensor) -> None:
    allowed = _TOLERANCE * (own - x).abs().max() + _ULPS * own.abs().max()
    off = (ours - own).abs().max()
    if not off <= allowed:
        raise UnknownLayerError(
            f"its native step differs from it by {off.item():.1e} on random input, "
            f"where {allowed.item():.1e} is rounding"
        )
