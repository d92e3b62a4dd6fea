"""The packed weights of one layer, whether they are still those that it has, and when they may be used."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from auxkern.backends.choice import choose
from auxkern.core.backend import Backend
from auxkern.core.decoder import Window
from auxkern.core.memory import LargePages
from auxkern.model.native.described import described, turns_heads
from auxkern.model.native.structures import parts_of, structure_of
from auxkern.model.native.watch import Watch
from auxkern.model.native.windows import WindowedCache

ATTENTION = "auxkern"  # its name among transformers' attention functions


def cpu_backend() -> Backend:
    """Which runs native steps."""
    return choose("cpu", torch.device("cpu"), (torch.float32,))


class Conditions:
    """What a native step would leave out, of one layer or of several.

    Args:
        hooks: of the children that the step computes itself.
        attention_hooks: of modules of attention.
        configs: of attention.
        parameters: of the layers.
    """

    def __init__(
        self,
        hooks: Iterable[dict[int, Any]],
        attention_hooks: Iterable[dict[int, Any]],
        configs: Iterable[Any],
        parameters: Iterable[nn.Parameter],
    ) -> None:
        self._hooks, self._attention_hooks = list(hooks), list(attention_hooks)
        self._configs = list({id(config): config for config in configs}.values())
        self._parameters = list(parameters)

    @classmethod
    def joined(cls, each: Iterable[Conditions]) -> Conditions:
        """Those of several layers."""
        listed = list(each)
        return cls(
            *(
                [value for one in listed for value in getattr(one, name)]
                for name in ("_hooks", "_attention_hooks", "_configs", "_parameters")
            )
        )

    def allow(self, x: Tensor) -> bool:
        """Whether a call on x is one that leaves nothing out."""
        if any(self._hooks) or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        if not x.is_cpu or any(one._attn_implementation != ATTENTION for one in self._configs):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self._parameters)):
            return False
        return only_recorded(self._attention_hooks)


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
        weights = [one.weight for one in (parts.qkv, parts.output, parts.up, parts.down)]
        self.nbytes = sum(weight.nbytes for weight in weights)
        self.kinds = [weight.stored_kind for weight in weights]
        self.kernel = cpu_backend().decoder_layer(parts)
        self.names = list(inspect.signature(type(layer).forward).parameters)[2:]
        children = [child for _, child in parts_of(layer, structure)]
        parameters = list(layer.parameters())
        self.watch = Watch([layer, *children], parameters)
        self.conditions = Conditions(
            (hooks for child in children if child is not attention for hooks in hooks_of(child)),
            hooks_of(attention),
            [attention.config],
            parameters,
        )

    def window(self, cache: Any, x: Tensor) -> Window | None:
        """Where a cache takes the new columns of x (B, T, D) in place; None if it has to be told of them."""
        windows = cache.windows(x.shape[0], x.shape[1]) if isinstance(cache, WindowedCache) else None
        return None if windows is None else windows.of(self.index)


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The tables of hooks that a call of a module looks at."""
    return [module._forward_hooks, module._forward_pre_hooks]


def only_recorded(tables: Iterable[dict[int, Any]]) -> bool:
    """Whether hooks are transformers' own, which record what this kind of attention does not have."""
    return all(
        getattr(hook, "__module__", "").startswith("transformers.")
        for hooks in tables
        if hooks
        for hook in hooks.values()
    )
