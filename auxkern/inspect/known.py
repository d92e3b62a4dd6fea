"""Rules that kernels are known to break today; the list is there to be emptied."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownFailure:
    """One rule that some binaries of one kernel break.

    Attributes:
        rule: as ``rules.py`` names it.
        kernel: its name.
        cases: labels of its launches.
        targets: names of targets.
        because: why it is so, in a few words.
    """

    rule: str
    kernel: str
    cases: tuple[str, ...]
    targets: tuple[str, ...]
    because: str

    def covers(self, kernel: str, case: str, target: str) -> bool:
        """Whether this binary is one of those."""
        return kernel == self.kernel and case in self.cases and target in self.targets


FAILURES: tuple[KnownFailure, ...] = ()
