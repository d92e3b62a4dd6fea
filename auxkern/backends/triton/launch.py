"""A kernel launch as a value: run it, or compile it ahead of time for a GPU that is not there.

Beside it stands what terms and rows are as arguments of kernels; ``device/rows.py`` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from auxkern.core.terms import Logits

VECTOR_BYTES = 16
MAX_SPLITS = 128  # programs that may share a row; the width of the kernel that combines them
_UNBOUNDED = 2**30 - 2  # an inner size that no row number reaches; its code is an int32

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: number of programs along each axis.
        arguments: by name: tensors, numbers, and (named) tuples of them.
        constants: by name: the ``tl.constexpr`` arguments.
        num_warps: warps per program.
        bytes_moved: bytes of logits and gradients that the launch must read and write.
        flops: floating-point operations, an exponential counted as one.
        num_stages: tiles of operands in flight in a loop over products; None for the compiler's choice.
        registers: most of them per thread, on NVIDIA's GPUs; None for the compiler's choice, which spills
            some where that lets more programs in.
        tensor_flops: those of matrix products of 16-bit operands, which are not in ``flops``.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, object]
    constants: dict[str, Any]
    num_warps: int
    bytes_moved: int
    flops: int
    num_stages: int | None = None
    tensor_flops: int = 0
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the source."""
        given = {"num_stages": self.num_stages, "maxnreg": self.registers}
        chosen = {name: value for name, value in given.items() if value is not None}
        # Triton's default for fused multiply-adds is an environment variable's and a version's; the last
        # bits of a loss, and with them a draw, would change with it.
        return {"num_warps": self.num_warps, "enable_fp_fusion": True, **chosen}

    def run(self) -> CompiledKernel | None:
        """Launch on the current CUDA device, or in Triton's interpreter; the binary, if there is one."""
        given = self.arguments | self.constants | self.options
        kernel: CompiledKernel | None = self.kernel[self.grid](**given)
        return kernel

    def source(self) -> ASTSource:
        """What Triton would compile for this launch."""
        names = self.kernel.arg_names
        plain = {
            self.kernel.params[i].name for i in range(len(names)) if self.kernel.params[i].do_not_specialize
        }
        signature = {name: _signature(self.arguments[name]) for name in self.arguments}
        signature |= dict.fromkeys(self.constants, "constexpr")
        attributes: dict[tuple[int, ...], object] = {}
        for name in self.arguments:
            if name not in plain:
                _mark_aligned((names.index(name),), self.arguments[name], attributes)
        return ASTSource(self.kernel, {n: signature[n] for n in names}, self.constants, attributes)

    def compile(self, target: GPUTarget) -> CompiledKernel:
        """Compile for ``target``; needs no GPU.

        Args:
            target: such as ``GPUTarget("cuda", 90, 32)``.
        """
        return triton.compile(self.source(), target=target, options=self.options)


def _signature(value: object) -> object:
    if isinstance(value, tuple):
        parts: Iterable[Any] = map(_signature, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if isinstance(value, int) and -(2**31) <= value < 2**31 else "i64"


def _mark_aligned(path: tuple[int, ...], value: object, attributes: dict[tuple[int, ...], object]) -> None:
    """Note the pointers that Triton sees to be multiples of 16 bytes; ints are coded never to be."""
    if isinstance(value, tuple):
        for index, part in enumerate(value):
            _mark_aligned((*path, index), part, attributes)
    elif isinstance(value, Tensor) and value.data_ptr() % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]


