"""What a run asks of peers, part by part; one that fails leaves a note, and the others go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from auxkern.bench import session
from auxkern.bench.peers import LmTask, Peer, PeerError
from auxkern.bench.results import GenerateRun, Throughput
from auxkern.bench.runner import Progress
from auxkern.machine import OtherWork

Requests = Sequence[tuple[list[int], int]]  # token ids of a prompt, and how many new tokens are wanted


@dataclass(frozen=True)
class Line:
    """A peer at one precision, which is one implementation.

    Attributes:
        peer, precision: who, and one of the precisions of its kind.
        task: the LM.
    """

    peer: Peer
    precision: str
    task: LmTask

    @property
    def implementation(self) -> str:
        """Its name in tables."""
        return f"{self.peer.kind.title} {self.precision}"


def text_jobs(
    lines: Sequence[Line], batches: Mapping[int, Requests], run: GenerateRun
) -> list[tuple[int, str, Any]]:
    """(batch, title, job) of the texts, which are ``run``'s results.

    Args:
        lines: what is measured.
        batches: the requests of each batch.
        run: is told of the implementations, and of what fails.
    """
    run.peers += [line.implementation for line in lines]
    return [
        (batch, f"{line.implementation}, batch {batch}", partial(_texts, line, batch, requests, run))
        for line in lines
        for batch, requests in batches.items()
    ]


def nll_jobs(lines: Sequence[Line], sentences: list[list[int]], run: GenerateRun) -> list[session.Job]:
    """Jobs that add to ``run.nll``."""
    return [(f"{line.implementation}, nll", partial(_nll, line, sentences, run)) for line in lines]


def _texts(
    line: Line, batch: int, requests: Requests, run: GenerateRun, progress: Progress
) -> Throughput | None:
    progress(0.0, "writing")
    name, tokens, other = line.implementation, sum(length for _, length in requests), OtherWork()
    try:
        seconds = line.peer.seconds(line.task, line.precision, batch, requests)
    except PeerError as error:
        _failed(f"{name}, batch {batch}", error, run)
        return None
    return Throughput(name, batch, len(requests), tokens, seconds, {}, other.cores())


def _nll(line: Line, sentences: list[list[int]], run: GenerateRun, progress: Progress) -> None:
    progress(0.0, "scoring")
    try:
        run.nll[line.implementation] = line.peer.nll(line.task, line.precision, sentences)
    except PeerError as error:
        _failed(f"{line.implementation}, nll", error, run)


def _failed(what: str, error: PeerError, run: GenerateRun) -> None:
    run.failed = True
    run.notes.append(f"Failed: {what}: {error}")
