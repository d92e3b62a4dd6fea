"""What the benchmark commands share: options, progress, files, and ending early."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from auxkern import machine
from auxkern.bench.plot import SUFFIXES, plot
from auxkern.bench.results import CaseResult, Run
from auxkern.bench.runner import Progress
from auxkern.core.files import replace_file
from auxkern.terminal import INTERRUPTED, console_for_stdout


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """--backend, --quick, --json and --plot."""
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="measure this auxkern backend (repeatable); by default every fast one that runs on the device",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer cases and fewer repeats: a first impression"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything measured, after each case"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw bars of time and memory (.png or .svg)"
    )


def check_common_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with a message if files cannot be written or a package is missing."""
    needed = ["rich"] + (["matplotlib"] if options.plot else [])
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} is not installed; pip install 'auxkern[bench]'")
    for name, path in (("--json", options.json), ("--plot", options.plot)):
        if path is None:
            continue
        if path.is_dir():
            parser.error(f"{name} {path} is a folder; give a file name")
        if not path.resolve().parent.is_dir():
            parser.error(f"{name} {path}: the folder {path.resolve().parent} does not exist; make it first")
    if options.plot is not None:
        if options.plot.suffix not in SUFFIXES:
            parser.error(f"--plot {options.plot} must end in {' or '.join(SUFFIXES)}")
        if options.json is not None and options.json.resolve() == options.plot.resolve():
            parser.error(f"--json and --plot name the same file {options.json}; give two names")


def new_run(prog: str, argv: list[str] | None, device: torch.device) -> Run:
    """A run without cases: command, date and machine."""
    arguments = sys.argv[1:] if argv is None else argv
    return Run(
        command=shlex.join([*prog.split(), *arguments]),
        date=machine.now(),
        machine=machine.machine_facts(device),
    )


Job = tuple[str, Callable[[Progress], CaseResult]]


def carry_out(run: Run, jobs: list[Job], options: argparse.Namespace) -> int:
    """Runs the jobs, prints each as it ends, writes the files.

    Ctrl-C keeps what is finished: it is printed and written like a run that ended by itself.

    Args:
        run: takes the results; its header is printed first, with its facts.
        jobs: (title, function of a progress callback that measures one case).
        options: with ``json`` and ``plot``.

    Returns:
        0; 1 if an implementation of ours was wrong or failed; 130 after Ctrl-C.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from auxkern.bench import tables

    out, err = console_for_stdout(), Console(stderr=True)
    tables.print_header(out, run)
    tables.print_facts(out, run)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # The bar is for eyes: a log file gets none of it.
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=len(jobs))
        try:
            for index, (title, measure) in enumerate(jobs):

                def report(share: float, doing: str, index: int = index, title: str = title) -> None:
                    bar.update(task, completed=index + share, description=f"{title}: {doing}")

                case = measure(report)
                run.cases.append(case)
                tables.print_case(out, case)
                if options.json is not None:
                    replace_file(options.json, run.to_json())
        except KeyboardInterrupt:
            run.interrupted = True
            run.notes.append(f"Interrupted: {len(run.cases)} of {len(jobs)} cases are finished.")
    tables.print_footer(out, run)
    if options.json is not None:
        replace_file(options.json, run.to_json())
        print(f"wrote {options.json}", file=sys.stderr)
    if options.plot is not None:
        _plot(run, options.plot)
    if run.interrupted:
        return INTERRUPTED
    bad = [result for case in run.cases for result in case.results if result.ours and result.status != "ok"]
    return 1 if bad else 0


def _plot(run: Run, path: Path) -> None:
    if not any(result.passes for case in run.cases for result in case.results):
        print(f"nothing was timed, so {path} is not drawn", file=sys.stderr)
        return
    plot(run, path)
    print(f"wrote {path}", file=sys.stderr)
