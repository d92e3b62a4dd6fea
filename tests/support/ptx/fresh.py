"""Which memory nobody has written yet: allocated without contents, by torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.ptx.memory import Allocation, Array, mark

_EMPTY = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default, torch.ops.aten.new_empty_strided.default,
}  # fmt: skip


class Fresh(TorchDispatchMode):
    """Follows torch's operations: what ``empty`` and its kin hand out is unwritten until one writes to it.

    Tensors are kept, for an address that is freed may be handed out again for something else.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[int, Array] = {}  # of a storage: for each byte
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _EMPTY:
            self.add(result)
        for given, declared in zip(args, func._schema.arguments, strict=False):
            self._note_written(given, declared)
        for declared in func._schema.arguments:
            self._note_written(kwargs.get(declared.name), declared)
        return result

    def _note_written(self, value: Any, declared: Any) -> None:
        if declared.alias_info is not None and declared.alias_info.is_write and isinstance(value, Tensor):
            self.written(value)

    def add(self, tensor: Tensor) -> None:
        """Take a whole tensor for unwritten."""
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and storage.nbytes():
            self._kept.append(tensor)
            self._written[storage.data_ptr()] = np.zeros(storage.nbytes(), bool)

    def copy(self) -> Fresh:
        """As it is now; what is noted in one, the other does not learn."""
        other = Fresh()
        other._kept = list(self._kept)
        other._written = {base: flags.copy() for base, flags in self._written.items()}
        return other

    def written(self, tensor: Tensor) -> None:
        """Torch has written to it."""
        storage = tensor.untyped_storage()
        flags = self._written.get(storage.data_ptr())
        if flags is not None and tensor.numel():
            mark(flags, tensor, storage.data_ptr())

    def _part(self, allocation: Allocation) -> Array | None:
        """The flags of an allocation's bytes; None where torch says that all is written."""
        for base, flags in self._written.items():
            if base <= allocation.base < base + len(flags):
                return flags[allocation.base - base : allocation.end - base]
        return None

    def mark(self, allocation: Allocation) -> None:
        """Tell an allocation's shadow."""
        flags, shadow = self._part(allocation), allocation.shadow
        if flags is not None and shadow is not None:
            padded = np.resize(flags, len(shadow.unwritten) * shadow.granule)
            shadow.unwritten[:] = ~padded.reshape(-1, shadow.granule).all(-1)

    def note(self, allocation: Allocation) -> None:
        """Learn from an allocation's shadow what a kernel wrote."""
        flags, shadow = self._part(allocation), allocation.shadow
        if flags is not None and shadow is not None:
            flags |= np.repeat(~shadow.unwritten, shadow.granule)[: len(flags)]
