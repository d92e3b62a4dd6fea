"""The norm behind a model's layers as one native call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from auxkern.core.decoder import Norm
from auxkern.model.native.exchanged import NativeModule, exchanged
from auxkern.model.native.packed_layers import cpu_backend
from auxkern.model.native.recognised import recognised_norm
from auxkern.model.native.structures import UnknownLayerError
from auxkern.model.native.watch import Watch
from auxkern.ops.torch_ops import is_differentiated


class NativeNorm(NativeModule):
    """A norm with a native step, see ``NormStep``."""


class NormStep:
    """The native step of a norm of rows.

    Args:
        module: the norm.

    Attributes:
        norm: what it computes; None where no kind is known.
    """

    def __init__(self, module: nn.Module) -> None:
        self._look(module)

    def _look(self, module: nn.Module) -> None:
        # While it is tried what the norm computes, its own forward runs.
        self.norm: Norm | None = None
        self._watch = Watch([module], module.parameters())
        try:
            self.norm = recognised_norm(module, _width(module))
        except UnknownLayerError:
            return

    def run(self, module: nn.Module, x: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What the norm makes of x (..., D); None where its own forward must."""
        if args or options or type(x) is not Tensor or x.dtype is not torch.float32 or not x.is_cpu:
            return None
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None
        if not self._watch.unchanged:
            self._look(module)
        if self.norm is None or x.shape[-1] != _width(module):
            return None
        if is_differentiated((x, *module.parameters())):
            return None
        return cpu_backend().normed(self.norm, x.contiguous())


def exchange_norm(parent: nn.Module, name: str) -> None:
    """Puts a native step in the place of a norm, where its kind is known."""
    norm = getattr(parent, name)
    if isinstance(norm, NativeNorm):
        return
    step = NormStep(norm)
    if step.norm is not None:
        setattr(parent, name, exchanged(norm, step, NativeNorm))


def _width(module: nn.Module) -> int:
    """Numbers of a row.

    Raises:
        UnknownLayerError: nothing says how many.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.device.type != "cpu":
        raise UnknownLayerError(f"its norm {type(module).__name__} has no weight of a row's width")
    return int(weight.shape[0])
