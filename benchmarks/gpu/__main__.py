"""``python3 -m benchmarks.gpu FOLDER``: everything worth knowing about the kernels on this GPU."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.stages import ROOT, Reading, Stage, stages

if TYPE_CHECKING:
    from benchmarks.gpu.record import Record, StageResult

_TUNING_SECONDS = 500.0  # the last choice that is begun may take half a minute

_EPILOG = """\
Needs an NVIDIA GPU and a python3 with PyTorch and Triton; no network, and nothing is installed.
FOLDER gets gpu.json, gpu.md (drawn from it) and a log for each stage; they are written after every
stage. A stage whose program or Python package is missing is skipped and says so.
With --tune it gets tuning.json and the file that dispatch reads, after every choice.
Exit status: 0; 1 if a stage failed or ran out of time, choices are left to tune, or there is no GPU; 2 for
bad options; 130 after Ctrl-C.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the stages that were asked for, each in its own process and within its own time.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0; 1 if a stage failed or timed out, or there is no GPU; 130 after Ctrl-C or SIGTERM. Bad
        options exit with 2 (``SystemExit``, as argparse does).
    """
    parser = _parser()
    options = parser.parse_args(argv)
    folder = _folder(parser, options.folder)
    every = stages(folder)
    names = [stage.name for stage in every]
    for name in options.stage or []:
        if name not in names:
            parser.error(f"--stage {name}: choose from {', '.join(names)}")
    chosen = [stage for stage in every if not options.stage or stage.name in options.stage]
    if options.tune and options.stage:
        parser.error(f"--tune runs no stage; leave out --stage {options.stage[0]}")
    if options.seconds is not None and not options.tune:
        parser.error(f"--seconds {options.seconds:g} is for --tune")
    if options.dry_run:
        _list_candidates() if options.tune else _list(chosen)
        return 0
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 keeps the kernels off the GPU; unset it")
    missing = _no_gpu()
    if missing:
        print(f"{parser.prog}: {missing}", file=sys.stderr)
        return 1
    command = shlex.join([*parser.prog.split(), *(sys.argv[1:] if argv is None else argv)])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if options.tune:
            return _tune(folder, command, options.seconds or _TUNING_SECONDS)
        return run_stages(chosen, folder, command)
    except OSError as error:
        parser.error(f"{folder} cannot be written: {error}")
    except KeyboardInterrupt:  # between two stages
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu",
        description="Test, check and measure the kernels on this machine's GPU within 9 minutes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default="", help="where results are written")
    parser.add_argument(
        "--stage", action="append", metavar="NAME", help="run only this one (repeatable); see --dry-run"
    )
    parser.add_argument("--dry-run", action="store_true", help="list every command and its time; run none")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure how kernels are launched best, and write the file that dispatch reads; "
        "goes on where an earlier run stopped",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help=f"of --tune: begin no choice after so many (default: {_TUNING_SECONDS:.0f})",
    )
    return parser


def _folder(parser: argparse.ArgumentParser, given: str) -> Path:
    if not given:
        parser.error("say where the results go: make gpu OUT=folder, or python3 -m benchmarks.gpu FOLDER")
    folder = Path(given).resolve()
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            parser.error(f"FOLDER {given}: {path} is a file; give a folder, which may be a new one")
    return folder


def _list(chosen: Sequence[Stage]) -> None:
    for stage in chosen:
        print(f"{stage.name:9} {stage.seconds:4.0f} s  {stage.line}")
    print(f"{'total':9} {sum(stage.seconds for stage in chosen):4.0f} s")


def _list_candidates() -> None:
    from auxkern.backends.triton.configs import Configs
    from benchmarks.gpu.tuning import listed

    print("\n".join(listed(Configs())))


def _tune(folder: Path, command: str, seconds: float) -> int:
    missing = [module for module in ("triton",) if importlib.util.find_spec(module) is None]
    if missing:
        print(f"{sys.executable} has no {missing[0]}, whose kernels are tuned", file=sys.stderr)
        return 1
    from benchmarks.gpu import tuning

    return tuning.main(folder, command, seconds)


def _no_gpu() -> str | None:
    """Why nothing can run here, in one line; None if there is a GPU."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no PyTorch; use a python3 that has (make gpu PYTHON=...)"
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return f"PyTorch {torch.__version__} sees no NVIDIA GPU here, so there is nothing to measure"
    return None


