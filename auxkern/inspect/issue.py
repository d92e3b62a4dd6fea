"""A MODEL of what a compiled kernel costs: its instructions by class, and the time that these take.

It counts instructions in the listing and divides by data-sheet rates. Code outside of loops counts once,
whether or not a branch skips it, and so does a turn that the compiler took out of a loop. It knows nothing of
latency, dependences between instructions, bank conflicts, caches, dual issue, or pipes that take an
instruction every second clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from auxkern.backends.triton.cases import VOCABULARIES, Case
from auxkern.backends.triton.launch import Launch
from auxkern.inspect.assembly import Assembly, Loop
from auxkern.inspect.opcodes import OTHER, by_class
from auxkern.inspect.source import SourceLoop
from auxkern.inspect.targets import Target

COLUMN, PRODUCTS, PROGRAM = "column", "1,000 products", "program"
# Of one multiprocessor: warps that start an instruction in a clock, lanes that take a transcendental one.
_SCHEDULERS, _MUFU_LANES = 4, 16
_BARRIERS = ("BAR", "UCGABAR_WAIT")
# Copies of whole tiles, by the tensor memory accelerator: loops that load so are not recognised.
_UNREAD = {"UTMALDG", "UBLKCP"}


@dataclass(frozen=True)
class IssueModel:
    """What a kernel executes for a unit of its work.

    Attributes:
        unit: "column" of a tile in the loops over V, of all passes; "1,000 products", multiply-adds of a
            (row, id, d), of a tile with all that is done to it; "program" where there is neither.
        instructions: of threads, by class, for one unit; for a program, of each of its threads.
        barriers: that a program waits at for each tile.
        passes: over what is read; None if it cannot be told.
    """

    unit: str
    instructions: dict[str, float]
    barriers: float
    passes: int | None

    @property
    def total(self) -> float:
        """Instructions of all classes."""
        return sum(self.instructions.values())

    @property
    def unknown(self) -> float:
        """Share of the instructions that are in no class, 0 to 1."""
        return self.instructions[OTHER] / self.total if self.total else 0.0


@dataclass(frozen=True)
class Bound:
    """Microseconds that a launch takes for each thing that it needs, in the MODEL; the largest decides.

    Attributes:
        model: key of ``cases.VOCABULARIES``.
        issue_us: to start every instruction.
        mufu_us: to execute the transcendental functions and conversions.
        memory_us: to move what must be moved once.
        tensor_us: to multiply matrices of 16-bit operands.
    """

    model: str
    issue_us: float
    mufu_us: float
    memory_us: float
    tensor_us: float

    @property
    def largest(self) -> tuple[str, float]:
        """What takes longest, and how long, in microseconds."""
        times = [
            ("memory", self.memory_us),
            ("tensor", self.tensor_us),
            ("mufu", self.mufu_us),
            ("issue", self.issue_us),
        ]
        return max(times, key=lambda time: time[1])


def model_of(made: Assembly, launch: Launch, target: Target) -> IssueModel:
    """The model of one launch.

    Raises:
        ValueError: the loops of the listing are not those of the source.
    """
    threads = launch.num_warps * target.warp
    block = launch.constants.get("BLOCK")
    if block and made.loops:
        unit, share = COLUMN, threads / block
        counts = _added([(_turns_of_tile(s, loop, threads), loop.opcodes) for s, loop in _kept(made)])
    else:
        unit, share = _unit_of_program(launch, threads)
        counts = _opcodes_of_program(made, launch, 0.0, threads)
    return IssueModel(
        unit=unit,
        instructions={name: count * share for name, count in by_class(counts).items()},
        barriers=sum(counts.get(opcode, 0.0) for opcode in _BARRIERS),
        passes=made.source.passes,
    )


def bound_of(made: Assembly, case: Case, target: Target) -> Bound:
    """What one launch takes.

    Raises:
        ValueError: as ``model_of``.
    """
    launch = case.launch
    programs = math.prod(launch.grid)
    share = case.columns or VOCABULARIES[case.model] * case.rows / programs
    counts = by_class(_opcodes_of_program(made, launch, share, launch.num_warps * target.warp))
    warps = programs * launch.num_warps
    # A program runs on one multiprocessor, a warp on one scheduler: a small launch leaves others idle.
    busy = min(_SCHEDULERS * target.multiprocessors, programs * min(_SCHEDULERS, launch.num_warps))
    clocks = busy * target.clock
    mufu_clocks = target.warp * _SCHEDULERS / _MUFU_LANES
    return Bound(
        model=case.model,
        issue_us=warps * sum(counts.values()) / clocks * 1e6,
        mufu_us=warps * counts["mufu"] * mufu_clocks / clocks * 1e6,
        memory_us=launch.bytes_moved / target.bandwidth * 1e6,
        tensor_us=launch.tensor_flops / target.tensor_flops * 1e6,
    )


def issue_share(model: IssueModel, case: Case, target: Target) -> float:
    """Time to start the instructions of a column, on a full GPU, as a multiple of that to move its bytes."""
    issue = model.total / target.warp / (_SCHEDULERS * target.multiprocessors * target.clock)
    memory = case.launch.bytes_moved / (case.rows * VOCABULARIES[case.model]) / target.bandwidth
    return issue / memory


def pairs(made: Assembly) -> list[tuple[SourceLoop, Loop | None]]:
    """Each loop of the source with what the listing has of it; None where it was unrolled.

    Raises:
        ValueError: the loops of the listing are not those of the source.
    """
    sources = made.source.loops
    if not fits(made):
        raise ValueError(f"{len(made.loops)} loops that load in the listing, {len(sources)} in the source")
    # Short loops whose turns the assembler knows are unrolled first; the order of the others is kept.
    short = [place for place, source in enumerate(sources) if source.turns is not None]
    short.sort(key=lambda place: sources[place].turns or 0)
    gone = set(short[: len(sources) - len(made.loops)])
    loops = iter(made.loops)
    return [(s, None if place in gone else next(loops)) for place, s in enumerate(sources)]


def fits(made: Assembly) -> bool:
    """Whether the model knows each loop of the listing, and so holds."""
    if _UNREAD & set(made.outside).union(*(loop.opcodes for loop in made.loops)):
        return False
    lasting = sum(source.turns is None for source in made.source.loops)
    return lasting <= len(made.loops) <= len(made.source.loops)


def turns_in_loop(made: Assembly, threads: int) -> int:
    """Tiles in one turn of the loop that moves the most, of a program of so many ``threads``."""
    if not fits(made):
        return 1
    kept = [(s, loop) for s, loop in _kept(made) if loop.load_bytes == made.load_bytes]
    return _unrolled(*kept[0], threads) if kept else 1


def _kept(made: Assembly) -> list[tuple[SourceLoop, Loop]]:
    return [(source, loop) for source, loop in pairs(made) if loop is not None]


def _unrolled(source: SourceLoop, loop: Loop, threads: int) -> int:
    """Turns of the source in one turn of the listing's loop, of a program of so many ``threads``."""
    expected = sum(load.bytes_of_thread(threads) for load in source.loads)
    return max(1, round(sum(loop.load_bytes) / expected)) if expected else 1


