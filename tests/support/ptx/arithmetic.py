"""What PTX instructions compute, on whole arrays of lanes.

Lanes are the last axis and scalars broadcast. A register is an unsigned array (uint16, uint32 or
uint64); floating-point functions take and give float32 or float64 arrays of the same bits, rounded to
nearest. NaN results of float32 are the canonical NaN 0x7FFFFFFF, as on the hardware, whatever NaN came in.

Call everything under ``np.errstate(all="ignore")``: infinities and NaN are ordinary operands here.
The rules are those of NVIDIA's "Parallel Thread Execution ISA", version 9.1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

F32, F64 = np.float32, np.float64
U16, U32, U64 = np.uint16, np.uint32, np.uint64
# Arrays of any shape, and numpy's scalars.
Lanes = Any

_CANONICAL_F32 = np.array([0x7FFFFFFF], U32).view(F32)[0]
_CANONICAL_16 = U16(0x7FFF)
INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
# How conversions to these types may round; to others only to nearest, floats to integers as above.
ROUNDINGS = {"f16": ("rn", "rz"), "bf16": ("rn", "rz"), "tf32": ("rna", "rn", "rz")}


def signed_view(x: Lanes) -> Lanes:
    """The bits of an unsigned array as signed integers of the same width."""
    return x.view(f"i{x.dtype.itemsize}")


def add_halves(x: Lanes, y: Lanes) -> Lanes:
    """Sums of the upper and of the lower 16 bits of uint32, neither carried."""
    upper = U32(0xFFFF0000)
    return ((x & upper) + (y & upper)) | ((x + y) & ~upper)


def canonical(x: Lanes) -> Lanes:
    """x with every NaN of a float32 array turned into 0x7FFFFFFF; float64 keeps its payloads."""
    if x.dtype.type is not F32:
        return x
    nan = np.isnan(x)
    return np.where(nan, _CANONICAL_F32, x) if nan.any() else x


def flush(x: Lanes) -> Lanes:
    """``.ftz``: subnormal float32 values become zeros of their sign."""
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)


def integral(x: Lanes, mode: str) -> Lanes:
    """x rounded to an integer in its own type; mode "rni", "rzi", "rmi" or "rpi", KeyError otherwise."""
    return canonical(INTEGRAL[mode](x))


def fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """a * b + c of float32, rounded once."""
    product = np.multiply(a, b, dtype=F64)  # exact: 48 bits
    total = np.asarray(np.add(product, c, dtype=F64))
    nearest = total.astype(F32)
    # The second rounding can only be wrong where the first one ended halfway between two floats (the
    # position of that bit is fixed for normal results). NaNs join them to become canonical.
    halfway = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    magnitude = nearest.view(U32) & U32(0x7FFFFFFF)
    unusual = (magnitude - U32(0x00800001)) >= U32(0x7F800001 - 0x00800001)
    doubtful = (halfway | unusual) & (total != 0)
    if doubtful.any():
        terms = (np.broadcast_to(x, total.shape)[doubtful].astype(F64) for x in (product, c))
        nearest[doubtful] = canonical(_odd_sum(*terms).astype(F32))
    return nearest


def _odd_sum(x: Lanes, y: Lanes) -> np.ndarray:
    """x + y of float64 rounded to odd (Boldo and Melquiond 2008): then to float32 is one rounding."""
    total = x + y
    part = total - x
    lost = (x - (total - part)) + (y - part)  # exactly (Knuth's TwoSum); NaN where total is infinite
    bits = total.view(np.int64)
    inexact = (lost != 0) & ((bits & 1) == 0) & ~np.isnan(lost)
    outward = (lost > 0) == (total > 0)
    return np.where(inexact, bits + np.where(outward, 1, -1), bits).view(F64)


def _extreme(choose: np.ufunc, zeros_sign: np.ufunc, x: Lanes, y: Lanes) -> Lanes:
    """choose(x, y), but a zero has the signs of both under that function of bits: +0 is above -0."""
    result = choose(x, y)
    zeros = (result == 0) & (x == y)
    if zeros.any():
        bits = f"u{result.dtype.itemsize}"
        result = np.where(zeros, zeros_sign(x.view(bits), y.view(bits)).view(result.dtype), result)
    return canonical(result)


# ``max`` and ``min``: the number where the other is NaN; with ``.NaN`` NaN where either is.
maximum = partial(_extreme, np.fmax, np.bitwise_and)
minimum = partial(_extreme, np.fmin, np.bitwise_or)
maximum_nan = partial(_extreme, np.maximum, np.bitwise_and)
minimum_nan = partial(_extreme, np.minimum, np.bitwise_or)


def shl(x: Lanes, amount: Lanes) -> Lanes:
    """x shifted left; an amount (uint32) of the width or more gives 0."""
    kind = x.dtype.type
    return np.where(amount < U32(8 * x.dtype.itemsize), x << amount.astype(kind), kind(0))


def shr(x: Lanes, amount: Lanes, signed: bool = False) -> Lanes:
    """x shifted right; an amount (uint32) of the width or more gives 0, or copies of the sign."""
    bits, kind = U32(8 * x.dtype.itemsize), x.dtype.type
    if signed:
        most = np.minimum(amount, bits - U32(1)).astype(kind)
        return (signed_view(x) >> signed_view(most)).view(kind)
    return np.where(amount < bits, x >> amount.astype(kind), kind(0))


def mulhi(x: Lanes, y: Lanes, signed: bool = False) -> Lanes:
    """The upper half of the product of two registers of 16 or of 32 bits."""
    size, kind = x.dtype.itemsize, x.dtype.type
    if signed:
        x, y = signed_view(x), signed_view(y)
    wide = np.dtype(f"{x.dtype.kind}{2 * size}")
    return (np.multiply(x, y, dtype=wide) >> wide.type(8 * size)).astype(kind)


def bfe(x: Lanes, position: Lanes, length: Lanes, signed: bool = False) -> Lanes:
    """The bit field of x at position, of that length (uint32; their low 8 bits count)."""
    bits = U32(8 * x.dtype.itemsize)
    position, length = position & U32(0xFF), length & U32(0xFF)
    # Past the field's last bit, or that of x where the field reaches beyond it: the bit that is the sign.
    above = bits - np.minimum(position + length, bits)
    field = shr(shl(x, above), above + position, signed)
    return np.where(length == 0, x.dtype.type(0), field) if signed else field


def bfi(a: Lanes, b: Lanes, position: Lanes, length: Lanes) -> Lanes:
    """b with the low bits of a in its field at position, of that length."""
    position, length = position & U32(0xFF), length & U32(0xFF)
    mask = shl(~shl(~a.dtype.type(0), length), position)
    return (b & ~mask) | (shl(a, position) & mask)


def prmt(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """Four bytes picked from the eight of (b, a), uint32; a digit of 8 or more takes copies of a sign."""
    both, selector = (np.asarray(b, U64) << U64(32)) | a, np.asarray(selector, U64)
    result = U64(0)
    for place in range(4):
        digit = (selector >> U64(4 * place)) & U64(15)
        byte = (both >> ((digit & U64(7)) << U64(3))) & U64(0xFF)
        byte = np.where(digit >= U64(8), (byte >> U64(7)) * U64(0xFF), byte)
        result = result | (byte << U64(8 * place))
    return result.astype(U32)


def lop3(a: Lanes, b: Lanes, c: Lanes, table: int) -> Lanes:
    """The function of three bits whose truth table is ``table``, on every bit of uint32 registers."""
    result = (a ^ a) | (b ^ b) | (c ^ c)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def shf(low: Lanes, high: Lanes, amount: Lanes, direction: str, mode: str) -> Lanes:
    """The upper half of (high, low), uint32, shifted left ("l"), or the lower one shifted right ("r")."""
    amount = amount & U32(31) if mode == "wrap" else np.minimum(amount, U32(32))
    pair, amount = (np.asarray(high, U64) << U64(32)) | low, np.asarray(amount, U64)
    shifted = (pair << amount) >> U64(32) if direction == "l" else pair >> amount
    return shifted.astype(U32)


def popc(x: Lanes) -> Lanes:
    """The number of set bits, uint32."""
    return np.bitwise_count(x).astype(U32)


def to_f16(x: Lanes, mode: str = "rn") -> Lanes:
    """float32 to the bits of float16, uint16; mode "rn" or "rz"."""
    half = x.astype(np.float16)
    bits = half.view(U16)
    if mode == "rz":
        bits = bits - (np.abs(half.astype(F32)) > np.abs(x)).astype(U16)
    return np.where(np.isnan(x), _CANONICAL_16, bits)


def to_bf16(x: Lanes, mode: str = "rn") -> Lanes:
    """float32 to the bits of bfloat16, uint16; mode "rn" or "rz"."""
    bits = x.view(U32)
    if mode == "rn":
        bits = bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))
    return np.where(np.isnan(x), _CANONICAL_16, (bits >> U32(16)).astype(U16))


def from_f16(bits: Lanes) -> Lanes:
    """The bits of float16 (uint16) to float32, exactly."""
    return canonical(bits.view(np.float16).astype(F32))


def from_bf16(bits: Lanes) -> Lanes:
    """The bits of bfloat16 (uint16) to float32, exactly; a NaN keeps its payload."""
    return (bits.astype(U32) << U32(16)).view(F32)


def to_tf32(bits: Lanes, mode: str = "rna") -> Lanes:
    """The bits of float32 rounded to TF32's 10 bits of mantissa, uint32; "rna", "rn" or "rz"."""
    more = {"rna": U32(0x1000), "rn": U32(0x0FFF) + ((bits >> U32(13)) & U32(1)), "rz": U32(0)}[mode]
    nan = (bits & U32(0x7FFFFFFF)) > U32(0x7F800000)
    return np.where(nan, U32(0x7FFFFFFF), (bits + more) & U32(0xFFFFE000))


def to_integer(x: Lanes, target: str, mode: str) -> Lanes:
    """float32 or float64 to an integer type ("s16" to "u64"), clamped, unsigned of its width.

    NaN gives 0 where neither the source is float64 nor the target 64 bits wide, else the target's
    highest bit alone.
    """
    bits = int(target[1:])
    limits = np.iinfo(f"{'i' if target[0] == 's' else 'u'}{bits // 8}")
    value = integral(x, mode).astype(F64)
    # As a float64 the largest of 64 bits is one more, which is clamped too.
    above, below = value >= F64(limits.max), value <= F64(limits.min)
    inside = np.where(above | below | np.isnan(value), F64(0), value).astype(limits.dtype)
    result = np.where(above, limits.max, np.where(below, limits.min, inside)).astype(f"u{bits // 8}")
    wide = x.dtype.type is F64 or bits == 64
    return np.where(np.isnan(x), result.dtype.type(2 ** (bits - 1) if wide else 0), result)
