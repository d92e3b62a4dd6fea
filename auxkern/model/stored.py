"""Weights of a GGUF file as they are stored, told again in the model that was loaded from it.

A model's weight is stored where a tensor of the file, widened, has its rows, in any order: what a family
calls a tensor, and how its converter turned rows, need not be known. A weight whose numbers were changed on
the way into the model, or later, is not stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auxkern.core.packed import BLOCK_BYTES, StoredRows

_ROWS = 4096  # that are widened at once


class _Sorted(NamedTuple):
    """A tensor of the file, and its rows in the order of what names them."""

    rows: StoredRows
    order: Tensor


class StoredWeights:
    """The tensors of a GGUF file that are kept in blocks which kernels multiply: Q8_0, Q4_0 and Q4_1.

    Args:
        path: the file, which must stay where it is.

    Raises:
        ModuleNotFoundError: the package gguf is not installed.
        OSError, ValueError: there is no such file, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._shapes: set[tuple[int, int]] = set()
        self._tensors: dict[bytes, _Sorted] = {}
        for name, rows in _tensors(self.path):
            order, named = _named(rows)
            if order is None:
                raise ValueError(
                    f"{self.path}: the {rows.kind} tensor {name} has scales or minima that are NaN or "
                    "infinite; the file is damaged, get it again"
                )
            self._shapes.add((rows.N, rows.K))
            self._tensors[named] = _Sorted(rows, order)

    def __len__(self) -> int:
        return len(self._tensors)

    def __deepcopy__(self, memo: Any) -> StoredWeights:
        return self  # it never changes

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def rows_of(self, weight: Tensor) -> StoredRows | None:
        """The blocks of a weight, row by row; None if no tensor of the file has its numbers.

        Args:
            weight: (N, K) on the CPU.
        """
        weight = weight.detach()
        if weight.dtype is not torch.float32 or tuple(weight.shape) not in self._shapes:
            return None
        order, named = _named(weight)
        tensor = self._tensors.get(named)
        if order is None or tensor is None:
            return None
        numbers = torch.empty_like(order)
        numbers[order] = tensor.order
        rows = tensor.rows.of(numbers)
        same = all(torch.equal(rows.of(some).widened(), weight[some]) for some in _slices(rows.N))
        return rows if same else None


def _tensors(path: Path) -> Iterator[tuple[str, StoredRows]]:
    from gguf import GGUFReader

    # Mapped, and copied where somebody wrote, which nobody does: torch has no tensors for reading alone.
    for tensor in GGUFReader(path, "c").tensors:
        kind = tensor.tensor_type.name
        if kind in BLOCK_BYTES and tensor.data.ndim == 2:
            yield tensor.name, StoredRows(kind, torch.from_numpy(tensor.data))


def _slices(N: int) -> list[slice]:
    return [slice(begin, begin + _ROWS) for begin in range(0, N, _ROWS)]


def _named(weight: StoredRows | Tensor) -> tuple[Tensor | None, bytes]:
    """Rows sorted by a number drawn of their values, and all numbers; no order if a value is not finite."""
    N, K = (weight.N, weight.K) if isinstance(weight, StoredRows) else weight.shape
    factors = torch.randint(-(2**62), 2**62, (K,), generator=torch.Generator().manual_seed(K))
    names = torch.empty(N, dtype=torch.int64)
    for some in _slices(N):
        values = weight.of(some).widened() if isinstance(weight, StoredRows) else weight[some].contiguous()
        if not values.isfinite().all():
            return None, b""
        # 0.0 and -0.0 are one number. Products wrap around.
        names[some] = ((values + 0.0).view(torch.int32).long() * factors).sum(1)
    order = names.argsort(stable=True)
    return order, names[order].numpy().tobytes() + N.to_bytes(8, "little")
