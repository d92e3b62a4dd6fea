"""A decoder layer as a value: what ``auxkern_layer`` in kernels/include/auxkern.h is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from auxkern.core.memory import LargePages
from auxkern.core.packed import PackedWeight

CACHE_DTYPES = (torch.float32, torch.bfloat16)  # what keys and values may be kept in


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm of rows, in float32.

    Attributes:
        kind: "rms", x / sqrt(mean x^2 + eps), or "layer", (x - mean) / sqrt(variance + eps).
        weight: (width,) float32 factors, or None for ones.
        bias: (width,) float32, or None.
        eps: as above.
    """

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True, eq=False)
class Projection:
    """A product of a layer.

    Attributes:
        weight: packed.
        bias: (N,) float32, or None.
    """

    weight: PackedWeight
    bias: Tensor | None


@dataclass(frozen=True)
class Heads:
    """The heads of attention.

    Attributes:
        queries: heads.
        keys: heads of keys and of values; divides the former.
        width: of each.
        scale: of their products.
        clip: most and, negated, least of a query, key or value; 0 for no limit.
        whole_norms: whether norms of queries and keys are over all heads, else over each.
    """

    queries: int
    keys: int
    width: int
    scale: float
    clip: float = 0.0
    whole_norms: bool = False


@dataclass(frozen=True, eq=False)
class DecoderParts:
    """A decoder layer of width D.

    Attributes:
        heads: of attention.
        norms: by name, of "attention_norm", "attention_after", "mlp_norm", "mlp_after", "query_norm" and
            "key_norm" those that it has.
        qkv: to queries, keys and values, one after the other.
        output: of attention.
        up: to the MLP's inner width; gate and up in turns where it is gated.
        down: from there.
        activation: "silu", "gelu_tanh", "gelu" or "relu".
        gated: whether the activated gate multiplies what goes up.
        parallel: whether the MLP reads what attention reads.
        cache_dtype: of the keys and values that it makes, float32 or bfloat16.
    """

    heads: Heads
    norms: dict[str, Norm]
    qkv: Projection
    output: Projection
    up: Projection
    down: Projection
    activation: str
    gated: bool
    parallel: bool
    cache_dtype: torch.dtype = torch.float32

    def moved(self, memory: LargePages) -> DecoderParts:
        """The same, with packed weights in other memory."""
        qkv, output, up, down = (
            replace(one, weight=one.weight.moved(memory))
            for one in (self.qkv, self.output, self.up, self.down)
        )
        return replace(self, qkv=qkv, output=output, up=up, down=down)


class Window(NamedTuple):
    """Columns of one layer's cache that a step attends to, the last of which it writes.

    Attributes:
        keys, values: (B or more, heads, columns, width) float32 or bfloat16, of the same type and strides,
            width contiguous.
        begin: the first column that is attended to.
        end: the first that is written.
    """

    keys: Tensor
    values: Tensor
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class CacheMemory:
    """Keys and values of all layers of a model, in memory that stays where it is.

    Attributes:
        keys, values: as in ``Window``, one of each layer; all of the same shape, type and strides.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Windows(NamedTuple):
    """The same columns of every layer's cache; ``begin`` and ``end`` as in ``Window``."""

    memory: CacheMemory
    begin: int
    end: int

    def of(self, layer: int) -> Window:
        """One layer's."""
        return Window(self.memory.keys[layer], self.memory.values[layer], self.begin, self.end)


class LayerInputs(ABC):
    """What all layers of a step are given, as a backend keeps it.

    Attributes:
        causal: whether there is no mask and several positions, each of which sees those up to its own.
        columns: of the mask; None where there is none, or where one entry stands for all.
    """

    causal: bool
    columns: int | None


class DecoderLayer(ABC):
    """A decoder layer that a backend runs; see ``Backend.decoder_layer``.

    x and what is returned are (B, T, D) float32. A row does not depend on the others, nor on what it
    does not see.
    """

    @abstractmethod
    def inputs(
        self, size: tuple[int, int], mask: Tensor | None, angles: tuple[Tensor, Tensor] | None
    ) -> LayerInputs:
        """What the layers of a step share.

        Args:
            size: B and T.
            mask: (B or 1, 1, T or 1, P or 1) bool; None: position t sees P - T + t + 1 columns.
            angles: cosines and sines, (B or 1, T, rotary) float32 each; None where nothing is turned.

        Raises:
            ValueError: a mask or angles of another kind.
        """

    @abstractmethod
    def whole(self, x: Tensor, inputs: LayerInputs, window: Window | None) -> Tensor:
        """The layer, with new keys and values written to the window; None for no cache."""

    @abstractmethod
    def projected(self, x: Tensor, inputs: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The layer up to queries (B, T, heads, width) float32, new keys and values (B, heads, T, width)."""

    @abstractmethod
    def attended(self, x: Tensor, inputs: LayerInputs, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The layer from attention on; ``query`` is written to, keys and values are (B, heads, P, width)."""


class DecoderStack(ABC):
    """Decoder layers of the same sizes, one after the other; see ``Backend.decoder_stack``."""

    @abstractmethod
    def through(
        self, x: Tensor, inputs: LayerInputs, windows: Windows | None, *, every: bool = False
    ) -> Tensor:
        """What the last layer makes of x (B, T, D); with ``every`` (layers, B, T, D), what each makes.

        Args:
            windows: where new keys and values go; None for no cache.
        """
