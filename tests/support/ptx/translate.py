"""Instructions as Python: each block of a kernel becomes two functions, for all lanes and for some.

A function takes the registers (a list of unsigned arrays, one entry a lane; booleans for predicates), the
``Lanes`` that hold memory and the warps' operations, and the mask of the lanes that take part (None: all).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tests.support.ptx import approximate, arithmetic, fragments
from tests.support.ptx.parser import Address, Block, Instruction, Kernel, Operand, PtxError

# Results as expressions of the operands, which count from 0: {0} is unsigned of the type's width, {0:t} as
# the type says, {0:u4} of another type, {0:n} a number in the text; SIGNED is the type's. In front of an
# arrow stands the result's type where it is another one.
_RULES = {
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~({0})",
    "selp": "where({2:p}, {0}, {1})", "cvta.to.global": "{0}", "cvta.global": "{0}",
    "shl": "A.shl({0}, {1:u4})", "shr": "A.shr({0}, {1:u4}, SIGNED)",
    "bfe": "A.bfe({0}, {1:u4}, {2:u4}, SIGNED)", "bfi": "A.bfi({0}, {1}, {2:u4}, {3:u4})",
    "prmt": "A.prmt({0}, {1}, {2})", "lop3": "A.lop3({0}, {1}, {2}, {3:n})", "popc": "u4 <- A.popc({0})",
    **{
        f"shf.{side}.{mode}": f"A.shf({{0}}, {{1}}, {{2}}, {side!r}, {mode!r})"
        for side in "lr" for mode in ("wrap", "clamp")
    },
}  # fmt: skip
_INTEGERS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul.lo": "{0} * {1}", "mad.lo": "{0} * {1} + {2}",
    "mul.hi": "A.mulhi({0}, {1}, SIGNED)", "mad.hi": "A.mulhi({0}, {1}, SIGNED) + {2}",
    "mul.wide": "w <- np.multiply({0:t}, {1:t}, dtype=WIDE)",
    "mad.wide": "w <- np.multiply({0:t}, {1:t}, dtype=WIDE) + {2:w}",
    "min": "t <- np.minimum({0:t}, {1:t})", "max": "t <- np.maximum({0:t}, {1:t})",
    "neg": "t <- np.negative({0:t})", "abs": "t <- np.abs({0:t})",
    "div": "t <- X.divided({0:t}, {1:t}, AT)[0]", "rem": "t <- X.divided({0:t}, {1:t}, AT)[1]",
}  # fmt: skip
_HALVES = {"add": "A.add_halves({0}, {1})"}  # two numbers of 16 bits in a register of 32
_FLOATS = {
    "add": "A.canonical({0} + {1})", "sub": "A.canonical({0} - {1})", "mul": "A.canonical({0} * {1})",
    "neg": "np.negative({0})", "abs": "np.abs({0})",
    "max": "A.maximum({0}, {1})", "max.NaN": "A.maximum_nan({0}, {1})",
    "min": "A.minimum({0}, {1})", "min.NaN": "A.minimum_nan({0}, {1})",
    "div": "A.canonical({0} / {1})", "sqrt": "A.canonical(np.sqrt({0}))", "rcp": "A.canonical(1 / {0})",
}  # fmt: skip
_FLOAT32 = {
    "fma": "A.fma({0}, {1}, {2})", "mad": "A.fma({0}, {1}, {2})",
    "div.full": "Q.div_full({0}, {1}, X.noise)", "div.approx": "Q.div_approx({0}, {1}, X.noise)",
    **{f"{name}.approx": f"Q.{name}({{0}}, X.noise)" for name in ("ex2", "lg2", "rcp", "sqrt", "rsqrt")},
}  # fmt: skip
_COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_SPECIAL = {
    "%tid.x": "X.tid", "%tid.y": "X.zero", "%tid.z": "X.zero", "%laneid": "X.lane",
    "%ctaid.x": "X.ctaid[0]", "%ctaid.y": "X.ctaid[1]", "%ctaid.z": "X.ctaid[2]",
    "%ntid.x": "X.spread(u4(X.threads))", "%nctaid.x": "X.spread(u4(X.grid[0]))",
    "%nctaid.y": "X.spread(u4(X.grid[1]))", "%nctaid.z": "X.spread(u4(X.grid[2]))",
}  # fmt: skip
_SHARED = "global_smem"
_TYPES = {f"{kind}{size}": np.dtype(f"{kind}{size}").type for kind in "ui" for size in (1, 2, 4, 8)}
_TYPES |= {"f4": np.float32, "f8": np.float64}
_NAMES: dict[str, Any] = {"A": arithmetic, "Q": approximate, "where": np.where, "np": np, **_TYPES}


def width_of(kind: str) -> int:
    """Bytes of a PTX type.

    Raises:
        PtxError: it is a packed type, each of which is an opcode's own.
    """
    if "x" in kind:
        raise PtxError(f"type {kind}")
    return int(re.sub(r"\D", "", kind)) // 8


def _dtype(kind: str) -> str:
    """NumPy's name of a PTX type: "f4" of "f32", "i8" of "s64", "u2" of "b16", "p" of "pred"."""
    return "p" if kind == "pred" else {"f": "f", "s": "i"}.get(kind[0], "u") + str(width_of(kind))


