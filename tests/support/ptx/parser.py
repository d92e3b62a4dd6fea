"""PTX text as blocks of instructions."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property


class PtxError(Exception):
    """PTX that this executor does not know or that makes no sense; the message shows the instruction."""


@dataclass(frozen=True)
class Address:
    """``[base + offset]``: a register, a parameter or a variable, and bytes."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its modifiers, as ``fma.rn.f32``.
        operands: registers and immediates as written, vectors of them, addresses.
        predicate: a register that must be true (false if ``negated``); None for always.
        source: file and line of Triton's source, innermost first; ``path`` and ``number`` of the innermost.
        line: of the PTX, from 1.
    """

    opcode: str
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    source: str
    line: int
    path: str = ""
    number: int = 0

    @property
    def text(self) -> str:
        """The line of Triton's source."""
        return linecache.getline(self.path, self.number).strip()

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The opcode's words; a state space may have a qualifier, as ``shared::cta``."""
        return tuple(self.opcode.split("."))

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(map(_shown, self.operands))}".strip()


def _shown(operand: Operand) -> str:
    if isinstance(operand, Address):
        return f"[{operand.base}+{operand.offset}]"
    if isinstance(operand, tuple):
        inside = ", ".join(operand if len(operand) < 9 else (*operand[:2], "...", operand[-1]))
        return f"{{{inside}}}"
    return operand


@dataclass
class Block:
    """Instructions without a branch, a barrier or a label between them.

    Attributes:
        end: the branch, return or barrier behind them; None where the next block follows.
    """

    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None


@dataclass(frozen=True)
class Kernel:
    """One entry point.

    Attributes:
        parameters: PTX type of each, such as "u32", in order.
        widths: bytes of each declared register; 0 for predicates.
        threads: of a program.
        labels: index of the block that each begins.
    """

    name: str
    parameters: dict[str, str]
    widths: dict[str, int]
    threads: int
    blocks: list[Block]
    labels: dict[str, int]

    @property
    def instructions(self) -> Iterator[Instruction]:
        """All of them, in order, those that end blocks among them."""
        for block in self.blocks:
            yield from block.instructions
            if block.end is not None:
                yield block.end


_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)\s*(.*?)\{", re.S)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+.*?(\w+)\s*(?:,|$)", re.M)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)(?:<(\d+)>)?")
_STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_LABEL = re.compile(r"([$\w]+):(?!:)")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+[^/]*(?://\s*(.*))?")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_JUMPS = ("bra", "bra.uni", "ret", "exit")
BARRIERS = (
    "bar.sync",
    "barrier.sync",
    "barrier.sync.aligned",
    "barrier.cta.sync",
    "barrier.cta.sync.aligned",
)


def parse(text: str) -> Kernel:
    """The kernel in a PTX module that has one.

    Raises:
        PtxError: there is none, its number of threads is open, or a statement makes no sense.
    """
    entry = _ENTRY.search(text)
    if entry is None:
        raise PtxError("no .entry in the PTX")
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry[3])
    if threads is None:
        raise PtxError(f"{entry[1]} does not say how many threads it has")
    # Behind the function stand tables for debuggers.
    body = text[entry.end() :].partition("$L__func_end0:")[0]
    widths = {
        register: 0 if kind == "pred" else int(kind[1:]) // 8
        for kind, name, count in _REGISTERS.findall(body)
        for register in ([f"{name}{i}" for i in range(int(count))] if count else [name])
    }
    blocks, labels = _blocks(list(_statements(body, text.count("\n", 0, entry.end()) + 1, text)))
    parameters = {name: kind for kind, name in _PARAMETER.findall(entry[2])}
    return Kernel(entry[1], parameters, widths, int(threads[1]), blocks, labels)


def _statements(body: str, first: int, text: str) -> Iterator[str | Instruction]:
    """Labels and instructions, in order; the body begins at line ``first``."""
    files = dict(_FILE.findall(text))
    source, path, number, pending = "", "", 0, ""
    for line, raw in enumerate(body.split("\n"), first):
        location = _LOCATION.match(raw.strip())
        if location:
            path, number = files.get(location[1], ""), int(location[2])
            source = location[3] or f"{path}:{number}"
            continue
        *whole, pending = (pending + raw.split("//")[0]).split(";")
        if label := _LABEL.match(pending.strip()):
            yield label[1]
            pending = ""
        for statement in map(str.strip, whole):
            if statement.startswith("."):
                continue
            parts = _STATEMENT.match(statement)
            if parts is None:
                raise PtxError(f"line {line}: cannot read {statement!r}")
            operands = tuple(map(_operand, _split(parts[4])))
            yield Instruction(parts[3], operands, parts[2], bool(parts[1]), source, line, path, number)


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    return text


def _blocks(statements: Sequence[str | Instruction]) -> tuple[list[Block], dict[str, int]]:
    targets = {s.operands[0] for s in statements if isinstance(s, Instruction) and s.opcode.startswith("bra")}
    blocks, labels = [Block()], {}
    for statement in statements:
        if isinstance(statement, str):
            if statement in targets:  # others are for debuggers
                if blocks[-1].instructions:
                    blocks.append(Block())
                labels[statement] = len(blocks) - 1
        elif statement.opcode in _JUMPS or statement.opcode in BARRIERS:
            blocks[-1].end = statement
            blocks.append(Block())
        else:
            blocks[-1].instructions.append(statement)
    if not blocks[-1].instructions:
        blocks.pop()
    return blocks, labels
