"""``auxkern generate --input``: a file of any length through the engine, and goes on where it was stopped."""

from __future__ import annotations

import argparse
import glob
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auxkern.bench.session import INTERRUPTED
from auxkern.commands.ranks import Launched
from auxkern.generation import (
    BadLine,
    CompletionWriter,
    Engine,
    Request,
    file_fingerprint,
    read_requests,
)
from auxkern.ops.sampling_params import SamplingParams
from auxkern.training.progress import Progress, duration, progress_for

# Requests that are encoded ahead of their turn: newcomers of like length are looked for among them.
_AHEAD = 4
_ALONE = Launched()


def generate(
    options: argparse.Namespace,
    model: Any,
    text_format: Any,
    params: SamplingParams,
    *,
    retry_errors: bool = False,
    launched: Launched = _ALONE,
) -> int:
    """Answers every request in ``options.input`` that ``options.output`` does not answer yet.

    Of several processes (``launched``) each takes its share of them. The first one writes ``options.output``
    itself, and at the end takes over what the others wrote beside it; should one be lost, the next run, of
    any number of processes, does that first.

    Args:
        options: of ``auxkern generate``.
        model, text_format: a pair, and what makes its ids.
        params: what lines leave out.
        retry_errors: whether an answer that is an error is none: its line is taken out of the output
            before the run goes on. Lines of the input that are no requests are bad again either way.
        launched: this process among those that share the input, joined.

    Returns:
        0; 1 if lines of the input were no requests or requests failed, in this run or in the one that it
        goes on with; 130 after Ctrl-C.

    Raises:
        OSError, ValueError: a file cannot be read or written, or is of another run; a line is bad and
            ``options.stop_on_error`` is set.
    """
    engine = Engine(
        model,
        text_format,
        slots=options.batch_size,
        max_length=options.max_length,
        max_condition=options.max_condition,
    )
    defaults = Request(
        "defaults",
        params=params,
        seed=options.seed or 0,
        max_new_tokens=options.max_new_tokens,
        aux_scale=options.aux_scale,
        samples=options.number,
    )
    errors = None
    if not options.stop_on_error:
        errors = options.output.with_name(options.output.name + ".errors.jsonl")
    run = _identity(options, model, defaults)
    if launched.rank > 0:
        return _help(options, defaults, engine, run, launched)
    began = time.monotonic()
    with CompletionWriter(options.output, errors, run=run, retry_errors=retry_errors) as writer:
        count = _Count(writer.done, writer.failed)
        _gather(options.output, writer, count, errors=not retry_errors)
        launched.wait()
        try:
            _write(options.input, defaults, engine, writer, count, launched)
            launched.wait()
            stopped = False
        except KeyboardInterrupt:
            stopped = True
        if not stopped:
            _check_parts(options.output, launched)
            _gather(options.output, writer, count)
    if stopped:
        _say_how_to_go_on(options.output, count)
        return INTERRUPTED
    _print_summary(options, engine, time.monotonic() - began, count, errors, launched)
    return 1 if count.failed or count.bad else 0


def _help(
    options: argparse.Namespace,
    defaults: Request,
    engine: Engine,
    run: dict[str, Any],
    launched: Launched,
) -> int:
    """What all processes but the first do; returns its exit status."""
    launched.wait()  # until the output has what earlier runs found
    with CompletionWriter(_part(options.output, launched.rank), run=run, besides=options.output) as writer:
        try:
            _write(options.input, defaults, engine, writer, _Count(0, 0), launched, options.stop_on_error)
        except KeyboardInterrupt:
            return INTERRUPTED
    launched.wait()
    return 0


def _part(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}.part-{rank}")


def _check_parts(output: Path, launched: Launched) -> None:
    missing = [rank for rank in range(1, launched.count) if not _part(output, rank).is_file()]
    if missing:
        raise ValueError(
            f"processes {missing} have written no {_part(output, missing[0]).name} beside {output}; all need "
            "one folder that they share. What they wrote is where they are, and will be taken over from here"
        )


def _gather(output: Path, writer: CompletionWriter, count: _Count, *, errors: bool = True) -> None:
    """Takes over what other processes wrote beside the output."""
    for path in sorted(output.parent.glob(f"{glob.escape(output.name)}.part-*")):
        if path.name.removeprefix(f"{output.name}.part-").isdecimal():
            done, failed = writer.absorb(path, errors=errors)
            count.done += done
            count.failed += failed


