"""Reads what matters out of compiled kernels: registers, spills, widths, tensor-core instructions.

NVIDIA's cubins are read by ``cuobjdump`` and ``nvdisasm``, which Triton brings along; AMD's
assembly is text already.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_DISASSEMBLY_SECONDS = 60


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
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    load_bytes: tuple[int, ...]
    store_bytes: tuple[int, ...]
    loop_instructions: int
    tensor_core: tuple[str, ...]


def _loops_by_branches(lines: list[str]) -> Iterable[list[str]]:
    """NVIDIA: the lines of every span that a branch jumps back over and that holds no other one."""
    begins: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_\w+):", line):
            begins[label[1]] = number
        elif (branch := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and branch[1] in begins:
            spans.append((begins[branch[1]], number))
    for begin, end in spans:
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans):
            yield lines[begin : end + 1]


def _loops_by_remarks(lines: list[str]) -> Iterable[list[str]]:
    """AMD: the lines of every innermost loop.

    LLVM may place a loop's blocks anywhere, but says in a remark which loop a block belongs to.
    """
    blocks: list[tuple[str, list[str]]] = [("", [])]
    for line in lines:
        if begins := re.match(r"\.L(BB\w+):|; %bb\.\w+:", line):
            blocks.append((begins[1] or "", []))
        blocks[-1][1].append(line)
    loops: dict[str, list[str]] = {}
    for name, block in blocks:
        remarks = " ".join(block[:2])  # beside the label, or below it
        if "This Inner Loop Header" in remarks:
            loops.setdefault(name, []).extend(block)
        elif inside := re.search(r"in Loop: Header=(BB\w+)", remarks):
            loops.setdefault(inside[1], []).extend(block)
    innermost = {name for name, block in blocks if "This Inner Loop Header" in " ".join(block[:2])}
    return [loop for name, loop in loops.items() if name in innermost]


@dataclass(frozen=True)
class _Dialect:
    instruction: re.Pattern[str]
    loops: Callable[[list[str]], Iterable[list[str]]]
    load: re.Pattern[str]
    store: re.Pattern[str]
    matrix: re.Pattern[str]
    widths: dict[str, int]


_SASS = _Dialect(
    instruction=re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*)"),
    loops=_loops_by_branches,
    # LDGSTS copies from global to shared memory, as wide as a load.
    load=re.compile(r"\bLDG(?:STS)?\.E(?:\.\w+)*?(\.(?:256|128|64|U16|S16|U8|S8))?(?=[.\s])(?!\.)"),
    store=re.compile(r"\bSTG\.E(?:\.\w+)*?(\.(?:256|128|64|U16|S16|U8|S8))?(?=[.\s])(?!\.)"),
    matrix=re.compile(r"\b(HGMMA|HMMA|QGMMA|IGMMA|UTCHMMA|UTCQMMA|UTCIMMA|QMMA|OMMA)\b"),
    widths={".256": 32, ".128": 16, ".64": 8, "": 4, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1},
)
_GCN_WIDTHS = r"(dwordx4|dwordx3|dwordx2|dword|ushort|sshort|short|ubyte|sbyte|byte)"
_GCN = _Dialect(
    instruction=re.compile(r"^\t([a-z]\w+.*)"),
    loops=_loops_by_remarks,
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
    shared = compiled.metadata.shared
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
        return _assembly(_SASS, text.splitlines(), registers, spill, shared)
    text = compiled.asm["amdgcn"]
    registers = _number(r"\.vgpr_count:\s*(\d+)", text)
    spill = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    return _assembly(_GCN, text.splitlines(), registers, spill, shared)


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
    instructions = [line for line in lines if dialect.instruction.search(line)]
    bodies = ([line for line in body if dialect.instruction.search(line)] for body in dialect.loops(lines))
    loop = max(bodies, key=lambda body: _traffic(dialect, body), default=[])
    inner = loop if _traffic(dialect, loop) else instructions
    return Assembly(
        registers=registers,
        spill_bytes=spill,
        shared_bytes=shared,
        instructions=len(instructions),
        load_bytes=_widths(dialect, dialect.load, inner),
        store_bytes=_widths(dialect, dialect.store, inner),
        loop_instructions=len(inner) if inner is loop else 0,
        tensor_core=tuple(sorted({m[1] for line in instructions if (m := dialect.matrix.search(line))})),
    )


def _widths(dialect: _Dialect, kind: re.Pattern[str], lines: list[str]) -> tuple[int, ...]:
    return tuple(dialect.widths[m[1] or ""] for line in lines if (m := kind.search(line)))


def _traffic(dialect: _Dialect, lines: list[str]) -> int:
    return sum(_widths(dialect, dialect.load, lines)) + sum(_widths(dialect, dialect.store, lines))
