"""A linear layer's weight in the order in which a kernel reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auxkern.core.memory import LargePages

COMPUTES = ("float32", "bfloat16", "int8")
# How values are kept; what the kernels call them is the place in this list.
KINDS = (
    *("float32", "float16", "bfloat16", "bfloat16 pairs", "int8"),
    *("Q8_0", "Q4_0", "Q4_1", "Q8_0 widened", "Q4_0 widened", "Q4_1 widened"),
)
ACTIVATIONS = ("identity", "silu", "gelu_tanh", "gelu", "relu")  # likewise
STORED_COMPUTES = ("float32", "int8")  # that read a GGUF file's blocks; others take them widened
BLOCK = 32  # values that share a scale in a GGUF file
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
GROUP = 64  # k that share a scale in int8: a base's nll then stays within 0.01 of float32's


def check_compute(compute: str) -> None:
    """Raises ValueError if there is no such arithmetic."""
    if compute not in COMPUTES:
        raise ValueError(f"compute is {compute!r}; choose one of {', '.join(map(repr, COMPUTES))}")


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a weight (N, K) in the blocks of a GGUF file, as they stand there.

    A block has 32 values of a row: a scale d in half precision, of Q4_1 a minimum m likewise, and 32 integers
    q. They stand for d q, d (q - 8) in Q4_0 and d q + m in Q4_1.

    Attributes:
        kind: "Q8_0", "Q4_0" or "Q4_1".
        blocks: (N, bytes) uint8.
    """

    kind: str
    blocks: Tensor

    @property
    def N(self) -> int:
        """Rows."""
        return self.blocks.shape[0]

    @property
    def K(self) -> int:
        """Values of a row."""
        return self.blocks.shape[1] // BLOCK_BYTES[self.kind] * BLOCK

    def of(self, rows: Tensor | slice) -> StoredRows:
        """Some of the rows, by their numbers."""
        return StoredRows(self.kind, self.blocks[rows])

    def widened(self) -> Tensor:
        """(N, K) float32, as every reader of such files widens them."""
        blocks = self.blocks.reshape(self.N, -1, BLOCK_BYTES[self.kind])
        d = blocks[..., :2].contiguous().view(torch.float16).float()
        if self.kind == "Q8_0":
            return (blocks[..., 2:].view(torch.int8).float() * d).flatten(1)
        integers = blocks[..., -BLOCK // 2 :]
        q = torch.cat([integers & 15, integers >> 4], -1)
        if self.kind == "Q4_0":
            return ((q.float() - 8) * d).flatten(1)
        return (q.float() * d + blocks[..., 2:4].contiguous().view(torch.float16).float()).flatten(1)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (N, K) that is not trained, packed once for products on a CPU; ``pack`` makes it.

    Attributes:
        kind: of ``KINDS``: how values are kept. The first three are multiplied in float32, exactly as kept;
            the last six are a GGUF file's, whose integers are multiplied with rows rounded as int8's, or
            widened and multiplied in float32.
        N: outputs.
        K: inputs.
        group: of integers, k that share a scale of the weight; else 0.
        row_group: of those that are multiplied as such, k of a row that share its scale; 0: all.
        gated: whether the first N / 2 rows are the gate of the others, and stand beside them.
        values: (bytes,) uint8, as kernels/include/auxkern.h says.
        scales: (panels * groups * 16,) float32; empty but for int8: a file's stand among the values.
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
        if self.kind in BLOCK_BYTES:
            return "int8"
        return {"int8": "int8", "bfloat16 pairs": "bfloat16"}.get(self.kind, "float32")

    @property
    def stored_kind(self) -> str | None:
        """Of ``BLOCK_BYTES``: the kind of the file's blocks; None if it is not of such."""
        kind = self.kind.partition(" ")[0]
        return kind if kind in BLOCK_BYTES else None

    @property
    def width(self) -> int:
        """Columns of a product's result."""
        return self.N // 2 if self.gated else self.N
