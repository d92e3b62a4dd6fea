"""A module with the class of another and a native step before its forward."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn


class NativeModule(nn.Module):
    """Mixed into a module's own class by ``exchanged``.

    It has the children, parameters and hooks of the module that it replaces, and is an instance of that
    module's class. What its step does not do, the module's own forward does.
    """

    native_step: Any

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """(..., D) to (..., D); arguments as the module's own forward takes them."""
        y = self.native_step.run(self, x, args, options)
        return super().forward(x, *args, **options) if y is None else y

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class was made here, and has no name that another process could import.
        mixed, kind = type(self).__bases__
        return _blank, (mixed, kind), self.__dict__


@functools.cache
def _native_class(mixed: Any, kind: Any) -> Any:
    return type(f"Native{kind.__name__}", (mixed, kind), {"__module__": __name__})


def _blank(mixed: Any, kind: Any) -> Any:
    native = _native_class(mixed, kind)
    return native.__new__(native)


def exchanged(module: nn.Module, step: Any, mixed: type[NativeModule]) -> Any:
    """A module with the children, parameters and hooks of another, that takes a native step.

    Args:
        module: the other.
        step: whose ``run`` is called first, and says with None that the module's own forward must be.
        mixed: what it is an instance of, too.
    """
    native = _blank(mixed, type(module))
    native.__dict__.update(module.__dict__, native_step=step)
    return native
