"""``python -m auxkern.bench.report FILE.json``: tables and plots of a stored run."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from auxkern.bench.results import Run
from auxkern.core.files import replace_file
from auxkern.terminal import console_for_stdout


def main(argv: list[str] | None = None) -> int:
    """Renders what ``python -m auxkern.bench --json`` wrote.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0, or 2 if a file cannot be read, drawn or updated.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if (options.update is None) != (options.name is None):
        parser.error("--update FILE.md and --name NAME go together: NAME says between which markers")
    try:
        return _render(options)
    except ModuleNotFoundError as error:
        print(f"{parser.prog}: {error}; pip install 'auxkern[bench]'", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m auxkern.bench.report",
        description="Render the JSON of a benchmark run. Without options it prints the tables.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="JSON written by a benchmark's --json")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (.png or .svg)")
    parser.add_argument(
        "--update", type=Path, metavar="FILE.md", help="put the Markdown table between markers there"
    )
    parser.add_argument("--name", help="the markers are <!-- bench:NAME --> and <!-- /bench:NAME -->")
    return parser


class Rendering(NamedTuple):
    """How the files of one kind are shown.

    Attributes:
        read: makes the run of a file's text.
        print_run: prints its tables on stdout.
        markdown: its tables and where they come from.
        plot: draws it into a file.
    """

    read: Callable[[str], Any]
    print_run: Callable[[Any], None]
    markdown: Callable[[Any], str]
    plot: Callable[[Any, Path], None]


def _renderings() -> dict[str | None, Rendering]:
    """By the kind that a file names; times of operators name none."""
    from auxkern.bench import generate_plot, generate_report, plot, tables

    operators = Rendering(Run.from_json, print_run, tables.markdown, plot.plot)
    generation = Rendering(
        generate_report.GenerateRun.from_json,
        generate_report.print_run,
        generate_report.markdown,
        generate_plot.plot,
    )
    return {None: operators, "gpu": operators, generate_report.KIND: generation}


def _kind(text: str) -> str | None:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the file is not JSON: {error}; give one that --json wrote") from error
    return record.get("kind") if isinstance(record, dict) else None


def _render(options: argparse.Namespace) -> int:
    text, renderings = options.file.read_text(encoding="utf-8"), _renderings()
    kind = _kind(text)
    if kind not in renderings:
        known = ", ".join(repr(name) for name in renderings if name is not None)
        raise ValueError(f"{options.file} holds a result of kind {kind!r}; drawn are {known} and operators")
    rendering = renderings[kind]
    run = rendering.read(text)
    if options.markdown:
        print(rendering.markdown(run), end="")
    if options.update is not None:
        page = options.update.read_text(encoding="utf-8")
        replace_file(options.update, between_markers(page, options.name, rendering.markdown(run)))
    if options.plot is not None:
        rendering.plot(run, options.plot)
    if not (options.markdown or options.update or options.plot):
        rendering.print_run(run)
    return 0


def print_run(run: Run) -> None:
    """Prints the tables of a run of operators on stdout."""
    from auxkern.bench import tables

    console = console_for_stdout()
    tables.print_header(console, run)
    tables.print_facts(console, run)
    for case in run.cases:
        tables.print_case(console, case)
    tables.print_footer(console, run)


def between_markers(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between ``<!-- bench:name -->`` and ``<!-- /bench:name -->``.

    Raises:
        ValueError: the pair of markers is not there exactly once, in this order.
    """
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"the file must hold {start} and, after it, {end}, each once")
    pattern = re.escape(start) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{start}\n{content.strip()}\n{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    sys.exit(main())
