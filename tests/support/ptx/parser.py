"""PTX text as blocks of instructions."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator
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
class Parameter:
    """A kernel's: its PTX type, such as "u32", and whether it is declared a pointer."""

    type: str
    pointer: bool


@dataclass(frozen=True)
class Kernel:
    """One entry point.

    Attributes:
        widths: bytes of each declared register; 0 for predicates.
        threads: of a program.
        labels: index of the block that each begins.
    """

    name: str
    parameters: dict[str, Parameter]
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
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(.*?)(\w+)\s*(?:,|$)", re.M)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_LABEL = re.compile(r"([$\w]+):(?!:)")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+[^/]*(?://\s*(.*))?")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_BRANCHES = ("bra", "bra.uni", "ret", "exit")
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
    body = _Body(text, entry.end())
    blocks, labels = _blocks(body.statements)
    parameters = {name: Parameter(kind, ".ptr" in how) for kind, how, name in _PARAMETER.findall(entry[2])}
    return Kernel(entry[1], parameters, body.widths, int(threads[1]), blocks, labels)


class _Body:
    """Statements of a function, the registers of inner scopes under names of their own."""

    def __init__(self, text: str, start: int) -> None:
        self.files = dict(_FILE.findall(text))
        self.widths: dict[str, int] = {}
        self.statements: list[str | Instruction] = []  # labels and instructions
        self._scopes: list[dict[str, str]] = [{}]
        self._source, self._path, self._number, self._pending = "", "", 0, ""
        first = text.count("\n", 0, start) + 1
        for line, raw in enumerate(text[start:].split("\n"), first):
            location = _LOCATION.match(raw.strip())
            if location:
                self._path, self._number = self.files.get(location[1], ""), int(location[2])
                self._source = location[3] or f"{self._path}:{self._number}"
            elif not self._read(self._pending + raw.split("//")[0].strip(), line):
                return

    def _read(self, text: str, line: int) -> bool:
        """False at the function's end."""
        self._pending = ""
        while text:
            if text[0] == "{":
                self._scopes.append({})
                text = text[1:].lstrip()
            elif text[0] == "}":
                self._scopes.pop()
                text = text[1:].lstrip()
                if not self._scopes:
                    return False
            elif label := _LABEL.match(text):
                self.statements.append(label[1])
                text = text[label.end() :].lstrip()
            elif text.startswith((".file", ".pragma", ".section")):
                return True
            else:
                statement, semicolon, rest = text.partition(";")
                if not semicolon:
                    self._pending = text + " "
                    return True
                self._statement(statement.strip(), line)
                text = rest.lstrip()
        return True

    def _statement(self, text: str, line: int) -> None:
        if declared := _REGISTERS.match(text):
            self._declare(declared[1], declared[2])
            return
        if text.startswith("."):
            return
        for scope in reversed(self._scopes[1:]):
            for name, unique in scope.items():
                text = re.sub(rf"(?<![\w%$.]){re.escape(name)}(?!\w)", unique, text)
        parts = _STATEMENT.match(text)
        if parts is None:
            raise PtxError(f"line {line}: cannot read {text!r}")
        operands = tuple(map(_operand, _split(parts[4])))
        self.statements.append(
            Instruction(
                parts[3], operands, parts[2], bool(parts[1]), self._source, line, self._path, self._number
            )
        )

    def _declare(self, kind: str, names: str) -> None:
        width = 0 if kind == "pred" else int(re.sub(r"\D", "", kind)) // 8
        for name in map(str.strip, names.split(",")):
            if counted := re.match(r"(%\w+)<(\d+)>", name):
                self.widths |= {f"{counted[1]}{i}": width for i in range(int(counted[2]))}
            elif len(self._scopes) == 1:
                self.widths[name] = width
            else:
                unique = f"%{len(self.widths)}_{name.lstrip('%')}"
                self._scopes[-1][name], self.widths[unique] = unique, width


def _split(text: str) -> Iterator[str]:
    """At the commas outside brackets."""
    depth, begin = 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            yield text[begin:place].strip()
            begin = place + 1
    if text[begin:].strip():
        yield text[begin:].strip()


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    return text


def _blocks(statements: list[str | Instruction]) -> tuple[list[Block], dict[str, int]]:
    blocks: list[Block] = []
    labels: dict[str, int] = {}
    block = Block()
    targets = {s.operands[0] for s in statements if isinstance(s, Instruction) and s.opcode.startswith("bra")}
    for statement in statements:
        if isinstance(statement, str):
            # Labels of debug information are no one's target.
            if statement in targets:
                if block.instructions:
                    blocks.append(block)
                    block = Block()
                labels[statement] = len(blocks)
        elif statement.opcode in _BRANCHES or statement.opcode in BARRIERS:
            block.end = statement
            blocks.append(block)
            block = Block()
        else:
            block.instructions.append(statement)
    if block.instructions:
        blocks.append(block)
    return blocks, labels