def run_stages(chosen: Sequence[Stage], folder: Path, command: str) -> int:
    """Runs ``chosen`` one after the other and keeps the results up to date in ``folder``.

    A stage that fails or runs out of time does not stop the others; Ctrl-C (or SIGTERM) ends the
    running one and leaves the rest not run.

    Args:
        chosen: in the order in which they run.
        folder: an existing folder.
        command: what was typed, for the record.

    Returns:
        0; 1 if a stage failed or timed out; 130 after Ctrl-C.

    Raises:
        OSError: the folder cannot be written.
    """
    # Imported here, for they import torch: --dry-run and --help need none.
    from auxkern.machine import now
    from benchmarks.gpu.record import Record, StageResult

    results = [StageResult(stage.name, stage.line, stage.seconds) for stage in chosen]
    record = Record(command, now(), results)
    record.write(folder)
    saved = 0.0
    with _sigterm_as_ctrl_c():
        for stage, result in zip(chosen, results, strict=True):
            result.budget += saved if stage.takes_rest else 0.0
            print(f"{stage.name}: at most {result.budget:.0f} s", file=sys.stderr, flush=True)
            _carry_out(stage, result, folder)
            saved += max(0.0, result.budget - result.seconds)
            record.write(folder)
            _tell(result)
            if result.status == "interrupted":
                break
    print(f"wrote {folder / 'gpu.json'} and {folder / 'gpu.md'}", file=sys.stderr)
    return _exit_status(record)


def _tell(result: StageResult) -> None:
    found = "; ".join(filter(None, (result.reason, result.summary)))
    print(
        f"{result.name}: {result.status} after {result.seconds:.0f} s. {found}", file=sys.stderr, flush=True
    )


def _exit_status(record: Record) -> int:
    if any(stage.status == "interrupted" for stage in record.stages):
        return 130
    return 1 if record.failed else 0


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Lets SIGTERM, which ``timeout`` and job schedulers send, end a stage as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _carry_out(stage: Stage, result: StageResult, folder: Path) -> None:
    """Runs one stage and fills ``result``; never raises for what the stage does."""
    from benchmarks.gpu import running

    missing = [module for module in stage.needs if importlib.util.find_spec(module) is None]
    if missing:
        result.status, result.reason = "skipped", f"{sys.executable} has no {' and no '.join(missing)}"
        return
    if shutil.which(stage.command[0]) is None:
        result.status, result.reason = "skipped", f"{stage.command[0]} is not installed"
        return
    if stage.writes is not None:
        stage.writes.unlink(missing_ok=True)  # of an earlier run
    log = folder / f"{stage.name}.log"
    result.log = log.name
    ended = running.run(stage.command, log, result.budget, folder=ROOT, environment=_environment(stage))
    result.seconds, result.exit_status = ended.seconds, ended.status
    reading = _read(stage, log)
    result.figures, result.summary = reading.figures, reading.summary
    result.status, result.reason = _judge(ended, reading, log)
    if stage.writes is not None and not reading.problem:
        stage.writes.unlink(missing_ok=True)  # its content is in the figures


def _environment(stage: Stage) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment}


def _read(stage: Stage, log: Path) -> Reading:
    try:
        return stage.read(log.read_text(encoding="utf-8", errors="replace"), stage.writes)
    except (KeyError, TypeError, ValueError) as error:  # what it printed is not what its reader knows
        return Reading(problem=f"its output cannot be read: {type(error).__name__}: {error}")


def _judge(ended: Any, reading: Reading, log: Path) -> tuple[str, str]:
    """(status, reason) of a stage that was started."""
    if ended.how == "by Ctrl-C":
        return "interrupted", "stopped by Ctrl-C"
    if reading.skipped:
        return "skipped", reading.skipped
    if ended.how == "at its limit":
        return "timed out", f"stopped after {ended.seconds:.0f} s"
    if ended.status or reading.problem:
        end = "" if not ended.status else f"exit status {ended.status}, see {log.name}"
        return "failed", "; ".join(filter(None, (reading.problem, end)))
    return "passed", ""


if __name__ == "__main__":
    raise SystemExit(main())
