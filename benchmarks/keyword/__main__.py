"""``python -m benchmarks.keyword``: auxiliary tuning beside its alternatives, on keywords never seen."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from auxkern.bench.machine import now
from auxkern.bench.session import INTERRUPTED, positive
from auxkern.commands.pair import versions
from auxkern.files import replace_file
from auxkern.training.loop import TrainingInterrupted
from auxkern.training.progress import duration, progress_for
from benchmarks.keyword.presets import BY_NAME, METHODS, PRESETS, Preset
from benchmarks.keyword.record import study_record
from benchmarks.keyword.runs import (
    FACTS,
    Workplace,
    cache_states,
    measure_references,
    measure_untrained,
    run_folder,
    train_method,
    write_facts,
)
from benchmarks.keyword.tuning import chosen, trial_folder, trials, try_prompts, try_rate

RESULTS = Path("benchmarks") / "results"
_EPILOG = """\
The study trains each method with the same sentences in the same order, writes texts for the same held-out
keywords at the same steps, and measures them. Every run is a process of its own; stopped by Ctrl-C or worse,
the same command goes on where it was. --tune tries learning rates and prompts instead, and writes what the
study reads. `python -m benchmarks.keyword.page FILE.json` makes the page and the pictures.
Exit status: 0; 1 if a run failed (its log says why); 2 for bad options or missing data; 130 after Ctrl-C.
"""
_STATES, _REFERENCES = "states", "references"


def main(argv: list[str] | None = None) -> int:
    """Runs the study, or one run of it.

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
    try:
        if options.run is not None:
            return _one(preset, options.output, tuning, options.run)
        if options.tune:
            return _tune(preset, options, tuning, _command(parser, arguments))
        if not tuning.is_file():
            raise FileNotFoundError(f"{tuning} is missing; --tune writes it")
        return _study(preset, options, tuning, _command(parser, arguments))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{parser.prog}: {stop or 'stopped'}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.keyword",
        description="Auxiliary tuning and its alternatives on the keyword task.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument("--output", type=Path, default=Path("out/keyword"), metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="where the results go")
    parser.add_argument("--jobs", type=positive, help="runs at a time (default: 2 on a CPU, 1 on a GPU)")
    parser.add_argument("--tune", action="store_true", help="try learning rates and prompts")
    parser.add_argument(
        "--tuning",
        type=Path,
        metavar="FILE.json",
        help="what --tune writes and the study reads (default: the preset's committed one)",
    )
    parser.add_argument("--run", metavar="NAME", help="one run, as the study starts it")
    return parser


