"""What the families of kernels have in common: where they run, and how their launches get there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache, cached_property
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
from auxkern.backends.triton.replays import Constant, Replay, key_of

_MOST_REPLAYS = 512
_OLDEST = (3, 6)

_ATEN = torch.ops.aten
_UNINITIALISED = (_ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.detach)

_UNKNOWN = object()  # of a call that has not been

_Result = TypeVar("_Result", bound=tuple[Tensor, ...])


@cache
def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


class TritonKernels(RowKernels):
    """What the families of kernels have in common."""

    remembers = True

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
        self,
        plan: Callable[[], tuple[_Result, list[Launch]]],
        inputs: Sequence[Tensor],
        facts: Hashable,
        unplanned: Callable[[], _Result] | None = None,
    ) -> _Result:
        """What a plan returns, filled by its launches; one that only addresses tell from another is not made.

        Args:
            plan: makes its result, a named tuple of tensors, and what the launches share uninitialised; one
                that computes anything but constants is made for each call.
            inputs: every tensor that it is given.
            facts: everything else that it depends on.
            unplanned: does the same otherwise, where launches are not made again; None to run the plan.
        """
        key, device = key_of(inputs, facts), inputs[0].device
        replay = self._replays.get(key, _UNKNOWN)
        if isinstance(replay, Replay) and replay.possible:
            if _is_current(device):
                return cast(_Result, replay(inputs))
            with torch.cuda.device(device):
                return cast(_Result, replay(inputs))
        if replay is not None:
            # Of a call that never comes again nothing need be known.
            if replay is _UNKNOWN:
                self._remember(key, None)
            if unplanned is not None:
                return unplanned()
            result, launches = plan()
            self.run(launches, device)
            return result
        result, replay = self.recorded(plan, inputs)
        self._remember(key, replay)
        return result

    def recorded(
        self, plan: Callable[[], tuple[_Result, list[Launch]]], inputs: Sequence[Tensor]
    ) -> tuple[_Result, Replay]:
        """What a plan returns, filled by its launches, and these, to be made again; as ``run_plan``."""
        watch = _Watch()
        with watch:
            result, launches = plan()
        kernels = self.run(launches, inputs[0].device)
        replay = Replay(inputs, result, launches, kernels, watch.constants)
        # What a plan computes would not be computed when its launches are made again.
        replay.possible &= not watch.computed and bool(launches)
        return result, replay

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
    """Sees whether torch computes anything, beside memory, constants and views of these."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed = False
        self.constants: list[Constant] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        if func is _ATEN.full.default:
            shape, number = args
            self.constants.append(Constant(result, tuple(shape), number, options))
        else:
            self.computed |= not (func.is_view or func.overloadpacket in _UNINITIALISED)
        return result


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever device its tensors are on."""
    return contextlib.nullcontext() if _is_current(device) else torch.cuda.device(device)


def _is_current(device: torch.device) -> bool:
    return device.type == "cpu" or device.index == torch.cuda.current_device()