@dataclass
class _Count:
    """Texts in the output, errors among them, and lines of the input that are no requests."""

    done: int
    failed: int
    bad: int = 0


def _write(
    path: Path,
    defaults: Request,
    engine: Engine,
    writer: CompletionWriter,
    count: _Count,
    launched: Launched,
    stop_on_error: bool = False,
) -> None:
    """Writes what is missing in the output of this process's share, and counts it."""

    def report(line: BadLine) -> None:
        if writer.takes_bad_lines:
            writer.report(line)
        count.bad += 1

    # All read every line, and one of them reports the bad ones.
    raises = stop_on_error if launched.rank > 0 else not writer.takes_bad_lines
    lines = read_requests(path, defaults, None if raises else report)
    mine = itertools.islice(lines, launched.rank, None, launched.count)
    progress = progress_for() if launched.rank == 0 else Progress()
    meter = _Meter(engine, -(-_count_lines(path) // launched.count), progress)
    try:
        for completion in _completions(engine, writer.pending(meter.counted(mine))):
            writer.write(completion)
            count.done += 1
            count.failed += completion.finish_reason == "error"
            meter.show()
    finally:
        meter.close()


def _completions(engine: Engine, pending: Iterator[tuple[Request, tuple[int, ...]]]) -> Iterator[Any]:
    """Keeps the engine's queue filled, and never fuller than it needs."""
    more = True
    while more or not engine.scheduler.idle:
        while more and engine.scheduler.waiting < _AHEAD * engine.scheduler.slots:
            request = next(pending, None)
            if request is None:
                more = False
            else:
                yield from engine.submit(*request)
        yield from engine.step()


class _Meter:
    """Tells how far the input is read, and how fast."""

    def __init__(self, engine: Engine, total: int, progress: Progress) -> None:
        self._engine, self._progress = engine, progress
        self._began, self._read, self._total = time.monotonic(), 0, total
        self._shown = 0.0
        progress.start(0, total, "requests")

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def counted(self, requests: Iterator[Request]) -> Iterator[Request]:
        """The same requests."""
        for request in requests:
            self._read += 1
            yield request

    def show(self) -> None:
        """A line at most every tenth of a second."""
        now = time.monotonic()
        if now - self._shown < 0.1:
            return
        self._shown = now
        scheduler, stats = self._engine.scheduler, self._engine.stats
        done = max(0, self._read - scheduler.waiting - len(scheduler.running))
        self._progress.advance(done)
        left = self.seconds / done * (self._total - done) if done else 0.0
        self._progress.figures(
            f"{stats.new_tokens / self.seconds:,.0f} tokens/s written, "
            f"{stats.prefill_tokens / self.seconds:,.0f} read, {duration(left)} left"
        )

    def close(self) -> None:
        """Nothing more will come."""
        self._progress.close()


def _identity(options: argparse.Namespace, model: Any, defaults: Request) -> dict[str, Any]:
    """What makes another output if it changes."""
    from auxkern.model import fingerprint

    return {
        "input": file_fingerprint(options.input),
        "auxiliary": fingerprint(model),
        "base": model.lm_fingerprint,
        "condition_template": model.config.condition_template,
        "defaults": defaults.as_record(),
        "max_length": options.max_length,
        "max_condition": options.max_condition,
    }


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b"")) or 1


def _say_how_to_go_on(output: Path, count: _Count) -> None:
    print(
        f"\nauxkern generate: stopped; {output} has {count.done:,} texts so far. "
        "Start the same command again, and it goes on",
        file=sys.stderr,
    )


def _print_summary(
    options: argparse.Namespace,
    engine: Engine,
    seconds: float,
    count: _Count,
    errors: Path | None,
    launched: Launched,
) -> None:
    stats = engine.stats
    speed = stats.new_tokens / max(seconds, 1e-9)
    of = f", by the first of {launched.count} processes" if launched.count > 1 else ""
    print(
        f"{options.output}: {stats.new_tokens:,} tokens written, {stats.prefill_tokens:,} read, in "
        f"{duration(seconds)} ({speed:,.0f} written per second{of})"
    )
    if count.failed:
        print(
            f"{count.failed:,} texts could not be written; their lines in {options.output} have an error; "
            "--retry-errors asks for them again",
            file=sys.stderr,
        )
    if count.bad:
        print(f"{count.bad:,} lines of {options.input} are no requests; see {errors}", file=sys.stderr)
