"""Memory that a training loop's gradients use again, step after step."""

from __future__ import annotations

import math
import mmap
import sys

import torch
from torch import Tensor


def _private(size: int) -> mmap.mmap:
    """Fresh memory of this process alone: by default a forked one would write to it too."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # a system without fork
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


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
            if hasattr(mmap, "MADV_HUGEPAGE"):
                chosen.madvise(mmap.MADV_HUGEPAGE)
        self._blocks = [*kept, chosen]
        return chosen
