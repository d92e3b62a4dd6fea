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

from auxkern.commands.mixture import MixtureFile
from auxkern.commands.ranks import Launched
from auxkern.generation import BadLine, CompletionWriter, Engine, Request, file_fingerprint, read_requests
from auxkern.model import fingerprint
from auxkern.ops.sampling_params import SamplingParams
from auxkern.terminal import INTERRUPTED
from auxkern.training.progress import Progress, duration, progress_for

# Requests that are encoded ahead of their turn: newcomers of like length are looked for among them.
_AHEAD = 4


def answer_file(
    options: argparse.Namespace, model: Any, text_format: Any, params: SamplingParams, launched: Launched
) -> int:
    """Answers every request in ``options.input`` that ``options.output`` does not answer yet.

    Of several processes (``launched``) each takes its share of them. The first one writes ``options.output``
    itself, and at the end takes over what the others wrote beside it; should one be lost, the next run, of
    any number of processes, does that first.

    Args:
        options: of ``auxkern generate``. With ``retry_errors`` an answer that is an error is none: its line
            is taken out of the output before the run goes on. Lines of the input that are no requests are
            bad again either way.
        model, text_format: a pair, and what makes its ids.
        params: what lines leave out.
        launched: this process among those that share the input, joined.

    Returns:
        0; 1 if lines of the input were no requests or requests failed, in this run or in the one that it
        goes on with; 130 after Ctrl-C.

    Raises:
        OSError, ValueError: a file cannot be read or written, or is of another run; a line is bad and
            ``options.stop_on_error`` is set.
    """
    mixture = None if options.mixture is None else MixtureFile.read(options.mixture)
    defaults = Request(
        "defaults",
        params=params,
        seed=options.seed or 0,
        max_new_tokens=options.max_new_tokens,
        aux_scale=options.aux_scale,
        samples=options.number,
    )
    defaults = defaults if mixture is None else mixture.defaults(defaults)
    models = {} if mixture is None else mixture.load(model, text_format.tokenizer, options)
    engine = Engine(
        model,
        text_format,
        models=models,
        slots=options.batch_size,
        max_length=options.max_length,
        max_condition=options.max_condition,
    )
    run = {  # what makes another output if it changes
        "input": file_fingerprint(options.input),
        "auxiliary": fingerprint(model),
        "base": model.lm_fingerprint,
        "condition_template": model.config.condition_template,
        "defaults": defaults.as_record(),
        "max_length": options.max_length,
        "max_condition": options.max_condition,
    }
    if mixture is not None:
        run["mixture"] = mixture.record(models)
    work = _FileRun(options, engine, defaults, launched)
    return work.lead(run) if launched.rank == 0 else work.follow(run)


@dataclass
class _FileRun:
    """A process's share of the input, and its texts so far."""

    options: argparse.Namespace
    engine: Engine
    defaults: Request
    launched: Launched
    done: int = 0  # texts in its output,
    failed: int = 0  # errors among them,
    bad: int = 0  # and lines of the input that are no requests

    def lead(self, run: dict[str, Any]) -> int:
        """What the first process does; returns its exit status."""
        output, retry = self.options.output, self.options.retry_errors
        errors = None if self.options.stop_on_error else output.with_name(output.name + ".errors.jsonl")
        began = time.monotonic()
        with CompletionWriter(output, errors, run=run, retry_errors=retry) as writer:
            self.done, self.failed = writer.done, writer.failed
            self._gather(writer, errors=not retry)
            self.launched.wait()
            try:
                self._write(writer)
                self.launched.wait()
            except KeyboardInterrupt:
                print(
                    f"\nauxkern generate: stopped; {output} has {self.done:,} texts so far. "
                    "Start the same command again, and it goes on",
                    file=sys.stderr,
                )
                return INTERRUPTED
            missing = [rank for rank in range(1, self.launched.count) if not self._part(rank).is_file()]
            if missing:
                raise ValueError(
                    f"processes {missing} have written no {self._part(missing[0]).name} beside {output}; all "
                    "need one folder that they share. What they wrote is where they are, and will be taken "
                    "over from here"
                )
            self._gather(writer)
        self._print_summary(time.monotonic() - began, errors)
        return 1 if self.failed or self.bad else 0

    def follow(self, run: dict[str, Any]) -> int:
        """What all processes but the first do; returns its exit status."""
        self.launched.wait()  # until the output has what earlier runs found
        part = self._part(self.launched.rank)
        with CompletionWriter(part, run=run, besides=self.options.output) as writer:
            try:
                self._write(writer)
            except KeyboardInterrupt:
                return INTERRUPTED
        self.launched.wait()
        return 0

    def _part(self, rank: int) -> Path:
        output: Path = self.options.output
        return output.with_name(f"{output.name}.part-{rank}")

    def _gather(self, writer: CompletionWriter, *, errors: bool = True) -> None:
        """Takes over what other processes wrote beside the output."""
        output: Path = self.options.output
        for path in sorted(output.parent.glob(f"{glob.escape(output.name)}.part-*")):
            if path.name.removeprefix(f"{output.name}.part-").isdecimal():
                done, failed = writer.absorb(path, errors=errors)
                self.done += done
                self.failed += failed

    def _write(self, writer: CompletionWriter) -> None:
        """Writes what is missing in the output of this process's share, and counts it."""

        def report(line: BadLine) -> None:
            if writer.takes_bad_lines:
                writer.report(line)
            self.bad += 1

        path, rank, count = self.options.input, self.launched.rank, self.launched.count
        # All read every line, and one of them reports the bad ones.
        lines = read_requests(path, self.defaults, None if self.options.stop_on_error else report)
        mine = itertools.islice(lines, rank, None, count)
        progress = progress_for() if rank == 0 else Progress()
        with path.open("rb") as file:
            total = sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b"")) or 1
        meter = _Meter(self.engine, -(-total // count), progress)
        try:
            for completion in _completions(self.engine, writer.pending(meter.counted(mine))):
                writer.write(completion)
                self.done += 1
                self.failed += completion.finish_reason == "error"
                meter.show()
        finally:
            progress.close()

    def _print_summary(self, seconds: float, errors: Path | None) -> None:
        stats, count = self.engine.stats, self.launched.count
        speed = stats.new_tokens / max(seconds, 1e-9)
        of = f", by the first of {count} processes" if count > 1 else ""
        print(
            f"{self.options.output}: {stats.new_tokens:,} tokens written, {stats.prefill_tokens:,} read, in "
            f"{duration(seconds)} ({speed:,.0f} written per second{of})"
        )
        if self.failed:
            print(
                f"{self.failed:,} texts could not be written; their lines in {self.options.output} have an "
                "error; --retry-errors asks for them again",
                file=sys.stderr,
            )
        if self.bad:
            bad = f"{self.bad:,} lines of {self.options.input} are no requests"
            print(f"{bad}; see {errors}", file=sys.stderr)


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
        seconds = now - self._began
        left = seconds / done * (self._total - done) if done else 0.0
        self._progress.figures(
            f"{stats.new_tokens / seconds:,.0f} tokens/s written, "
            f"{stats.prefill_tokens / seconds:,.0f} read, {duration(left)} left"
        )
