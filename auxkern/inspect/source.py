"""The loops of a kernel as Triton's intermediate code has them: how often they turn, what they read.

A listing does not say how often a loop turns; the code that it was made from does, in numbers or in the
names of the kernel's arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_NAME = re.compile(r"%[\w$.-]+")
_LOCATION = re.compile(r"\s*loc\((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*\)")
_CONSTANT = re.compile(r"(%[\w$.-]+) = arith\.constant (-?\d+) : i\d+")
_FOR = re.compile(r"scf\.for (%[\w$.-]+) = (%[\w$.-]+) to (%[\w$.-]+) step (%[\w$.-]+)")
_CARRIED = re.compile(r"(%[\w$.-]+) = (%[\w$.-]+)(?=[,)])")
_ARGUMENT = re.compile(r"(%[\w$.-]+): (!tt\.)?")
_LOAD = re.compile(r"= tt\.load (%[\w$.-]+)")
_LOADED = re.compile(r": (?:tensor<([\dx]*?)x?)?!tt\.ptr<([a-z]+)(\d+)")
_DOT = re.compile(r"= tt\.dot(?:_scaled)? .*: tensor<[\dx]+x(\w+)> \* tensor<[\dx]+x(\w+)>")
_YIELD = re.compile(r"(?:scf\.yield|tt\.reduce\.return|tt\.scan\.return) (.*)")


@dataclass(frozen=True)
class Load:
    """One read of global memory.

    Attributes:
        elements: of the tile; 1 where all threads read one number.
        size: bytes of an element.
    """

    elements: int
    size: int

    def bytes_of_thread(self, threads: int) -> float:
        """What each thread reads if they share the tile, bytes."""
        return max(self.elements / threads, 1.0) * self.size


@dataclass
class SourceLoop:
    """A loop that reads global memory and holds no other one.

    Attributes:
        turns: how often it turns; None where that depends on the launch.
        length: the argument that it counts up to from 0, by ``step``; None if there is none.
        read: whether memory says how often it turns.
        step: of its index; 0 where that depends on the launch.
        repeats: how often loops around it run it over the same addresses.
        continues: whether it begins where another loop ended, and so belongs to that one's pass.
        loads: of one turn.
        tensor_dots: for each product of matrices whether tensor cores can take its operands.
    """

    turns: int | None
    length: str | None
    step: int
    read: bool = False
    repeats: int = 1
    continues: bool = False
    loads: list[Load] = field(default_factory=list)
    tensor_dots: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """What the intermediate code says about memory.

    Attributes:
        loops: in the order of the code.
        passes: the most loops, with their repeats, that read one argument; 1 where one is read without
            a loop, 0 if there is no tile of global memory; None if a loop repeats reads nobody knows how
            often.
    """

    loops: list[SourceLoop] = field(default_factory=list)
    passes: int | None = 0


@dataclass(eq=False)
class _Region:
    """A pair of braces.

    Attributes:
        result: what the operation that has the region defines; None if nothing.
    """

    result: str | None


@dataclass(eq=False)
class _Body(_Region):
    """The body of a loop.

    Attributes:
        index, upper: names of the loop's index and of the end of its range.
        loop: what is known of it.
        nested: whether a loop in it reads.
    """

    index: str
    upper: str
    loop: SourceLoop
    nested: bool = False


class _Reader:
    """Takes one operation after the other."""

    def __init__(self) -> None:
        self.constants: dict[str, int] = {}
        self.pointers: set[str] = set()  # the arguments that are, and those that are not
        self.numbers: set[str] = set()
        self.loaded: set[str] = set()
        self.uses: dict[str, set[str]] = {}  # what each value is computed from
        self.regions: list[_Region] = []
        self.bodies: list[_Body] = []
        self.reads: dict[tuple[str, _Body | None], int | None] = {}  # (pointer, loop) -> repeats

    def take(self, line: str) -> None:
        if constant := _CONSTANT.search(line):
            self.constants[constant[1]] = int(constant[2])
        result, _, right = line.partition(" = ") if line.startswith("%") else ("", "", line)
        result = result.partition(":")[0]
        if result:
            self.uses[result] = set(_NAME.findall(right))
        if line.startswith("tt.func"):
            for name, kind in _ARGUMENT.findall(line):
                (self.pointers if kind else self.numbers).add(name)
        if (yielded := _YIELD.match(line)) and self.regions and self.regions[-1].result:
            self.uses[self.regions[-1].result] |= set(_NAME.findall(yielded[1].partition(":")[0]))
        if load := _LOAD.search(line):
            self.loaded.add(result)
            self._read(load[1], line)
        elif (dot := _DOT.search(line)) and (around := self._around()):
            exact = dot[1] == dot[2] == "f32" and "inputPrecision" not in line
            around[0].loop.tensor_dots.append(not exact)
        opened = line.count("{") - line.count("}")
        if opened > 0:
            self.regions.append(self._region(result or None, line))
        elif opened < 0:
            self.regions.pop()

    def _region(self, result: str | None, line: str) -> _Region:
        counted = _FOR.search(line)
        if counted is None:
            return _Region(result)
        index, lower, upper, step = counted.groups()
        begin, end, by = (self.constants.get(name) for name in (lower, upper, step))
        turns = None
        if begin is not None and end is not None and by:
            turns = max(0, -(-(end - begin) // by))
        loop = SourceLoop(
            turns=turns,
            length=upper[1:] if begin == 0 and upper in self.numbers else None,
            step=by or 0,
            read=bool(self.loaded & self._inputs(upper)),
            continues=any(lower == other.upper for other in self.bodies),
        )
        self.uses[index] = {lower}
        for carried, first in _CARRIED.findall(line.partition("iter_args")[2]):
            self.uses[carried] = {first, index}  # moves on with the loop, for all that is known
        self.bodies.append(_Body(result, index, upper, loop))
        return self.bodies[-1]

    def _around(self) -> list[_Body]:
        """The loops around, the innermost first."""
        return [region for region in reversed(self.regions) if isinstance(region, _Body)]

    def _read(self, pointer: str, line: str) -> None:
        kind = _LOADED.search(line)
        if kind is None:
            return
        inputs, around = self._inputs(pointer), self._around()
        # A loop whose index does not enter the address reads the same again.
        idle = [body for body in around if body.index not in inputs]
        for body in around[1:]:
            body.nested = True
        if around:
            loop = around[0].loop
            elements = math.prod(int(size) for size in (kind[1] or "").split("x") if size)
            loop.loads.append(Load(elements, int(kind[3]) // 8))
            outer = _product(body.loop.turns for body in idle if body is not around[0])
            loop.repeats = max(loop.repeats, outer or 1)
        if kind[1]:
            for argument in inputs & self.pointers:
                self.reads[argument, around[0] if around else None] = _product(b.loop.turns for b in idle)

    def _inputs(self, name: str) -> set[str]:
        """Everything that a value is computed from."""
        reached: set[str] = set()
        waiting = [name]
        while waiting:
            if (value := waiting.pop()) not in reached:
                reached.add(value)
                waiting += self.uses.get(value, ())
        return reached

    def passes(self) -> int | None:
        """As ``Source`` says."""
        sums: dict[str, int] = {}
        for (argument, body), repeats in self.reads.items():
            if body is not None and not body.loop.continues:
                if repeats is None:
                    return None
                sums[argument] = sums.get(argument, 0) + repeats
        return max(sums.values(), default=min(1, len(self.reads)))


def _product(turns: Iterable[int | None]) -> int | None:
    """None if one of them is not known."""
    numbers = list(turns)
    return None if None in numbers else math.prod(number for number in numbers if number is not None)


def read_source(text: str) -> Source:
    """The loops of a kernel.

    Args:
        text: Triton's intermediate code, ``CompiledKernel.asm["ttir"]``.
    """
    reader = _Reader()
    for line in text.splitlines():
        if (operation := _LOCATION.sub("", line).strip()) and not operation.startswith("#"):
            reader.take(operation)
    loops = [body.loop for body in reader.bodies if body.loop.loads and not body.nested]
    return Source(loops, reader.passes())
