"""``python -m auxkern.inspect``: what the compiler made of every Triton kernel, on any machine."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from auxkern import machine
from auxkern.core.files import replace_file
from auxkern.inspect.targets import TARGETS
from auxkern.terminal import INTERRUPTED, command_parser, output_file, positive
from auxkern.training.progress import takes_bars

if TYPE_CHECKING:
    from auxkern.inspect.survey import Finding

_EPILOG = """\
Every kernel is compiled ahead of time as dispatch would launch it; nothing runs, no GPU is needed.
One binary serves every vocabulary and batch, so models differ in bytes and FLOPs only. Loads and
stores are those of the inner loop (with a star, of the whole kernel, where it has none): how many,
and the widest in bytes. Floors are the bytes or the FLOPs of one launch, whichever takes longer, at a
GPU's data-sheet rates: no kernel is faster.
"moved" is what the compiled inner loop reads and writes, compared with those bytes: 1 is ideal.
For NVIDIA a MODEL, not a measurement, counts the instructions of the listing by what executes them, per
column of logits or per 1,000 multiply-adds of a product, and divides them by data-sheet rates: of issue,
transcendental functions, memory and tensor cores, the one that takes longest is the bound. The model
leaves out latency, dependences between instructions, bank conflicts, caches, dual issue, and pipes that
take an instruction every second clock; code outside of loops counts once, branches taken or not.
Exit status: 0; 1 if a kernel spills, moves less than 16 bytes at a time where it must not, exceeds
the shared memory, misses the tensor cores, rounds exact products in them, reads more often than it
states, on an H100 issues for longer than memory takes, or does not compile for NVIDIA, or if a known
failure is none any more; 2 for bad options; 130 after Ctrl-C.
"""


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints tables per target and one of floors, and writes JSON if asked.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0; 1 if a rule is broken; 2 if Triton is missing; 130 after Ctrl-C. Bad options exit with
        2 (``SystemExit``, as argparse does).
    """
    parser = _parser()
    options = parser.parse_args(argv)
    missing = [name for name in ("triton", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} is not installed; pip install 'auxkern[triton,bench]'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by an interpreter; unset it")
    _check_names(parser, options)
    from auxkern.inspect import page, tables

    try:
        findings = _survey(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    tables.show(findings, options.model)
    if options.json is not None or options.record is not None:
        arguments = sys.argv[1:] if argv is None else argv
        made = {
            "command": shlex.join([*parser.prog.split(), *arguments]),
            "date": machine.now(),
            "machine": machine.machine_facts(torch.device("cpu")),
        }
        if options.json is not None:
            targets = {name: asdict(TARGETS[name]) for name in dict.fromkeys(f.target for f in findings)}
            everything = [asdict(finding) for finding in findings]
            _write(options.json, {**made, "targets": targets, "findings": everything})
        if options.record is not None:
            kept = page.costs(findings, options.model)
            _write(options.record, {**made, "model": options.model, "costs": kept})
    return 1 if any(finding.problems for finding in findings) else 0


def _write(path: Path, content: dict[str, object]) -> None:
    replace_file(path, json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python -m auxkern.inspect", __doc__.partition(": ")[2], _EPILOG)
    parser.add_argument(
        "--target",
        action="append",
        choices=list(TARGETS),
        help="compile for this architecture (repeatable); default: all of them",
    )
    parser.add_argument("--kernel", action="append", metavar="NAME", help="only this kernel (repeatable)")
    parser.add_argument(
        "--model", default="Llama-3", metavar="NAME", help="whose floor the table shows; default: Llama-3"
    )
    parser.add_argument(
        "--jobs", type=positive, metavar="N", help="processes that compile at once; default: one per core"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write everything found, floors of all models"
    )
    parser.add_argument(
        "--record",
        type=output_file,
        metavar="FILE",
        help="write what auxkern.inspect.page draws tables of",
    )
    return parser


def _check_names(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    from auxkern.backends.triton.cases import VOCABULARIES
    from auxkern.backends.triton.kernels import KERNELS

    names = [kernel.name for kernel in KERNELS]
    for name in options.kernel or []:
        if name not in names:
            parser.error(f"--kernel {name}: choose from {', '.join(names)}")
    if options.model not in VOCABULARIES:
        parser.error(f"--model {options.model}: choose from {', '.join(VOCABULARIES)}")


def _survey(options: argparse.Namespace) -> list[Finding]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from auxkern.inspect import survey

    work = survey.jobs(options.target or list(TARGETS), options.kernel or [])
    processes = min(options.jobs or machine.usable_cores(), len(work))
    err = Console(stderr=True)
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # The bar is for eyes: a log file gets none of it.
    with Progress(*columns, console=err, disable=not takes_bars(sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=len(work))
        return survey.survey(work, processes, lambda: bar.advance(task))


if __name__ == "__main__":
    raise SystemExit(main())
