"""``python -m benchmarks.keyword``: auxiliary tuning beside its alternatives, on keywords never seen."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from auxkern.terminal import INTERRUPTED, command_parser, positive
from auxkern.training.loop import TrainingInterrupted
from auxkern.training.progress import duration, progress_for
from benchmarks.keyword.jobs import STATES, do_job, facts_of, study_jobs, tuning_jobs
from benchmarks.keyword.presets import PRESETS, Preset
from benchmarks.keyword.record import study_record
from benchmarks.keyword.runs import Workplace
from benchmarks.keyword.scheduling import run_all
from benchmarks.keyword.tuning import chosen
from benchmarks.shared import record_head, write_json

RESULTS = Path("benchmarks") / "results"
_Head = Callable[[str], dict[str, Any]]  # of a record, for its kind
_EPILOG = """\
The study trains each method with the same sentences in the same order, writes texts for the same held-out
keywords at the same steps, and measures them. Every run is a process of its own; stopped by Ctrl-C or worse,
the same command goes on where it was. --tune tries learning rates and prompts instead, and writes what the
study reads. `python -m benchmarks.keyword.page FILE.json` makes the page and the pictures.
Exit status: 0; 1 if a run failed (its log says why); 2 for bad options or missing data; 130 after Ctrl-C.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the study, its tuning, or one job of them.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0; 1 if a run failed; 2 if data is missing; 130 after Ctrl-C. Bad options exit with 2.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]
    tuning = options.tuning or RESULTS / f"keyword_{preset.name}_tuning.json"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def head(kind: str) -> dict[str, Any]:
        return record_head(kind, parser.prog, arguments, device)

    try:
        if options.run is not None:
            return _one(preset, options.output, tuning, options.run)
        if options.tune:
            return _tune(preset, options, tuning, head)
        if options.partial:
            return _write(preset, options, tuning, head, None)
        return _study(preset, options, tuning, head)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except TrainingInterrupted as stop:
        print(f"{parser.prog}: {stop}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m benchmarks.keyword", "Auxiliary tuning and its alternatives on the keyword task.", _EPILOG
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument("--output", type=Path, default=Path("out/keyword"), metavar="FOLDER")
    parser.add_argument(
        "--json", type=Path, metavar="FILE.json", help="results (default: keyword.json in the output folder)"
    )
    parser.add_argument("--jobs", type=positive, help="runs at a time (default: 2 on a CPU, 1 on a GPU)")
    parser.add_argument("--tune", action="store_true", help="try learning rates and prompts")
    parser.add_argument(
        "--tuning",
        type=Path,
        metavar="FILE.json",
        help="what --tune writes and the study reads (default: the preset's committed one)",
    )
    parser.add_argument(
        "--partial", action="store_true", help="write the results of the runs that are done, and start none"
    )
    parser.add_argument("--run", metavar="NAME", help="one job, as the study starts it, such as auxiliary:0")
    return parser


def _study(preset: Preset, options: argparse.Namespace, tuning: Path, head: _Head) -> int:
    if not tuning.is_file():
        raise FileNotFoundError(f"{tuning} is missing; --tune writes it")
    began = time.monotonic()
    if not _all_done(options, tuning, study_jobs()):
        return 1
    return _write(preset, options, tuning, head, time.monotonic() - began)


def _write(
    preset: Preset, options: argparse.Namespace, tuning: Path, head: _Head, seconds: float | None
) -> int:
    """Writes the record; without ``seconds`` of the runs that are done."""
    found = json.loads(tuning.read_text(encoding="utf-8"))
    record = {
        **head("keyword study"),
        "seconds of this command": None if seconds is None else round(seconds),
        **study_record(preset, options.output, found, partial=seconds is None),
    }
    path = options.json or options.output / "keyword.json"
    write_json(path, record)
    print(f"wrote {path}" + ("" if seconds is None else f" after {duration(seconds)}"))
    return 0


def _tune(preset: Preset, options: argparse.Namespace, tuning: Path, head: _Head) -> int:
    if not _all_done(options, tuning, tuning_jobs(preset)):
        return 1
    write_json(tuning, {**head("keyword study, tuning"), **chosen(preset, options.output)})
    print(f"wrote {tuning}")
    return 0


def _one(preset: Preset, output: Path, tuning: Path, job: str) -> int:
    """One job in this process."""
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    do_job(Workplace.open(preset, output), job, tuning, progress_for())
    return 0


def _all_done(options: argparse.Namespace, tuning: Path, jobs: Sequence[str]) -> bool:
    """Does the jobs that are not done yet, the base's states before them; whether all are."""

    def command_of(job: str) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.keyword", "--preset", options.preset, "--run", job]
        return [*command, "--output", str(options.output), "--tuning", str(tuning)]

    at_a_time = options.jobs or (1 if torch.cuda.is_available() else 2)
    logs = options.output / "logs"
    for some, number in (([STATES], 1), (jobs, at_a_time)):
        waiting = [job for job in some if not facts_of(options.output, job).is_file()]
        if not run_all(waiting, command_of, jobs=number, logs=logs):
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
