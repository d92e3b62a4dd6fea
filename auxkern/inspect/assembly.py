"""Reads what matters out of compiled kernels: registers, spills, widths, tensor-core instructions.

NVIDIA's cubins are read by ``cuobjdump`` and ``nvdisasm``, which Triton brings along; AMD's
assembly is text already.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton

from auxkern.inspect.flow import read_flow
from auxkern.inspect.source import Source, read_source

_DISASSEMBLY_SECONDS = 60


@dataclass(frozen=True)
class Loop:
    """A loop of a listing that loads from global memory and holds no other one that does.

    Attributes:
        opcodes: how often each instruction stands in it, without modifiers.
        load_bytes: widths of its global loads, one entry per instruction.
    """

    opcodes: dict[str, int]
    load_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Assembly:
    """What the compiler made of one kernel.

    Attributes:
        registers: 32-bit registers per thread.
        spill_bytes: local memory per thread; registers that did not fit live there.
        shared_bytes: shared memory per program.
        instructions: in the whole kernel.
        load_bytes: widths of the global loads in the inner loop (in the kernel if it has none),
            one entry per instruction.
        store_bytes: of the global stores likewise.
        loop_instructions: in the inner loop that moves the most bytes; 0 if there is none.
        tensor_core: kinds of matrix instruction.
        loops: in the order of the listing; empty for AMD.
        outside: instructions that stand in none of them, as in a ``Loop``, without what is called.
        source: loops of the code that was compiled.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    load_bytes: tuple[int, ...]
    store_bytes: tuple[int, ...]
    loop_instructions: int
    tensor_core: tuple[str, ...]
    loops: tuple[Loop, ...] = ()
    outside: dict[str, int] = field(default_factory=dict)
    source: Source = field(default_factory=Source)


@dataclass(frozen=True)
class _Listing:
    """Instructions, and places of those of each loop; for NVIDIA, opcodes, and places of what is reached."""

    instructions: list[str]
    loops: list[list[int]]
    opcodes: Sequence[str] = ()
    reached: Sequence[int] = ()


def _nvidia(lines: list[str]) -> _Listing:
    flow = read_flow(lines)
    return _Listing(
        [instruction.text for instruction in flow.instructions],
        flow.loops,
        [instruction.opcode for instruction in flow.instructions],
        flow.reached,
    )


def _amd(lines: list[str]) -> _Listing:
    """With the innermost loops alone.

    LLVM may place a loop's blocks anywhere, but says in a remark which loop a block belongs to.
    """
    blocks: list[tuple[str, list[str]]] = [("", [])]
    for line in lines:
        if begins := re.match(r"\.L(BB\w+):|; %bb\.\w+:", line):
            blocks.append((begins[1] or "", []))
        blocks[-1][1].append(line)
    instructions: list[str] = []
    loops: dict[str, list[int]] = {}
    innermost = set()
    for name, block in blocks:
        first = len(instructions)
        instructions += [line[1:] for line in block if re.match(r"\t[a-z]\w+", line)]
        places = range(first, len(instructions))
        remarks = " ".join(block[:2])  # beside the label, or below it
        if "This Inner Loop Header" in remarks:
            innermost.add(name)
            loops.setdefault(name, []).extend(places)
        elif inside := re.search(r"in Loop: Header=(BB\w+)", remarks):
            loops.setdefault(inside[1], []).extend(places)
    return _Listing(instructions, [loop for name, loop in loops.items() if name in innermost])


@dataclass(frozen=True)
class _Dialect:
    listing: Callable[[list[str]], _Listing]
    load: re.Pattern[str]
    store: re.Pattern[str]
    matrix: re.Pattern[str]
    widths: dict[str, int]