def splits(rows: int, tiles: int, multiprocessors: int, programs: int) -> int:
    """Programs that share one row: enough to give every multiprocessor so many programs.

    Args:
        rows: N.
        tiles: tiles in a row; no program gets less than one.
        multiprocessors: of the device.
        programs: wanted per multiprocessor.
    """
    wanted = -(-multiprocessors * programs // rows)
    return max(1, min(wanted, tiles, MAX_SPLITS))


class LogitsArgument(NamedTuple):
    """A term, or a gradient, as kernels take it: [n // inner, n % inner, v] of a strided tensor."""

    logits: Tensor
    outer_stride: int  # coded, in elements, like the three that follow
    inner_stride: int
    inner: int
    column_stride: int
    scale: float
    softcap: float


def as_argument(x: Tensor, scale: float = 1.0, softcap: float = 0.0) -> LogitsArgument:
    """The (outer, inner, V) tensor ``x`` as kernels take it; a ``softcap`` of 0 is none."""
    outer_stride, inner_stride, inner, column_stride = map(encode, (*_row_steps(x), x.stride(2)))
    return LogitsArgument(x, outer_stride, inner_stride, inner, column_stride, scale, softcap)


def _row_steps(x: Tensor) -> tuple[int, int, int]:
    """(outer stride, inner stride, inner size)."""
    # With one outer index the inner size is N: fixed instead, so that no kernel depends on N.
    if x.shape[0] == 1:
        return 0, x.stride(1), _UNBOUNDED
    return x.stride(0), x.stride(1), x.shape[1]


def encode(n: int) -> int:
    """A stride or a size as kernels take it."""
    # Triton compiles anew for ints in tuples that are 1 or divisible by 16; odd ones above 1 are
    # neither, so no batch size or length compiles anything.
    return 2 * n + 3


class Alignment(NamedTuple):
    """Which streams can be read or written 16 bytes at a time.

    Attributes:
        leader: index of the stream at whose boundaries rows are cut; -1 if no stream has adjacent
            columns.
        aligned: per stream, whether its rows begin as far from a boundary as the leader's.
        granule: columns that a vector of the narrowest aligned stream holds.
    """

    leader: int
    aligned: tuple[bool, ...]
    granule: int


@dataclass(frozen=True)
class _Steps:
    """Where the rows of one stream begin, in elements from a multiple of 16 bytes."""

    first: int
    outer: int
    inner: int
    inner_size: int
    lanes: int  # elements in 16 bytes

    def modulo(self, lanes: int) -> tuple[int, int, int, int]:
        """Equal for streams whose rows all begin equally far from a boundary of ``lanes``."""
        outer, inner, size = self.outer % lanes, self.inner % lanes, self.inner_size
        if size == _UNBOUNDED or outer == inner * size % lanes:
            outer = size = 0
        return self.first % lanes, outer, inner, size


def alignment(streams: list[Tensor]) -> Alignment:
    """Choose the boundaries that let the most bytes move in whole vectors.

    Args:
        streams: (outer, inner, V) tensors, read or written.
    """
    steps = {}
    for index, x in enumerate(streams):
        if x.stride(2) == 1:
            first, lanes = x.data_ptr() // x.element_size(), VECTOR_BYTES // x.element_size()
            # A single row goes nowhere, whatever its strides say.
            by_row = _row_steps(x) if x.shape[0] * x.shape[1] > 1 else (0, 0, _UNBOUNDED)
            steps[index] = _Steps(first, *by_row, lanes)
    best, chosen = -1, Alignment(-1, (False,) * len(streams), 8)
    # The narrowest dtypes first: mostly one of them serves all, and the search is over.
    for leader, its in sorted(steps.items(), key=lambda item: -item[1].lanes):
        aligned = tuple(
            i in steps
            and steps[i].lanes <= its.lanes
            and steps[i].modulo(steps[i].lanes) == its.modulo(steps[i].lanes)
            for i in range(len(streams))
        )
        gain = sum(x.element_size() for x, yes in zip(streams, aligned, strict=True) if yes)
        if gain > best:
            best, chosen = gain, Alignment(leader, aligned, its.lanes)
        if all(aligned):
            break
    return chosen


def as_arguments(terms: Sequence[Logits]) -> tuple[LogitsArgument, ...]:
    """Logits as kernels take them; a scale for each row is not among it."""
    return tuple(
        [
            as_argument(t.values, 1.0 if isinstance(t.scale, Tensor) else t.scale, t.softcap or 0.0)
            for t in terms
        ]
    )


def term_constants(terms: Sequence[Logits]) -> dict[str, object]:
    """The constants of every kernel that reads these terms."""
    return {
        "UNIT": tuple(t.values.stride(2) == 1 for t in terms),
        "CAPPED": tuple(t.softcap is not None for t in terms),
    }


class RowsArgument(NamedTuple):
    """``RowLosses`` as kernels take them."""

    nll: Tensor
    row_max: Tensor
    log_sum: Tensor
    smooth: Tensor
    argmax: Tensor
    term_nll: Tensor
    lse: Tensor
