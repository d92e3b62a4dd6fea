"""What all layers of a step are given: looked at once, since every layer gets the same objects."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from auxkern.core.decoder import DecoderLayer, LayerInputs

_KEPT = 4  # layers with sliding windows or without rotary positions take turns with the others


class _Asked(NamedTuple):
    size: tuple[int, int]
    mask: Tensor | None
    angles: Any
    inputs: LayerInputs | None  # None: of a kind that the kernel does not take


class RecentInputs:
    """The inputs that layers of one model were given last."""

    def __init__(self) -> None:
        self._recent: tuple[_Asked, ...] = ()

    def of(self, kernel: DecoderLayer, x: Tensor, mask: Any, angles: Any) -> LayerInputs | None:
        """As ``kernel`` takes them; None if they are of another kind.

        Args:
            kernel: any of the layers.
            x: (B, T, D).
            mask: what transformers calls ``attention_mask``.
            angles: what it calls ``position_embeddings``; None where the layer turns nothing.
        """
        size = x.shape[:2]
        for asked in self._recent:
            if asked.mask is mask and asked.angles is angles and asked.size == size:
                return asked.inputs
        inputs = converted(kernel, (size[0], size[1]), mask, angles)
        # One assignment: threads may lose an entry, and never see half of one.
        self._recent = (_Asked((size[0], size[1]), mask, angles, inputs), *self._recent[: _KEPT - 1])
        return inputs


def converted(kernel: DecoderLayer, size: tuple[int, int], mask: Any, angles: Any) -> LayerInputs | None:
    """As ``RecentInputs.of``, of B and T, and not kept."""
    pair = isinstance(angles, tuple) and len(angles) == 2 and all(type(one) is Tensor for one in angles)
    if (mask is not None and type(mask) is not Tensor) or (angles is not None and not pair):
        return None
    if any(tensor.device.type != "cpu" for tensor in (mask, *(angles or ())) if tensor is not None):
        return None
    try:
        return kernel.inputs(size, mask, angles)
    except ValueError:
        return None  # the layer's own forward takes more kinds, or says what is wrong
