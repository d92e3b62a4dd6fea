"""Instructions as Python: each block of a kernel becomes two functions, for all lanes and for some.

A function takes the registers (a list of unsigned arrays, one entry a lane; booleans for predicates), the
``Lanes`` that hold memory and the warps' operations, and the mask of the lanes that take part (None: all).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tests.support.ptx import approximate, arithmetic, fragments
from tests.support.ptx.parser import Address, Block, Instruction, Kernel, Operand, PtxError

_TYPES = {
    "u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "u8": np.uint64,
    "i1": np.int8, "i2": np.int16, "i4": np.int32, "i8": np.int64,
    "f2": np.float16, "f4": np.float32, "f8": np.float64,
}  # fmt: skip
_SPECIAL = {
    "%tid.x": "X.tid", "%tid.y": "X.zero", "%tid.z": "X.zero", "%laneid": "X.lane",
    "%ctaid.x": "X.ctaid[0]", "%ctaid.y": "X.ctaid[1]", "%ctaid.z": "X.ctaid[2]",
    "%ntid.x": "X.spread(u4(X.threads))", "%nctaid.x": "X.spread(u4(X.grid[0]))",
    "%nctaid.y": "X.spread(u4(X.grid[1]))", "%nctaid.z": "X.spread(u4(X.grid[2]))",
}  # fmt: skip
_SHARED = "global_smem"
_COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_LOGIC = {"and": "&", "or": "|", "xor": "^"}


def width_of(kind: str) -> int:
    """Bytes of a PTX type."""
    return int(re.sub(r"\D", "", kind)) // 8


def _dtype(kind: str) -> str:
    """NumPy's name of a PTX type: "f4" of "f32", "i8" of "s64", "u2" of "b16"."""
    return {"f": "f", "s": "i"}.get(kind[0], "u") + str(width_of(kind))


