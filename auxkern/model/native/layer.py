"""A decoder layer of transformers that runs as one native step, and as it was wherever it cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from auxkern.core.decoder import LayerInputs
from auxkern.core.memory import LargePages
from auxkern.model.native.ahead import Stack
from auxkern.model.native.exchanged import NativeModule
from auxkern.model.native.inputs import RecentInputs
from auxkern.model.native.packed_layers import PackedLayer
from auxkern.model.native.structures import UnknownLayerError

_CACHES = ("cache", "past_key_values")  # transformers 5.24 has renamed it
# Arguments that change nothing in a layer, or that are looked at apart from the others.
_WITHOUT_EFFECT = frozenset(
    (
        "position_ids",
        "use_cache",
        "cache_position",
        "output_hidden_states",
        "return_dict",
        "attention_mask",
        "position_embeddings",
    )
)


class NativeLayer(NativeModule):
    """A decoder layer with a native step, see ``LayerStep``.

    The layer's own forward runs where gradients are wanted, in training, under autocast, where attention is
    another than "auxkern", where a child has hooks or was replaced, with options that are not known.
    """

    native_step: LayerStep


class LayerStep:
    """The native step of one layer.

    Args:
        compute: as in ``use_native_kernels``.
        recent: shared by the layers of a model.
        memory: likewise, for packed weights.

    Attributes:
        as_tuple: whether the layer returns a tuple.
        refusal: why the layer runs as it was since its parts were changed; None if it does not.
        stack: of all layers of the model; None if some of them are as they were.
        packed: the layer's weights as they were when it was packed; None if it has not been.
    """

    def __init__(self, compute: str, recent: RecentInputs, memory: LargePages) -> None:
        self.compute, self._recent, self._memory = compute, recent, memory
        self.as_tuple = False
        self.stack: Stack | None = None
        self.packed: PackedLayer | None = None
        self.refusal: str | None = None

    def pack(self, layer: nn.Module) -> PackedLayer:
        """Packs the layer's weights as they are now."""
        self.packed = packed = PackedLayer(layer, self.compute, self._memory)
        return packed

    def change(self, layer: nn.Module, compute: str) -> None:
        """Packs the layer's weights for another arithmetic; if that cannot be, ``refusal`` says why."""
        if compute != self.compute:
            self.compute, self.refusal = compute, None
            self._packed_anew(layer)

    def _packed_anew(self, layer: nn.Module) -> PackedLayer | None:
        if self.refusal is not None:
            return None
        try:
            return self.pack(layer)
        except (UnknownLayerError, ValueError) as reason:
            self.packed, self.refusal = None, str(reason)
            return None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the layer packs its own weights.
        return {**self.__dict__, "packed": None, "_recent": RecentInputs(), "_memory": LargePages()}

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return 0 if self.packed is None else self.packed.nbytes

    @property
    def kinds(self) -> list[str | None]:
        """The blocks of a GGUF file that each of the packed weights is kept in; None: of none."""
        return [] if self.packed is None else self.packed.kinds

    def run(self, layer: nn.Module, x: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What the layer makes of x (B, T, D); None where its own forward must."""
        stack = self.stack if self.stack is not None and self.stack.is_ahead else None
        if stack is not None and stack.handed(
            x, options.get("attention_mask"), options.get("position_embeddings")
        ):
            return (x,) if self.as_tuple else x
        if layer.training or type(x) is not Tensor or x.dtype is not torch.float32 or x.dim() != 3:
            return None
        packed = self.packed
        if packed is None or not packed.watch.unchanged:
            if x.device.type != "cpu" or torch.is_grad_enabled():
                return None  # the next step without gradients packs what training leaves
            packed = self._packed_anew(layer)
        if packed is None or x.shape[2] != packed.width or not packed.conditions.allow(x):
            return None
        if args:
            options = {**options, **dict(zip(packed.names, args, strict=False))}
        cache = None
        for name, value in options.items():
            if value is None or value is False or name in _WITHOUT_EFFECT:
                continue
            if name not in _CACHES:
                return None
            cache = value
        angles = options.get("position_embeddings") if packed.turns_heads else None
        mask = options.get("attention_mask")
        inputs = self._recent.of(packed.kernel, x, mask, angles)
        if inputs is None or (packed.turns_heads and angles is None):
            return None
        if cache is not None and not _takes(cache, inputs, packed.index):
            return None
        x = x if x.is_contiguous() else x.contiguous()
        y = None
        if stack is not None:
            y = stack.through(layer, x, (mask, options.get("position_embeddings")), inputs, cache)
        if y is None:
            y = _stepped(packed, x, inputs, cache)
        return (y,) if self.as_tuple else y


def _takes(cache: Any, inputs: LayerInputs, index: int) -> bool:
    """Whether a layer knows this kind of cache, and what it is to see of it."""
    # Without a mask transformers means as many columns as positions.
    return hasattr(cache, "layers") and not (inputs.causal and cache.get_seq_length(index))


def _stepped(packed: PackedLayer, x: Tensor, inputs: LayerInputs, cache: Any) -> Tensor:
    """What a layer makes of x, with a cache that it takes."""
    kernel, index = packed.kernel, packed.index
    if cache is None:
        return kernel.whole(x, inputs, None)
    window = packed.window(cache, x)
    if window is not None:
        return kernel.whole(x, inputs, window)
    query, keys, values = kernel.projected(x, inputs)
    return kernel.attended(x, inputs, query, *cache.update(keys, values, index))
