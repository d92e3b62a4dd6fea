"""All decoder layers of a model in one native call, where nobody reads what stands between them.

A model calls its layers one after the other. While a ``Stack`` runs ahead, the first makes what the last
one returns, and each of the others hands on what it is given, if that is what the one before it returned
and masks and angles are the same. A model that does anything else between its layers is run once more,
layer by layer, and from then on always.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from auxkern.core.decoder import LayerInputs

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


class Stack:
    """The decoder layers of a model.

    Args:
        layers: all of them, ``NativeLayer`` each.

    Attributes:
        refusal: why it runs layer by layer; None if it does not.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.refusal: str | None = None
        self._run = _Run()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "refusal": self.refusal}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _run=_Run())

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
        each: Any = self.layers
        packed = [one.native_step.ready(one, x) for one in each]
        first = packed[0]
        if first is None or any(one is None or one.turns_heads != first.turns_heads for one in packed):
            return None
        windows = None
        if cache is not None:
            windows = [one.window(cache, x) for one in packed]
            if any(window is None for window in windows):
                return None
        run.result, run.given = (
            first.kernel.through([one.kernel for one in packed[1:]], x, inputs, windows),
            given,
        )
        return run.result


def stack_of(model: nn.Module) -> Stack | None:
    """The stack of a transformer's decoder layers; None where some of them are as they were."""
    for child in model.children():
        stack = getattr(child, "native_stack", None)
        if stack is not None:
            return stack if stack.layers is child else None
    return None
