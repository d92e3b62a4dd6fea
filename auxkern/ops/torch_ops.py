"""How a function becomes a ``torch.library`` operator: apart from autocast, without a derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def apart_from_autocast(function: _Function) -> _Function:
    """``function`` with autocast off for the device of its first tensor; a term or list may hold it."""

    @functools.wraps(function)
    def apart(*arguments: Any, **options: Any) -> Any:
        tensor = _first_tensor(arguments)
        kind = "meta" if tensor is None else tensor.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(*arguments, **options)
        with torch.autocast(kind, enabled=False):
            return function(*arguments, **options)

    return apart  # type: ignore[return-value]


def implements(name: str) -> Callable[[_Function], _Function]:
    """Registers a function as the ``torch.library`` operator ``name``, on every device.

    A kernel runs under the autocast of whoever calls the operator, which would round the products in it;
    so it is put apart. Autograd Functions call operators with gradients off. Where one is reached with
    gradients on, as by ``torch.func.grad`` in compiled code, torch would take its results for constants:
    to ask for a derivative there is an error.
    """

    def register(function: _Function) -> _Function:
        apart = apart_from_autocast(function)
        torch.library.impl(name, "default")(apart)
        if not getattr(torch.ops.auxkern, name.removeprefix("auxkern::")).default._schema.is_mutable:
            torch.library.register_autograd(name, functools.partial(_refuse, name))
        return apart

    return register


def _refuse(name: str, *_: Any) -> Any:
    raise RuntimeError(
        f"the operator {name} has no derivative; auxkern's own functions have, but for transforms "
        "of torch.func in compiled code; there use torch's functions on auxkern.ops.dense.dense_logits(terms)"
    )


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((x for x in map(_first_tensor, value) if x is not None), None)
    return _first_tensor(list(getattr(value, "tensors", {}).values()))
