"""Memory: what is left of it, and large pages for gradients that are made anew and for what stays."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_LARGE_PAGE = 2 << 20
_BLOCK = 64 << 20  # of memory that stays; what nobody writes to takes none
_LINE = 64
_MEMINFO = Path("/proc/meminfo")


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on ``device``; None where it cannot be read."""
    if device.type == "cuda":
        # What PyTorch's allocator keeps for later is free for the next tensor too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if not _MEMINFO.exists():
        return None
    lines = _MEMINFO.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _private(size: int) -> mmap.mmap:
    """Fresh memory of this process alone, zeros: by default a forked one would write to it too."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # a system without fork
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


class LargePages:
    """Memory for tensors that stay on a CPU, one behind the other, in pages of 2 MiB where there are some.

    Weights are read from end to end at every step: in pages of 4 KiB the table of pages is read beside them,
    which halves the rate in a virtual machine. Memory is given back when no tensor of a block is left.
    """

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8, device="cpu")

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, its address a multiple of 64."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        if nbytes > len(self._room):
            size = max(_BLOCK, -(-nbytes // _LARGE_PAGE) * _LARGE_PAGE)
            block = torch.frombuffer(_private(size + _LARGE_PAGE), dtype=torch.uint8)
            begin = -block.data_ptr() % _LARGE_PAGE
            self._room = block[begin : begin + size]
        taken, self._room = self._room[:nbytes], self._room[-(-nbytes // _LINE) * _LINE :]
        return taken.view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor's values in this memory, contiguous."""
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)


class GradientMemory:
    """Memory for gradients of the size of the logits on a CPU, used again from step to step.

    A CPU gives back the memory of a large tensor when it is freed, and the page faults of fresh
    memory cost more than the loss itself. Pass one of these to every call of a training loop:

        >>> memory = auxkern.GradientMemory()
        >>> loss = auxkern.cross_entropy([lm_logits, aux_logits], labels, gradient_memory=memory)

    A gradient's memory is used again only when no tensor refers to it any more; until then other
    memory is taken. What is held is at most what was in use at one time; ``release`` drops it. Use
    one object per thread. A copy or an unpickled one is empty, and a forked process writes to memory of
    its own. On other devices torch's allocator keeps memory by itself, and this
    object takes no part.
    """

    def __init__(self) -> None:
        self._blocks: list[mmap.mmap] = []

    def __reduce__(self) -> tuple[type[GradientMemory], tuple[()]]:
        """A copy, in this process or another, is empty: what is held is nobody's data."""
        return type(self), ()

    @property
    def nbytes(self) -> int:
        """Bytes held, in use or not."""
        return sum(len(block) for block in self._blocks)

    def release(self) -> None:
        """Drop everything held; gradients that are in use keep their memory until they are freed."""
        self._blocks.clear()

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous CPU tensor of this shape and dtype, its elements not initialised.

        Free blocks of other sizes are dropped, so that a loop whose shapes change holds no more
        than it uses.
        """
        count = math.prod(shape)
        nbytes = count * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        block = self._free_block(nbytes)
        return torch.frombuffer(block, dtype=dtype, count=count).view(shape)

    def _free_block(self, nbytes: int) -> mmap.mmap:
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        kept, chosen = [], None
        while self._blocks:
            block = self._blocks.pop()
            # A tensor made from a block holds a reference to it until its storage is freed; a free
            # one is known to this variable and the call alone.
            free = sys.getrefcount(block) <= 2
            if free and chosen is None and len(block) == size:
                chosen = block
            elif not free:
                kept.append(block)
        if chosen is None:
            chosen = _private(size)
        self._blocks = [*kept, chosen]
        return chosen
