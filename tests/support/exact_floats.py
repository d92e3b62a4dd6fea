"""What is true of floating-point numbers, by whole numbers and fractions, and operands to try it on."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

F32, F64, U16, U32, U64 = np.float32, np.float64, np.uint16, np.uint32, np.uint64

# (bits of precision, exponent of the least subnormal, exponent past the greatest finite value)
FORMATS = {"f16": (11, -24, 16), "bf16": (8, -133, 128), "f32": (24, -149, 128), "f64": (53, -1074, 1024)}
# Zeros, subnormals, ones, the ends of the range, infinities and NaN, of both signs.
EDGES = np.array(
    [sign * x for x in (0.0, 2**-149, 2**-127, 2**-126, 1.0, 1.5, 65504.0, 65520.0, 3.4028235e38, np.inf)
     for sign in (1, -1)] + [np.nan],
    F32,
)  # fmt: skip


def exactly_rounded(value: Fraction, mode: str, name: str) -> float:
    """value rounded once to a format, by whole numbers: mode "rn" or "rz"; nonzero values only."""
    precision, least, past = FORMATS[name]
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - precision + 1, least)
    count, rest = divmod(size, unit)
    up = mode == "rn" and (2 * rest > unit or (2 * rest == unit and count % 2 == 1))
    size = (count + up) * unit
    if size >= Fraction(2) ** past:
        if mode == "rn":
            return -math.inf if value < 0 else math.inf
        size = Fraction(2) ** past - Fraction(2) ** (past - precision)
    return -float(size) if value < 0 else float(size)


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bit for bit, so that zeros have their signs and NaN its canonical bits."""
    assert got.dtype == want.dtype
    bits = np.dtype(f"u{want.dtype.itemsize}")
    differ = np.flatnonzero(got.view(bits) != want.view(bits))
    assert len(differ) == 0, (len(differ), differ[:3], got[differ[:3]], want[differ[:3]])


def floats(seed: int, count: int, exponents: tuple[int, int], dtype: type = F32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mantissa = rng.uniform(1, 2, count) * rng.choice([-1, 1], count)
    return np.ldexp(mantissa, rng.integers(*exponents, count)).astype(dtype)


def registers(seed: int, bits: int, count: int = 400) -> np.ndarray:
    """Random registers, with all zeros, all ones, the sign alone and small numbers among them."""
    kind = {16: U16, 32: U32, 64: U64}[bits]
    edges = [0, 1, 2, 3, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 2**bits - 2]
    rng = np.random.default_rng(seed)
    x = np.concatenate([np.array(edges, kind), rng.integers(0, 2**bits, count, kind)])
    return rng.permutation(x)


def signed_value(x: int, bits: int) -> int:
    return x - 2**bits if x >> (bits - 1) else x
