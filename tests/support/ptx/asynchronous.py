"""What runs beside its warp until a wait: copies to shared memory, products of warp groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support.ptx import fragments
from tests.support.ptx.memory import POISON, SEVERAL, Access, Array
from tests.support.ptx.parser import PtxError

if TYPE_CHECKING:
    from tests.support.ptx.lanes import Lanes

_GROUP = 128  # threads of a warp group
_BUSY = np.uint32(0x7FBADC0D)


@dataclass(frozen=True)
class _Copy:
    """Bytes on their way, for each of its lanes."""

    lane: Array
    offset: Array
    words: Array  # (n, words)
    group: Array


class Copies:
    """``cp.async``: what is copied is poison until its group is waited for."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._flying: list[_Copy] = []
        self._group = np.zeros(lanes.n, np.int64)

    def begin(self, to: Array, address: Array, nbytes: int, read: Array, mask: Array | None, at: int) -> None:
        """Copy ``read`` bytes (all or none, then zeros) to shared memory."""
        lanes, shared = self._lanes, self._lanes.batch.shared
        on = np.ones(lanes.n, bool) if mask is None else mask
        if ((read != nbytes) & (read != 0) & on).any():
            raise PtxError(f"{lanes.place(at).instruction}: a part of the bytes")
        offset = lanes.offsets(to, nbytes, mask, at)
        live = on & (read != 0)
        words = np.stack(lanes.load_global(address, 4, nbytes // 4, live, at), -1)
        words = np.where(live[:, None], words, np.uint32(0))[on]
        offset, lane = offset[on], np.flatnonzero(on)
        access = Access(lanes.thread[on], lanes.access(4).stamp[on], 4, nbytes // 4)
        # A copy over another one in flight, and one into what others still read, are faults of a write.
        lanes.watch_shared(offset, access, None, at, list(words.T))
        granules = shared.shadow.granules(offset, nbytes)
        shared.landing[granules] = True
        shared.bytes[offset[:, None] + np.arange(nbytes)] = POISON
        self._flying.append(_Copy(lane, offset, words, self._group[on]))

    def commit(self, mask: Array | None) -> None:
        self._group += 1 if mask is None else mask

    def wait(self, left: int | None, mask: Array | None) -> None:
        """Until all but the ``left`` latest groups have landed; all copies if None."""
        flying, self._flying = self._flying, []
        for copy in flying:
            done = np.ones(len(copy.lane), bool)
            if left is not None:
                done = copy.group < self._group[copy.lane] - left
            if mask is not None:
                done &= mask[copy.lane]
            if done.any():
                self._land(copy, done)
            if not done.all():
                rest = ~done
                self._flying.append(
                    _Copy(copy.lane[rest], copy.offset[rest], copy.words[rest], copy.group[rest])
                )

    def _land(self, copy: _Copy, done: Array) -> None:
        lanes, shared = self._lanes, self._lanes.batch.shared
        lane, offset, words = copy.lane[done], copy.offset[done], copy.words[done]
        shared.words[4][(offset // 4)[:, None] + np.arange(words.shape[1])] = words
        granules = shared.shadow.granules(offset, 4 * words.shape[1])
        shared.landing[granules] = False
        # Others see it after a barrier behind this wait.
        shared.shadow.writer[granules] = lanes.thread[lane][:, None]
        shared.shadow.write_stamp[granules] = lanes.access(4).stamp[lane][:, None]
        fences = lanes.batch.fences[lanes.thread[lane] - lanes.batch.first_thread]
        shared.fences[granules] = np.broadcast_to(fences[:, None], granules.shape)


class Products:
    """``wgmma``: registers that a product works on are poison until its group is waited for."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._flying: dict[int, tuple[Array, int]] = {}  # register: result, group
        self._group = 0
        self._reads: list[tuple[int, Array]] = []  # group, granules
        self._fenced: dict[int, Array] = {}  # by identity
        self._busy = lanes.spread(_BUSY)

    def in_flight(self, registers: list[int]) -> bool:
        return any(register in self._flying for register in registers)

    def proxy_fence(self, mask: Array | None) -> None:
        """What these threads wrote before, products may read, and theirs may read what others wrote."""
        lanes, batch = self._lanes, self._lanes.batch
        thread = lanes.thread if mask is None else lanes.thread[mask]
        batch.fences[thread - batch.first_thread] += 1
        stamp = lanes.access(4).stamp
        batch.fence_stamps[thread - batch.first_thread] = stamp if mask is None else stamp[mask]

    def fence(self, mask: Array | None) -> None:
        """What registers hold now may enter a product.

        Copies of it may, too: LLVM puts moves of registers behind the fence, where ptxas takes them away.
        """
        self._fenced = {id(value): value for value in self._lanes.registers}

    def commit(self, mask: Array | None) -> None:
        self._group += 1

    def begin(
        self, registers: list[Array], places: list[int], shape: tuple[int, int, str, int, int],
        a: Any, b: Array, keep: Array, mask: Array | None, at: int,
    ) -> None:  # fmt: skip
        """A product of 64 rows for each warp group; it ends now, its registers show it at the wait.

        Args:
            places: registers of the accumulator.
            shape: columns, depth, type, whether each operand is transposed.
            a: its registers, or a descriptor; ``b`` is one.
            keep: whether to add to the accumulator.
        """
        columns, depth, kind, a_transposed, b_transposed = shape
        lanes = self._lanes
        if mask is not None and not mask.all():
            raise PtxError(f"{lanes.place(at).instruction}: under a mask")
        if any(p not in self._flying and id(registers[p]) not in self._fenced for p in places):
            lanes.batch.report.add("accumulator changed behind wgmma.fence", lanes.place(at), "")
        if isinstance(a, tuple):
            left = fragments.wgmma_a(a, kind)
        else:
            left = self._matrix(a, 64, depth, kind, a_transposed, at)
        right = self._matrix(b, columns, depth, kind, b_transposed, at)
        held = tuple(self._flying[p][0] if p in self._flying else registers[p] for p in places)
        keeps = keep.reshape(-1, _GROUP)[:, :1, None]
        accumulator = np.where(keeps, fragments.wgmma_accumulator(held), np.float32(0))
        result = fragments.wgmma_registers(fragments.wgmma(left, right, accumulator))
        for place, value in zip(places, result, strict=True):
            self._flying[place] = (value, self._group)
            registers[place] = self._busy

    def _matrix(
        self, descriptors: Array, rows: int, depth: int, kind: str, transposed: int, at: int
    ) -> Array:
        """(groups, rows, depth) values of an operand in shared memory."""
        lanes, batch, shared = self._lanes, self._lanes.batch, self._lanes.batch.shared
        groups = descriptors.reshape(-1, _GROUP)
        lanes.fault(
            "descriptors differ in a warp group", at, None,
            np.repeat((groups != groups[:, :1]).any(1), _GROUP), lambda i: hex(int(descriptors[i])),
        )  # fmt: skip
        size = 4 if kind == "tf32" else 2
        address = fragments.wgmma_addresses(groups[:, 0], rows, depth, size, bool(transposed))
        if (address + size > shared.nbytes).any():
            detail = f"byte {int(address.max())} of {shared.nbytes}"
            batch.report.add("shared access out of bounds", lanes.place(at), detail)
            address = np.minimum(address, shared.nbytes - size) // size * size
        offset = address + lanes.base[::_GROUP][:, None, None]
        self._watch(offset, size, at)
        return fragments.values(shared.words[size][offset // size], kind)

    def _watch(self, offset: Array, size: int, at: int) -> None:
        lanes, batch, shared = self._lanes, self._lanes.batch, self._lanes.batch.shared
        shadow = shared.shadow
        for group, places in enumerate(offset):
            leader = _GROUP * group
            granules = np.unique(shadow.granules(places.reshape(-1), size))
            stamp = lanes.access(4).stamp[leader]
            writer, written = shadow.writer[granules], shadow.write_stamp[granules]
            thread = np.maximum(writer - batch.first_thread, 0)
            # A proxy fence lies between: the writer's before a barrier, or this group's behind one.
            fenced = (batch.fences[thread] > shared.fences[granules]) & (batch.fence_stamps[thread] < stamp)
            mine = batch.fence_stamps[lanes.thread[leader : leader + _GROUP] - batch.first_thread].min()
            faults = {
                "shared: nobody wrote": shadow.unwritten[granules],
                "shared: read while a copy is in flight": shared.landing[granules],
                "shared: race, read after write": (writer > 0) & (written == stamp),
                "shared: product without a proxy fence": (writer > 0) & ~fenced & ~(mine > written),
            }
            for kind, bad in faults.items():
                if bad.any():
                    byte = granules[bad.argmax()] * shadow.granule
                    who = f"program {lanes.program[leader]}, warp group {lanes.tid[leader] // _GROUP}"
                    batch.report.add(kind, lanes.place(at), f"{who}, at byte {byte}")
            shared.reading[granules] += 1
            self._reads.append((self._group, granules))

    def wait(self, registers: list[Array], left: int, mask: Array | None, at: int) -> None:
        """Until all but the ``left`` latest groups are done."""
        done, shared = self._group - left, self._lanes.batch.shared
        for place in [p for p, (_, group) in self._flying.items() if group < done]:
            result, _ = self._flying.pop(place)
            if registers[place] is not self._busy:
                where = self._lanes.place(at)
                self._lanes.batch.report.add("accumulator overwritten by others", where, "")
            registers[place] = result
        reads, self._reads = self._reads, []
        epochs = self._lanes.batch.epoch
        for group, granules in reads:
            if group < done:
                shared.reading[granules] -= 1
                program = int(granules[0]) * shared.shadow.granule // shared.nbytes
                shared.shadow.reader[granules] = SEVERAL
                shared.shadow.read_stamp[granules] = self._lanes.batch.stamp(program, epochs[program])
            else:
                self._reads.append((group, granules))
