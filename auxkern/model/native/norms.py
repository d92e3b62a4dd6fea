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
        module: the norm, on the CPU.

    Raises:
        UnknownLayerError: it is of no kind that is known.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norm: Norm | None = recognised_norm(module, _width(module))
        self._watch = Watch([module], module.parameters())

    def run(self, module: nn.Module, x: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What the norm makes of x (..., D); None where its own forward must."""
        if args or options or type(x) is not Tensor or x.dtype is not torch.float32 or not x.is_cpu:
            return None
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None
        if not self._watch.unchanged:
            # While it is tried what it computes, its own forward runs.
            self._norm, self._watch = None, Watch([module], module.parameters())
            self._norm = _norm_of(module)
        if self._norm is None or x.shape[-1] != _width(module):
            return None
        if is_differentiated((x, *module.parameters())):
            return None
        return cpu_backend().normed(self._norm, x.contiguous())


def exchange_norm(parent: nn.Module, name: str) -> None:
    """Puts a native step in the place of a norm, where its kind is known."""
    norm = getattr(parent, name)
    if isinstance(norm, NativeNorm):
        return
    try:
        step = NormStep(norm)
    except UnknownLayerError:
        return
    setattr(parent, name, exchanged(norm, step, NativeNorm))


def _norm_of(module: nn.Module) -> Norm | None:
    try:
        return recognised_norm(module, _width(module))
    except UnknownLayerError:
        return None


def _width(module: nn.Module) -> int:
    """Numbers of a row.

    Raises:
        UnknownLayerError: nothing says how many.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.device.type != "cpu":
        raise UnknownLayerError(f"its norm {type(module).__name__} has no weight of a row's width")
    return int(weight.shape[0])
