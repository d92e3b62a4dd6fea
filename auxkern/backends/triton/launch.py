"""A kernel launch as a value: run it, or compile it ahead of time for a GPU that is not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

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
        tensor_flops: those of matrix products of 16-bit operands, which are not in ``flops``.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    bytes_moved: int
    flops: int
    num_stages: int | None = None
    tensor_flops: int = 0

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the source."""
        stages = {} if self.num_stages is None else {"num_stages": self.num_stages}
        return {"num_warps": self.num_warps, **stages}

    def run(self) -> None:
        """Launch on the current CUDA device, or in Triton's interpreter."""
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    def source(self) -> ASTSource:
        """What Triton would compile for this launch."""
        names = self.kernel.arg_names
        plain = {
            self.kernel.params[i].name for i in range(len(names)) if self.kernel.params[i].do_not_specialize
        }
        signature = {name: _signature(self.arguments[name]) for name in self.arguments}
        signature |= dict.fromkeys(self.constants, "constexpr")
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
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


def _signature(value: Any) -> Any:
    if isinstance(value, tuple):
        parts = map(_signature, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _mark_aligned(path: tuple[int, ...], value: Any, attributes: dict[tuple[int, ...], Any]) -> None:
    """Note the pointers that Triton sees to be multiples of 16 bytes; ints are coded never to be."""
    if isinstance(value, tuple):
        for index, part in enumerate(value):
            _mark_aligned((*path, index), part, attributes)
    elif isinstance(value, Tensor) and value.data_ptr() % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
