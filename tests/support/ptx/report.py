"""What execution found: each kind of fault once for each place in a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.support.ptx.parser import Instruction


@dataclass(frozen=True)
class Place:
    """Where: a kernel's instruction."""

    kernel: str
    instruction: Instruction


@dataclass
class Fault:
    """One kind of fault at one place.

    Attributes:
        kind: such as "global read out of bounds".
        detail: address, threads and values of the first.
        times: lanes or instructions that had it.
    """

    kind: str
    place: Place
    detail: str
    times: int = 1

    def __str__(self) -> str:
        at = self.place.instruction
        return (
            f"{self.place.kernel}: {self.kind} ({self.times} times)\n"
            f"    at {at.source}: {at.text}\n    line {at.line} of the PTX: {at}\n    first: {self.detail}"
        )


@dataclass(frozen=True)
class Benign:
    """A fault that does no harm, and why; named for one kernel and one line of its source.

    Attributes:
        kernel, kind: as reported.
        text: a part of the line that no other line with such a fault has.
        reason: why no result depends on it.
    """

    kernel: str
    kind: str
    text: str
    reason: str

    def covers(self, fault: Fault) -> bool:
        place = fault.place
        named = (self.kernel, self.kind) == (place.kernel, fault.kind)
        return named and self.text in place.instruction.text


@dataclass
class Report:
    """Faults of any number of launches.

    Attributes:
        benign: what is not counted among the faults.
        excused: those of ``benign`` that were met.
    """

    benign: tuple[Benign, ...] = ()
    faults: dict[tuple[str, Place], Fault] = field(default_factory=dict)
    excused: set[Benign] = field(default_factory=set)

    def add(self, kind: str, place: Place, detail: str) -> None:
        """A fault, or one more of one that is known."""
        known = self.faults.get((kind, place))
        if known is not None:
            known.times += 1
            return
        fault = Fault(kind, place, detail)
        excuse = next((benign for benign in self.benign if benign.covers(fault)), None)
        if excuse is None:
            self.faults[kind, place] = fault
        else:
            self.excused.add(excuse)

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.faults}

    def __str__(self) -> str:
        return "\n".join(map(str, self.faults.values())) or "no faults"
