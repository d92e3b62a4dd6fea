"""The control flow of an NVIDIA listing: its instructions, its loops, and what no branch reaches.

A jump backwards is not yet a loop: the compiler moves rare code, such as a wait that has to be tried
again, to the end of a kernel and jumps back from there. A loop is a jump to a place that every way to the
jump passes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*)")
_OPCODE = re.compile(
    r"(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z]\w*)(?P<modifiers>[.\w]*)\s*(?P<operands>.*)"
)
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_ENDS = {"EXIT", "RET", "BRX", "JMX", "JMP", "KILL"}  # where another instruction does not follow


@dataclass(frozen=True)
class Instruction:
    """A line of a listing.

    Attributes:
        opcode: without its modifiers, such as "FMUL".
        text: all of it.
        conditional: whether a predicate decides if it runs, or where it goes.
        target: place of the instruction that it may jump to; None if it is no branch.
    """

    opcode: str
    text: str
    conditional: bool
    target: int | None


@dataclass(frozen=True)
class Flow:
    """The instructions of a kernel, and the code behind it, in order."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def loops(self) -> list[list[int]]:
        """Places of the instructions of every loop, the outer ones first; loops with one head are one."""
        blocks, successors = self._blocks
        dominators, predecessors = self._passed, _turned(successors)
        bodies: dict[int, set[int]] = {}
        for block in dominators:
            for head in successors[block]:
                if head in dominators[block]:
                    body = bodies.setdefault(head, {head})
                    waiting = [block]
                    while waiting:
                        if (inside := waiting.pop()) not in body:
                            body.add(inside)
                            waiting += [p for p in predecessors[inside] if p in dominators]
        ordered = sorted(bodies.values(), key=lambda body: (min(body), -len(body)))
        return [[place for block in sorted(body) for place in blocks[block]] for body in ordered]

    @cached_property
    def reached(self) -> list[int]:
        """Places of the instructions that the kernel's beginning leads to; calls are not followed."""
        blocks, _ = self._blocks
        return [place for block in sorted(self._passed) for place in blocks[block]]

    @cached_property
    def _passed(self) -> dict[int, set[int]]:
        return _dominators(self._blocks[1])

    @cached_property
    def _blocks(self) -> tuple[list[range], list[list[int]]]:
        """Runs of instructions without a jump into or out of their middle, and where each may go on."""
        listing = self.instructions
        begins = {0} | {i.target for i in listing if i.target is not None}
        begins |= {n + 1 for n, i in enumerate(listing) if i.target is not None or i.opcode in _ENDS}
        starts = sorted(place for place in begins if place < len(listing))
        number = {start: n for n, start in enumerate(starts)}
        blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(listing)], strict=True)]
        successors: list[list[int]] = []
        for block in blocks:
            last = listing[block[-1]]
            after = [] if last.target is None else [number[last.target]]
            stops = not last.conditional and (last.target is not None or last.opcode in _ENDS)
            if not stops and block.stop in number:
                after.append(number[block.stop])
            successors.append(after)
        return blocks, successors


def read_flow(lines: list[str]) -> Flow:
    """The flow of a listing of ``nvdisasm -c``."""
    places: dict[str, int] = {}
    texts: list[str] = []
    for line in lines:
        if label := _LABEL.match(line):
            places[label[1]] = len(texts)
        elif instruction := _INSTRUCTION.search(line):
            texts.append(instruction[1])
    return Flow(tuple(_instruction(text, places, len(texts)) for text in texts))


def _instruction(text: str, places: dict[str, int], count: int) -> Instruction:
    parts = _OPCODE.match(text)
    if parts is None:
        return Instruction(text.split()[0], text, False, None)
    target = None
    conditional = parts["predicate"] is not None
    if parts["opcode"] in ("BRA", "CALL") and (label := _TARGET.search(parts["operands"])):
        # A label behind the last instruction leads nowhere.
        target = places[label[1]] if places.get(label[1], count) < count else None
        # A predicate may stand among the operands; a call to a mere label is a jump that may return.
        conditional = conditional or label.start() > 0 or parts["opcode"] == "CALL"
    return Instruction(parts["opcode"], text, conditional, target)


def _turned(successors: list[list[int]]) -> list[list[int]]:
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, after in enumerate(successors):
        for other in after:
            predecessors[other].append(block)
    return predecessors


def _dominators(successors: list[list[int]]) -> dict[int, set[int]]:
    """For each block that block 0 leads to, those that every way to it passes, itself among them."""
    if not successors:
        return {}
    order, waiting = [], [0]
    seen = {0}
    while waiting:
        order.append(block := waiting.pop(0))
        for other in successors[block]:
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    predecessors = _turned(successors)
    dominators = {block: set(seen) for block in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = set.intersection(*(dominators[p] for p in predecessors[block] if p in seen)) | {block}
            if common != dominators[block]:
                dominators[block], changed = common, True
    return dominators
