"""All decoder layers of a model in one native call, where nobody reads what stands between them.

A model calls its layers one after the other. While a ``Stack`` runs ahead, the first makes what the last
one returns, and each of the others hands on what it is given, if that is what the one before it returned
and masks and angles are the same. A model that does anything else between its layers is run once more,
layer by layer, and from then on always.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from auxkern.core.decoder import DecoderStack, LayerInputs, Windows
from auxkern.model.native.packed_layers import Conditions, PackedLayer, cpu_backend, hooks_of, only_recorded
from auxkern.model.native.watch import Watch
from auxkern.model.native.windows import WindowedCache

_Output = TypeVar("_Output")


class _Run(threading.local):
    """What one thread is doing.

    Attributes:
        ahead: whether layers may run ahead.
        result: of the last layer; None until the first has been called.
        given: mask and angles of the first layer.
        handed: how many layers have handed the result on.
    """

    ahead = False
    result: Tensor | None = None
    given: tuple[Any, Any] = (None, None)
    handed = 0


class PackedStack:
    """The packed weights of all layers.

    Args:
        layers: as they are now.
        packed: of each.

    Attributes:
        kernel: that runs them.
        turns_heads: whether positions turn queries and keys; None if in some layers only.
        width: D.
    """

    def __init__(self, layers: nn.ModuleList, packed: Sequence[PackedLayer]) -> None:
        self.packed = packed
        self.kernel: DecoderStack = cpu_backend().decoder_stack([one.kernel for one in packed])
        turning = {one.turns_heads for one in packed}
        self.turns_heads = turning.pop() if len(turning) == 1 else None
        self.width = packed[0].width
        self.in_order = [one.index for one in packed] == list(range(len(packed)))
        self._layers = layers
        self._watch = Watch.joined(one.watch for one in packed)
        self._conditions = Conditions.joined(one.conditions for one in packed)
        self._hooks = [hooks for layer in layers for hooks in hooks_of(layer)]

    def may_run(self, x: Tensor) -> bool:
        """Whether calls of all layers, the first one on x (B, T, D), would read these and nobody listens."""
        return (
            x.shape[2] == self.width
            and not any(layer.training for layer in self._layers)
            and only_recorded(self._hooks)
            and self._conditions.allow(x)
            and self._watch.unchanged
        )

    def windows(self, cache: Any, x: Tensor) -> Windows | None:
        """Where a cache takes new columns of x (B, T, D) in place; None if it has to be told of them."""
        if not isinstance(cache, WindowedCache) or not self.in_order:
            return None
        return cache.windows(x.shape[0], x.shape[1])


class Stack:
    """The decoder layers of a model.

    Args:
        layers: all of them, ``NativeLayer`` each.

    Attributes:
        refusal: why it runs layer by layer; None if it does not.
        token_step: the ``TokenStep`` of the model that calls them; None before its first pass.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.refusal: str | None = None
        self.token_step: Any = None
        self._run = _Run()
        self._packed: PackedStack | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "refusal": self.refusal}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, token_step=None, _run=_Run(), _packed=None)

    def run(self, forward: Callable[[], _Output]) -> _Output:
        """A forward pass of the model, of which nobody wants hidden states between layers.

        Args:
            forward: can be called again: what it writes to a cache is written once more.
        """
        run = self._run
        if self.refusal is not None or run.ahead:
            return forward()
        run.ahead, run.result, run.handed = True, None, 0
        try:
            output = forward()
        finally:
            ran, run.ahead, run.result, run.given = run.result, False, None, (None, None)
        if ran is None or run.handed == len(self.layers) - 1:
            return output
        self.refusal = "the model does something between its layers, or gives them different masks"
        return forward()

    @property
    def is_ahead(self) -> bool:
        """Whether the layers of a forward pass of this thread may run ahead."""
        return self._run.ahead

    def handed(self, x: Tensor, mask: Any, angles: Any) -> bool:
        """Whether a layer that is given this has been run already."""
        run = self._run
        if x is not run.result or run.given[0] is not mask or run.given[1] is not angles:
            return False
        run.handed += 1
        return True

    def packed(self, x: Tensor) -> PackedStack | None:
        """What runs a call of all layers, the first one on x (B, T, D); None where they are called."""
        each: Any = self.layers
        now = [layer.native_step.packed for layer in each]
        known = self._packed
        if known is None or any(one is not of for one, of in zip(now, known.packed, strict=True)):
            if not now or any(one is None for one in now):
                return None
            known = PackedStack(self.layers, now)
            self._packed = known if known.may_run(x) else None
            return self._packed
        return known if known.may_run(x) else None

    def through(
        self, layer: nn.Module, x: Tensor, given: tuple[Any, Any], inputs: LayerInputs, cache: Any
    ) -> Tensor | None:
        """What all layers make of x; None where they have to be called one by one.

        Args:
            layer: that is called, which must be the first.
            given: mask and angles, as the model hands them to it.
            inputs: the same, as the kernels take them.
            cache: of the model, or None.
        """
        run = self._run
        if layer is not self.layers[0] or run.result is not None:
            return None
        packed = self.packed(x)
        if packed is None or packed.turns_heads is None:
            return None
        windows = packed.windows(cache, x)
        if cache is not None and windows is None:
            return None
        run.result, run.given = packed.kernel.through(x, inputs, windows), given
        return run.result


def stack_of(model: nn.Module) -> Stack | None:
    """The stack of a transformer's decoder layers; None where some of them are as they were."""
    for child in model.children():
        stack = getattr(child, "native_stack", None)
        if stack is not None:
            return stack if stack.layers is child else None
    return None
