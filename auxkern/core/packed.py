"""A linear layer's weight in the order in which a kernel reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from auxkern.core.memory import LargePages

COMPUTES = ("float32", "bfloat16", "int8")
# How values are kept; what the kernels call them is the place in this list.
KINDS = ("float32", "float16", "bfloat16", "bfloat16 pairs", "int8")
ACTIVATIONS = ("identity", "silu", "gelu_tanh", "gelu", "relu")  # likewise
GROUP = 64  # k that share a scale in int8: a base's nll then stays within 0.01 of float32's


def check_compute(compute: str) -> None:
    """Raises ValueError if there is no such arithmetic."""
    if compute not in COMPUTES:
        raise ValueError(f"compute is {compute!r}; choose one of {', '.join(map(repr, COMPUTES))}")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (N, K) that is not trained, packed once for products on a CPU; ``pack`` makes it.

    Attributes:
        kind: of ``KINDS``: how values are kept. The first three are multiplied in float32, exactly as kept.
        N: outputs.
        K: inputs.
        group: of int8, k that share a scale of the weight; else 0.
        row_group: of int8, k of a row that share its scale; 0: all.
        gated: whether the first N / 2 rows are the gate of the others, and stand beside them.
        values: (bytes,) uint8, as kernels/include/auxkern.h says.
        scales: (panels * groups * 16,) float32; empty but for int8.
    """

    kind: str
    N: int
    K: int
    group: int
    row_group: int
    gated: bool
    values: Tensor
    scales: Tensor

    def moved(self, memory: LargePages) -> PackedWeight:
        """The same in other memory."""
        return replace(self, values=memory.copy(self.values), scales=memory.copy(self.scales))

    @property
    def nbytes(self) -> int:
        """Memory of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    @property
    def compute(self) -> str:
        """Of ``COMPUTES``: the arithmetic of products with it."""
        return {"int8": "int8", "bfloat16 pairs": "bfloat16"}.get(self.kind, "float32")

    @property
    def width(self) -> int:
        """Columns of a product's result."""
        return self.N // 2 if self.gated else self.N
