"""PTX's approximate instructions (``.approx``, ``div.full``): exact, or as wrong as they may be.

Without noise a result is the true value rounded to nearest. With a ``Noise`` it moves anywhere within
the error that the PTX ISA documents, so that code which passes needs no more accuracy than a GPU
promises. Special results (of zero, infinite, NaN and negative operands) stay as documented.
Subnormal operands and results are kept; ``.ftz`` is ``arithmetic.flush`` around a call.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from tests.support.ptx.arithmetic import F32, F64, U32, U64, Lanes, canonical


class Bound(NamedTuple):
    """The largest error of an instruction: the sum of its parts, one of which is not 0."""

    ulps: float = 0.0  # in units of the last place of the rounded result
    relative: float = 0.0
    absolute: float = 0.0


# Each from its section "Floating Point Instructions: ..." of the PTX ISA, version 9.1.
EX2 = Bound(ulps=2)  # from the correctly rounded result, over the full range
LG2_NEAR_1 = Bound(absolute=2.0**-22)  # operands in (0.5, 2)
LG2 = Bound(relative=2.0**-22)  # other positive finite operands
RCP = Bound(ulps=1)  # over the full range
SQRT = Bound(relative=2.0**-23)
RSQRT = Bound(relative=2.0**-22.9)
TANH = Bound(relative=2.0**-11)
SIN_COS = Bound(absolute=2.0**-20.5)  # operands in [-2 pi, 2 pi]
# Operands in [-100 pi, 100 pi]. Nothing is promised beyond; this module then keeps this bound.
SIN_COS_FAR = Bound(absolute=2.0**-14.7)
DIV = Bound(ulps=2)  # div.full over the full range, div.approx for divisors in [2^-126, 2^126]


class Noise:
    """Errors of approximate instructions, within their bounds.

    The error is a function of the seed, the instruction and its operands: like a GPU, it gives the
    same result for the same operands, in any thread and at any time.
    """

    def __init__(self, seed: int) -> None:
        self._salt = np.random.default_rng(seed).integers(0, 2**64, dtype=U64)

    def shares(self, instruction: str, *operands: Lanes) -> np.ndarray:
        """float64 in [-1, 1], the ends included: what part of the bound to be wrong by."""
        state = self._salt ^ U64(zlib.crc32(instruction.encode()))
        for operand in operands:
            # The finaliser of MurmurHash3: every operand bit reaches every bit of the result.
            state = state ^ np.asarray(operand, F32).view(U32).astype(U64)
            for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
                state = (state ^ (state >> U64(33))) * U64(factor)
            state = state ^ (state >> U64(33))
        # A quarter of all lanes is as wrong as it may be; the others lie between.
        unit = (state >> U64(11)).astype(F64) * 2.0**-53
        return np.clip((unit * 2 - 1) * 4 / 3, -1.0, 1.0)


def _moved(exact: Lanes, bound: Bound, shares: Lanes, keep: Lanes) -> np.ndarray:
    """float32 values within the bound of exact (float64), except where ``keep``: there its rounding."""
    nearest = np.asarray(exact).astype(F32)
    room = bound.ulps * np.spacing(np.abs(nearest)).astype(F64)
    room = room + bound.relative * np.abs(exact) + bound.absolute
    moved = (exact + shares * room).astype(F32)
    # Rounding may carry a value out of its bound; infinities and NaN fail the comparison too.
    allowed = np.abs(moved.astype(F64) - exact) <= room
    return np.where(allowed & ~keep & (exact != 0), moved, nearest)


def ex2(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``ex2.approx.f32``: 2^x."""
    exact = np.exp2(x, dtype=F64)
    result = np.asarray(exact).astype(F32)
    if noise is not None:
        # This bound alone counts from the rounded result.
        result = _moved(result.astype(F64), EX2, noise.shares("ex2", x), (x == 0) | np.isinf(x))
    return canonical(result)


def lg2(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``lg2.approx.f32``: the logarithm to base 2; NaN of negative numbers."""
    exact = np.log2(x, dtype=F64)
    if noise is None:
        return canonical(np.asarray(exact).astype(F32))
    shares, keep = noise.shares("lg2", x), np.isinf(x)
    near = (x > F32(0.5)) & (x < F32(2))
    result = np.where(near, _moved(exact, LG2_NEAR_1, shares, keep), _moved(exact, LG2, shares, keep))
    # The logarithm of 1 is 0, and the bound is absolute: it moves as well.
    return canonical(np.where(x == 1, (shares * LG2_NEAR_1.absolute).astype(F32), result))


def _unary(name: str, x: Lanes, exact: Lanes, bound: Bound, noise: Noise | None) -> Lanes:
    if noise is None:
        return canonical(np.asarray(exact).astype(F32))
    return canonical(_moved(exact, bound, noise.shares(name, x), (x == 0) | np.isinf(x)))


def rcp(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``rcp.approx.f32``: 1 / x."""
    return _unary("rcp", x, np.divide(1.0, x, dtype=F64), RCP, noise)


def sqrt(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``sqrt.approx.f32``; NaN of negative numbers, -0 of -0."""
    return _unary("sqrt", x, np.sqrt(x, dtype=F64), SQRT, noise)


def rsqrt(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``rsqrt.approx.f32``: 1 / sqrt(x); NaN of negative numbers, -infinity of -0."""
    return _unary("rsqrt", x, 1.0 / np.sqrt(x, dtype=F64), RSQRT, noise)


def tanh(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``tanh.approx.f32``; subnormal operands are passed through."""
    result = _unary("tanh", x, np.tanh(x, dtype=F64), TANH, noise)
    return np.where(np.abs(x) < F32(2.0**-126), x, result)


def _circular(name: str, x: Lanes, exact: Lanes, noise: Noise | None) -> Lanes:
    near = _unary(name, x, exact, SIN_COS, noise)
    if noise is None:
        return near
    return np.where(np.abs(x) <= 2 * np.pi, near, _unary(name, x, exact, SIN_COS_FAR, noise))


def sin(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``sin.approx.f32``, x in radians; NaN of infinities."""
    return _circular("sin", x, np.sin(x, dtype=F64), noise)


def cos(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``cos.approx.f32``, x in radians; NaN of infinities."""
    return _circular("cos", x, np.cos(x, dtype=F64), noise)


def div_full(x: Lanes, y: Lanes, noise: Noise | None = None) -> Lanes:
    """``div.full.f32``: x / y over the full range."""
    exact = np.divide(x, y, dtype=F64)
    if noise is None:
        return canonical(np.asarray(exact).astype(F32))
    keep = (x == 0) | (y == 0) | np.isinf(x) | np.isinf(y)
    return canonical(_moved(exact, DIV, noise.shares("div", x, y), keep))


def div_approx(x: Lanes, y: Lanes, noise: Noise | None = None) -> Lanes:
    """``div.approx.f32``: x times the reciprocal of y, with that reciprocal's gaps.

    For |y| in (2^126, 2^128) it is NaN where x is infinite and a zero of the quotient's sign elsewhere.
    Below 2^-126, where nothing is documented, it is the product with the rounded reciprocal.
    """
    result = div_full(x, y, noise)
    size = np.abs(y)
    huge = (size > F32(2.0**126)) & (size < np.inf)
    if huge.any():
        lost = np.where(np.isinf(x) | np.isnan(x), F32(np.nan), np.copysign(F32(0), x) * np.sign(y))
        result = np.where(huge, lost, result)
    tiny = size < F32(2.0**-126)
    if tiny.any():
        result = np.where(tiny, np.multiply(x, np.divide(F32(1), y)), result)
    return canonical(result)
