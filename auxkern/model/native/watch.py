"""Whether modules are still as they were when something was made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import nn

_version = attrgetter("_version")
_values: Callable[[dict[str, Any]], Iterable[Any]] = dict.values


class Watch:
    """The children, parameters and numbers of some modules.

    Every step looks at those of all layers, hundreds of them: without a loop in Python.

    Args:
        owners: whose own children and parameters must stay the same objects.
        parameters: whose numbers must stay.
    """

    def __init__(self, owners: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> None:
        self._places = [
            places for owner in owners for places in (owner._modules, owner._parameters) if places
        ]
        self._present = list(chain.from_iterable(map(_values, self._places)))
        self._parameters = list(parameters)
        self._addresses_of = [p.data_ptr for p in self._parameters]
        # In-place changes count a parameter's version up; a move gives it other memory.
        self._versions = list(map(_version, self._parameters))
        self._addresses = [address() for address in self._addresses_of]

    @classmethod
    def joined(cls, each: Iterable[Watch]) -> Watch:
        """All that some watches look at, as they knew it."""
        watch = cls((), ())
        for one in each:
            for name, known in vars(one).items():
                getattr(watch, name).extend(known)
        return watch

    @property
    def unchanged(self) -> bool:
        """Whether all is as it was."""
        return (
            sum(map(len, self._places)) == len(self._present)
            and all(map(is_, chain.from_iterable(map(_values, self._places)), self._present))
            and list(map(_version, self._parameters)) == self._versions
            and [address() for address in self._addresses_of] == self._addresses
        )
