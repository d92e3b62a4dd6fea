"""The stages: what each runs, how long it may take, and how its output is read."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # of the repository; stages run there


@dataclass(frozen=True)
class Reading:
    """What a stage's output says.

    Attributes:
        figures: for the JSON file.
        summary: one line for the table.
        problem: why the stage failed although its exit status may be 0; None if all is well.
        skipped: why it could not do its work at all on this machine; None if it did.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    problem: str | None = None
    skipped: str | None = None


def nothing(log: str, written: Path | None) -> Reading:
    return Reading()


@dataclass(frozen=True)
class Stage:
    """One command with its own time budget.

    Attributes:
        name: for ``--stage``, and of its log file.
        command: program and arguments.
        seconds: budget.
        read: (log, file that the command writes, if any) -> what they say. Also called when the
            command failed or was stopped.
        needs: Python modules without which it is skipped.
        environment: variables added to those of this process.
        writes: file that the command writes; its content ends up in ``figures``.
        takes_rest: whether it may also use the time that earlier stages left.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    read: Callable[[str, Path | None], Reading] = nothing
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    writes: Path | None = None
    takes_rest: bool = False

    @property
    def line(self) -> str:
        """What one would type, with this Python by its name only."""
        python = Path(sys.executable).name
        words = [python if word == sys.executable else word for word in self.command]
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(words)])


def stages(folder: Path) -> list[Stage]:
    """All stages, in the order in which they run; together they take 8 minutes at most.

    Args:
        folder: where files are written, absolute.
    """
    python = sys.executable
    bench = folder / "bench.json"
    # The command ends up in records: no more of this machine's paths there than must be.
    shown = bench.relative_to(ROOT) if bench.is_relative_to(ROOT) else bench
    selection = (python, "-m", "benchmarks.gpu.selection")
    operators = [word for op in ("cross_entropy", "sample", "linear") for word in ("--op", op)]
    # Blocks of PyTorch's cache would hide a read or write beyond the end of a tensor.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Stage("device", (python, "-m", "benchmarks.gpu.device"), 20, read_device),
        Stage("ceilings", (python, "-m", "benchmarks.gpu.ceilings"), 30, read_ceilings),
        tests_stage(python),
        *(
            Stage(
                tool,
                (sanitizer(), "--tool", tool, "--launch-timeout", "60", *selection),
                80,
                read_sanitizer,
                environment=uncached,
            )
            for tool in ("memcheck", "racecheck")
        ),
        Stage(
            "bench",
            # The short lists: torch.compile and other peers tune themselves for half a minute in every case.
            (python, "-m", "auxkern.bench", "--device", "cuda", "--quick", *operators, "--json", str(shown)),
            110,
            read_bench,
            needs=("rich",),
            writes=bench,
            takes_rest=True,
        ),
    ]


def tests_stage(python: str) -> Stage:
    """The tests marked ``gpu``, in several processes where pytest-xdist is there.

    Most of their time goes into compiling kernels on a machine that has compiled none before.
    """
    # One line for each test: a run that is stopped still tells what it saw.
    options: tuple[str, ...] = ("-v", "-m", "gpu", "--tb=short", "--durations=10", "-p", "no:cacheprovider")
    processes = min(8, (os.cpu_count() or 1) // 2)
    environment = {}
    if processes > 1 and importlib.util.find_spec("xdist") is not None:
        options += ("-n", str(processes), "--dist", "worksteal")
        environment["OMP_NUM_THREADS"] = "2"
    needs = ("pytest", "hypothesis")
    return Stage("tests", (python, "-m", "pytest", *options), 160, read_tests, needs, environment)


def sanitizer() -> str:
    """Path of compute-sanitizer, from PATH or the CUDA toolkit; its plain name if there is none."""
    name = "compute-sanitizer"
    roots = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    places = [Path(root) / "bin" / name for root in [*roots, "/usr/local/cuda"]]
    return shutil.which(name) or next((str(path) for path in places if os.access(path, os.X_OK)), name)


def _printed(log: str) -> dict[str, Any] | None:
    """The JSON object on the last line of the log that begins like one."""
    lines = [line for line in log.splitlines() if line.startswith("{")]
    try:
        found = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def read_device(log: str, written: Path | None) -> Reading:
    """Figures "machine" and "peers", both printable values by name."""
    figures = _printed(log)
    if figures is None:
        return Reading(problem="printed no figures")
    machine = figures["machine"]
    return Reading(figures, f"{machine['device']}, driver {machine['driver']}")


def read_ceilings(log: str, written: Path | None) -> Reading:
    """Figures as ``benchmarks.gpu.ceilings.measure`` returns them."""
    figures = _printed(log)
    if figures is None:
        return Reading(problem="printed no figures")
    copy, product = figures["copy"]["rate"], figures["bf16 product"]["rate"]
    return Reading(figures, f"copy {copy / 1e12:.2f} TB/s, bf16 product {product / 1e12:.0f} TFLOP/s")


_OUTCOMES = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
_TEST = re.compile(rf"^(\S+::.+?) {_OUTCOMES}\b", re.MULTILINE)
_TEST_OF_MANY_PROCESSES = re.compile(rf"^\[gw\d+\] \[ *\d+%\] {_OUTCOMES} (\S+::.+?) *$", re.MULTILINE)


def read_tests(log: str, written: Path | None) -> Reading:
    """Figures: number of tests by outcome, and the names of those that failed."""
    # The last word counts: a test that passes and cannot be torn down is an error.
    outcomes = {name: outcome.lower() for name, outcome in _TEST.findall(log)}
    outcomes |= {name: outcome.lower() for outcome, name in _TEST_OF_MANY_PROCESSES.findall(log)}
    counts = Counter(outcomes.values())
    bad = [name for name, outcome in outcomes.items() if outcome in ("failed", "error")]
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    problem = None
    if bad:
        problem = f"{len(bad)} tests failed: {', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}"
    elif not counts["passed"]:
        problem = "no test passed"
    return Reading({"outcomes": dict(counts), "failed": bad}, summary, problem)


_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error")
_HAZARDS = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)")
_CHECKED = re.compile(r"^(\d+) cases are right", re.MULTILINE)


def read_sanitizer(log: str, written: Path | None) -> Reading:
    """Figures: errors (and warnings of racecheck) reported, and cases that ran under the tool."""
    if "Device not supported" in log:
        return Reading(skipped="compute-sanitizer does not support this device or its driver")
    checked, errors, hazards = _CHECKED.search(log), _ERRORS.search(log), _HAZARDS.search(log)
    if hazards is None and errors is None:
        return Reading(problem="compute-sanitizer printed no summary")
    figures = {"cases": int(checked[1]) if checked else 0}
    if hazards is not None:
        figures |= {"errors": int(hazards[2]), "warnings": int(hazards[3])}
    elif errors is not None:
        figures |= {"errors": int(errors[1])}
    found = ", ".join(f"{name}: {count}" for name, count in figures.items())
    problem = None
    if figures["errors"]:
        problem = "compute-sanitizer found errors"
    elif checked is None:
        problem = "the selection did not run to its end"
    return Reading(figures, found, problem)


def read_bench(log: str, written: Path | None) -> Reading:
    """Figures: the run as ``auxkern.bench`` wrote it, as far as it came."""
    if written is None or not written.exists():
        return Reading(problem="wrote no file")
    run = json.loads(written.read_text(encoding="utf-8"))
    statuses = Counter(result["status"] for case in run["cases"] for result in case["results"])
    found = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    problem = None if statuses["ok"] else "nothing was timed"
    return Reading({"run": run}, f"{len(run['cases'])} cases: {found}", problem)
