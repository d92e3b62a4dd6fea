"""Docstrings as they are written here, for reStructuredText: formulas and code are what is indented."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

_SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Example):")


def literal_blocks(lines: list[str]) -> list[str]:
    """The same with ``::`` before what is indented outside of a section."""
    result: list[str] = []
    outside, before = True, ""  # of a section; the last line, if it is not empty
    inside_block = False
    for line in lines:
        if line and not line.startswith(" "):
            # "Raises: as ``LoopSettings``." on one line is a section of one line.
            outside, inside_block = _SECTION.match(line) is None, False
        elif line and outside and not inside_block and not before:
            result += ["::", ""]
            inside_block = True
        result.append(line)
        before = line
    return result


def _process(app: Sphinx, kind: str, name: str, value: object, options: object, lines: list[str]) -> None:
    lines[:] = literal_blocks(lines)


def _skip(app: Sphinx, kind: str, name: str, value: object, skip: bool, options: object) -> bool | None:
    # Python's own words for the fields of a NamedTuple, which the class describes.
    return True if str(value.__doc__).startswith("Alias for field number") else None


def _signature(
    app: Sphinx, kind: str, name: str, value: object, options: object, given: str | None, back: str | None
) -> tuple[str | None, str | None]:
    # A field's default that is made anew is no expression, and the rest would not be read as one.
    return (given or "").replace("<factory>", "...") or None, back


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    # Before napoleon, which turns sections into fields, and indents them.
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True}