def _command(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    return shlex.join([*parser.prog.split(), *arguments])


def _study(preset: Preset, options: argparse.Namespace, tuning: Path, command: str) -> int:
    began = time.monotonic()
    names = [f"{method.name}:{seed}" for method in METHODS for seed in range(method.seeds)]
    if not _run_all(preset, options, tuning, [_STATES], 1):
        return 1
    # The longest first: at the end no core waits for one of them.
    order = sorted(names, key=lambda name: BY_NAME[name.split(":")[0]].kind not in ("fine-tuning", "LoRA"))
    if not _run_all(preset, options, tuning, [*order, _REFERENCES], _jobs(options)):
        return 1
    record = {
        "kind": "keyword study",
        "command": command,
        "date": now(),
        "machine": versions(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        **study_record(preset, options.output, json.loads(tuning.read_text(encoding="utf-8"))),
    }
    record["seconds of this command"] = round(time.monotonic() - began)
    path = options.json or options.output / "keyword.json"
    replace_file(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path} after {duration(time.monotonic() - began)}")
    return 0


def _tune(preset: Preset, options: argparse.Namespace, tuning: Path, command: str) -> int:
    names = [f"try:{name}:{rate:g}" for name, rate in trials(preset)]
    if not _run_all(preset, options, tuning, [_STATES], 1):
        return 1
    if not _run_all(preset, options, tuning, [*reversed(names), "try:prompts:0"], _jobs(options)):
        return 1
    shares = json.loads((trial_folder(options.output, "prompts", 0) / FACTS).read_text())["shares"]
    record = {
        "kind": "keyword study, tuning",
        "command": command,
        "date": now(),
        "machine": versions(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        **chosen(preset, options.output, shares),
    }
    replace_file(tuning, json.dumps(record, indent=1) + "\n")
    print(f"wrote {tuning}")
    return 0


def _jobs(options: argparse.Namespace) -> int:
    return options.jobs or (1 if torch.cuda.is_available() else 2)


def _one(preset: Preset, output: Path, tuning: Path, name: str) -> int:
    """One run in this process."""
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    place = Workplace.open(preset, output)
    try:
        _work(place, tuning, name)
    except TrainingInterrupted as stop:
        print(stop, file=sys.stderr)
        return INTERRUPTED
    return 0


def _work(place: Workplace, tuning: Path, name: str) -> None:
    if name == _STATES:
        seconds = cache_states(place, progress_for())
        path = place.output / "states" / FACTS
        if not path.is_file():
            write_facts(path.parent, {"seconds": seconds})
    elif name == _REFERENCES:
        write_facts(place.output / "runs" / _REFERENCES, measure_references(place))
    elif name == "try:prompts:0":
        write_facts(trial_folder(place.output, "prompts", 0), {"shares": try_prompts(place)})
    elif name.startswith("try:"):
        _, method_name, rate = name.split(":")
        try_rate(place, method_name, float(rate), progress_for())
    else:
        method, seed = BY_NAME[name.split(":")[0]], int(name.split(":")[1])
        found = json.loads(tuning.read_text(encoding="utf-8"))
        folder = run_folder(place.output, method, seed)
        if method.trained:
            rate = found["learning_rates"][method.tuned_as]
            facts = train_method(place, method, seed, rate, folder, progress_for())
        else:
            facts = measure_untrained(place, method, found["prompt"])
        write_facts(folder, facts)


def _facts_of(output: Path, name: str) -> Path:
    if name in (_STATES, _REFERENCES):
        return (output if name == _STATES else output / "runs") / name / FACTS
    if name.startswith("try:"):
        _, method, rate = name.split(":")
        return trial_folder(output, method, float(rate)) / FACTS
    method, seed = name.split(":")
    return run_folder(output, BY_NAME[method], int(seed)) / FACTS


def _run_all(
    preset: Preset, options: argparse.Namespace, tuning: Path, names: Sequence[str], jobs: int
) -> bool:
    """Runs what is not done yet, so many at a time, each with its share of the cores.

    Returns:
        Whether all are done.
    """
    output: Path = options.output
    waiting = [name for name in names if not _facts_of(output, name).is_file()]
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)),
        # A run that waits must not keep a core from the other.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                command = [sys.executable, "-m", "benchmarks.keyword", "--preset", preset.name]
                command += ["--output", str(output), "--tuning", str(tuning), "--run", name]
                with (logs / f"{name.replace(':', '-')}.log").open("ab") as log:
                    child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                running[name] = (child, time.monotonic())
                print(f"{name}: started", flush=True)
            time.sleep(0.2)
            for name, (child, began) in list(running.items()):
                if child.poll() is None:
                    continue
                del running[name]
                if child.returncode == 0:
                    print(f"{name}: done after {duration(time.monotonic() - began)}", flush=True)
                else:
                    failed.append(name)
                    log_file = logs / f"{name.replace(':', '-')}.log"
                    print(f"{name}: failed with status {child.returncode}, see {log_file}", flush=True)
    except KeyboardInterrupt:
        _stop([child for child, _ in running.values()])
        raise
    return not failed


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Lets each finish its step and save it."""
    for child in children:
        # A terminal's Ctrl-C has reached them already; a second signal would stop them at once.
        if os.getpgid(child.pid) != os.getpgid(0) or not sys.stdin.isatty():
            child.send_signal(signal.SIGINT)
    for child in children:
        child.wait()


if __name__ == "__main__":
    sys.exit(main())
