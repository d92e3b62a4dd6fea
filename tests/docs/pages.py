"""The pages of docs/, and the fenced code on them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tests.support.launching import ROOT

PAGES = {path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))}
# Written by programs from records; what they hold is tested with those.
MADE = ("keyword", "compose", "gpu-model")
_FENCE = re.compile(r"^```([^\s{]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_ANY = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)


class Fence(NamedTuple):
    """Fenced code: its language, its text, and the line where it begins; no directives of Sphinx's."""

    language: str
    code: str
    line: int


def fences(path: Path) -> list[Fence]:
    text = path.read_text(encoding="utf-8")
    return [Fence(one[1], one[2], text.count("\n", 0, one.start(2)) + 1) for one in _FENCE.finditer(text)]


def prose(path: Path) -> str:
    """The page without its fenced code."""
    return _ANY.sub("", path.read_text(encoding="utf-8"))
