"""``python -m auxkern.bench.report FILE.json``: tables and plots of a stored run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from auxkern.bench import results
from auxkern.core.files import replace_file
from auxkern.terminal import command_parser, output_file, sentence

_EPILOG = "Exit status: 0; 2 for bad options, or a file that cannot be read, drawn or updated.\n"


def main(argv: list[str] | None = None) -> int:
    """Renders what a benchmark's ``--json`` wrote.

    ``argv`` are the arguments after the program's name; None: those of the process. Returns 0, or 2 if a
    file cannot be read, drawn or updated.
    """
    about = "Render the JSON of a benchmark run. Without options it prints the tables."
    parser = command_parser("python -m auxkern.bench.report", about, _EPILOG)
    parser.add_argument("file", type=Path, help="JSON written by a benchmark's --json")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="draw it (.png or .svg)")
    put = "put the Markdown table between markers there"
    parser.add_argument("--update", type=Path, metavar="FILE.md", help=put)
    parser.add_argument("--name", help="the markers are <!-- bench:NAME --> and <!-- /bench:NAME -->")
    options = parser.parse_args(argv)
    if (options.update is None) != (options.name is None):
        parser.error("--update FILE.md and --name NAME go together: NAME says between which markers")
    try:
        from auxkern.bench import plot, tables

        run = results.read(options.file.read_text(encoding="utf-8"), options.file)
        if options.markdown:
            print(tables.markdown(run), end="")
        if options.update is not None:
            page = options.update.read_text(encoding="utf-8")
            replace_file(options.update, between_markers(page, options.name, tables.markdown(run)))
        if options.plot is not None:
            plot.plot(run, options.plot)
        if not (options.markdown or options.update or options.plot):
            tables.print_run(run)
    except ModuleNotFoundError as error:
        print(f"{parser.prog}: {error}; pip install 'auxkern[bench]'", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {sentence(error)}", file=sys.stderr)
    else:
        return 0
    return 2


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
