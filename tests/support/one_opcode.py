"""One PTX instruction, translated and executed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from tests.support.ptx.parser import parse
from tests.support.ptx.translate import Code


def translated(opcode: str, widths: list[int], literals: Sequence[str] = ()) -> Code:
    """The opcode with registers %r0 (the result), %r1 and so on, of these bytes, then literals.

    Raises:
        PtxError: it is not known.
    """
    declared = "".join(f".reg .b{8 * width} %r{i}; " for i, width in enumerate(widths))
    operands = ", ".join([*(f"%r{i}" for i in range(len(widths))), *literals])
    return Code(parse(f".entry one() .reqntid 32 {{ {declared}{opcode} {operands}; ret; }}"))


def executed(opcode: str, result: type, *operands: np.ndarray, literals: Sequence[str] = ()) -> np.ndarray:
    """What the opcode makes of operands, of one length: numbers of NumPy's type ``result``."""
    size = np.dtype(result).itemsize
    code = translated(opcode, [size, *(x.dtype.itemsize for x in operands)], literals)
    values = [np.zeros(len(operands[0]), f"u{size}"), *(x.view(f"u{x.dtype.itemsize}") for x in operands)]
    registers = [values[int(name.removeprefix("%r"))] for name in code.registers]
    code.function(0, False)(registers, SimpleNamespace(noise=None), None)
    return registers[code.registers["%r0"][0]].view(result)
