"""``python -m benchmarks.keyword``: auxiliary tuning beside its alternatives, on keywords never seen."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from auxkern.training.progress import duration, progress_for
from benchmarks.keyword.jobs import STATES, do_job, facts_of, study_jobs, tuning_jobs
from benchmarks.keyword.presets import PRESETS, Preset
from benchmarks.keyword.record import study_record
from benchmarks.keyword.runs import Workplace
from benchmarks.keyword.tuning import chosen
from benchmarks.shared import record_head, write_json
from benchmarks.studies import RESULTS, run_stages, study_parser, study_status, take_own_threads

_MODULE = "benchmarks.keyword"
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

    def work() -> int:
        if options.run is not None:
            return _one(preset, options.output, tuning, options.run)
        if options.tune:
            return _tune(preset, options, tuning, head)
        if options.partial:
            return _write(preset, options, tuning, head, None)
        return _study(preset, options, tuning, head)

    return study_status(parser.prog, work)


def _parser() -> argparse.ArgumentParser:
    about = "Auxiliary tuning and its alternatives on the keyword task."
    parser = study_parser(_MODULE, about, _EPILOG, PRESETS, Path("out/keyword"))
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
    take_own_threads()
    do_job(Workplace.open(preset, output), job, tuning, progress_for())
    return 0


def _all_done(options: argparse.Namespace, tuning: Path, jobs: Sequence[str]) -> bool:
    """Does the jobs that are not done yet, the base's states before them; whether all are."""
    stages = (((STATES,), False), (jobs, True))
    return run_stages(_MODULE, options, stages, facts_of, ("--tuning", str(tuning)))


if __name__ == "__main__":
    sys.exit(main())
