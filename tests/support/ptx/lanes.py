"""Lanes that run together: their registers, their accesses to memory, their warps' operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support.ptx import fragments
from tests.support.ptx.asynchronous import Copies, Products
from tests.support.ptx.memory import NOBODY, PROGRAMS, SEVERAL, Access, Array, Shadow, stamp_of
from tests.support.ptx.parser import PtxError
from tests.support.ptx.report import Place

if TYPE_CHECKING:
    from tests.support.ptx.machine import Batch

_WARP = np.arange(32)
SAME_VALUE = "race, write after write of the same value"
# What a register holds before it is first written.
_POISON = {0: False, 2: np.uint16(0x7E5A), 4: np.uint32(0x7FBADBAD), 8: np.uint64(0x7FF4DEAD0000BEEF)}
_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
_ATOMICS = {**_REDUCTIONS, "exch": lambda old, new: new}


class Lanes:
    """The same warps of every program of a batch.

    Attributes:
        index: (n,) the lane's program, counted in the batch.
        tid, lane, ctaid: special registers.
        thread: (n,) numbered through the grid, from 1.
        registers: (n,) each.
        block: the next one of all lanes, or (n,) where they differ.
        waiting: (n,) at a barrier.
    """

    def __init__(self, batch: Batch, warps: range) -> None:
        self.batch, self.threads, self.grid = batch, batch.threads, batch.grid
        self.noise = batch.settings.noise
        programs = len(batch.programs)
        tid = np.arange(32 * warps.start, 32 * warps.stop, dtype=np.uint32)
        self.index = np.repeat(np.arange(programs), len(tid))
        self.tid = np.tile(tid, programs)
        self.lane = self.tid & np.uint32(31)
        self.n = len(self.tid)
        program = batch.programs[self.index]
        self.program = program
        self.thread = (1 + program * batch.threads + self.tid).astype(np.int32)
        x, y = batch.grid[:2]
        self.ctaid = [p.astype(np.uint32) for p in (program % x, program // x % y, program // (x * y))]
        self.zero = np.zeros(self.n, np.uint32)
        self.base = self.index * batch.shared.nbytes
        widths = batch.code.registers.values()
        self.registers: list[Array] = [np.full(self.n, _POISON[width]) for _, width in widths]
        self.block: int | Array = 0
        self.waiting = np.zeros(self.n, bool)
        self._spread: dict[tuple[str, bytes], Array] = {}
        self._stamp: tuple[int, Array] = (-1, self.zero)
        self.copies, self.products = Copies(self), Products(self)

    # --- values

    def spread(self, value: Any) -> Array:
        """A scalar in every lane."""
        value = np.asarray(value)
        key = (value.dtype.str, value.tobytes())
        if key not in self._spread:
            self._spread[key] = np.full(self.n, value)
        return self._spread[key]

    def parameter(self, name: str, kind: str, width: int) -> Array:
        """A kernel's argument, read as a PTX type into a register of ``width`` bytes."""
        value = int.from_bytes(self.batch.parameters[name], "little", signed=kind.startswith("s"))
        size = int(kind[1:]) // 8
        if size != len(self.batch.parameters[name]):
            raise PtxError(f"parameter {name} has {len(self.batch.parameters[name])} bytes, read as {kind}")
        return self.spread(np.array(value % 2 ** (8 * width), f"<u{width}"))

    def divided(self, x: Array, y: Array, mask: Array | None, at: int) -> tuple[Array, Array]:
        """(quotient, towards zero, and remainder) of integers; of a division by 0 all bits are set."""
        zero = y == 0
        self.fault("division by zero", at, mask, np.broadcast_to(zero, self.zero.shape), lambda i: "")
        y = np.where(zero, y.dtype.type(1), y)
        rest = np.fmod(x, y)
        ones = np.full((), -1).astype(x.dtype)
        return np.where(zero, ones, (x - rest) // y), np.where(zero, ones, rest)

    # --- faults

    def place(self, at: int) -> Place:
        return Place(self.batch.code.kernel.name, self.batch.code.instructions[at])

    def fault(self, kind: str, at: int, mask: Array | None, bad: Array, detail: Any) -> None:
        """Report the lanes that are ``bad`` within a mask.

        Args:
            detail: text for the index of a lane.
        """
        bad = bad if mask is None else bad & mask
        if bad.any():
            i = int(bad.argmax())
            who = f"program {self.program[i]}, thread {self.tid[i]}"
            self.batch.report.add(kind, self.place(at), f"{who}: {detail(i)}")

    def access(self, size: int, count: int = 1) -> Access:
        if self._stamp[0] != self.batch.barriers:
            self._stamp = (self.batch.barriers, stamp_of(self.program, self.batch.epoch[self.index]))
        return Access(self.thread, self._stamp[1], size, count)

    def _watch(
        self, space: str, shadow: Shadow, offset: Array, access: Access, at: int, there: Array | None
    ) -> None:
        """Tell a shadow of an access, and report what it says.

        Args:
            there: of a write: (n,) whether a lane's values are there already; None for a read.
        """
        granules, threads = shadow.granules(offset, access.nbytes), self.batch.threads
        writer, reader = shadow.writer[granules], shadow.reader[granules]
        if there is None:
            unwritten, late = shadow.read(granules, access)
            faults = [
                (f"{space}: nobody wrote", unwritten, None),
                (f"{space}: race, read after write", late, writer),
            ]
        else:
            late, early = shadow.write(granules, access)
            last = shadow.writer[granules]
            # Of another lane of this instruction, or of one before that left the same.
            same = np.where(late, there[:, None], last != access.thread[:, None])
            faults = [
                (f"{space}: {SAME_VALUE}", same, np.where(late, writer, last)),
                (f"{space}: race, write after write", late & ~same, writer),
                (f"{space}: race, write after read", early, reader),
            ]
        for kind, bad, others in faults:
            if bad.any():
                i, j = np.argwhere(bad)[0]
                after = "" if others is None else f" after {_who(others[i, j], threads)}"
                byte = granules[i, j] * shadow.granule
                detail = f"{_who(access.thread[i], threads)}{after}, at byte {byte}"
                self.batch.report.add(kind, self.place(at), detail)

    # --- global memory

    def _checked(
        self, address: Array, nbytes: int, mask: Array | None, at: int, verb: str
    ) -> tuple[Any, ...]:
        """(address, mask, allocation of each lane): where it may not go it goes to a safe place."""
        memory = self.batch.memory
        which = memory.find(address)
        bad = memory.outside(address, nbytes, which)
        crooked = (address & np.uint64(nbytes - 1)) != 0
        if bad.any() or crooked.any():

            def where(i: int) -> str:
                near = memory.allocations[max(int(which[i]), 0)] if memory.allocations else None
                return f"{nbytes} bytes at {near.where(int(address[i])) if near else hex(int(address[i]))}"

            self.fault(f"global {verb} out of bounds", at, mask, bad, where)
            self.fault(f"global {verb} misaligned", at, mask, crooked & ~bad, where)
            mask = ~(bad | crooked) if mask is None else mask & ~(bad | crooked)
        if mask is not None:
            address = np.where(mask, address, memory.safe)
        return address, mask, which

    def _watch_global(
        self, address: Array, access: Access, mask: Array | None, which: Array, at: int,
        there: Array | None = None,
    ) -> None:  # fmt: skip
        """Note accesses to global memory; ``there`` as in ``_watch``."""
        memory = self.batch.memory
        for i in np.unique(which if mask is None else which[mask]):
            shadow = memory.allocations[i].shadow
            if shadow is not None:
                here = which == i if mask is None else (which == i) & mask
                offset = (address[here] - memory.base[i]).astype(np.int64)
                name, same = f"global {memory.allocations[i].names}", None if there is None else there[here]
                self._watch(name, shadow, offset, access.only(here), at, same)

    def load_global(self, address: Array, size: int, count: int, mask: Array | None, at: int) -> list[Array]:
        address, mask, which = self._checked(address, size * count, mask, at, "read")
        access = self.access(size, count)
        if mask is None or mask.any():
            self._watch_global(address, access, mask, which, at)
        return self.batch.memory.load(address, access)

    def store_global(
        self, address: Array, values: list[Array], size: int, mask: Array | None, at: int
    ) -> None:
        address, mask, which = self._checked(address, size * len(values), mask, at, "write")
        if mask is not None and not mask.any():
            return
        access = self.access(size, len(values))
        there = _alike(self.batch.memory.load(address, access), values)
        self._watch_global(address, access, mask, which, at, there)
        if mask is not None:
            address, values = address[mask], [value[mask] for value in values]
        if not self.batch.memory.store(address, values, size):
            self.batch.report.add("global: lanes store different values", self.place(at), "at one address")

    def atomic(
        self, name: str, address: Array, values: tuple[Array, ...], mask: Array | None, at: int
    ) -> Array:
        """``atom.global``, one lane after another: (n,) what each found. Not watched for races."""
        size = values[0].itemsize
        address, mask, which = self._checked(address, size, mask, at, "write")
        found = np.zeros(self.n, values[0].dtype)
        for i in range(self.n) if mask is None else np.flatnonzero(mask):
            one, access = address[i : i + 1], Access(self.thread[i : i + 1], self.zero[i : i + 1], size)
            old = self.batch.memory.load(one, access)[0].view(found.dtype)
            given = [value[i : i + 1] for value in values]
            new = (
                np.where(old == given[0], given[-1], old) if name == "cas" else _ATOMICS[name](old, given[0])
            )
            self.batch.memory.store(one, [new.view(f"u{size}")], size)
            shadow = self.batch.memory.allocations[which[i]].shadow
            if shadow is not None:
                offset = np.array([int(one[0]) - self.batch.memory.allocations[which[i]].base])
                shadow.unwritten[shadow.granules(offset, size)] = False
            found[i] = old[0]
        return found.view(f"u{size}")

    # --- shared memory

    def offsets(self, address: Array, nbytes: int, mask: Array | None, at: int) -> Array:
        """Of checked addresses in the batch's shared memory; 0 of the program where they may not go."""
        shared, place = self.batch.shared, address.astype(np.int64)
        bad, crooked = place + nbytes > shared.nbytes, place % nbytes != 0

        def where(i: int) -> str:
            return f"{nbytes} bytes at {place[i]} of {shared.nbytes}"

        self.fault("shared access out of bounds", at, mask, bad, where)
        self.fault("shared access misaligned", at, mask, crooked, where)
        good = ~(bad | crooked)
        return np.where(good if mask is None else good & mask, place, 0) + self.base

    def watch_shared(
        self, offset: Array, access: Access, mask: Array | None, at: int, values: list[Array] | None = None
    ) -> None:
        """Note accesses to shared memory, one for each offset: of these values, or reads."""
        shared, write = self.batch.shared, values is not None
        there = None
        if values is not None:
            there = _alike(shared.load(offset, access.size, access.count), values)
            there = there if mask is None else there[mask]
        if mask is not None:
            offset, access = offset[mask], access.only(mask)
        if not len(offset):
            return
        granules = shared.shadow.granules(offset, access.nbytes)
        verb = "write" if write else "read"
        if shared.landing[granules].any():
            self.batch.report.add(f"shared: {verb} while a copy is in flight", self.place(at), "")
        if write and shared.reading[granules].any():
            self.batch.report.add("shared: write while a product reads", self.place(at), "")
        self._watch("shared", shared.shadow, offset, access, at, there)
        if write:
            fences = self.batch.fences[access.thread - self.batch.first_thread]
            shared.fences[granules] = np.broadcast_to(fences[:, None], granules.shape)

    def load_shared(self, address: Array, size: int, count: int, mask: Array | None, at: int) -> list[Array]:
        offset = self.offsets(address, size * count, mask, at)
        self.watch_shared(offset, self.access(size, count), mask, at)
        return self.batch.shared.load(offset, size, count)

    def store_shared(
        self, address: Array, values: list[Array], size: int, mask: Array | None, at: int
    ) -> None:
        offset = self.offsets(address, size * len(values), mask, at)
        self.watch_shared(offset, self.access(size, len(values)), mask, at, values)
        if mask is not None:
            offset, values = offset[mask], [value[mask] for value in values]
        if not self.batch.shared.store(offset, values, size):
            self.batch.report.add("shared: lanes store different values", self.place(at), "at one address")

    # --- warps

    def _whole(self, members: Array, mask: Array | None, at: int) -> None:
        others = members != np.uint32(2**32 - 1)
        if np.any(others if mask is None else others & mask):
            raise PtxError(f"{self.place(at).instruction}: only whole warps are modelled")
        if mask is not None:
            warps = mask.reshape(-1, 32)
            torn = np.repeat(warps.any(1) & ~warps.all(1), 32)
            self.fault("warp operation without all its lanes", at, mask, torn, lambda i: "")

    def shuffle(
        self, mode: str, value: Array, lane: Any, clamp: int, members: Array, mask: Array | None, at: int
    ) -> tuple[Array, Array]:
        """``shfl.sync``: (values, whether the lane asked for is in range)."""
        self._whole(members, mask, at)
        lane = np.broadcast_to(lane & np.uint32(31), (self.n,)).astype(np.int64).reshape(-1, 32)
        segment, last = clamp >> 8 & 31, clamp & 31
        low = _WARP & segment
        high = low | (last & ~segment)
        source = {
            "bfly": _WARP ^ lane,
            "up": _WARP - lane,
            "down": _WARP + lane,
            "idx": low | (lane & ~segment),
        }
        valid = source[mode] >= high if mode == "up" else source[mode] <= high
        chosen = np.where(valid, source[mode], _WARP)
        return np.take_along_axis(value.reshape(-1, 32), chosen, 1).reshape(-1), valid.reshape(-1)

    def reduced(self, name: str, value: Array, members: Array, mask: Array | None, at: int) -> Array:
        """``redux.sync``."""
        self._whole(members, mask, at)
        warps = value.reshape(-1, 32)
        return np.repeat(_REDUCTIONS[name].reduce(warps, axis=1, dtype=value.dtype), 32)

    def vote(self, name: str, value: Array, members: Array, mask: Array | None, at: int) -> Array:
        """``vote.sync``."""
        self._whole(members, mask, at)
        warps = value.reshape(-1, 32)
        if name == "ballot":
            return np.repeat((warps << _WARP.astype(np.uint32)).sum(1, dtype=np.uint32), 32)
        return np.repeat(
            {"all": warps.all(1), "any": warps.any(1), "uni": warps.all(1) | ~warps.any(1)}[name], 32
        )

    def mma(
        self, shape: str, kind: str, a: Any, b: Any, c: Any, mask: Array | None, at: int
    ) -> tuple[Array, ...]:
        self._whole(self.spread(np.uint32(2**32 - 1)), mask, at)
        return fragments.mma(shape, kind, a, b, c)

    def ldmatrix(self, address: Array, count: int, transposed: bool, mask: Array | None, at: int) -> Any:
        """Row r of matrix i comes from the address of lane 8 i + r."""
        self._whole(self.spread(np.uint32(2**32 - 1)), mask, at)
        asked = self.lane < 8 * count
        rows = asked if mask is None else asked & mask
        offset = self.offsets(address, 16, rows, at)
        self.watch_shared(offset, self.access(4, 4), rows, at)
        words = np.stack(self.batch.shared.load(offset, 4, 4), -1)
        return fragments.ldmatrix(
            words.reshape(-1, 32, 4)[:, : 8 * count].reshape(-1, count, 8, 4), transposed
        )

    def stmatrix(self, address: Array, values: Any, transposed: bool, mask: Array | None, at: int) -> None:
        """Row r of matrix i goes to the address of lane 8 i + r."""
        self._whole(self.spread(np.uint32(2**32 - 1)), mask, at)
        last = 8 * len(values)
        words = np.zeros((self.n // 32, 32, 4), np.uint32)
        words[:, :last] = fragments.stmatrix(values, transposed).reshape(-1, last, 4)
        asked = self.lane < last if mask is None else (self.lane < last) & mask
        self.store_shared(address, list(words.reshape(-1, 4).T), 4, asked, at)

    def settled(self, places: list[int], at: int) -> None:
        """Registers that an instruction touches hold no product in flight."""
        if self.products.in_flight(places):
            self.batch.report.add("register of a product in flight", self.place(at), "")


def _alike(held: list[Array], values: list[Array]) -> Array:
    """(n,) whether memory holds these values."""
    return np.logical_and.reduce([old == new for old, new in zip(held, values, strict=True)])


def _who(thread: int, threads: int) -> str:
    if thread <= 0:
        return {NOBODY: "nobody", SEVERAL: "several threads", PROGRAMS: "several programs"}[int(thread)]
    return f"program {(thread - 1) // threads}, thread {(thread - 1) % threads}"