class Code:
    """A translated kernel, its functions compiled when they are first wanted.

    Attributes:
        registers: index and width of each.
        instructions: in order; a function's place is an index into them.

    Raises:
        PtxError: an opcode, a modifier or an operand is not known.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.instructions = kernel, list(kernel.instructions)
        self._translator = _Translator(kernel)
        self._firsts, number = [], 0
        for block in kernel.blocks:
            self._firsts.append(number)
            number += len(block.instructions) + (block.end is not None)
            self._translator.check(block)
        self.registers = self._translator.registers
        self._functions: dict[tuple[int, bool], Callable[..., None]] = {}

    def function(self, index: int, masked: bool) -> Callable[..., None]:
        """Of a block, for all lanes or for those of a mask."""
        made = self._functions.get((index, masked))
        if made is None:
            text = self._translator.function(self.kernel.blocks[index], masked, self._firsts[index])
            names = _NAMES | self._translator.constants
            exec(compile(text, f"<{self.kernel.name}, block {index}>", "exec"), names)
            made = self._functions[index, masked] = names["block"]
        return made


_NAMES: dict[str, Any] = {
    "A": arithmetic, "Q": approximate, "where": np.where, "np": np, **_TYPES
}  # fmt: skip


class _Translator:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.registers: dict[str, tuple[int, int]] = {}
        self.constants: dict[str, Any] = {}
        self._mask, self._at = "None", 0
        for instruction in kernel.instructions:
            if instruction.predicate:
                self._register(instruction.predicate)
        # Registers that a product may still be working on.
        self._accumulators = {
            register
            for instruction in kernel.instructions
            if instruction.opcode.startswith("wgmma.mma_async")
            for register in instruction.operands[0]
        }

    def check(self, block: Block) -> None:
        """Translate it for nothing: every opcode is known, and every register has its number."""
        self.function(block, False, 0)
        end = block.end
        if end is not None and end.opcode.startswith("bar") and end.operands != ("0",):
            raise PtxError(f"line {end.line} of {self.kernel.name}: {end}: only barrier 0 of all threads")

    def function(self, block: Block, masked: bool, number: int) -> str:
        """Of one block, whose first instruction has this number in the kernel."""
        lines = ["def block(R, X, m):"]
        for self._at, instruction in enumerate(block.instructions, number):
            self._mask = "m" if masked else "None"
            if instruction.predicate:
                place, _ = self._register(instruction.predicate)
                guard = f"{'~' if instruction.negated else ''}R[{place}]"
                lines.append(f"q = {guard} & m" if masked else f"q = {guard}")
                self._mask = "q"
            lines += self._in_flight(instruction)
            lines += self._translated(instruction)
        return "\n    ".join([*lines, "return"])

    def _translated(self, instruction: Instruction) -> Iterable[str]:
        root = instruction.parts[0]
        rule = getattr(self, f"_{root}", None)
        if root == "cp":
            rule = self._copy
        try:
            if rule is None:
                raise PtxError("its opcode")
            return list(rule(instruction))
        except (PtxError, KeyError, ValueError, IndexError, TypeError) as reason:
            where = f"line {instruction.line} of {self.kernel.name}"
            raise PtxError(f"{where}: {instruction}: {type(reason).__name__}: {reason}") from reason

    def _in_flight(self, instruction: Instruction) -> Iterable[str]:
        """A check of registers that only a wait makes readable."""
        if self._accumulators and not instruction.opcode.startswith("wgmma"):
            used = {
                name
                for operand in instruction.operands
                for name in (operand if isinstance(operand, tuple) else (operand,))
                if name in self._accumulators
            }
            if used:
                places = [self.registers[name][0] for name in used if name in self.registers]
                yield f"X.settled({places}, {self._at})"

    # --- operands

    def _register(self, name: str) -> tuple[int, int]:
        """(index, bytes); 0 bytes for a predicate."""
        if name not in self.registers:
            if name not in self.kernel.widths:
                raise PtxError(f"register {name}")
            self.registers[name] = (len(self.registers), self.kernel.widths[name])
        return self.registers[name]

    def _constant(self, value: Any) -> str:
        name = f"k{value.dtype.str[1:]}_{value.tobytes().hex()}"
        self.constants[name] = value
        return name

    def _immediate(self, text: str, dtype: str) -> str:
        kind = np.dtype(_TYPES[dtype])
        digits = re.match(r"0[fFdD]([0-9A-Fa-f]+)$", text)
        number = int(digits[1], 16) if digits else int(text, 0)
        if digits and len(digits[1]) != 2 * kind.itemsize:
            raise PtxError(f"immediate {text} as {dtype}")
        bits = np.array(number % 2 ** (8 * kind.itemsize), f"<u{kind.itemsize}")
        return self._constant(bits.view(kind)[()])

    def _value(self, operand: Operand, dtype: str) -> str:
        """An expression for an operand, of NumPy's ``dtype``; "p" for a predicate."""
        if not isinstance(operand, str):
            raise PtxError(f"operand {operand}")
        if operand == _SHARED:
            return self._constant(_TYPES[dtype](0))
        negated = operand.startswith("!")
        if not operand.lstrip("!").startswith("%"):
            return f"X.spread({int(operand, 0) != 0})" if dtype == "p" else self._immediate(operand, dtype)
        if operand in _SPECIAL:
            text, width = _SPECIAL[operand], 4
        else:
            place, width = self._register(operand.lstrip("!"))
            text = f"R[{place}]"
        if dtype == "p":
            return f"~{text}" if negated else text
        size = int(dtype[1])
        if width < size or width == 0:
            raise PtxError(f"{operand} as {dtype}")
        if width > size:
            text = f"{text}.astype(u{size})"
        return text if dtype[0] == "u" else f"{text}.view({dtype})"

    def _spread(self, operand: Operand, dtype: str) -> str:
        """An expression with one entry for each lane."""
        text = self._value(operand, dtype)
        return text if text.startswith(("R[", "X.")) else f"X.spread({text})"

    def _address(self, operand: Operand, dtype: str) -> str:
        if not isinstance(operand, Address):
            raise PtxError(f"address {operand}")
        text = self._spread(operand.base, dtype)
        if not operand.offset:
            return text
        offset = self._immediate(str(operand.offset), dtype)
        return f"({text} + {offset})"

    def _put(self, register: Operand, text: str, dtype: str) -> str:
        """A statement that assigns an expression of ``dtype``, one entry for each lane."""
        if register == "_":
            return text
        if not isinstance(register, str):
            raise PtxError(f"destination {register}")
        place, width = self._register(register)
        if dtype != "p":
            size = int(dtype[1])
            if dtype[0] != "u":
                text = f"({text}).view(u{size})"
            if width > size:
                text = f"({text}).astype(u{width})"
            if 0 < width < size:
                raise PtxError(f"{register} for {dtype}")
        if self._mask == "None":
            return f"R[{place}] = {text}"
        return f"R[{place}] = where({self._mask}, {text}, R[{place}])"

    def _result(self, i: Instruction, text: str, dtype: str) -> list[str]:
        """The first operand takes an expression of the others."""
        if not re.search(r"R\[|X\.", text):
            text = f"X.spread({text})"
        return [self._put(i.operands[0], text, dtype)]

    # --- moves

    def _mov(self, i: Instruction) -> Iterable[str]:
        to, what = i.operands
        if i.parts[-1] == "pred":
            return self._result(i, self._value(what, "p"), "p")
        size = width_of(i.parts[-1])
        whole = f"u{size}"
        if isinstance(to, tuple):
            part = f"u{size // len(to)}"
            lines = [f"v = {self._spread(what, whole)}"]
            for place, register in enumerate(to):
                if register != "_":
                    bits = self._constant(_TYPES[whole](8 * int(part[1]) * place))
                    lines.append(self._put(register, f"(v >> {bits}).astype({part})", part))
            return lines
        if isinstance(what, tuple):
            part = f"u{size // len(what)}"
            pieces = [
                f"({self._spread(x, part)}.astype({whole}) << "
                f"{self._constant(_TYPES[whole](8 * int(part[1]) * place))})"
                for place, x in enumerate(what)
            ]
            return self._result(i, " | ".join(pieces), whole)
        return self._result(i, self._value(what, whole), whole)

    def _cvta(self, i: Instruction) -> Iterable[str]:
        return self._result(i, self._value(i.operands[1], "u8"), "u8")

    def _ld(self, i: Instruction) -> Iterable[str]:
        to, where = i.operands
        space = i.parts[1].partition("::")[0]
        size = width_of(i.parts[-1])
        if space == "param":
            if not isinstance(where, Address) or where.offset:
                raise PtxError("address of a parameter")
            _, width = self._register(str(to))
            return self._result(i, f"X.parameter({where.base!r}, {i.parts[-1]!r}, {width})", f"u{width}")
        registers = to if isinstance(to, tuple) else (to,)
        address = self._address(where, "u8" if space == "global" else "u4")
        if space not in ("global", "shared"):
            raise PtxError(f"state space {space}")
        lines = [f"v = X.load_{space}({address}, {size}, {len(registers)}, {self._mask}, {self._at})"]
        return lines + [self._put(r, f"v[{n}]", f"u{size}") for n, r in enumerate(registers)]

    def _st(self, i: Instruction) -> Iterable[str]:
        where, what = i.operands
        space = i.parts[1].partition("::")[0]
        size = width_of(i.parts[-1])
        if space not in ("global", "shared"):
            raise PtxError(f"state space {space}")
        values = [self._spread(x, f"u{size}") for x in (what if isinstance(what, tuple) else (what,))]
        address = self._address(where, "u8" if space == "global" else "u4")
        return [f"X.store_{space}({address}, [{', '.join(values)}], {size}, {self._mask}, {self._at})"]

    def _atom(self, i: Instruction) -> Iterable[str]:
        kind, operation = i.parts[-1], i.parts[-2]
        if "global" not in i.parts:
            raise PtxError("atomics of global memory only")
        values = ", ".join(self._spread(x, _dtype(kind)) for x in i.operands[2:])
        address = self._address(i.operands[1], "u8")
        line = f"v = X.atomic({operation!r}, {address}, [{values}], {self._mask}, {self._at})"
        return [line, self._put(i.operands[0], "v", f"u{width_of(kind)}")]

    def _red(self, i: Instruction) -> Iterable[str]:
        return self._atom(Instruction(i.opcode, ("_", *i.operands), None, False, i.source, i.line))

    # --- copies and products that others wait for

    def _copy(self, i: Instruction) -> Iterable[str]:
        if i.opcode == "cp.async.commit_group":
            return [f"X.copies.commit({self._mask})"]
        if i.opcode in ("cp.async.wait_group", "cp.async.wait_all"):
            left = int(str(i.operands[0]), 0) if i.operands else None
            return [f"X.copies.wait({left}, {self._mask})"]
        if not i.opcode.startswith(("cp.async.cg.shared", "cp.async.ca.shared")) or "bulk" in i.parts:
            raise PtxError("its opcode")
        to, what, size, *given = i.operands
        nbytes = int(str(size), 0)
        read = self._spread(given[0], "u4") if given else f"X.spread(u4({nbytes}))"
        to, what = self._address(to, "u4"), self._address(what, "u8")
        return [f"X.copies.begin({to}, {what}, {nbytes}, {read}, {self._mask}, {self._at})"]

    def _wgmma(self, i: Instruction) -> Iterable[str]:
        if i.parts[1] == "fence":
            return [f"X.products.fence({self._mask})"]
        if i.parts[1] == "commit_group":
            return [f"X.products.commit({self._mask})"]
        if i.parts[1] == "wait_group":
            return [f"X.products.wait(R, {int(str(i.operands[0]))}, {self._mask}, {self._at})"]
        to, a, b, keep, *flags = i.operands
        if i.parts[1] != "mma_async" or i.parts[-3] != "f32" or flags[:2] != ["1", "1"]:
            raise PtxError("a type or a scale of the product")
        shape = re.match(r"m64n(\d+)k(\d+)$", next(p for p in i.parts if p.startswith("m64")))
        if shape is None or not isinstance(to, tuple):
            raise PtxError("shape")
        transposed = [int(str(flag)) for flag in flags[2:]]
        if isinstance(a, tuple):
            left, transposed = f"({', '.join(self._spread(x, 'u4') for x in a)},)", [0, *transposed, 0][:2]
        else:
            left, transposed = self._spread(a, "u8"), [*transposed, 0, 0][:2]
        registers = [self._register(x)[0] for x in to]
        shape_and_type = f"({shape[1]}, {shape[2]}, {i.parts[-2]!r}, {transposed[0]}, {transposed[1]})"
        operands = f"{left}, {self._spread(b, 'u8')}, {self._spread(keep, 'p')}"
        return [f"X.products.begin(R, {registers}, {shape_and_type}, {operands}, {self._mask}, {self._at})"]

    def _fence(self, i: Instruction) -> Iterable[str]:
        return [f"X.products.proxy_fence({self._mask})"] if i.opcode.startswith("fence.proxy.async") else []

    def _membar(self, i: Instruction) -> Iterable[str]:
        return []

    # --- warps

    def _mma(self, i: Instruction) -> Iterable[str]:
        to, a, b, c = i.operands
        shape, kinds = next(p for p in i.parts if re.match(r"m\d+n\d+k\d+$", p)), i.parts[-4:]
        if kinds != ("f32", kinds[1], kinds[1], "f32") or (shape, kinds[1]) not in fragments.MMA:
            raise PtxError("types")
        a, b, c = (
            f"({', '.join(self._spread(x, 'u4') for x in (y if isinstance(y, tuple) else (y,)))},)"
            for y in (a, b, c)
        )
        line = f"v = X.mma({shape!r}, {kinds[1]!r}, {a}, {b}, {c}, {self._mask}, {self._at})"
        return [line, *(self._put(x, f"v[{n}]", "u4") for n, x in enumerate(to))]

    def _ldmatrix(self, i: Instruction) -> Iterable[str]:
        to = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
        address = self._address(i.operands[1], "u4")
        line = f"v = X.ldmatrix({address}, {len(to)}, {'trans' in i.parts}, {self._mask}, {self._at})"
        return [line, *(self._put(x, f"v[{n}]", "u4") for n, x in enumerate(to))]

    def _shfl(self, i: Instruction) -> Iterable[str]:
        to, value, lane, clamp, members = i.operands
        result, _, valid = str(to).partition("|")
        if str(clamp).startswith("%"):
            raise PtxError("a register for the clamp")
        operands = f"{self._spread(value, 'u4')}, {self._value(lane, 'u4')}, {int(str(clamp), 0)}"
        line = f"v, w = X.shuffle({i.parts[2]!r}, {operands}, {self._members(members)})"
        return [line, self._put(result, "v", "u4"), *([self._put(valid, "w", "p")] if valid else [])]

    def _redux(self, i: Instruction) -> Iterable[str]:
        _, value, members = i.operands
        dtype = _dtype(i.parts[-1])
        text = f"X.reduced({i.parts[2]!r}, {self._spread(value, dtype)}, {self._members(members)})"
        return self._result(i, text, dtype)

    def _vote(self, i: Instruction) -> Iterable[str]:
        _, value, members = i.operands
        text = f"X.vote({i.parts[2]!r}, {self._value(value, 'p')}, {self._members(members)})"
        return self._result(i, text, "u4" if i.parts[2] == "ballot" else "p")

    def _bar(self, i: Instruction) -> Iterable[str]:
        if i.opcode != "bar.warp.sync":
            raise PtxError("its opcode")
        return [f"X.warp_barrier({self._members(i.operands[0])})"]

    def _members(self, members: Operand) -> str:
        """Which lanes a warp's operation says it has, the mask and the place."""
        return f"{self._value(members, 'u4')}, {self._mask}, {self._at}"

    # --- comparison and choice

    def _setp(self, i: Instruction) -> Iterable[str]:
        comparison, dtype = i.parts[1], _dtype(i.parts[-1])
        to, x, y, *other = i.operands
        x, y = self._value(x, dtype), self._value(y, dtype)
        if "ftz" in i.parts:
            x, y = f"A.flush({x})", f"A.flush({y})"
        lines, text = [f"v = {_comparison(comparison, x, y, dtype)}"], "v"
        if not re.search(r"R\[|X\.", lines[0]):
            lines[0] = f"v = X.spread({lines[0][4:]})"
        first, _, second = str(to).partition("|")
        operation = ""
        if other:
            operation = _LOGIC[i.parts[2]]
            text = f"(v {operation} w)"
            lines.append(f"w = {self._value(other[0], 'p')}")
        lines.append(self._put(first, text, "p"))
        if second:
            lines.append(self._put(second, f"(~v {operation} w)" if other else "~v", "p"))
        return lines

    def _selp(self, i: Instruction) -> Iterable[str]:
        dtype = f"u{width_of(i.parts[-1])}"
        yes, no = (self._value(x, dtype) for x in i.operands[1:3])
        return self._result(i, f"where({self._value(i.operands[3], 'p')}, {yes}, {no})", dtype)

    # --- bits

    def _logic(self, i: Instruction) -> Iterable[str]:
        kind = i.parts[-1]
        dtype = "p" if kind == "pred" else f"u{width_of(kind)}"
        x, y = (self._value(operand, dtype) for operand in i.operands[1:])
        return self._result(i, f"({x} {_LOGIC[i.parts[0]]} {y})", dtype)

    _and = _or = _xor = _logic

    def _not(self, i: Instruction) -> Iterable[str]:
        dtype = "p" if i.parts[-1] == "pred" else f"u{width_of(i.parts[-1])}"
        return self._result(i, f"~({self._value(i.operands[1], dtype)})", dtype)

    def _shift(self, i: Instruction) -> Iterable[str]:
        dtype = f"u{width_of(i.parts[-1])}"
        signed = ", True" if i.parts[-1].startswith("s") else ""
        x, amount = self._value(i.operands[1], dtype), self._value(i.operands[2], "u4")
        return self._result(i, f"A.{i.parts[0]}({x}, {amount}{signed if i.parts[0] == 'shr' else ''})", dtype)

    _shl = _shr = _shift

    def _call(self, function: str, i: Instruction, dtypes: str, *more: object) -> list[str]:
        """``A.function(operands, more)``, whose result and operands have these dtypes, split at blanks."""
        result, *operands = dtypes.split()
        values = [self._value(x, dtype) for x, dtype in zip(i.operands[1:], operands, strict=True)]
        return self._result(i, f"A.{function}({', '.join([*values, *map(repr, more)])})", result)

    def _bfe(self, i: Instruction) -> Iterable[str]:
        u = f"u{width_of(i.parts[-1])}"
        return self._call("bfe", i, f"{u} {u} u4 u4", i.parts[-1].startswith("s"))

    def _bfi(self, i: Instruction) -> Iterable[str]:
        u = f"u{width_of(i.parts[-1])}"
        return self._call("bfi", i, f"{u} {u} {u} u4 u4")

    def _prmt(self, i: Instruction) -> Iterable[str]:
        if len(i.parts) > 2:
            raise PtxError("a mode")
        return self._call("prmt", i, "u4 u4 u4 u4")

    def _lop3(self, i: Instruction) -> Iterable[str]:
        values = ", ".join(self._spread(x, "u4") for x in i.operands[1:4])
        return self._result(i, f"A.lop3({values}, {int(str(i.operands[4]), 0)})", "u4")

    def _shf(self, i: Instruction) -> Iterable[str]:
        return self._call("shf", i, "u4 u4 u4 u4", i.parts[1], i.parts[2])

    def _popc(self, i: Instruction) -> Iterable[str]:
        return self._call("popc", i, f"u4 u{width_of(i.parts[-1])}")

    # --- numbers

    def _arithmetic(self, i: Instruction) -> Iterable[str]:
        if i.parts[-1].startswith("f"):
            return self._float(i)
        return self._integer(i)

    _add = _sub = _mul = _mad = _fma = _min = _max = _neg = _abs = _div = _rem = _arithmetic

    def _float(self, i: Instruction) -> Iterable[str]:
        dtype, root, words = _dtype(i.parts[-1]), i.parts[0], i.parts[1:-1]
        if dtype not in ("f4", "f8"):
            raise PtxError("arithmetic of 16 bits")
        if set(words) - {"rn", "approx", "full", "ftz", "NaN"}:
            raise PtxError("modifier")
        flush = "ftz" in words
        values = [self._value(x, dtype) for x in i.operands[1:]]
        if flush:
            values = [f"A.flush({x})" for x in values]
        text = _float_text(root, words, values, dtype)
        return self._result(i, f"A.flush({text})" if flush else text, dtype)

    _ex2 = _lg2 = _rcp = _sqrt = _rsqrt = _float

    def _integer(self, i: Instruction) -> Iterable[str]:
        root, kind = i.parts[0], i.parts[-1]
        signed, dtype, u = kind.startswith("s"), _dtype(kind), f"u{width_of(kind)}"
        if "sat" in i.parts:
            raise PtxError("saturated integers")
        if root in ("mul", "mad"):
            return self._product(i, signed, u)
        if root in ("add", "sub"):
            x, y = (self._value(x, u) for x in i.operands[1:])
            return self._result(i, f"({x} {'+' if root == 'add' else '-'} {y})", u)
        if root in ("div", "rem"):
            x, y = (self._spread(x, dtype) for x in i.operands[1:])
            return self._result(i, f"X.divided({root!r}, {x}, {y}, {self._mask}, {self._at})", dtype)
        values = ", ".join(self._value(x, dtype) for x in i.operands[1:])
        function = {"min": "np.minimum", "max": "np.maximum", "abs": "np.abs", "neg": "np.negative"}[root]
        return self._result(i, f"{function}({values})", dtype)

    def _product(self, i: Instruction, signed: bool, u: str) -> list[str]:
        x, y, *added = i.operands[1:]
        half = i.parts[1]
        if half == "wide":
            kind, wide = ("i" if signed else "u") + u[1], ("i" if signed else "u") + str(2 * int(u[1]))
            u = f"u{2 * int(u[1])}"
            text = f"np.multiply({self._value(x, kind)}, {self._value(y, kind)}, dtype={wide}).view({u})"
        elif half == "lo":
            text = f"({self._value(x, u)} * {self._value(y, u)})"
        elif half == "hi" and u != "u8":
            text = f"A.mulhi({self._value(x, u)}, {self._value(y, u)}, {signed})"
        else:
            raise PtxError("which half of a product")
        if added:
            text = f"({text} + {self._value(added[0], u)})"
        return self._result(i, text, u)

    def _cvt(self, i: Instruction) -> Iterable[str]:
        to, source = i.parts[-2:]
        words = i.parts[1:-2]
        mode = ".".join(w for w in words if w != "ftz") or "rn"
        modes = arithmetic.ROUNDINGS.get(to.removesuffix("x2"), ("rn",))
        if mode not in modes and (mode not in arithmetic.INTEGRAL or source[0] != "f"):
            raise PtxError("modifier")
        if to in ("f16x2", "bf16x2"):
            high, low = (
                f"A.to_{to[:-2]}({self._spread(x, 'f4')}, {mode!r}).astype(u4)" for x in i.operands[1:]
            )
            return self._result(i, f"(({high} << u4(16)) | {low})", "u4")
        if "f" in to or "f" in source:
            return self._float_conversion(i, to, source, mode)
        # Cut or extended by the types; a wider register is filled by the target's.
        text = f"{self._spread(i.operands[1], _dtype(source))}.astype({_dtype(to)})"
        _, width = self._register(str(i.operands[0]))
        if width > width_of(to):
            return self._result(i, f"{text}.astype(u{width})", f"u{width}")
        return self._result(i, text, _dtype(to))

    def _float_conversion(self, i: Instruction, to: str, source: str, mode: str) -> list[str]:
        x = self._spread(i.operands[1], f"u{width_of(source)}")
        if source in ("f16", "bf16"):
            if to != "f32":
                raise PtxError("types")
            return self._result(i, f"A.from_{source}({x})", "f4")
        if source[0] != "f":
            if to not in ("f32", "f64"):
                raise PtxError("types")
            return self._result(i, f"{x}.view({_dtype(source)}).astype({_dtype(to)})", _dtype(to))
        number = f"{x}.view({_dtype(source)})"
        if "ftz" in i.parts:
            number = f"A.flush({number})"
        if to in ("f16", "bf16"):
            return self._result(i, f"A.to_{to}({number}, {mode!r})", "u2")
        if to == "tf32":
            return self._result(i, f"A.to_tf32({x}, {mode!r})", "u4")
        if to[0] != "f":
            return self._result(i, f"A.to_integer({number}, {to!r}, {mode!r})", f"u{width_of(to)}")
        if mode in arithmetic.INTEGRAL:
            return self._result(i, f"A.integral({number}, {mode!r})", _dtype(to))
        return self._result(i, f"A.canonical({number}.astype({_dtype(to)}))", _dtype(to))


