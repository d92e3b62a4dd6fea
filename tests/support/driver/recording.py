"""Triton's own launcher and JIT on a machine without a GPU, under a driver that keeps what it is given.

``libcuda.c`` stands in for NVIDIA's driver. A process that has loaded it has it for good, so tests with it
run in a process of their own: ``library`` compiles it, ``test_launched.py`` starts one.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import CompiledKernel

from auxkern.backends import choice
from auxkern.backends import triton as backend
from auxkern.backends.triton import Triton, configs
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.kernels import KERNELS
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.replays import Replay, key_of
from auxkern.core.draws import RowTokens
from auxkern.core.sums import Sum

# Where the library lies, for a process that runs these tests.
VARIABLE = "AUXKERN_RECORDING_DRIVER"
H100, A100 = 0, 1
# No real stream is at such an address; it must come through as it is.
STREAM = 0x5EED0008
_MAJOR, _MINOR, _MULTIPROCESSORS = 75, 76, 16  # CUdevice_attribute


def compiler() -> str | None:
    """A C compiler, which Triton's launcher needs as well."""
    return shutil.which("gcc") or shutil.which("clang")


def library(folder: Path) -> Path:
    """``libcuda.so.1``, compiled in this folder."""
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    path = folder / "libcuda.so.1"
    options = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", f"-I{headers}"]
    source = Path(__file__).with_name("libcuda.c")
    subprocess.run([str(compiler()), *options, str(source), "-o", str(path)], check=True)
    return path


class Record(ctypes.Structure):
    """``struct launch`` of libcuda.c."""

    _fields_ = (
        ("number", ctypes.c_ulonglong),
        ("function", ctypes.c_void_p),
        ("stream", ctypes.c_ulonglong),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("bytes", ctypes.c_uint),
        ("arguments", ctypes.c_ubyte * 4096),
    )


class Parameter(NamedTuple):
    """What the PTX of a kernel declares."""

    type: str  # such as "u64"
    pointer: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return int(self.type[1:]) // 8


def parameters(ptx: str) -> list[Parameter]:
    """Of the one kernel in this text, in order."""
    declared = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.DOTALL)
    if declared is None:
        raise ValueError("the PTX has no .entry with parameters")
    listed = re.findall(r"\.param\s+\.(\w+)\s+(\.ptr)?", declared[1])
    return [Parameter(type, bool(pointer)) for type, pointer in listed]


class Launched(NamedTuple):
    """One launch: as we asked for it, as the driver got it, and what Triton compiled for it."""

    launch: Launch
    record: Record
    kernel: CompiledKernel


