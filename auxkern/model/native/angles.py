"""Angles of rotary positions, looked up instead of made anew in every step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auxkern.model.native.packed_layers import hooks_of

# Kinds of scaling whose angles are a position's alone. Those of others change with the length.
_FIXED = ("default", "linear", "llama3", "yarn")
_LEAST = 256  # positions


class _Known(NamedTuple):
    frequencies: Tensor
    version: int
    pair: tuple[Tensor, Tensor]  # (positions, W) each


class Angles:
    """Cosines and sines by position, as a model's rotary embedding makes them.

    Args:
        rotary: of the model.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary: Any = rotary
        self._known: _Known | None = None

    def of(self, vectors: Tensor, positions: Tensor, columns: int) -> Any:
        """What ``rotary(vectors, positions)`` returns, to the last bit.

        Args:
            vectors: (B, 1, D), whose dtype and device the angles have.
            positions: (B, 1) int64, each below ``columns``.
        """
        rotary = self._rotary
        frequencies: Any = getattr(rotary, "inv_freq", None)
        fixed = getattr(rotary, "rope_type", None) in _FIXED and type(frequencies) is Tensor
        if not fixed or any(hooks_of(rotary)):
            return rotary(vectors, positions)
        known = self._known
        if (
            known is None
            or known.frequencies is not frequencies
            or known.version != frequencies._version
            or known.pair[0].shape[0] < columns
            or known.pair[0].dtype != vectors.dtype
        ):
            places = torch.arange(max(_LEAST, 2 * columns), device=vectors.device)
            cos, sin = rotary(vectors[:1], places[None])
            self._known = known = _Known(frequencies, frequencies._version, (cos[0], sin[0]))
        places = positions[:, 0]
        cos, sin = (one.index_select(0, places)[:, None] for one in known.pair)
        return cos, sin