def _comparison(name: str, x: str, y: str, dtype: str) -> str:
    """Of two expressions; of floats a name with "u" is true where one is NaN."""
    if dtype[0] != "f" or (name in _COMPARISONS and name != "ne"):
        return f"({x} {_COMPARISONS[name]} {y})"
    either = f"(np.isnan({x}) | np.isnan({y}))"
    if name == "ne":
        return f"(({x} != {y}) & ~{either})"
    if name in ("num", "nan"):
        return either if name == "nan" else f"~{either}"
    return f"(({x} {_COMPARISONS[name[:-1]]} {y}) | {either})"


def _float_text(root: str, words: tuple[str, ...], values: list[str], dtype: str) -> str:
    """An expression for arithmetic on float32 or float64."""
    listed = ", ".join(values)
    if dtype == "f8" and (root in ("fma", "mad") or "approx" in words):
        raise PtxError("types")
    if root in ("fma", "mad"):
        return f"A.fma({listed})"
    if root in ("max", "min"):
        return f"A.{root}imum{'_nan' if 'NaN' in words else ''}({listed})"
    if root in ("neg", "abs"):
        return f"np.{'negative' if root == 'neg' else 'abs'}({listed})"
    if "approx" not in words and "full" not in words:
        names = {"add": "add", "sub": "subtract", "mul": "multiply", "div": "divide", "sqrt": "sqrt"}
        if root == "rcp":
            return f"A.canonical(np.divide({dtype}(1), {listed}))"
        return f"A.canonical(np.{names[root]}({listed}))"
    if root == "div":
        root = "div_full" if "full" in words else "div_approx"
    return f"Q.{root}({listed}, X.noise)"
