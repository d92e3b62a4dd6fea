"""PTX's approximate instructions (``.approx``, ``div.full``): exact, or as wrong as they may be.

Without noise a result is the true value rounded to nearest. With a ``Noise`` it moves anywhere within
the error that the PTX ISA documents, so that code which passes needs no more accuracy than a GPU
promises. Special results (of zero, infinite, NaN and negative operands) stay as documented.
Subnormal operands and results are kept; ``.ftz`` is ``arithmetic.flush`` around a call.
"""

from __future__ import annotations

import zlib

import numpy as np

from tests.support.ptx.arithmetic import F32, F64, U32, U64, Lanes, canonical


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


def _approximate(
    name: str, exact: Lanes, noise: Noise | None, *operands: Lanes,
    ulps: float = 0.0, relative: Lanes = 0.0, absolute: Lanes = 0.0,
) -> Lanes:  # fmt: skip
    """float32 values nearest to exact, or with noise within the sum of the parts of the ISA's bound."""
    nearest = np.asarray(exact, F32)
    if noise is None:
        return canonical(nearest)
    # A result that underflows to zero has no last place to be wrong in.
    room = ulps * (nearest != 0) * np.spacing(np.abs(nearest)).astype(F64)
    room = room + relative * np.abs(exact) + absolute
    moved = (exact + noise.shares(name, *operands) * room).astype(F32)
    # Rounding may carry a value out of its bound; infinities and NaN fail the comparison too.
    allowed = np.abs(moved.astype(F64) - exact) <= room
    for operand in operands:
        allowed &= (operand != 0) & ~np.isinf(operand)
    return canonical(np.where(allowed, moved, nearest))


def ex2(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``ex2.approx.f32``: 2^x."""
    # This bound alone counts from the rounded result.
    return _approximate("ex2", np.exp2(x, dtype=F64).astype(F32), noise, x, ulps=2)


def lg2(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``lg2.approx.f32``: the logarithm to base 2; NaN of negative numbers."""
    near_1, most = (x > F32(0.5)) & (x < F32(2)), 2.0**-22
    relative, absolute = np.where(near_1, 0, most), np.where(near_1, most, 0)
    return _approximate("lg2", np.log2(x, dtype=F64), noise, x, relative=relative, absolute=absolute)


def rcp(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``rcp.approx.f32``: 1 / x."""
    return _approximate("rcp", np.divide(1, x, dtype=F64), noise, x, ulps=1)


def sqrt(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``sqrt.approx.f32``; NaN of negative numbers, -0 of -0."""
    return _approximate("sqrt", np.sqrt(x, dtype=F64), noise, x, relative=2.0**-23)


def rsqrt(x: Lanes, noise: Noise | None = None) -> Lanes:
    """``rsqrt.approx.f32``: 1 / sqrt(x); NaN of negative numbers, -infinity of -0."""
    return _approximate("rsqrt", 1 / np.sqrt(x, dtype=F64), noise, x, relative=2.0**-22.9)


def div_full(x: Lanes, y: Lanes, noise: Noise | None = None) -> Lanes:
    """``div.full.f32``: x / y over the full range."""
    return _approximate("div", np.divide(x, y, dtype=F64), noise, x, y, ulps=2)


def div_approx(x: Lanes, y: Lanes, noise: Noise | None = None) -> Lanes:
    """``div.approx.f32``: for |y| in (2^126, 2^128) NaN of an infinite x, a zero of any other."""
    huge = (np.abs(y) > F32(2.0**126)) & ~np.isinf(y)
    return np.where(huge, canonical(x * (y * F32(0))), div_full(x, y, noise))