class RecordingDriver(CudaDriver):
    """Triton's driver, which asks the library, not torch, for devices; every tensor counts as a device's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self._library, self.device = library, H100
        self.get_current_device = lambda: self.device
        self.get_current_stream = lambda device: STREAM
        self.get_device_capability = lambda device: (
            self.attribute(_MAJOR, device),
            self.attribute(_MINOR, device),
        )

    def attribute(self, which: int, device: int) -> int:
        """A ``CUdevice_attribute``."""
        value = ctypes.c_int()
        if self._library.cuDeviceGetAttribute(ctypes.byref(value), which, device):
            raise ValueError(f"the library has no attribute {which} of device {device}")
        return value.value


class Recorder(Triton):
    """The backend on CPU tensors, launched as on a GPU.

    Attributes:
        driver: through which it launches; its ``device`` is the GPU.
        compiled: names of the kernels that the JIT has compiled, in order.
        checks_replays: whether launches that are made again are compared with what a plan would make.
        replayed: how many calls that was done for.
        plans: how many have been made for calls.
    """

    def __init__(self, path: Path) -> None:
        # Under its own name, so that whoever opens libcuda.so.1 later gets this one.
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._last = Record.in_dll(self._library, "recording_last")
        self.driver = RecordingDriver(self._library)
        self.compiled: list[str] = []
        self._kept: list[Launched] | None = None
        self._recorded: dict[int, Gpu] = {}
        self.checks_replays, self.replayed, self.plans = False, 0, 0

    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        return None

    def heads_refusal(self, sum: Sum) -> str | None:
        # Of tensors on a CPU, in the interpreter.
        reason = super().heads_refusal(sum)
        return None if reason is not None and "interpreter" in reason else reason

    def gpu(self, device: torch.device) -> Gpu:
        index = self.driver.device
        if index not in self._recorded:
            number = self.driver.attribute(_MULTIPROCESSORS, index)
            self._recorded[index] = Gpu(f"recorded {index}", configs.A100, number, cache_bytes=sys.maxsize)
        return self._recorded[index]

    def run(self, launches: Iterable[Launch], device: torch.device) -> list[CompiledKernel | None]:
        kernels: list[CompiledKernel | None] = []
        for launch in launches:
            kernels += super().run([launch], device)
            if self._kept is not None:
                self._kept.append(self._launched(launch))
            for out in launch.arguments.values():
                if isinstance(out, RowTokens):
                    out.token.zero_()
        return kernels

    def run_plan(self, plan: Any, inputs: Any, facts: Any, *unplanned: Any) -> Any:
        if self._kept is not None:
            # What is launched again has no ``Launch``.
            self._replays.clear()
        replay = self._replays.get(key_of(inputs, facts)) if self.checks_replays else None
        if replay is not None and replay.possible:
            _, fresh = self.recorded(plan, inputs)
            assert _described(replay) == _described(fresh), "a fact is missing: calls that differ look alike"
            self.replayed += 1

        def counted() -> Any:
            self.plans += 1
            return plan()

        done = super().run_plan(counted, inputs, facts, *unplanned)
        if isinstance(done, RowTokens):
            # No kernel has run, and what follows a draw looks at its tokens.
            done.token.zero_()
        return done

    def forget(self) -> None:
        """As if nothing had been compiled."""
        for kernel in KERNELS:
            kernel.function.device_caches.clear()
        self.compiled.clear()
        self._replays.clear()

    @property
    def launches(self) -> int:
        """That the driver has seen."""
        return self._last.number

    def was_given(self, x: Tensor) -> bool:
        """Whether the last kernel was given this address."""
        given = bytes(self._last.arguments[: self._last.bytes])
        return x.data_ptr().to_bytes(8, "little") in given

    def _launched(self, launch: Launch) -> Launched:
        record = Record.from_buffer_copy(self._last)
        kernels = launch.kernel.device_caches[self.driver.device][0].values()
        return Launched(launch, record, next(k for k in kernels if k.function == record.function))

    @contextmanager
    def kept(self) -> Iterator[list[Launched]]:
        """The launches within."""
        self._kept = launched = []
        try:
            yield launched
        finally:
            self._kept = None

    def declare(
        self, module: object, function: int, name: str, metadata_group: dict[str, str], hash: str
    ) -> None:
        """Tell the driver what a kernel takes, before its first launch: a hook of Triton's."""
        ptx = next(path for file, path in metadata_group.items() if file.endswith(".ptx"))
        sizes = [parameter.size for parameter in parameters(Path(ptx).read_text())]
        given = (ctypes.c_uint * len(sizes))(*sizes)
        if self._library.recording_declare(ctypes.c_void_p(function), len(sizes), given):
            raise ValueError(f"{name} has {len(sizes)} parameters, more than the recording driver keeps")

    def count(self, *, fn: Any, **_: Any) -> None:
        """Note that something was compiled: a hook of Triton's."""
        self.compiled.append(fn.name)


def _described(replay: Replay) -> list[object]:
    """All that it launches; the place of a tensor stands for its address."""
    places = [1000 * place for place in range(1, 100)]
    launches = [(id(kernel), grid, filled(places)) for kernel, grid, filled, _ in replay._launches]
    return [*launches, *replay._constants]


@contextmanager
def recorder(path: Path) -> Iterator[Recorder]:
    """Within, the backend called "triton" launches through this library; everything global is put back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_LIBCUDA_PATH", str(path.parent))
        recorder = Recorder(path)
        patch.setattr(triton.runtime.driver, "_active", recorder.driver)
        patch.setattr(knobs.runtime, "jit_post_compile_hook", recorder.count)
        patch.setattr(backend, "BACKEND", recorder)
        choice._import.cache_clear()
        # As on a GPU: this backend is the first choice.
        patch.setattr(
            choice, "_explained", lambda where, dtypes: choice.Explanation("triton", where, dtypes, {})
        )
        knobs.runtime.kernel_load_end_hook.add(recorder.declare)
        try:
            yield recorder
        finally:
            knobs.runtime.kernel_load_end_hook.remove(recorder.declare)
            recorder.forget()
            patch.undo()
            choice._import.cache_clear()


def flat(value: object) -> Iterator[Tensor | int | float]:
    """What a kernel takes of an argument: the parts of (named) tuples, in order."""
    if isinstance(value, tuple):
        for part in value:
            yield from flat(part)
    else:
        yield value
