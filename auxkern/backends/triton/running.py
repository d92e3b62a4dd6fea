"""What the families of kernels have in common: where they run, and how their launches get there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel

from auxkern.backends.chunked import RowKernels
from auxkern.backends.triton.device.rows import decode
from auxkern.backends.triton.gpu import Gpu, gpu_of
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.replays import Replay, key_of

_MOST_REPLAYS = 256
_OLDEST = (3, 6)

_ATEN = torch.ops.aten
_UNINITIALISED = (_ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.detach)

_Result = TypeVar("_Result", bound=tuple[Tensor, ...])


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


class TritonKernels(RowKernels):
    """What the families of kernels have in common."""

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernels; that was decided when they were imported."""
        return not isinstance(decode, triton.JITFunction)

    def gpu(self, device: torch.device) -> Gpu:
        """What plans know of a device.

        Raises:
            ValueError: the file with its measured choices is bad; see ``tuned.configs_for``.
        """
        known = self._gpus.get(device)
        if known is None:
            known = self._gpus[device] = gpu_of(device)
        return known

    def run(self, launches: Iterable[Launch], device: torch.device) -> list[CompiledKernel | None]:
        """Launch in order; the binary of each, if there is one."""
        with _on(device):
            return [launch.run() for launch in launches]

    def run_plan(
        self, plan: Callable[[], tuple[_Result, list[Launch]]], inputs: Sequence[Tensor], facts: Hashable
    ) -> _Result:
        """What a plan returns, filled by its launches; one that only addresses tell from another is not made.

        Args:
            plan: makes its result, a named tuple of tensors, and what the launches share uninitialised; one
                that computes anything is made for each call.
            inputs: every tensor that it is given.
            facts: everything else that it depends on.
        """
        key, device = key_of(inputs, facts), inputs[0].device
        replay = self._replays.get(key)
        if replay is not None and replay.possible:
            with _on(device):
                return cast(_Result, replay(inputs))
        if replay is not None or key not in self._replays:
            # Of a call that never comes again nothing need be known.
            if key not in self._replays:
                self._remember(key, None)
            result, launches = plan()
            self.run(launches, device)
            return result
        watch = _Watch()
        with watch:
            result, launches = plan()
        replay = Replay(inputs, result, launches, self.run(launches, device))
        # What a plan computes would not be computed when its launches are made again.
        replay.possible &= not watch.computed
        self._remember(key, replay)
        return result

    def _remember(self, key: Hashable, replay: Replay | None) -> None:
        if len(self._replays) >= _MOST_REPLAYS:
            self._replays.clear()
        self._replays[key] = replay

    @cached_property
    def _gpus(self) -> dict[torch.device, Gpu]:
        return {}

    @cached_property
    def _replays(self) -> dict[Hashable, Replay | None]:
        """By ``key_of`` a call; None where there has been one such call."""
        return {}

    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        if _version() < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            return f"Triton {triton.__version__} is older than {oldest}; pip install 'triton>={oldest}'"
        if torch.float64 in dtypes:
            return 'its kernels sum in float32; use backend="reference" for float64'
        if device.type == "cuda" or (device.type == "cpu" and self.interpreted):
            return None
        if device.type == "cpu":
            return "its kernels need a GPU; set TRITON_INTERPRET=1 before Python starts to interpret them"
        return f"its kernels run on CUDA and ROCm GPUs, not on {device.type!r}"

    def linear_refusal(self, x: Tensor, weight: Tensor) -> str | None:
        return "it leaves linear layers to the library of the device"


class _Watch(TorchDispatchMode):
    """Sees whether torch computes anything, beside memory and views of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.computed |= not (func.is_view or func.overloadpacket in _UNINITIALISED)
        return func(*args, **(kwargs or {}))


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever device its tensors are on."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
