"""Runs one command within a time limit and leaves no process of it behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 5.0  # for a command to write down what it has, between SIGINT and SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        how: "by itself", "at its limit" or "by Ctrl-C".
        status: its exit status; negative for the signal that ended it.
        seconds: that it ran.
    """

    how: str
    status: int
    seconds: float


def run(
    command: Sequence[str], log: Path, limit: float, *, folder: Path, environment: Mapping[str, str]
) -> Ended:
    """Runs ``command`` for at most ``limit`` seconds, its output in ``log``.

    At its limit, and if this process gets KeyboardInterrupt, the command gets SIGINT, then a few
    seconds (part of the limit), then it is killed. Whatever it started ends with it, as far as
    it stayed in its process group or, on Linux, among its descendants.

    Args:
        command: program and arguments.
        log: file for stdout and stderr together; written anew.
        limit: seconds.
        folder: working directory.
        environment: the whole of it.

    Raises:
        OSError: the program cannot be started, or the log cannot be written.
    """
    grace = min(GRACE_SECONDS, limit / 4)
    start = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            cwd=folder, env=dict(environment), start_new_session=True,
        )  # fmt: skip
    how = "by itself"
    descendants: dict[int, str] = {}
    try:
        try:
            child.wait(limit - grace)
        except subprocess.TimeoutExpired:
            how = "at its limit"
        except KeyboardInterrupt:
            how = "by Ctrl-C"
        if how != "by itself":
            descendants = _descendants(child.pid)
            _signal_group(child.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):  # then it is killed, below
                child.wait(grace)
    finally:
        descendants |= _descendants(child.pid)
        _signal_group(child.pid, signal.SIGKILL)
        for pid, began in descendants.items():
            if _stat(pid)[1] == began:  # else it is gone, and its number is another process's
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        child.wait()
    return Ended(how, child.returncode, time.monotonic() - start)


def _signal_group(leader: int, which: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all of the group have ended
        os.killpg(leader, which)


def _descendants(pid: int) -> dict[int, str]:
    """Start time by process number of all that descend from ``pid``; empty where there is no /proc."""
    parents = {int(entry.name): _stat(int(entry.name)) for entry in Path("/proc").glob("[0-9]*")}
    found: dict[int, str] = {}
    around = {pid}
    while around:
        around = {child for child, (parent, _) in parents.items() if parent in around and child not in found}
        found |= {child: parents[child][1] for child in around}
    return found


def _stat(pid: int) -> tuple[int, str]:
    """(parent, start time in clock ticks) of a process, (-1, "") if it is gone; proc(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1, ""
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces
    return int(fields[1]), fields[19]
