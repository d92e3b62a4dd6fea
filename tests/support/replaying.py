"""A stand-in for CUDA graphs on a CPU: torch's operations, taken down once and done again.

What a CUDA graph keeps is kept: which operations, on which memory, with which Python numbers. So a step
that depends on a number of the host's goes wrong here as it would there, which a recorder that calls the
step again would hide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from auxkern.generation import Engine


class _Taken(TorchDispatchMode):
    """Takes down every operation, with its result, as it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:  # a view goes on showing what its memory holds
            self.operations.append((func, args, kwargs or {}, result))
        return result


class Replays:
    """Records calls as ``CudaRecorder`` does.

    Attributes:
        recorded: calls that were taken down.
        replayed: replays so far.
        running: whether one is going on.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.running = False

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        for _ in range(2):
            call()
        with _Taken() as taken:
            call()
        self.recorded += 1

        def replay() -> None:
            self.running = True
            for func, args, kwargs, result in taken.operations:
                _again(func, args, kwargs, result)
            self.running = False
            self.replayed += 1

        return replay


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """The operation once more, its result in the memory of the first time."""
    new = func(*args, **kwargs)
    for old, value in zip(tree_leaves(result), tree_leaves(new), strict=True):
        if isinstance(old, torch.Tensor) and old is not value:
            if old.shape != value.shape:
                raise AssertionError(f"{func} made {tuple(old.shape)} and now {tuple(value.shape)}")
            old.copy_(value)


class Recorded(Engine):
    """An engine whose steps are taken down once and done again.

    A native kernel is not seen, and so not done again: draws must be torch's own operations.
    """

    def _recorder(self, graphs: bool | None) -> Replays:
        self.replays = Replays()
        return self.replays


class Repeated(Engine):
    """An engine whose recorded steps are called again: quicker than ``Replays``, native draws and all.

    What a step takes from the host is not noticed.
    """

    recorded = 0

    def _recorder(self, graphs: bool | None) -> Callable[[Callable[[], None]], Callable[[], None]]:
        def record(call: Callable[[], None]) -> Callable[[], None]:
            self.recorded += 1
            call()
            return call

        return record


class Outside(TorchDispatchMode):
    """Names of the operations that are done outside of replays, views left out."""

    def __init__(self, replays: Replays) -> None:
        super().__init__()
        self._replays = replays
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._replays.running and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
