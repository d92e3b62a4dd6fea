"""The packed weights of one layer, and whether they are still those that it has."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from auxkern.backends.choice import choose
from auxkern.core.decoder import Window
from auxkern.core.memory import LargePages
from auxkern.model.native.described import described, turns_heads
from auxkern.model.native.structures import parts_of, structure_of
from auxkern.model.native.windows import WindowedLayer

ATTENTION = "auxkern"  # its name among transformers' attention functions


class PackedLayer:
    """A layer's weights, packed for a kernel.

    Args:
        layer: of a transformers model, on the CPU.
        compute: as in ``use_native_kernels``.
        memory: for packed weights.

    Raises:
        UnknownLayerError: it cannot be described.
        ValueError: a weight cannot be kept with this compute.
    """

    def __init__(self, layer: nn.Module, compute: str, memory: LargePages) -> None:
        structure = structure_of(layer)
        parts = described(layer, compute).moved(memory)
        attention = getattr(layer, structure.attention)
        self.turns_heads = turns_heads(layer, structure)
        self.width = parts.qkv.weight.K
        self.index = int(attention.layer_idx)
        self.nbytes = sum(one.weight.nbytes for one in (parts.qkv, parts.output, parts.up, parts.down))
        backend = choose("cpu", torch.device("cpu"), (torch.float32,))
        self.kernel = backend.decoder_layer(parts)
        self.names = list(inspect.signature(type(layer).forward).parameters)[2:]
        self._config = attention.config
        children = [child for _, child in parts_of(layer, structure)]
        self._attention_hooks = [attention._forward_hooks, attention._forward_pre_hooks]
        self._hooks = [
            hooks
            for child in children
            if child is not attention
            for hooks in (child._forward_hooks, child._forward_pre_hooks)
        ]
        self._parameters = list(layer.parameters())
        owners = [layer, *children]
        self._places = [
            places for owner in owners for places in (owner._modules, owner._parameters) if places
        ]
        # Whoever stands here keeps its id as long as it is kept.
        self._kept = [one for places in self._places for one in places.values()]
        self._ids = self._present()
        self._addresses = [p.data_ptr for p in self._parameters]
        self._state = self._versions()

    def is_current(self) -> bool:
        """Whether the layer has the parts and numbers that were packed."""
        return self._present() == self._ids and self._versions() == self._state

    def _present(self) -> list[int]:
        return [id(one) for places in self._places for one in places.values()]

    def _versions(self) -> list[int]:
        # In-place changes count a parameter's version up; a move gives it other memory.
        return [*[p._version for p in self._parameters], *[address() for address in self._addresses]]

    def window(self, cache: Any, x: Tensor) -> Window | None:
        """Where a cache takes the new columns of x (B, T, D) in place; None if it has to be told of them."""
        layers = getattr(cache, "layers", ())
        of_layer = layers[self.index] if self.index < len(layers) else None
        return of_layer.window(x.shape[0], x.shape[1]) if isinstance(of_layer, WindowedLayer) else None

    def may_run(self, x: Tensor) -> bool:
        """Whether a call on x is one that leaves nothing out."""
        if any(self._hooks) or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        if not x.is_cpu or self._config._attn_implementation != ATTENTION:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self._parameters)):
            return False
        return not any(self._attention_hooks) or all(map(records_only, self._attention_hooks))


def records_only(hooks: dict[int, Any]) -> bool:
    """Whether hooks are transformers' own, which record what this kind of attention does not have."""
    return all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks.values())
