"""More rounds of some lines of a run, one line after the other, and the median of what each took.

A machine that slows down for minutes would favour whoever was measured before. In rounds that follow each
other closely all lines meet the same machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from auxkern.bench import session
from auxkern.bench.results import GenerateRun, Throughput
from auxkern.bench.runner import Progress

Measure = Callable[[Progress], Throughput | None]


def round_jobs(lines: Sequence[tuple[str, Measure]], rounds: int, run: GenerateRun) -> list[session.Job]:
    """Jobs of all rounds but the first, which change the results that are there.

    Args:
        lines: title and measurement of each.
        rounds: with the first one.
        run: whose results are measured again.
    """
    return [
        (f"{title}, round {number}", partial(_again, measure, run))
        for number in range(2, rounds + 1)
        for title, measure in lines
    ]


def _again(measure: Measure, run: GenerateRun, progress: Progress) -> None:
    new = measure(progress)
    if new is None:
        return
    for place, known in enumerate(run.results):
        if (known.implementation, known.batch) == (new.implementation, new.batch):
            every = [*(known.rounds or [known.seconds]), new.seconds]
            busy = [one for one in (known.busy_cores, new.busy_cores) if one is not None]
            run.results[place] = replace(
                known, seconds=statistics.median(every), rounds=every, busy_cores=max(busy, default=None)
            )


def spread_notes(run: GenerateRun) -> list[str]:
    """What to tell the reader of the rounds; nothing where there was one."""
    repeated = [one for one in run.results if one.rounds]
    if not repeated:
        return []
    widest = max(repeated, key=lambda one: max(one.rounds) / min(one.rounds))
    share = max(widest.rounds) / min(widest.rounds) - 1
    return [
        f"The engine's and the peers' lines: the median of {len(widest.rounds)} rounds, one line after the "
        f"other. The slowest and the fastest of them are up to {share:.0%} apart ({widest.implementation}, "
        f"batch {widest.batch})."
    ]