def _turns_of_tile(source: SourceLoop, loop: Loop, threads: int) -> float:
    """How often a loop turns for a tile of its row."""
    return 0.0 if source.continues else source.repeats / _unrolled(source, loop, threads)


def _opcodes_of_program(made: Assembly, launch: Launch, columns: float, threads: int) -> dict[str, float]:
    """Instructions of one thread from its beginning to its end; loops over a row take ``columns``."""
    counts = [(1.0, made.outside)]
    for source, loop in _kept(made):
        counts.append((_turns_of_tile(source, loop, threads) * _tiles(source, launch, columns), loop.opcodes))
    return _added(counts)


def _tiles(source: SourceLoop, launch: Launch, columns: float) -> float:
    """How often a program comes by one loop of the source; that over a row takes ``columns`` of it.

    One whose length is read from memory, but for tiles of a row, counts once, as does code that a branch may
    skip.
    """
    if source.turns is not None:
        return source.turns
    if source.read and source.step <= 1:
        return 1.0
    length = launch.arguments.get(source.length or "", columns)
    return length / source.step if isinstance(length, (int, float)) and source.step else 0.0


def _added(counts: Sequence[tuple[float, dict[str, int]]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for weight, opcodes in counts:
        for opcode, count in opcodes.items():
            sums[opcode] = sums.get(opcode, 0.0) + weight * count
    return sums


def _unit_of_program(launch: Launch, threads: int) -> tuple[str, float]:
    """The unit of a launch whose programs have no loop over a row, and its share of a program's threads."""
    constants = launch.constants
    if "BLOCK_N" in constants:
        products = constants["BLOCK_N"] * constants["BLOCK_V"] * sum(constants["D"])
        return PRODUCTS, 1000 * threads / products
    if "BLOCK_V" in constants and "LANES" not in constants:
        return COLUMN, threads / (constants["R"] * constants["BLOCK_V"])
    return PROGRAM, 1.0
