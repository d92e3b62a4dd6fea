"""Operators compute in the dtypes that they promise, whatever autocast their caller runs under."""

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
    """Registers a function as the ``torch.library`` operator ``name``, on every device, apart from autocast.

    A kernel runs under the autocast of whoever calls the operator; the products in it would be rounded.
    """

    def register(function: _Function) -> _Function:
        apart = apart_from_autocast(function)
        torch.library.impl(name, "default")(apart)
        return apart

    return register


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((x for x in map(_first_tensor, value) if x is not None), None)
    return _first_tensor(list(getattr(value, "tensors", {}).values()))
