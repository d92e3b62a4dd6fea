"""Pages of studies: Markdown and pictures, made from a study's JSON file alone."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auxkern.bench import results
from auxkern.bench.plot import SUFFIXES
from auxkern.core.files import replace_file

Record = dict[str, Any]
RESULTS = Path("benchmarks/results")


def committed(name: str) -> Any:
    """A committed record: what is in its JSON file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def committed_run(name: str) -> Any:
    """A committed record of auxkern.bench, as ``auxkern.bench.results.read`` gives it."""
    path = RESULTS / f"{name}.json"
    return results.read(path.read_text(encoding="utf-8"), path)


def unfit(name: str, note: str) -> ValueError:
    """What to raise for a committed record that a note says is of a machine that was not quiet."""
    return ValueError(f"{RESULTS / name}.json is not for a page: {note} Run it again.")


@dataclass(frozen=True)
class Page:
    """How a study's record becomes its page.

    Attributes:
        module: that is run, such as "benchmarks.keyword.page".
        kind: of the record, such as "keyword study".
        path: of the page.
        pictures: by name: draws a record into a file. They stand beside the record's file.
        text: the Markdown, of the record, the paths from the page to the pictures, and the command that
            makes the page.
        others: what further records of the kind there may be, for people: the first one has them as "others".
            None where there are none.
    """

    module: str
    kind: str
    path: Path
    pictures: Mapping[str, Callable[[Record, Path], None]]
    text: Callable[[Record, dict[str, str], str], str]
    others: str | None = None

    def main(self, argv: list[str] | None = None) -> int:
        """Writes the page and its pictures.

        Args:
            argv: arguments after the program's name; those of the process when None.

        Returns:
            0. Bad options, and a file that is no record of this study, exit with 2.
        """
        parser = argparse.ArgumentParser(
            prog=f"python -m {self.module}",
            description=f"The page and the pictures of a {self.kind}.",
            allow_abbrev=False,
        )
        parser.add_argument("file", type=Path, metavar="FILE.json", help="what the study wrote")
        if self.others is not None:
            parser.add_argument("others", type=Path, nargs="*", metavar="OTHER.json", help=self.others)
        parser.add_argument("--page", type=Path, default=self.path, metavar="FILE.md")
        options = parser.parse_args(argv)
        files = [options.file, *(options.others if self.others is not None else [])]
        record, *others = (self._record(parser, file) for file in files)
        record |= {"others": others} if self.others is not None else {}
        paths = {}
        for name, draw in self.pictures.items():
            path = options.file.with_name(f"{options.file.stem}_{name}.png")
            draw(record, path)
            paths[name] = os.path.relpath(path, options.page.parent)
        options.page.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join([*parser.prog.split(), *map(str, files)])
        replace_file(options.page, self.text(record, paths, command))
        print(f"wrote {options.page} and {len(paths)} pictures beside {options.file}")
        return 0

    def _record(self, parser: argparse.ArgumentParser, file: Path) -> Record:
        try:
            record: Record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.exit(2, f"{parser.prog}: {file}: {error}\n")
        if record.get("kind") != self.kind:
            parser.exit(2, f"{parser.prog}: {file} is no record of a {self.kind}\n")
        return record


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
    """Text that cannot break a table."""
    plain = " ".join(text.split())
    for sign in "\\|`*_<>[]":
        plain = plain.replace(sign, f"\\{sign}")
    return plain or "(empty)"


def interval(ends: Sequence[float], digits: int) -> str:
    """Both ends in brackets."""
    return f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def two_panels(title: str) -> tuple[Any, Any]:
    """A figure of matplotlib and its two axes, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    return figure, figure.subplots(1, 2)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure, whole or not at all.

    Raises:
        ValueError: the file name ends neither in .png nor in .svg.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}")
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=130)
    replace_file(path, image.getvalue())