def _unsigned(dtype: str) -> str:
    return dtype if dtype == "p" else f"u{dtype[1]}"


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
            self._translator.function(block, False, 0)  # every opcode is known, every register has its number
        self.registers = self._translator.registers
        self._functions: dict[tuple[int, bool], Callable[..., None]] = {}

    def function(self, index: int, masked: bool) -> Callable[..., None]:
        """Of a block, for all lanes or for those of a mask."""
        result = self._functions.get((index, masked))
        if result is None:
            text = self._translator.function(self.kernel.blocks[index], masked, self._firsts[index])
            names = _NAMES | self._translator.constants
            exec(compile(text, f"<{self.kernel.name}, block {index}>", "exec"), names)
            result = self._functions[index, masked] = names["block"]
        return result


class _Translator:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.registers: dict[str, tuple[int, int]] = {}
        self.constants: dict[str, Any] = {}
        self._mask, self._at = "None", 0
        for i in kernel.instructions:
            if i.predicate:
                self._register(i.predicate)
        # Registers that a product may still be working on.
        products = (i.operands[0] for i in kernel.instructions if i.opcode.startswith("wgmma.mma"))
        self._accumulators = {register for registers in products for register in registers}

    def function(self, block: Block, masked: bool, number: int) -> str:
        """Of one block, whose first instruction has this number in the kernel."""
        lines = ["def block(R, X, m):"]
        for self._at, i in enumerate(block.instructions, number):
            self._mask = "m" if masked else "None"
            if i.predicate:
                guard = f"{'~' if i.negated else ''}R[{self._register(i.predicate)[0]}]"
                lines.append(f"q = {guard} & m" if masked else f"q = {guard}")
                self._mask = "q"
            try:
                lines += [*self._settled(i), *self._translated(i)]
            except (PtxError, KeyError, ValueError, IndexError, TypeError) as reason:
                where = f"line {i.line} of {self.kernel.name}"
                raise PtxError(f"{where}: {i}: {type(reason).__name__}: {reason}") from reason
        end = block.end
        if end is not None and end.opcode.startswith("bar") and end.operands != ("0",):
            raise PtxError(f"line {end.line} of {self.kernel.name}: {end}: only barrier 0 of all threads")
        return "\n    ".join([*lines, "return"])

    def _translated(self, i: Instruction) -> Iterable[str]:
        rule = getattr(self, f"_{i.parts[0]}", self._expression)
        return rule(i)  # type: ignore[no-any-return]

    def _settled(self, i: Instruction) -> Iterable[str]:
        """A check of registers that only a wait makes readable."""
        if self._accumulators and not i.opcode.startswith("wgmma"):
            names = {
                n for o in i.operands for n in (o if isinstance(o, tuple) else (o,))
            } & self._accumulators
            places = [self._register(str(name))[0] for name in names]
            if places:
                yield f"X.settled({places}, {self._at})"

    # --- operands

    def _register(self, name: str) -> tuple[int, int]:
        """(index, bytes); 0 bytes for a predicate."""
        if name not in self.registers:
            self.registers[name] = (len(self.registers), self.kernel.widths[name])
        return self.registers[name]

    def _constant(self, text: str, dtype: str) -> str:
        digits = re.match(r"0[fFdD]([0-9A-Fa-f]+)$", text)
        size = int(dtype[1])
        if digits and len(digits[1]) != 2 * size:
            raise PtxError(f"{text} as {dtype}")
        number = int(digits[1], 16) if digits else int(text.removesuffix("U"), 0)
        bits = np.array(number % 2 ** (8 * size), f"u{size}")
        name = f"{dtype}_{int(bits):x}"
        self.constants[name] = bits.view(_TYPES[dtype])[()]
        return name

    def _value(self, operand: Operand, dtype: str) -> str:
        """An expression for an operand, of NumPy's ``dtype``; "p" for a predicate, "n" for a number."""
        if not isinstance(operand, str):
            raise PtxError(f"operand {operand}")
        if dtype == "n":
            return str(int(operand, 0))
        name = operand.removeprefix("!")
        if operand == _SHARED:
            return self._constant("0", dtype)
        if not name.startswith("%"):
            return f"X.spread({int(operand, 0) != 0})" if dtype == "p" else self._constant(operand, dtype)
        if operand in _SPECIAL:
            text, width = _SPECIAL[operand], 4
        else:
            place, width = self._register(name)
            text = f"R[{place}]"
        if dtype == "p":
            return text if name == operand else f"~{text}"
        size = int(dtype[1])
        if width < size:
            raise PtxError(f"{operand} as {dtype}")
        text = f"{text}.astype(u{size})" if width > size else text
        return text if dtype[0] == "u" else f"{text}.view({dtype})"

    def _spread(self, operand: Operand, dtype: str) -> str:
        """An expression with one entry for each lane."""
        text = self._value(operand, dtype)
        return text if text.startswith(("R[", "X.")) else f"X.spread({text})"

    def _listed(self, operand: Operand, dtype: str) -> str:
        """A tuple of a vector's values, or of one."""
        values = operand if isinstance(operand, tuple) else (operand,)
        return f"({', '.join(self._spread(x, dtype) for x in values)},)"

    def _address(self, operand: Operand, dtype: str) -> str:
        if not isinstance(operand, Address):
            raise PtxError(f"address {operand}")
        text = self._spread(operand.base, dtype)
        return f"({text} + {self._constant(str(operand.offset), dtype)})" if operand.offset else text

    def _put(self, register: Operand, text: str, dtype: str) -> str:
        """A statement that assigns an expression of ``dtype``, one entry for each lane."""
        if register == "_":
            return text
        place, width = self._register(str(register))
        if dtype != "p":
            size = int(dtype[1])
            text = text if dtype[0] == "u" else f"({text}).view(u{size})"
            if width < size:
                raise PtxError(f"{register} for {dtype}")
            text = f"({text}).astype(u{width})" if width > size else text
        return (
            f"R[{place}] = {text}"
            if self._mask == "None"
            else f"R[{place}] = where({self._mask}, {text}, R[{place}])"
        )

    def _result(self, i: Instruction, text: str, dtype: str) -> list[str]:
        """The first operand takes an expression of the others."""
        text = text if re.search(r"R\[|X\.", text) else f"X.spread({text})"
        return [self._put(i.operands[0], text, dtype)]

    def _results(self, i: Instruction, text: str, dtype: str) -> list[str]:
        """The first operand, a register or a vector, takes a list."""
        to = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
        return [f"v = {text}", *(self._put(x, f"v[{n}]", dtype) for n, x in enumerate(to))]

    # --- instructions with one result

    def _expression(self, i: Instruction) -> Iterable[str]:
        kind, words = i.parts[-1], [*i.parts[:-1]]
        packed = kind in ("s16x2", "u16x2")
        dtype = "u4" if packed else _dtype(kind)
        rules = (
            _HALVES
            if packed
            else _RULES | (_FLOATS if dtype[0] == "f" else _INTEGERS) | (_FLOAT32 if dtype == "f4" else {})
        )
        flush = dtype == "f4" and "ftz" in words
        if dtype[0] == "f":
            words = [word for word in words if word not in ("ftz", "rn")]
        rule = rules.get(".".join(words))
        if rule is None or (words[-1] in ("hi", "wide") and dtype[1] == "8"):
            raise PtxError("its opcode")
        result, _, text = rule.rpartition(" <- ")
        names = {"t": dtype, "w": f"{dtype[0]}{2 * int(dtype[1])}" if dtype[0] in "ui" else ""}
        plain = dtype if dtype[0] == "f" and words[0] != "selp" else _unsigned(dtype)

        def operand(field: re.Match[str]) -> str:
            wanted = names.get(field[2], field[2]) if field[2] else plain
            value = self._value(i.operands[1 + int(field[1])], wanted)
            return f"A.flush({value})" if flush else value

        text = re.sub(r"\{(\d)(?::(\w+))?\}", operand, text)
        text = text.replace("SIGNED", str(kind.startswith("s"))).replace("WIDE", names["w"])
        text = text.replace("AT", f"{self._mask}, {self._at}")
        return self._result(i, f"A.flush({text})" if flush else text, names.get(result, result) or plain)

    def _mov(self, i: Instruction) -> Iterable[str]:
        to, what = i.operands
        whole = _unsigned(_dtype(i.parts[-1]))
        if isinstance(to, tuple):
            part = int(whole[1]) // len(to)
            pieces = (
                f"(w >> {self._constant(str(8 * part * n), whole)}).astype(u{part})" for n in range(len(to))
            )
            return [
                f"w = {self._spread(what, whole)}",
                *self._results(i, f"[{', '.join(pieces)}]", f"u{part}"),
            ]
        if isinstance(what, tuple):
            part = int(whole[1]) // len(what)
            shifts = (self._constant(str(8 * part * n), whole) for n in range(len(what)))
            pieces = (
                f"({self._spread(x, f'u{part}')}.astype({whole}) << {s})"
                for x, s in zip(what, shifts, strict=True)
            )
            return self._result(i, " | ".join(pieces), whole)
        return self._result(i, self._value(what, whole), whole)

    def _setp(self, i: Instruction) -> Iterable[str]:
        dtype = _dtype(i.parts[-1])
        to, *operands = i.operands
        x, y = (self._value(operand, dtype) for operand in operands[:2])
        if "ftz" in i.parts:
            x, y = f"A.flush({x})", f"A.flush({y})"
        text = _comparison(i.parts[1], x, y, dtype)
        lines = [f"v = {text if re.search(r'R.|X.', text) else f'X.spread({text})'}"]
        yes, no = "v", "~v"
        if len(operands) > 2:
            lines.append(f"w = {self._value(operands[2], 'p')}")
            yes, no = (f"({value} {_LOGIC[i.parts[2]]} w)" for value in (yes, no))
        first, _, second = str(to).partition("|")
        return [*lines, self._put(first, yes, "p"), *([self._put(second, no, "p")] if second else [])]

    def _cvt(self, i: Instruction) -> Iterable[str]:
        to, source = i.parts[-2:]
        mode = ".".join(word for word in i.parts[1:-2] if word != "ftz") or "rn"
        known = arithmetic.ROUNDINGS.get(to.removesuffix("x2"), ("rn",))
        if mode not in known and (mode not in arithmetic.INTEGRAL or source[0] != "f"):
            raise PtxError("modifier")
        if to in ("f16x2", "bf16x2"):
            high, low = (
                f"A.to_{to[:-2]}({self._spread(x, 'f4')}, {mode!r}).astype(u4)" for x in i.operands[1:]
            )
            return self._result(i, f"({high} << u4(16)) | {low}", "u4")
        if source in ("f16", "bf16") and to == "f32":
            return self._result(i, f"A.from_{source}({self._spread(i.operands[1], 'u2')})", "f4")
        x = self._spread(i.operands[1], _dtype(source))
        x = f"A.flush({x})" if "ftz" in i.parts else x
        if to in ("f16", "bf16") and source == "f32":
            return self._result(i, f"A.to_{to}({x}, {mode!r})", "u2")
        if to == "tf32":
            return self._result(i, f"A.to_tf32({x}.view(u4), {mode!r})", "u4")
        if source[0] == "f" and to[0] in "us":
            return self._result(i, f"A.to_integer({x}, {to!r}, {mode!r})", f"u{width_of(to)}")
        if mode in arithmetic.INTEGRAL:
            return self._result(i, f"A.integral({x}, {mode!r})", _dtype(to))
        if to == "f16":
            raise PtxError("types")
        if to[0] == "f":
            return self._result(i, f"A.canonical({x}.astype({_dtype(to)}))", _dtype(to))
        # Cut or extended by the types; a wider register is filled by the target's.
        width = max(self._register(str(i.operands[0]))[1], width_of(to))
        return self._result(i, f"{x}.astype({_dtype(to)}).astype(u{width})", f"u{width}")

    # --- memory

    def _ld(self, i: Instruction) -> Iterable[str]:
        to, where = i.operands
        space, kind = i.parts[1].partition("::")[0], i.parts[-1]
        if space == "param":
            width = self._register(str(to))[1]
            if not isinstance(where, Address) or where.offset:
                raise PtxError("address of a parameter")
            return self._result(i, f"X.parameter({where.base!r}, {kind!r}, {width})", f"u{width}")
        count = len(to) if isinstance(to, tuple) else 1
        arguments = f"{self._address(where, _pointer(space))}, {width_of(kind)}, {count}"
        return self._results(
            i, f"X.load_{space}({arguments}, {self._mask}, {self._at})", f"u{width_of(kind)}"
        )

    def _st(self, i: Instruction) -> Iterable[str]:
        space, size = i.parts[1].partition("::")[0], width_of(i.parts[-1])
        address, values = (
            self._address(i.operands[0], _pointer(space)),
            self._listed(i.operands[1], f"u{size}"),
        )
        return [f"X.store_{space}({address}, {values}, {size}, {self._mask}, {self._at})"]

    def _atom(self, i: Instruction) -> Iterable[str]:
        if "global" not in i.parts:
            raise PtxError("atomics of global memory only")
        dtype = _dtype(i.parts[-1])
        values = self._listed(tuple(map(str, i.operands[2:])), dtype)
        arguments = f"{i.parts[-2]!r}, {self._address(i.operands[1], 'u8')}, {values}"
        return self._result(i, f"X.atomic({arguments}, {self._mask}, {self._at})", _unsigned(dtype))

    def _red(self, i: Instruction) -> Iterable[str]:
        return self._atom(Instruction(i.opcode, ("_", *i.operands), None, False, i.source, i.line))

    # --- copies and products that others wait for

    def _cp(self, i: Instruction) -> Iterable[str]:
        if i.opcode == "cp.async.commit_group":
            return [f"X.copies.commit({self._mask})"]
        if i.opcode in ("cp.async.wait_group", "cp.async.wait_all"):
            return [f"X.copies.wait({self._value(i.operands[0], 'n') if i.operands else None}, {self._mask})"]
        if not i.opcode.startswith(("cp.async.cg.shared", "cp.async.ca.shared")) or "bulk" in i.parts:
            raise PtxError("its opcode")
        to, what, size, *given = i.operands
        addresses = f"{self._address(to, 'u4')}, {self._address(what, 'u8')}"
        counts = f"{self._value(size, 'n')}, {self._spread(given[0] if given else size, 'u4')}"
        return [f"X.copies.begin({addresses}, {counts}, {self._mask}, {self._at})"]

    def _wgmma(self, i: Instruction) -> Iterable[str]:
        if i.parts[1] in ("fence", "commit_group"):
            return [f"X.products.{i.parts[1].partition('_')[0]}({self._mask})"]
        if i.parts[1] == "wait_group":
            return [f"X.products.wait(R, {self._value(i.operands[0], 'n')}, {self._mask}, {self._at})"]
        to, a, b, keep, *flags = i.operands
        shape = re.search(r"\.m64n(\d+)k(\d+)\.f32\.(\w+)\.\w+$", i.opcode)
        if i.parts[1] != "mma_async" or shape is None or flags[:2] != ["1", "1"]:
            raise PtxError("a shape, a type or a scale of the product")
        # Whether operands are transposed is said of those in shared memory, if it can be at all.
        transposed = [int(str(flag)) for flag in flags[2:]]
        transposed = [0] * (2 - len(transposed)) + transposed
        left = self._listed(a, "u4") if isinstance(a, tuple) else self._spread(a, "u8")
        product = f"({shape[1]}, {shape[2]}, {shape[3]!r}, {transposed[0]}, {transposed[1]})"
        operands = f"{left}, {self._spread(b, 'u8')}, {self._spread(keep, 'p')}"
        places = [self._register(x)[0] for x in to]
        return [f"X.products.begin(R, {places}, {product}, {operands}, {self._mask}, {self._at})"]

    def _fence(self, i: Instruction) -> Iterable[str]:
        return [f"X.products.proxy_fence({self._mask})"] if i.opcode.startswith("fence.proxy.async") else []

    # --- warps

    def _mma(self, i: Instruction) -> Iterable[str]:
        shape, kinds = next(p for p in i.parts if re.match(r"m\d+n\d+k\d+$", p)), i.parts[-4:]
        if kinds != ("f32", kinds[1], kinds[1], "f32") or (shape, kinds[1]) not in fragments.MMA:
            raise PtxError("types")
        operands = ", ".join(self._listed(x, "u4") for x in i.operands[1:])
        return self._results(i, f"X.mma({shape!r}, {kinds[1]!r}, {operands}, {self._mask}, {self._at})", "u4")

    def _ldmatrix(self, i: Instruction) -> Iterable[str]:
        count = len(i.operands[0]) if isinstance(i.operands[0], tuple) else 1
        arguments = f"{self._address(i.operands[1], 'u4')}, {count}, {'trans' in i.parts}"
        return self._results(i, f"X.ldmatrix({arguments}, {self._mask}, {self._at})", "u4")

    def _stmatrix(self, i: Instruction) -> Iterable[str]:
        to, what = i.operands
        values = ", ".join(self._spread(x, "u4") for x in (what if isinstance(what, tuple) else (what,)))
        arguments = f"{self._address(to, 'u4')}, ({values},), {'trans' in i.parts}"
        return [f"X.stmatrix({arguments}, {self._mask}, {self._at})"]

    def _shfl(self, i: Instruction) -> Iterable[str]:
        to, value, lane, clamp, members = i.operands
        result, _, valid = str(to).partition("|")
        operands = f"{self._spread(value, 'u4')}, {self._value(lane, 'u4')}, {self._value(clamp, 'n')}"
        line = f"v, w = X.shuffle({i.parts[2]!r}, {operands}, {self._members(members)})"
        return [line, self._put(result, "v", "u4"), *([self._put(valid, "w", "p")] if valid else [])]

    def _redux(self, i: Instruction) -> Iterable[str]:
        dtype = _dtype(i.parts[-1])
        value, members = self._spread(i.operands[1], dtype), self._members(i.operands[2])
        return self._result(i, f"X.reduced({i.parts[2]!r}, {value}, {members})", dtype)

    def _vote(self, i: Instruction) -> Iterable[str]:
        text = f"X.vote({i.parts[2]!r}, {self._value(i.operands[1], 'p')}, {self._members(i.operands[2])})"
        return self._result(i, text, "u4" if i.parts[2] == "ballot" else "p")

    def _members(self, members: Operand) -> str:
        """Which lanes a warp's operation says it has, the mask and the place."""
        return f"{self._value(members, 'u4')}, {self._mask}, {self._at}"


def _pointer(space: str) -> str:
    """The dtype of an address."""
    return {"global": "u8", "shared": "u4"}[space]


def _comparison(name: str, x: str, y: str, dtype: str) -> str:
    """Of two expressions; of floats a name with "u" is true where one is NaN."""
    if dtype[0] != "f" or (name in _COMPARISONS and name != "ne"):
        return f"({x} {_COMPARISONS[name]} {y})"
    either = f"(np.isnan({x}) | np.isnan({y}))"
    if name in ("num", "nan"):
        return either if name == "nan" else f"~{either}"
    if name == "ne":
        return f"(({x} != {y}) & ~{either})"
    return f"(({x} {_COMPARISONS[name[:-1]]} {y}) | {either})"


def loads_and_stores(instructions: Sequence[Instruction], space: str) -> Iterable[int]:
    """Bytes of the elements that instructions move to and from a state space."""
    for i in instructions:
        if i.parts[0] in ("ld", "st", "atom", "red") and space in i.parts[1].split("::"):
            yield width_of(i.parts[-1])
