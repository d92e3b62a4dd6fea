"""Studies of many jobs: each a process of its own with its share of the cores, done once and for all."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from auxkern.core.files import replace_file
from auxkern.terminal import INTERRUPTED, command_parser, positive, sentence
from auxkern.training.loop import TrainingInterrupted
from auxkern.training.progress import duration
from benchmarks.shared import record_head, write_json

FACTS = "facts.json"  # in the folder of a job, written when it is complete
_TAKEN = "seconds"  # in the folder of a study: what its commands have taken so far


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``write_facts`` wrote."""
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Whole or not at all, so that what is there is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / FACTS, json.dumps(facts, ensure_ascii=False) + "\n")


def study_parser(
    module: str, about: str, epilog: str, presets: Iterable[str], output: Path
) -> argparse.ArgumentParser:
    """The options that every study has.

    Args:
        module: that is run, such as "benchmarks.keyword".
        about, epilog: of the help.
        presets: by name; "cpu" is the default.
        output: default of the folder.
    """
    parser = command_parser(f"python -m {module}", about, epilog)
    parser.add_argument("--preset", choices=tuple(presets), default="cpu")
    parser.add_argument("--output", type=Path, default=output, metavar="FOLDER")
    parser.add_argument(
        "--json", type=Path, metavar="FILE.json", help="results (default: in the output folder)"
    )
    parser.add_argument("--jobs", type=positive, help="runs at a time (default: 2 on a CPU, 1 on a GPU)")
    parser.add_argument("--run", metavar="NAME", help="one job, as the study starts it")
    return parser


def study_status(prog: str, work: Callable[[], int]) -> int:
    """The exit status of ``work``: 2 after an error of data or options, 130 after Ctrl-C, in one line."""
    try:
        return work()
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"{prog}: {sentence(error)}", file=sys.stderr)
        return 2
    except TrainingInterrupted as stop:
        print(f"{prog}: {stop}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print(f"{prog}: stopped; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED


def take_own_threads() -> None:
    """Has torch use as many threads as the study that started this process gives it."""
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def run_study(
    module: str,
    options: argparse.Namespace,
    arguments: Sequence[str],
    stages: Sequence[tuple[Sequence[str], bool]],
    facts_of: Callable[[Path, str], Path],
    kind: str,
    results: Callable[[], dict[str, Any]],
) -> int:
    """Does what is left of a study, and writes its record, with the seconds of all commands that it took.

    Args:
        module, options, stages, facts_of: as of ``run_stages``.
        arguments: that were typed.
        kind: of the record.
        results: of all jobs, once they are done.

    Returns:
        0; 1 if a job failed.
    """
    began, taken = time.monotonic(), options.output / _TAKEN
    before = float(taken.read_text(encoding="utf-8")) if taken.is_file() else 0.0
    try:
        done = run_stages(module, options, stages, facts_of)
    finally:
        seconds = before + time.monotonic() - began
        options.output.mkdir(parents=True, exist_ok=True)
        replace_file(taken, f"{seconds:.1f}\n")
    if not done:
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        **record_head(kind, f"python -m {module}", arguments, device),
        "seconds of this command": round(seconds),
        **results(),
    }
    path = options.json or options.output / f"{module.rpartition('.')[2]}.json"
    write_json(path, record)
    print(f"wrote {path} after {duration(seconds)}")
    return 0


def run_stages(
    module: str,
    options: argparse.Namespace,
    stages: Sequence[tuple[Sequence[str], bool]],
    facts_of: Callable[[Path, str], Path],
) -> bool:
    """Does the jobs that are not done yet, a stage after the other, until one fails.

    Args:
        module: of the study; it does a job when it is given ``--run``.
        options: of ``study_parser``.
        stages: jobs, and whether some of them may run at a time.
        facts_of: of output folder and job, the file that says that it is done.

    Returns:
        Whether all are done.
    """

    def command_of(job: str) -> list[str]:
        command = [sys.executable, "-m", module, "--preset", options.preset, "--run", job]
        return [*command, "--output", str(options.output)]

    at_a_time = options.jobs or (1 if torch.cuda.is_available() else 2)
    for jobs, together in stages:
        waiting = [job for job in jobs if not facts_of(options.output, job).is_file()]
        number = at_a_time if together else 1
        if not run_all(waiting, command_of, jobs=number, logs=options.output / "logs"):
            return False
    return True


def run_all(waiting: Sequence[str], command_of: Callable[[str], list[str]], *, jobs: int, logs: Path) -> bool:
    """Runs all of them, the first ones first; where one fails the others go on.

    Args:
        waiting: names.
        command_of: the command of a name.
        jobs: processes at a time.
        logs: folder for a NAME.log of each, with : as -, which is added to.

    Returns:
        Whether all ended with status 0.

    Raises:
        KeyboardInterrupt: Ctrl-C; every process was told to finish its step and save, and has ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # A process that waits must not keep a core from another.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    left, failed = list(waiting), False
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while left or running:
            while left and len(running) < jobs:
                name = left.pop(0)
                with log_of(logs, name).open("ab") as log:
                    # Its own group: a terminal's Ctrl-C is passed on below, once.
                    child = subprocess.Popen(
                        command_of(name), stdout=log, stderr=log, env=environment, start_new_session=True
                    )
                running[name] = (child, time.monotonic())
                print(f"{name}: started", flush=True)
            time.sleep(0.1)
            for name, (child, began) in list(running.items()):
                if child.poll() is None:
                    continue
                del running[name]
                took = duration(time.monotonic() - began)
                if child.returncode == 0:
                    print(f"{name}: done after {took}", flush=True)
                else:
                    failed = True
                    where = log_of(logs, name)
                    print(f"{name}: status {child.returncode} after {took}, see {where}", flush=True)
    except KeyboardInterrupt:
        children = [child for child, _ in running.values()]
        for child in children:
            child.send_signal(signal.SIGTERM)
        for child in children:
            child.wait()
        raise
    return not failed


def log_of(logs: Path, name: str) -> Path:
    """Where what a process prints goes."""
    return logs / f"{name.replace(':', '-')}.log"
