"""From a ``Launch`` to its execution: compile to PTX, translate, flatten the arguments, run."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.cache import get_cache_manager

from auxkern.backends.triton.launch import Launch
from tests.support.ptx.fresh import Fresh
from tests.support.ptx.machine import Settings, Work, execute, granule
from tests.support.ptx.memory import Allocation, Global, Shadow
from tests.support.ptx.parser import PtxError, parse
from tests.support.ptx.report import Report
from tests.support.ptx.translate import Code

_SCRATCH = 2  # pointers that Triton adds behind the arguments; null where a kernel needs none


@dataclass(frozen=True)
class Ptx:
    """What Triton makes of a launch, short of a binary.

    Attributes:
        shared: bytes of shared memory of a program.
    """

    text: str
    shared: int


def compile_ptx(launch: Launch, arch: int) -> Ptx:
    """Triton's PTX for a compute capability (80, 90), from its cache or made; ``ptxas`` is not asked."""
    source = launch.source()
    # The PTX names the file, whose lines reports quote.
    path = launch.kernel.fn.__code__.co_filename
    key = f"{triton.__version__} {source.hash()} {sorted(launch.options.items())} {arch} {path} ptx"
    cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    kept = cache.get_file("kernel.ptx")
    if kept is not None:
        with open(kept) as file:
            shared, _, text = file.read().partition("\n")
        return Ptx(text, int(shared))
    text, metadata = lowered(launch, arch, "ptx")
    cache.put(f"{metadata['shared']}\n{text}", "kernel.ptx", binary=False)
    return Ptx(text, metadata["shared"])


def lowered(launch: Launch, arch: int, last: str) -> tuple[str, dict[str, Any]]:
    """Triton's code for a launch behind a stage ("ttir", "ttgir", "llir" or "ptx"), and its metadata."""
    backend = CUDABackend(GPUTarget("cuda", arch, 32))
    source, options = launch.source(), backend.parse_options(dict(launch.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module: Any = source.make_ir(backend.target, options, functions, modules, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata: dict[str, Any] = {"target": backend.target, **options.__dict__}
    for name, lower in stages.items():
        module = lower(module, metadata)
        if name == last:
            break
    return str(module), metadata


@dataclass
class Executor:
    """Runs launches on CPU tensors, as compiled for one GPU.

    Attributes:
        arch: compute capability, 80 or 90.
        report: collects what is wrong.
        races: whether to watch who touches which byte; bounds are always watched.
        fresh: knows memory that nobody has written yet; None to take everything for written.
        edit: a change to the PTX before it is read, for experiments.
        codes: what has been translated, by its PTX.
    """

    arch: int
    settings: Settings = field(default_factory=Settings)
    report: Report = field(default_factory=Report)
    races: bool = True
    fresh: Fresh | None = None
    edit: Any = None
    codes: dict[str, Code] = field(default_factory=dict)

    def run(self, launch: Launch) -> None:
        """Execute every thread of a launch; its results are in its tensors.

        Raises:
            PtxError: something in the kernel is not modelled, or it does not end.
        """
        ptx = compile_ptx(launch, self.arch)
        text = ptx.text if self.edit is None else self.edit(launch, ptx.text)
        if text not in self.codes:
            self.codes[text] = Code(parse(text))
        code = self.codes[text]
        arguments = list(flattened(launch))
        parameters = dict(zip(code.kernel.parameters, _packed(code, arguments), strict=True))
        memory = Global(self._allocations(code, arguments))
        grid = (*launch.grid, 1, 1)[:3]
        if code.kernel.threads != 32 * launch.num_warps:
            raise PtxError(
                f"{code.kernel.name} has {code.kernel.threads} threads, not {launch.num_warps} warps"
            )
        execute(Work(code, grid, parameters, memory, ptx.shared), self.settings, self.report)
        if self.fresh is not None:
            for allocation in memory.allocations:
                if allocation.shadow is not None:
                    self.fresh.note(allocation)

    def _allocations(self, code: Code, arguments: Sequence[tuple[str, Any]]) -> Iterator[Allocation]:
        """One for each storage that tensors among the arguments lie in."""
        storages: dict[int, list[tuple[str, Tensor]]] = {}
        for name, value in arguments:
            if isinstance(value, Tensor) and value.numel():
                storages.setdefault(value.untyped_storage().data_ptr(), []).append((name, value))
        narrowest = granule(code, "global")
        for tensors in storages.values():
            allocation = Allocation(tensors)
            if self.races:
                allocation.shadow = Shadow(allocation.end - allocation.base, narrowest, True)
                if self.fresh is not None:
                    self.fresh.mark(allocation)
            yield allocation


def flattened(launch: Launch) -> Iterator[tuple[str, Any]]:
    """(name, value) of each argument as a kernel's parameters list them: tuples entry by entry."""
    for name in launch.kernel.arg_names:
        if name in launch.arguments:
            yield from _flattened(name, launch.arguments[name])


def _flattened(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        for field_name, part in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from _flattened(f"{name}.{field_name}", part)
    else:
        yield name, value


def _packed(code: Code, arguments: Sequence[tuple[str, Any]]) -> Iterator[bytes]:
    """The bytes of each parameter, which must be declared as what the argument is."""
    declared = list(code.kernel.parameters.values())
    if len(declared) != len(arguments) + _SCRATCH:
        raise PtxError(f"{code.kernel.name} has {len(declared)} parameters for {len(arguments)} arguments")
    for (name, value), parameter in zip(arguments, declared, strict=False):
        if isinstance(value, Tensor):
            kind, layout, value = ("u64",), "<Q", value.data_ptr()
        elif isinstance(value, float):
            kind, layout = ("f32",), "<f"
        elif -(2**31) <= value < 2**31:
            kind, layout = ("u32", "s32"), "<i"
        else:
            kind, layout = ("u64", "s64"), "<q"
        if parameter not in kind:
            raise PtxError(f"{code.kernel.name}: {name} is {value!r}, its parameter {parameter}")
        yield struct.pack(layout, value)
    yield from [bytes(8)] * _SCRATCH
