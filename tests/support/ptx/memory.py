"""Memory and who touched it: bounds, alignment, what nobody wrote, and races.

Two accesses of the same place, one of them a write, by different threads must be ordered by a barrier
between them; programs of a grid are never ordered. Lanes of a warp are threads like others: a GPU since
Volta may run them one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tests.support.ptx.parser import PtxError

Array = np.ndarray[Any, Any]

# Instead of a thread, which count from 1: none, several of a program, of several programs. Memory of zeros
# costs nothing where it is not touched, and tensors here may be of gigabytes without contents.
NOBODY, SEVERAL, PROGRAMS = 0, -1, -2
POISON = 0xDB  # of shared memory that no one wrote
_EPOCHS = 20  # bits of a stamp below the program's number


class _Everywhere:
    """This process's memory from ``_FIRST`` on, as NumPy takes it."""

    def __init__(self, itemsize: int) -> None:
        shape = ((2**47 - _FIRST) // itemsize,)
        self.__array_interface__ = {
            "data": (_FIRST, False), "shape": shape, "typestr": f"<u{itemsize}", "version": 3
        }  # fmt: skip


_FIRST = 4096
# Nothing of it is touched before its address was found inside a tensor.
_MEMORY = {size: np.asarray(_Everywhere(size)) for size in (1, 2, 4, 8)}


@dataclass(frozen=True)
class Access:
    """One access of each lane that takes part.

    Attributes:
        thread: (n,) numbers in the grid, from 1.
        stamp: (n,) the program and the number of barriers before it.
        size: bytes of one element.
        count: adjacent elements.
    """

    thread: Array
    stamp: Array
    size: int
    count: int = 1

    @property
    def nbytes(self) -> int:
        return self.size * self.count

    def only(self, lanes: Array) -> Access:
        return Access(self.thread[lanes], self.stamp[lanes], self.size, self.count)


def stamp_of(program: Array, epoch: Array) -> Array:
    """(n,) int64 that orders accesses of a program; unequal across programs."""
    return (program.astype(np.int64) << _EPOCHS) | epoch


class Shadow:
    """Who wrote and who read each granule of a stretch of memory last."""

    def __init__(self, nbytes: int, granule: int, written: bool) -> None:
        size = -(-nbytes // granule)
        self.granule = granule
        self.unwritten = np.zeros(size, bool)
        if not written:
            self.unwritten[:] = True
        self.writer, self.reader = (np.zeros(size, np.int32) for _ in range(2))
        self.write_stamp, self.read_stamp = (np.zeros(size, np.int64) for _ in range(2))

    def granules(self, offset: Array, nbytes: int) -> Array:
        """(n, granules of one access)."""
        return (offset // self.granule)[:, None] + np.arange(max(1, nbytes // self.granule))

    def read(self, at: Array, access: Access) -> tuple[Array, Array]:
        """Note a read; ((n, k) of which nobody wrote, of which another thread wrote too recently)."""
        thread, stamp = access.thread[:, None], access.stamp[:, None]
        by, when = self.writer[at], self.write_stamp[at]
        races = (by > 0) & (by != thread) & ((when == stamp) | (when >> _EPOCHS != stamp >> _EPOCHS))
        before, read = self.reader[at], self.read_stamp[at]
        here = read == stamp
        elsewhere = (before != NOBODY) & (read >> _EPOCHS != stamp >> _EPOCHS)
        note = np.where(here & (before != thread) & (before != NOBODY), SEVERAL, thread)
        note = np.where(elsewhere | (before == PROGRAMS), PROGRAMS, note).astype(np.int32)
        self.reader[at], self.read_stamp[at] = note, np.broadcast_to(stamp, at.shape)
        # Where lanes read the same granule, the last one's note stands.
        shared = self.reader[at] != note
        if shared.any():
            self.reader[at[shared]] = SEVERAL
        crowd = self.read_stamp[at] >> _EPOCHS != stamp >> _EPOCHS
        if crowd.any():
            self.reader[at[crowd]] = PROGRAMS
        return self.unwritten[at], races

    def write(self, at: Array, access: Access) -> tuple[Array, Array]:
        """Note a write; ((n, k) of which another thread wrote, read too recently)."""
        thread, stamp = access.thread[:, None], access.stamp[:, None]
        by, when = self.writer[at], self.write_stamp[at]
        after_write = (by > 0) & (by != thread) & ((when == stamp) | (when >> _EPOCHS != stamp >> _EPOCHS))
        reader, read = self.reader[at], self.read_stamp[at]
        after_read = (reader == PROGRAMS) | (
            (reader != NOBODY)
            & (((read == stamp) & (reader != thread)) | (read >> _EPOCHS != stamp >> _EPOCHS))
        )
        self.writer[at] = np.broadcast_to(thread, at.shape)
        self.write_stamp[at] = np.broadcast_to(stamp, at.shape)
        self.unwritten[at] = False
        return after_write, after_read


class Allocation:
    """A stretch of this process's memory that arguments of a launch lie in.

    Attributes:
        base, end: addresses.
        names: of the arguments.
        inside: (bytes,) bool: which bytes belong to an argument; None for all.
        shadow: who touched it; None if that is not asked.
    """

    def __init__(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        spans = [(t.data_ptr(), t.data_ptr() + _span(t)) for _, t in tensors]
        self.base, self.end = min(b for b, _ in spans), max(e for _, e in spans)
        self.names = "/".join(dict.fromkeys(name for name, _ in tensors))
        self.inside: Array | None = None
        self.shadow: Shadow | None = None
        if not all(t.numel() * t.element_size() == self.end - self.base for _, t in tensors):
            self.inside = np.zeros(self.end - self.base, bool)
            for _, t in tensors:
                mark(self.inside, t, self.base)

    def where(self, address: int) -> str:
        """An address as an offset into it."""
        return f"{self.names}{address - self.base:+d} of {self.end - self.base} bytes"


def _span(tensor: Tensor) -> int:
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def mark(flags: Array, tensor: Tensor, base: int) -> None:
    """Set the flags (one for each byte from ``base`` on) of a tensor's elements."""
    size = tensor.element_size()
    begin = flags[tensor.data_ptr() - base :]
    strides = (*(step * size for step in tensor.stride()), 1)
    np.lib.stride_tricks.as_strided(begin, (*tensor.shape, size), strides)[...] = True


class Global:
    """The allocations of a launch: checked access by address."""

    def __init__(self, allocations: Sequence[Allocation]) -> None:
        self.allocations = sorted(allocations, key=lambda a: a.base)
        self.base = np.array([a.base for a in self.allocations], np.uint64)
        self.end = np.array([a.end for a in self.allocations], np.uint64)
        self._spare = np.zeros(64, np.uint8)
        self.safe = np.uint64((self._spare.ctypes.data + 15) // 16 * 16)  # where a lane may read for nothing

    def find(self, address: Array) -> Array:
        """Index of the allocation that begins last below each address; -1 for none."""
        return np.searchsorted(self.base, address, side="right") - 1

    def outside(self, address: Array, nbytes: int, which: Array) -> Array:
        """Whether an access of so many bytes leaves the arguments' elements."""
        if not self.allocations:
            return np.ones(address.shape, bool)
        bad = (which < 0) | (address + np.uint64(nbytes) > self.end[np.maximum(which, 0)])
        for i in np.unique(which[~bad]):
            inside = self.allocations[i].inside
            if inside is not None:
                here = ~bad & (which == i)
                offset = (address[here] - self.base[i]).astype(np.int64)
                bad[here] = ~inside[offset[:, None] + np.arange(nbytes)].all(-1)
        return bad

    @staticmethod
    def load(address: Array, access: Access) -> list[Array]:
        """The elements at checked addresses."""
        memory, first = _MEMORY[access.size], _index(address, access.size)
        return [memory[first + i] for i in range(access.count)]

    @staticmethod
    def store(address: Array, values: Sequence[Array], size: int) -> bool:
        """Store at checked addresses; False if lanes stored different values at the same one."""
        memory, first, same = _MEMORY[size], _index(address, size), True
        for i, value in enumerate(values):
            memory[first + i] = value
            same = same and alike(memory[first + i], value)
        return same


def _index(address: Array, size: int) -> Array:
    return ((address - np.uint64(_FIRST)) // np.uint64(size)).astype(np.int64)


def alike(a: Array, b: Array) -> bool:
    """Equal, or both NaN of float32: lanes' payloads may differ here, a GPU's do not."""
    differ = a != b
    if a.dtype == np.uint32 and differ.any():
        differ &= ~((_is_nan(a)) & (_is_nan(b)))
    return not bool(differ.any())


def _is_nan(bits: Array) -> Array:
    return (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)


class Shared:
    """Shared memory of the programs that run together, one after another."""

    def __init__(self, programs: int, nbytes: int, granule: int) -> None:
        self.nbytes = nbytes
        self.bytes = np.full(programs * nbytes, POISON, np.uint8)
        self.words = {size: self.bytes.view(f"<u{size}") for size in (1, 2, 4, 8)}
        self.shadow = Shadow(programs * nbytes, granule, False)
        granules = len(self.shadow.unwritten)
        self.landing = np.zeros(granules, bool)  # a copy is on its way here
        self.reading = np.zeros(granules, np.int16)  # products in flight that read it
        self.fences = np.zeros(granules, np.int32)  # of its writer when it wrote

    def load(self, offset: Array, size: int, count: int) -> list[Array]:
        first, words = offset // size, self.words[size]
        return [words[first + i] for i in range(count)]

    def store(self, offset: Array, values: Sequence[Array], size: int) -> bool:
        """False if lanes stored different values at the same place."""
        first, words, same = offset // size, self.words[size], True
        for i, value in enumerate(values):
            words[first + i] = value
            same = same and alike(words[first + i], value)
        return same


def granule_of(sizes: Sequence[int]) -> int:
    """Bytes that are watched as one: the narrowest access of a kernel.

    Raises:
        PtxError: it is no power of 2.
    """
    smallest = min(sizes, default=4)
    if smallest & (smallest - 1):
        raise PtxError(f"accesses of {smallest} bytes")
    return min(smallest, 8)
