"""The README, the pages of docs/, and the fenced code on them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tests.support.launching import ROOT

README = ROOT / "README.md"
PAGES = {path.stem: path for path in (*sorted((ROOT / "docs").glob("*.md")), README)}
# Written by programs from records; what they hold is tested with those.
MADE = ("keyword", "compose", "gpu-model")
_FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", flags=re.MULTILINE)


class Fence(NamedTuple):
    """Fenced code: its language, its text, and the line where it begins."""

    language: str
    code: str
    line: int


def fences(path: Path) -> list[Fence]:
    """Those of a page, without directives of Sphinx's."""
    text = path.read_text(encoding="utf-8")
    found = [Fence(one[1], one[2], text.count("\n", 0, one.start(2)) + 1) for one in _FENCE.finditer(text)]
    return [one for one in found if not one.language.startswith("{")]


def prose(path: Path) -> str:
    """The page without anything fenced."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))
