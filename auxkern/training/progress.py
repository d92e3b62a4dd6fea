"""What a person sees while something long runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO


class Progress:
    """Silent; the base of those that show something.

    A record is one line of the log: ``{"step": ..., "loss": ..., ...}`` after a logged step, or
    ``{"step": ..., "evaluation": True, "nll": ..., ...}``.
    """

    def start(self, done: int, total: int, what: str) -> None:
        """Something of ``total`` parts begins, ``done`` of which are done already."""

    def advance(self, done: int) -> None:
        """So many parts are done."""

    def record(self, record: dict[str, Any]) -> None:
        """A line was added to the log."""

    def figures(self, text: str) -> None:
        """What is said beside the bar from now on."""

    def say(self, text: str) -> None:
        """Something that a person should read."""

    def close(self) -> None:
        """Nothing more will come; safe to call twice."""

    def counting(self, what: str) -> Callable[[int, int], None]:
        """A function that is told of parts done and parts in all; its first call begins them."""
        calls = itertools.count()

        def told(done: int, total: int) -> None:
            if not next(calls):
                self.start(done, total, what)
            self.advance(done)

        return told


class LineProgress(Progress):
    """Plain lines: evaluations, the first logged step, and else one every ``seconds`` at most."""

    def __init__(self, stream: TextIO, seconds: float = 10.0) -> None:
        self._stream, self._seconds = stream, seconds
        self._total, self._what, self._figures = 0, "", ""
        self._next, self._logged = math.inf, False

    def start(self, done: int, total: int, what: str) -> None:
        self._total, self._what, self._figures = total, what, ""
        self._next, self._logged = time.monotonic() + self._seconds, False

    def advance(self, done: int) -> None:
        if time.monotonic() >= self._next:
            self.say(f"{self._what} {done:,}/{self._total:,}" + (self._figures and f", {self._figures}"))

    def record(self, record: dict[str, Any]) -> None:
        is_step = not record.get("evaluation")
        if is_step:
            self.figures(_figures(record))  # of the line that comes when it is time
        if not (is_step and self._logged) or time.monotonic() >= self._next:
            self.say(record_line(record, self._total))
        self._logged |= is_step

    def figures(self, text: str) -> None:
        self._figures = text

    def say(self, text: str) -> None:
        self._next = time.monotonic() + self._seconds
        print(text, file=self._stream, flush=True)


class BarProgress(Progress):
    """A line that is drawn anew, with a bar; evaluations stay on the screen above it. Needs rich."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=stream, force_terminal=True),  # who asked for it has looked
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task: Any = None
        self._total = 0

    def start(self, done: int, total: int, what: str) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._total = total
        self._task = self._progress.add_task(what, completed=done, total=total, figures="")
        self._progress.start()

    def advance(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def record(self, record: dict[str, Any]) -> None:
        if record.get("evaluation"):
            self.say(record_line(record, self._total))
        else:
            self.figures(_figures(record))

    def figures(self, text: str) -> None:
        self._progress.update(self._task, figures=text)

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class PartsDone:
    """Counts parts for a caller's function, which is told of parts done and parts in all.

    Args:
        call: the function, or None.
        total: parts in all.
    """

    def __init__(self, call: Callable[[int, int], None] | None, total: int) -> None:
        self.call, self.done, self.total = call, 0, total

    def add(self, parts: int) -> None:
        """So many more are done."""
        self.done += parts
        if self.call is not None:
            self.call(self.done, self.total)


def takes_bars(stream: TextIO) -> bool:
    """Whether a line can be drawn anew there: a terminal that goes back, whatever colours are asked for."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def progress_for(stream: TextIO | None = None) -> Progress:
    """A bar if the stream (stderr if None) ``takes_bars`` and rich is installed, lines otherwise."""
    stream = sys.stderr if stream is None else stream
    if takes_bars(stream) and importlib.util.find_spec("rich") is not None:
        return BarProgress(stream)
    return LineProgress(stream)


def record_line(record: dict[str, Any], total: int) -> str:
    """A record of the log in words, on one line."""
    head = f"step {record['step']:,}/{total:,}"
    if not record.get("evaluation"):
        return f"{head}: {_figures(record)}"
    alone = "" if record["lm_nll"] is None else f", LM alone {record['lm_nll']:.4f}"
    best = " (best)" if record["best"] and record["step"] else ""
    return f"{head}: validation nll {record['nll']:.4f}{best}{alone}"


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _figures(record: dict[str, Any]) -> str:
    alone = "" if record["lm_loss"] is None else f" (LM {record['lm_loss']:.3f})"
    return (
        f"loss {record['loss']:.4f}{alone}, {record['tokens_per_second']:,.0f} tokens/s, "
        f"learning rate {record['learning_rate']:.2e}, {duration(record['seconds_left'])} left"
    )