_SASS = _Dialect(
    listing=_nvidia,
    # LDGSTS copies from global to shared memory, as wide as a load.
    load=re.compile(r"\bLDG(?:STS)?\.E(?:\.\w+)*?(\.(?:256|128|64|U16|S16|U8|S8))?(?=[.\s])(?!\.)"),
    store=re.compile(r"\bSTG\.E(?:\.\w+)*?(\.(?:256|128|64|U16|S16|U8|S8))?(?=[.\s])(?!\.)"),
    matrix=re.compile(r"\b(HGMMA|HMMA|QGMMA|IGMMA|UTCHMMA|UTCQMMA|UTCIMMA|QMMA|OMMA)\b"),
    widths={".256": 32, ".128": 16, ".64": 8, "": 4, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1},
)
_GCN_WIDTHS = r"(dwordx4|dwordx3|dwordx2|dword|ushort|sshort|short|ubyte|sbyte|byte)"
_GCN = _Dialect(
    listing=_amd,
    load=re.compile(rf"\b(?:global|buffer|flat)_load_{_GCN_WIDTHS}"),
    store=re.compile(rf"\b(?:global|buffer|flat)_store_{_GCN_WIDTHS}"),
    matrix=re.compile(r"\b(v_s?mfmac?_\w+)\b"),
    widths={
        "dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4,
        "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1, "byte": 1,
    },
)  # fmt: skip


def read(compiled: Any) -> Assembly:
    """What the compiler made of ``compiled``, a ``triton.compiler.CompiledKernel``.

    Raises:
        RuntimeError: a tool of Triton's is missing or cannot read the binary.
    """
    shared, source = compiled.metadata.shared, read_source(compiled.asm["ttir"])
    if "cubin" in compiled.asm:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            resources = _output(tools / "cuobjdump", "--dump-resource-usage", path)
            # Without data-flow analysis the listing is the same, and there a third sooner.
            text = _output(tools / "nvdisasm", "-c", "-ndf", path)
        registers = _number(r"REG:(\d+)", resources)
        spill = _number(r"STACK:(\d+)", resources) + _number(r"LOCAL:(\d+)", resources)
        return replace(_assembly(_SASS, text.splitlines(), registers, spill, shared), source=source)
    text = compiled.asm["amdgcn"]
    registers = _number(r"\.vgpr_count:\s*(\d+)", text)
    spill = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    return replace(_assembly(_GCN, text.splitlines(), registers, spill, shared), source=source)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's resource report: {text[:200]!r}")
    return int(match[1])


def _output(tool: Path, *arguments: str | Path) -> str:
    try:
        done = subprocess.run(
            [tool, *arguments], capture_output=True, text=True, timeout=_DISASSEMBLY_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        raise RuntimeError(f"{tool} could not read a compiled kernel: {detail}") from error
    return done.stdout


def _assembly(dialect: _Dialect, lines: list[str], registers: int, spill: int, shared: int) -> Assembly:
    listing = dialect.listing(lines)
    instructions = listing.instructions

    def moved(kind: re.Pattern[str], places: Sequence[int]) -> tuple[int, ...]:
        lines = (instructions[place] for place in places)
        return tuple(dialect.widths[m[1] or ""] for line in lines if (m := kind.search(line)))

    def traffic(places: Sequence[int]) -> int:
        return sum(moved(dialect.load, places)) + sum(moved(dialect.store, places))

    busiest = max(_innermost([loop for loop in listing.loops if traffic(loop)]), key=traffic, default=[])
    inner = busiest or range(len(instructions))
    loading = _innermost([loop for loop in listing.loops if moved(dialect.load, loop)])
    outside = set(listing.reached).difference(*loading)
    opcodes = listing.opcodes
    return Assembly(
        registers=registers,
        spill_bytes=spill,
        shared_bytes=shared,
        instructions=len(instructions),
        load_bytes=moved(dialect.load, inner),
        store_bytes=moved(dialect.store, inner),
        loop_instructions=len(busiest),
        tensor_core=tuple(sorted({m[1] for line in instructions if (m := dialect.matrix.search(line))})),
        loops=tuple(
            Loop(dict(Counter(opcodes[place] for place in loop)), moved(dialect.load, loop))
            for loop in (loading if opcodes else ())
        ),
        outside=dict(Counter(opcodes[place] for place in outside)),
    )


def _innermost(loops: list[list[int]]) -> list[list[int]]:
    """Those that hold no other one."""
    return [loop for loop in loops if not any(set(other) < set(loop) for other in loops)]
