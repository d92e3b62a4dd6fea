"""Runs a translated kernel over a grid: programs in batches, their warps in an order that one chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tests.support.ptx.approximate import Noise
from tests.support.ptx.lanes import Lanes
from tests.support.ptx.memory import Array, Global, Shared, granule_of, stamp_of
from tests.support.ptx.parser import BARRIERS, Instruction, PtxError
from tests.support.ptx.report import Place, Report
from tests.support.ptx.translate import Code, loads_and_stores

ORDERS = ("together", "forward", "reversed", "random")
_LANES = 4096  # that run at once
_MOST_STEPS = 1_000_000  # blocks of one batch: more of them is a loop without an end


@dataclass(frozen=True)
class Settings:
    """How a kernel is executed.

    Attributes:
        order: of warps between barriers: all of them instruction by instruction, one after another from
            either end, or in turns drawn from ``seed``.
        noise: of approximate instructions; None for exact ones.
        lanes: threads that run at once.
    """

    order: str = "together"
    seed: int = 0
    noise: Noise | None = None
    lanes: int = _LANES


@dataclass(frozen=True)
class Work:
    """A kernel and what it runs on.

    Attributes:
        grid: programs along each axis.
        parameters: bytes of each argument, by the parameter's name.
        shared: bytes of shared memory of a program.
    """

    code: Code
    grid: tuple[int, int, int]
    parameters: Mapping[str, bytes]
    memory: Global
    shared: int


def execute(work: Work, settings: Settings, report: Report) -> None:
    """Run every program; what is wrong goes to the report.

    Raises:
        PtxError: a barrier that some threads never reach, a loop without an end, something not modelled.
    """
    programs = np.arange(work.grid[0] * work.grid[1] * work.grid[2])
    some = max(1, settings.lanes // work.code.kernel.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(programs), some):
            Batch(work, programs[first : first + some], settings, report).run()


class Batch:
    """Programs that run together.

    Attributes:
        programs: their numbers.
        epoch: barriers that each has passed; ``barriers`` of all of them.
        fences: (threads,) proxy fences of each; ``fence_stamps`` when the last one was.
    """

    def __init__(self, work: Work, programs: Array, settings: Settings, report: Report) -> None:
        self.code, self.grid, self.parameters, self.memory = (
            work.code,
            work.grid,
            work.parameters,
            work.memory,
        )
        self.programs, self.settings, self.report = programs, settings, report
        self.threads = work.code.kernel.threads
        self.first_thread = 1 + int(programs[0]) * self.threads
        self.shared = Shared(len(programs), max(16, -(-work.shared // 16) * 16), granule(work.code, "shared"))
        self.epoch, self.barriers = np.zeros(len(programs), np.int64), 0
        self.fences = np.zeros(len(programs) * self.threads, np.int32)
        self.fence_stamps = np.full(len(self.fences), -1, np.int64)
        self._groups = [Lanes(self, warps) for warps in self._warps()]
        self._random = np.random.default_rng(settings.seed)
        self._steps = 0

    def stamp(self, program: int, epoch: int) -> int:
        return int(stamp_of(self.programs[program : program + 1], np.array([epoch]))[0])

    def _warps(self) -> list[range]:
        """Warps that run together; those of a product's warp group always do."""
        warps = self.threads // 32
        if self.threads % 32:
            raise PtxError(f"{self.code.kernel.name} has {self.threads} threads")
        if self.settings.order not in ORDERS:
            raise ValueError(f"order is {self.settings.order!r}; choose one of {', '.join(ORDERS)}")
        if self.settings.order == "together":
            return [range(warps)]
        together = 4 if any(i.opcode.startswith("wgmma") for i in self.code.instructions) else 1
        groups = [range(w, w + together) for w in range(0, warps, together)]
        return groups[::-1] if self.settings.order == "reversed" else groups

    def run(self) -> None:
        """Until every thread has returned."""
        end = len(self.code.kernel.blocks)
        alone = len(self._groups) == 1
        while True:
            for lanes in self._turns(end):
                self._step(lanes, end, alone)
            if all(_ended(lanes.block, end) for lanes in self._groups):
                return
            if not self._release(end):
                names = ", ".join(sorted({self._barrier(b).source for b in self._stuck(end)}))
                raise PtxError(f"{self.code.kernel.name}: threads wait for ever at a barrier: {names}")

    def _turns(self, end: int) -> Iterator[Lanes]:
        """Groups that can go on, until none can."""
        if self.settings.order != "random":
            for lanes in self._groups:
                while _runs(lanes, end):
                    yield lanes
            return
        while running := [lanes for lanes in self._groups if _runs(lanes, end)]:
            lanes = running[self._random.integers(len(running))]
            for _ in range(self._random.integers(1, 4)):
                if _runs(lanes, end):
                    yield lanes

    def _step(self, lanes: Lanes, end: int, alone: bool) -> None:
        """One block."""
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise PtxError(f"{self.code.kernel.name} has run {_MOST_STEPS} blocks and does not end")
        if isinstance(lanes.block, int):
            self._step_of_all(lanes, lanes.block, end, alone)
            return
        ready = np.where(lanes.waiting, end, lanes.block)
        block = int(ready.min())
        mask = ready == block
        if mask.all():
            lanes.block = block
            self._step_of_all(lanes, block, end, alone)
            return
        self.code.function(block, True)(lanes.registers, lanes, mask)
        last = self.code.kernel.blocks[block].end
        if last is not None and last.opcode in BARRIERS:
            lanes.waiting |= mask
        lanes.block[mask] = np.broadcast_to(self._next(lanes, block, last, end), mask.shape)[mask]

    def _step_of_all(self, lanes: Lanes, block: int, end: int, alone: bool) -> None:
        self.code.function(block, False)(lanes.registers, lanes, None)
        last = self.code.kernel.blocks[block].end
        following = self._next(lanes, block, last, end)
        if last is not None and last.opcode in BARRIERS:
            if alone:
                self.epoch += 1
                self.barriers += 1
            else:
                lanes.waiting[:] = True
                following = np.full(lanes.n, following)
        lanes.block = following

    def _next(self, lanes: Lanes, block: int, last: Instruction | None, end: int) -> int | Array:
        """The block behind this one: the same for all lanes, or one of each."""
        if last is None or last.opcode in BARRIERS:
            return block + 1
        to = self.code.kernel.labels[str(last.operands[0])] if last.opcode.startswith("bra") else end
        if last.predicate is None:
            return to
        taken = lanes.registers[self.code.registers[last.predicate][0]]
        taken = ~taken if last.negated else taken
        if taken.all():
            return to
        return np.where(taken, to, block + 1) if taken.any() else block + 1

    def _release(self, end: int) -> bool:
        """Let programs go on all of whose threads have come to a barrier; False if there is none."""
        index = np.concatenate([lanes.index for lanes in self._groups])
        block = np.concatenate([np.broadcast_to(lanes.block, (lanes.n,)) for lanes in self._groups])
        waiting = np.concatenate([lanes.waiting for lanes in self._groups])
        gone = block >= end
        released = False
        for program in range(len(self.programs)):
            here = index == program
            if not waiting[here].any() or not (waiting | gone)[here].all():
                continue
            barriers = np.unique(block[here & waiting])
            place = Place(self.code.kernel.name, self._barrier(int(barriers[0]) - 1))
            if len(barriers) > 1:
                self.report.add(
                    "threads meet at different barriers", place, f"program {self.programs[program]}"
                )
            if gone[here].any():
                self.report.add(
                    "barrier behind some threads' return", place, f"program {self.programs[program]}"
                )
            self.epoch[program] += 1
            released = True
            for lanes in self._groups:
                lanes.waiting &= lanes.index != program
        self.barriers += released
        for lanes in self._groups:
            if (
                not isinstance(lanes.block, int)
                and not lanes.waiting.any()
                and (lanes.block == lanes.block[0]).all()
            ):
                lanes.block = int(lanes.block[0])
        return released

    def _stuck(self, end: int) -> set[int]:
        blocks = [np.broadcast_to(lanes.block, (lanes.n,))[lanes.waiting] for lanes in self._groups]
        return {int(b) - 1 for b in np.concatenate(blocks)}

    def _barrier(self, block: int) -> Instruction:
        end = self.code.kernel.blocks[block].end
        assert end is not None
        return end


def _ended(block: int | Array, end: int) -> bool:
    return bool(np.all(block >= end))


def _runs(lanes: Lanes, end: int) -> bool:
    if isinstance(lanes.block, int):
        return lanes.block < end
    return bool((~lanes.waiting & (lanes.block < end)).any())


def granule(code: Code, space: str) -> int:
    """Bytes of the narrowest access of a kernel to shared or global memory."""
    others = (
        2 if space == "shared" and any(i.parts[0] in ("ldmatrix", "wgmma") for i in code.instructions) else 4
    )
    return granule_of([*loads_and_stores(code.instructions, space), others])
