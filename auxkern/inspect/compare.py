"""``python -m auxkern.inspect.compare``: what two surveys of the same kernels differ in.

Made for two versions of Triton: each writes a survey with ``python -m auxkern.inspect --json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auxkern.terminal import command_parser, sentence

_EPILOG = """\
A row for each binary whose registers or spilled bytes (per thread), shared memory (bytes per program),
instructions, or broken rules differ. Exit status: 0, whatever differs; 2 for files that are no
surveys.
"""
_MEASURES = {"regs": "registers", "spill": "spill_bytes", "shared": "shared_bytes", "instr": "instructions"}


@dataclass(frozen=True)
class Difference:
    """One binary, in two surveys.

    Attributes:
        target, kernel, case: which binary.
        old, new: registers, spilled bytes, shared bytes and instructions; None where a survey has no
            such binary or its compiler failed.
        problems: the rules that it breaks in the new survey.
    """

    target: str
    kernel: str
    case: str
    old: tuple[int, ...] | None
    new: tuple[int, ...] | None
    problems: tuple[str, ...]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """The binaries that two surveys do not agree on, in the order of the first that has them.

    Args:
        old, new: what ``python -m auxkern.inspect --json`` wrote.
    """
    before, after = _by_name(old), _by_name(new)
    result = []
    for name in {**before, **after}:
        first, second = _measures(before.get(name)), _measures(after.get(name))
        problems = [tuple(found[name]["problems"]) if name in found else () for found in (before, after)]
        if first != second or problems[0] != problems[1]:
            result.append(Difference(*name, first, second, problems[1]))
    return result


def _by_name(survey: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(f["target"], f["kernel"], f["case"]): f for f in survey["findings"]}


def _measures(finding: dict[str, Any] | None) -> tuple[int, ...] | None:
    made = finding and finding["made"]
    return tuple(made[name] for name in _MEASURES.values()) if made else None


def main(argv: list[str] | None = None) -> int:
    """Print a table of differences.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0. Bad options exit with 2 (``SystemExit``, as argparse does).
    """
    parser = command_parser("python -m auxkern.inspect.compare", __doc__.partition(": ")[2], _EPILOG)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("rich") is None:
        parser.error("rich is not installed; pip install 'auxkern[bench]'")
    old, new = (_read(parser, path) for path in (options.old, options.new))
    _show(old, new)
    return 0


def _read(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    try:
        survey = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(sentence(error) if isinstance(error, OSError) else f"{path}: {error}")
    if not isinstance(survey, dict) or not {"machine", "findings"} <= survey.keys():
        parser.error(f"{path} is no survey; python -m auxkern.inspect --json {path} writes one")
    return survey


def _show(old: dict[str, Any], new: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from auxkern.terminal import console_for_stdout

    out = console_for_stdout()
    versions = [survey["machine"]["triton"] for survey in (old, new)]
    different = differences(old, new)
    title = f"Triton {versions[0]} -> {versions[1]}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("target, kernel, case", overflow="fold")
    for name in _MEASURES:
        table.add_column(name, justify="right", no_wrap=True)
    for one in different:
        table.add_row(f"{one.target} {one.kernel} [{one.case}]".replace("[", r"\["), *_cells(one))
        for problem in one.problems:
            table.add_row(f"  {problem}".replace("[", r"\["))
    out.print(table)
    count = len(set(_by_name(old)) | set(_by_name(new)))
    out.print(f"{len(different)} of {count} binaries differ", highlight=False)


def _cells(one: Difference) -> list[str]:
    if one.old is None or one.new is None:
        texts = ["none" if side is None else " ".join(map(str, side)) for side in (one.old, one.new)]
        return [f"{texts[0]} -> {texts[1]}"]
    return [f"{a}" if a == b else f"{a} -> {b}" for a, b in zip(one.old, one.new, strict=True)]


if __name__ == "__main__":
    raise SystemExit(main())
