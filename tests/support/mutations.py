"""One damage at a time to a kernel's PTX: what a wrong compiler, or a wrong kernel, would have made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_GUARD = r"@!?%p\d+\s+"
_PLACE = r"\[ *(%\w+)(?: *\+ *(\d+))? *\]"


@dataclass(frozen=True)
class Mutation:
    """A damaged PTX module.

    Attributes:
        kind: what was done.
        line: where, from 1; lines keep their numbers.
        before, after: that line.
        text: all lines.
    """

    kind: str
    line: int
    before: str
    after: str
    text: str


def removed(text: str, opcode: str) -> Iterator[Mutation]:
    """Without an instruction, each that matches ``opcode`` in turn; it begins the opcode.

    Args:
        opcode: a regular expression.
    """
    yield from _changed(text, f"{opcode} removed", rf"^\s*(?:{_GUARD})?{opcode}\b[^;]*;", lambda match: "")


def loosened(text: str, of: str) -> Iterator[Mutation]:
    """A wait that lets one more group fly on: of copies ("cp.async") or products ("wgmma")."""
    wait = rf"({re.escape(of)}\.wait_group\S*\s+)(\d+)"
    yield from _changed(text, f"{of} waits loosened", wait, lambda match: f"{match[1]}{int(match[2]) + 1}")


def moved(text: str, opcode: str, nbytes: int) -> Iterator[Mutation]:
    """An access so many bytes behind where it should be."""

    def further(match: re.Match[str]) -> str:
        return f"{match[1]}[{match[2]}+{int(match[3] or 0) + nbytes}]"

    pattern = rf"^((?:\s*{_GUARD})?\s*{opcode}\b.*?){_PLACE}"
    yield from _changed(text, f"{opcode} moved by {nbytes} bytes", pattern, further)


def unguarded(text: str, opcode: str) -> Iterator[Mutation]:
    """An access by the lanes, too, that a mask keeps from it."""
    pattern = rf"^\s*{_GUARD}({opcode}\b)"
    yield from _changed(text, f"{opcode} without its mask", pattern, lambda match: match[1])


def narrowed(text: str) -> Iterator[Mutation]:
    """A 64-bit product of sizes that keeps 32 bits, sign and all."""

    def cut(match: re.Match[str]) -> str:
        return f"{match[0]} bfe.s64 {match[1]}, {match[1]}, 0, 32;"

    yield from _changed(
        text, "product of 32 bits", r"^\s*mul\.(?:lo|wide)\.[su](?:64|32)\s+(%rd\d+),.*;", cut
    )


def swapped(text: str) -> Iterator[Mutation]:
    """A product of tensor cores with two registers of its left operand exchanged."""
    registers = r"(mma\.sync[^{]*\{[^}]*\},\s*\{\s*)(%\w+),\s*(%\w+)"
    yield from _changed(
        text, "fragments swapped", registers, lambda match: f"{match[1]}{match[3]}, {match[2]}"
    )


def _changed(
    text: str, kind: str, pattern: str, replacement: Callable[[re.Match[str]], str]
) -> Iterator[Mutation]:
    lines = text.split("\n")
    for index, line in enumerate(lines):
        new = re.sub(pattern, replacement, line, count=1)
        if new != line:
            yield Mutation(kind, index + 1, line, new, "\n".join([*lines[:index], new, *lines[index + 1 :]]))
