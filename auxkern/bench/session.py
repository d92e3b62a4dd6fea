"""What the benchmark commands share: options, progress, files, and ending early."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from auxkern.bench.plot import SUFFIXES, plot
from auxkern.bench.results import AnyRun
from auxkern.bench.runner import Progress
from auxkern.core.files import replace_file
from auxkern.machine import machine_facts, now
from auxkern.terminal import INTERRUPTED, console_for_stdout, output_file
from auxkern.training.progress import takes_bars

# Title, and a function that measures one part of a run, or gives None and adds to the run itself.
Job = tuple[str, Callable[[Progress], Any]]


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, for ``device_from``."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")


def add_effort(parser: argparse.ArgumentParser) -> None:
    """--backend and --quick."""
    which = "measure this auxkern backend (repeatable); by default every fast one that runs on the device"
    parser.add_argument("--backend", action="append", metavar="NAME", help=which)
    quick = "fewer cases and fewer repeats: a first impression"
    parser.add_argument("--quick", action="store_true", help=quick)


def add_files(parser: argparse.ArgumentParser, part: str, drawn: str) -> None:
    """--json, written after each ``part``, and --plot of what is ``drawn``."""
    written = f"write everything measured, after each {part}"
    parser.add_argument("--json", type=output_file, metavar="FILE.json", help=written)
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help=f"draw {drawn} (.png or .svg)")


def check_files(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with a message if a picture's file is none, or a package is missing."""
    needed = ["rich"] + (["matplotlib"] if options.plot else [])
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} is not installed; pip install 'auxkern[bench]'")
    paths = {"--json": options.json, "--plot": options.plot}
    given = {name: path.resolve() for name, path in paths.items() if path is not None}
    if "--plot" in given and options.plot.suffix not in SUFFIXES:
        parser.error(f"--plot {options.plot} must end in {' or '.join(SUFFIXES)}")
    if len(set(given.values())) < len(given):
        parser.error(f"--json and --plot name the same file {options.json}; give two names")


def head(prog: str, argv: Sequence[str] | None, device: torch.device) -> tuple[str, str, dict[str, str]]:
    """Command, date and machine: what every run begins with."""
    arguments = sys.argv[1:] if argv is None else argv
    return shlex.join([*prog.split(), *arguments]), now(), machine_facts(device)


def carry_out(
    run: AnyRun, jobs: Sequence[Job], options: argparse.Namespace, remarks: Callable[[], list[str]] = list
) -> int:
    """Runs the jobs, prints each as it ends, adds it to ``run`` and writes the files of ``options``.

    Ctrl-C and errors keep what is finished: it is printed and written like a run that ended by itself,
    with the ``remarks`` that can be made when all is measured.

    Returns:
        0; 1 if an implementation of ours was wrong or failed, or a peer of texts did; 130 after Ctrl-C.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from auxkern.bench import tables

    out, err = console_for_stdout(), Console(stderr=True)
    tables.print_header(out, run)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    parts, finished = run.parts, 0
    try:
        # The bar is for eyes: a log file gets none of it.
        with Progress(*columns, console=err, disable=not takes_bars(sys.stderr), transient=True) as bar:
            task = bar.add_task("", total=len(jobs))
            for index, (title, measure) in enumerate(jobs):

                def report(share: float, doing: str, index: int = index, title: str = title) -> None:
                    bar.update(task, completed=index + share, description=f"{title}: {doing}")

                part = measure(report)
                if part is not None:  # else the job left in the run what there is to say
                    parts.append(part)
                    tables.print_part(out, part)
                finished += 1
                if options.json is not None:
                    replace_file(options.json, run.to_json())
    except KeyboardInterrupt:
        run.interrupted = True
        run.notes.append(f"Interrupted: {finished} of {len(jobs)} {run.PARTS[1]} are finished.")
    finally:
        run.notes += remarks()
        tables.print_footer(out, run)
        if options.json is not None:
            replace_file(options.json, run.to_json())
            print(f"wrote {options.json}", file=sys.stderr)
        if options.plot is not None and run.timed:
            plot(run, options.plot)
            print(f"wrote {options.plot}", file=sys.stderr)
        elif options.plot is not None:
            print(f"nothing was timed, so {options.plot} is not drawn", file=sys.stderr)
    return INTERRUPTED if run.interrupted else int(run.failed)
