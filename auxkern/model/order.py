"""A batch in another order of its columns: padding on one side."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Order(NamedTuple):
    """Positions of a batch with all padding on one side: windows, convolutions and states meet none between.

    Attributes:
        mask: (B, S') int64, 1 for real tokens, in the new order.
        positions: (B, S') int64, where each stood.
        places: (B, S) int64, where each went; any place for padding that was left out.
    """

    mask: Tensor
    positions: Tensor
    places: Tensor

    def take(self, values: Tensor) -> Tensor:
        """(B, S, ...) -> (B, S', ...)"""
        return _along(values, self.positions)

    def restore(self, values: Tensor) -> Tensor:
        """(B, S', ...) -> (B, S, ...)"""
        return _along(values, self.places)


def padding_first(mask: Tensor) -> Order:
    """The order for a mask (B, S) with all padding before what is real."""
    real = (mask != 0).long()
    positions = real.argsort(dim=1, stable=True)
    spare = _spare(real)
    places = positions.argsort(1)
    return Order(real.sort(1).values[:, spare:], positions[:, spare:], (places - spare).clamp_min(0))


def padding_last(mask: Tensor) -> Order:
    """The order for a mask (B, S) with all padding behind what is real."""
    real = (mask != 0).long()
    positions = (1 - real).argsort(dim=1, stable=True)
    left = real.shape[1] - _spare(real)
    places = positions.argsort(1).clamp_max(max(0, left - 1))
    return Order(real.sort(1, descending=True).values[:, :left], positions[:, :left], places)


def _spare(real: Tensor) -> int:
    """Columns that are padding in every row; none are counted on a GPU, for which a host would wait."""
    counted = real.device.type == "cpu" and real.numel() > 0
    return real.shape[1] - max(1, int(real.sum(1).max())) if counted else 0


def _along(values: Tensor, index: Tensor) -> Tensor:
    return values.take_along_dim(index.reshape(*index.shape, *[1] * (values.dim() - 2)), 1)
