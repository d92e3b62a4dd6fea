"""What PTX instructions compute, on whole arrays of lanes.

Lanes are the last axis and scalars broadcast. A register is an unsigned array (uint16, uint32 or
uint64); floating-point functions take and give float32 or float64 arrays of the same bits. Types and
rounding modes have their PTX names ("s32", "rz", "rni"). NaN results of float32 are the canonical
NaN 0x7FFFFFFF, as on the hardware, whatever NaN came in.

Call everything under ``np.errstate(all="ignore")``: infinities and NaN are ordinary operands here.
Section names are those of NVIDIA's "Parallel Thread Execution ISA", version 9.1.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

F32, F64 = np.float32, np.float64
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
# Arrays of any shape, and numpy's scalars.
Lanes = Any

_CANONICAL_F32 = np.array([0x7FFFFFFF], U32).view(F32)[0]
_LEAST_NORMAL = F32(2.0**-126)
_SIGNED = {U8: np.int8, U16: np.int16, U32: np.int32, U64: np.int64}


def signed_view(x: Lanes) -> Lanes:
    """The bits of an unsigned array as signed integers of the same width."""
    return x.view(_SIGNED[x.dtype.type])


# Rounding


def canonical(x: Lanes) -> Lanes:
    """x with every NaN of a float32 array turned into 0x7FFFFFFF; float64 keeps its payloads."""
    if x.dtype.type is not F32:
        return x
    nan = np.isnan(x)
    return np.where(nan, _CANONICAL_F32, x) if nan.any() else x


def flush(x: Lanes) -> Lanes:
    """``.ftz``: subnormal float32 values become zeros of their sign."""
    return np.where(np.abs(x) < _LEAST_NORMAL, np.copysign(F32(0), x), x)


def saturate(x: Lanes) -> Lanes:
    """``.sat`` of a floating-point result: clamped to [0, 1], NaN becomes +0."""
    clamped = np.where(x >= 1, x.dtype.type(1), x)
    return np.where(x > 0, clamped, x.dtype.type(0))


def sum_error(x: Lanes, y: Lanes, total: Lanes) -> Lanes:
    """What float64 addition lost: x + y - total, exactly (Knuth's TwoSum); NaN where total is infinite."""
    part = total - x
    return (x - (total - part)) + (y - part)


def _odd(high: Lanes, low: Lanes) -> np.ndarray:
    """high + low (high its nearest float64) rounded to odd: then to float32 is one rounding, not two.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    bits = np.asarray(high).view(np.int64)
    # The last condition leaves infinities alone, whose error is NaN.
    inexact = (low != 0) & ((bits & 1) == 0) & (low == low)
    outward = (low > 0) == (high > 0)
    return np.where(inexact, bits + np.where(outward, 1, -1), bits).view(F64)


def rounded(value: Lanes | tuple[Lanes, Lanes], mode: str, dtype: type = F32) -> Lanes:
    """An exact value rounded once.

    Args:
        value: float64, or a pair (high, low) of float64 whose sum is meant, high being the nearest
            float64 of it.
        mode: "rn", "rz", "rm" or "rp".
        dtype: float32, or float64 for a pair whose high did not overflow.
    Raises:
        ValueError: another mode.
    """
    high, low = value if isinstance(value, tuple) else (value, F64(0))
    if dtype is F32:
        exact = _odd(high, low)
        nearest = exact.astype(F32)
        above, below = nearest > exact, nearest < exact
    else:
        exact = nearest = np.asarray(high)
        above, below = low < 0, low > 0
    if mode == "rn":
        return canonical(nearest)
    zero, infinity = dtype(0), dtype(np.inf)
    if mode == "rz":
        outside = (above & (exact > 0)) | (below & (exact < 0))
        return canonical(np.where(outside, np.nextafter(nearest, zero), nearest))
    if mode == "rm":
        return canonical(np.where(above, np.nextafter(nearest, -infinity), nearest))
    if mode == "rp":
        return canonical(np.where(below, np.nextafter(nearest, infinity), nearest))
    raise ValueError(f"unknown rounding mode {mode!r}; rn, rz, rm and rp are modelled")


def integral(x: Lanes, mode: str) -> Lanes:
    """x rounded to an integer in its own type; mode "rni", "rzi", "rmi" or "rpi"."""
    roundings = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    if mode not in roundings:
        raise ValueError(f"unknown integer rounding {mode!r}; {', '.join(roundings)} are modelled")
    return canonical(roundings[mode](x))


# Floating-point arithmetic


def add(x: Lanes, y: Lanes, mode: str = "rn") -> Lanes:
    """x + y of float32."""
    if mode == "rn":
        return canonical(np.add(x, y))
    total = np.add(x, y, dtype=F64)
    wide = np.asarray(x, F64), np.asarray(y, F64)
    result = rounded((total, sum_error(*wide, total)), mode)
    if mode == "rm":
        # IEEE 754: towards minus infinity an exact zero is -0, unless both terms are +0.
        negative = (total == 0) & (np.signbit(x) | np.signbit(y))
        result = np.where(negative, F32(-0.0), result)
    return result


def sub(x: Lanes, y: Lanes, mode: str = "rn") -> Lanes:
    """x - y of float32."""
    return add(x, np.negative(y), mode)


def mul(x: Lanes, y: Lanes, mode: str = "rn") -> Lanes:
    """x * y of float32."""
    if mode == "rn":
        return canonical(np.multiply(x, y))
    return rounded(np.multiply(x, y, dtype=F64), mode)


def fma(a: Lanes, b: Lanes, c: Lanes, mode: str = "rn") -> Lanes:
    """a * b + c of float32, rounded once."""
    product = np.multiply(a, b, dtype=F64)  # exact: 48 bits
    total = np.asarray(np.add(product, c, dtype=F64))
    if mode != "rn":
        result = rounded((total, sum_error(product, np.asarray(c, F64), total)), mode)
        if mode == "rm":
            negative = (total == 0) & (np.signbit(product) | np.signbit(c))
            result = np.where(negative, F32(-0.0), result)
        return result
    nearest = total.astype(F32)
    # The second rounding can only be wrong where the first one ended halfway between two floats (the
    # position of that bit is fixed for normal results). NaNs join them to become canonical.
    halfway = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    magnitude = nearest.view(U32) & U32(0x7FFFFFFF)
    unusual = (magnitude - U32(0x00800001)) >= U32(0x7F800001 - 0x00800001)
    doubtful = (halfway | unusual) & (total != 0)
    if doubtful.any():
        product, c = (np.broadcast_to(x, total.shape)[doubtful].astype(F64) for x in (product, c))
        nearest[doubtful] = rounded((total[doubtful], sum_error(product, c, total[doubtful])), "rn")
    return nearest


def _product_error(a: Lanes, b: Lanes, product: Lanes) -> Lanes:
    """a * b - product of float64, exactly (Veltkamp and Dekker), away from overflow and underflow."""
    halves = []
    for x in (a, b):
        big = x * F64(2**27 + 1)
        high = big - (big - x)
        halves.append((high, x - high))
    (ah, al), (bh, bl) = halves
    return ((ah * bh - product) + ah * bl + al * bh) + al * bl


def fma64(a: Lanes, b: Lanes, c: Lanes) -> np.ndarray:
    """a * b + c of float64, rounded once to nearest.

    Lanes with an operand outside [2^-400, 2^400] (zeros excepted) are computed one by one with
    fractions: right, but slow.
    """
    a, b, c = np.broadcast_arrays(*(np.asarray(x, F64) for x in (a, b, c)))
    product = a * b
    low = _product_error(a, b, product)
    # Boldo and Melquiond's three-term sum: everything below the leading part is gathered to odd.
    upper = c + low
    total = product + upper
    rest, lost = sum_error(product, upper, total), sum_error(c, low, upper)
    tail = rest + lost
    result = np.asarray(total + _odd(tail, sum_error(rest, lost, tail)))

    ordinary = np.ones(a.shape, bool)
    for x in (a, b, c):
        size = np.abs(x)
        ordinary &= ((size >= 2.0**-400) & (size <= 2.0**400)) | (size == 0)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    zero = (product == 0) & ((a == 0) | (b == 0))
    # Infinities, NaN and zeros of either sign are what two roundings give.
    result = np.where(finite & ~zero, result, product + c)
    for lane in np.argwhere(finite & ~zero & ~ordinary):
        where = tuple(lane)
        exact = Fraction(float(a[where])) * Fraction(float(b[where])) + Fraction(float(c[where]))
        if exact == 0:
            result[where] = 0.0
            continue
        try:
            result[where] = float(exact)
        except OverflowError:
            result[where] = np.inf if exact > 0 else -np.inf
    return result


def _zeros_ordered(x: Lanes, y: Lanes, result: Lanes, greater: bool) -> Lanes:
    """result of a maximum or minimum, where +0 counts as more than -0."""
    zeros = (result == 0) & (x == y)
    if not zeros.any():
        return result
    bits = U32 if result.dtype.type is F32 else U64
    x, y = x.view(bits), y.view(bits)
    signed = ((x & y) if greater else (x | y)).view(result.dtype)
    return np.where(zeros, signed, result)


def maximum(x: Lanes, y: Lanes) -> Lanes:
    """``max``: the number where the other is NaN; +0 is above -0."""
    return canonical(_zeros_ordered(x, y, np.fmax(x, y), greater=True))


def minimum(x: Lanes, y: Lanes) -> Lanes:
    """``min``: the number where the other is NaN; -0 is below +0."""
    return canonical(_zeros_ordered(x, y, np.fmin(x, y), greater=False))


def maximum_nan(x: Lanes, y: Lanes) -> Lanes:
    """``max.NaN``: NaN where either is."""
    return canonical(_zeros_ordered(x, y, np.maximum(x, y), greater=True))


def minimum_nan(x: Lanes, y: Lanes) -> Lanes:
    """``min.NaN``: NaN where either is."""
    return canonical(_zeros_ordered(x, y, np.minimum(x, y), greater=False))


# Integer and bit instructions


def _bits(x: Lanes) -> int:
    return 8 * x.dtype.itemsize


def shl(x: Lanes, amount: Lanes) -> Lanes:
    """x shifted left; an amount (uint32) of the width or more gives 0."""
    kind = x.dtype.type
    return np.where(amount < U32(_bits(x)), x << amount.astype(kind), kind(0))


def shr(x: Lanes, amount: Lanes, signed: bool = False) -> Lanes:
    """x shifted right; an amount (uint32) of the width or more gives 0, or copies of the sign."""
    bits, kind = _bits(x), x.dtype.type
    if signed:
        most = np.minimum(amount, U32(bits - 1)).astype(kind)
        return (signed_view(x) >> signed_view(most)).view(kind)
    return np.where(amount < U32(bits), x >> amount.astype(kind), kind(0))


def mulhi(x: Lanes, y: Lanes, signed: bool = False) -> Lanes:
    """The upper half of the product of two registers of one width."""
    bits, kind = _bits(x), x.dtype.type
    if bits < 64:
        wide = U32 if bits == 16 else U64
        if signed:
            wide = np.int32 if bits == 16 else np.int64
            x, y = signed_view(x), signed_view(y)
        return (np.multiply(x, y, dtype=wide) >> wide(bits)).astype(kind)
    half, low = U64(32), U64(0xFFFFFFFF)
    x1, x0, y1, y0 = x >> half, x & low, y >> half, y & low
    middle = x1 * y0 + (x0 * y0 >> half)
    carry = (middle & low) + x0 * y1
    high = x1 * y1 + (middle >> half) + (carry >> half)
    if signed:
        # A negative operand counts 2^64 too much as an unsigned one.
        high = high - np.where(signed_view(x) < 0, y, U64(0)) - np.where(signed_view(y) < 0, x, U64(0))
    return high


def _ones(length: Lanes, kind: type, bits: int) -> Lanes:
    """``length`` low bits set; any length."""
    return ~shl(kind(2**bits - 1), length) if np.ndim(length) else kind(2 ** min(int(length), bits) - 1)


def bfe(x: Lanes, position: Lanes, length: Lanes, signed: bool = False) -> Lanes:
    """The bit field of x at position, of that length (uint32; their low 8 bits count)."""
    bits, kind = _bits(x), x.dtype.type
    position, length = position & U32(0xFF), length & U32(0xFF)
    mask = _ones(length, kind, bits)
    field = shr(x, position) & mask
    if not signed:
        return field
    # The sign is the field's last bit, or that of x where the field reaches past it.
    last = np.minimum(position + length - U32(1), U32(bits - 1))
    negative = ((shr(x, last) & kind(1)) != 0) & (length != 0)
    inside = mask & _ones(U32(bits) - np.minimum(position, U32(bits)), kind, bits)
    return np.where(negative, field | ~inside, field)


def bfi(a: Lanes, b: Lanes, position: Lanes, length: Lanes) -> Lanes:
    """b with the low bits of a in its field at position, of that length."""
    position, length = position & U32(0xFF), length & U32(0xFF)
    mask = shl(_ones(length, a.dtype.type, _bits(a)), position)
    return (b & ~mask) | (shl(a, position) & mask)


# Which byte (0 to 3 of a, 4 to 7 of b) goes where, for each value of the selector's two low bits;
# section "Data Movement and Conversion Instructions: prmt".
_PERMUTATIONS = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


def prmt(a: Lanes, b: Lanes, selector: Lanes, mode: str = "") -> Lanes:
    """Four bytes picked from the eight of (b, a), uint32.

    Raises:
        ValueError: a mode that PTX does not have.
    """
    if mode:
        if mode not in _PERMUTATIONS:
            raise ValueError(f"unknown prmt mode {mode!r}; {', '.join(_PERMUTATIONS)} are modelled")
        selector = np.array(_PERMUTATIONS[mode], U32)[selector & U32(3)]
    both = (np.asarray(b, U64) << U64(32)) | a
    selector = np.asarray(selector, U64)
    signs = bool((selector & U64(0x8888)).any())
    result = U64(0)
    for place in range(4):
        pick = (selector >> U64(4 * place)) & U64(15)
        byte = (both >> ((pick & U64(7)) << U64(3))) & U64(0xFF)
        if signs:
            byte = np.where(pick >= U64(8), (byte >> U64(7)) * U64(0xFF), byte)
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
    """Funnel shift of (high, low), uint32.

    Args:
        direction: "l" gives the upper half of the shifted pair, "r" the lower one.
        mode: "wrap" takes amount modulo 32, "clamp" at most 32.
    """
    amount = amount & U32(31) if mode == "wrap" else np.minimum(amount, U32(32))
    pair, amount = (np.asarray(high, U64) << U64(32)) | low, np.asarray(amount, U64)
    shifted = (pair << amount) >> U64(32) if direction == "l" else pair >> amount
    return shifted.astype(U32)


def popc(x: Lanes) -> Lanes:
    """The number of set bits, uint32."""
    return np.bitwise_count(x).astype(U32)


def clz(x: Lanes) -> Lanes:
    """The number of leading zeros, uint32."""
    spread = x
    step = 1
    while step < _bits(x):
        spread = spread | (spread >> x.dtype.type(step))
        step *= 2
    return popc(~spread)


def brev(x: Lanes) -> Lanes:
    """The bits in reverse order."""
    kind, bits = x.dtype.type, _bits(x)
    step = bits // 2
    mask = 2**bits - 1
    while step:
        mask ^= mask << step & (2**bits - 1)
        x = ((x >> kind(step)) & kind(mask)) | ((x & kind(mask)) << kind(step))
        step //= 2
    return x


def bfind(x: Lanes, signed: bool = False, shift: bool = False) -> Lanes:
    """The position of the highest bit unlike the sign, uint32; 0xFFFFFFFF without one.

    Args:
        shift: the amount that moves that bit to the top (``.shiftamt``) in place of its position.
    """
    if signed:
        x = np.where(signed_view(x) < 0, ~x, x)
    leading = clz(x)
    position = leading if shift else U32(_bits(x) - 1) - leading
    return np.where(x == 0, U32(0xFFFFFFFF), position)
