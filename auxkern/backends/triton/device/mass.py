"""Probability mass in fixed point, bit by bit as ``auxkern/core/mass.py`` makes it."""

# Triton's language is not Python's: kernels have no annotations.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from auxkern.core import mass

_FRACTION_BITS: tl.constexpr = tl.constexpr(mass.FRACTION_BITS)
_OCTAVES: tl.constexpr = tl.constexpr(mass.OCTAVES)
_MOST_OCTAVES: tl.constexpr = tl.constexpr(mass.MOST_OCTAVES)
_C1: tl.constexpr = tl.constexpr(mass.COEFFICIENTS[0])
_C2: tl.constexpr = tl.constexpr(mass.COEFFICIENTS[1])
_C3: tl.constexpr = tl.constexpr(mass.COEFFICIENTS[2])
_C4: tl.constexpr = tl.constexpr(mass.COEFFICIENTS[3])
_C5: tl.constexpr = tl.constexpr(mass.COEFFICIENTS[4])


@triton.jit
def masses(d, shift):
    """int64 exp(d) * 2**(31 + shift) of float32 d <= 0, cut off."""
    octaves = tl.minimum(tl.maximum(-d * _OCTAVES, 0.0), _MOST_OCTAVES).to(tl.int32)
    power = -octaves >> _FRACTION_BITS
    t = (-octaves << (32 - _FRACTION_BITS)).to(tl.uint32, bitcast=True)
    factor = tl.umulhi(tl.full(t.shape, _C5, tl.uint32), t) + _C4
    factor = tl.umulhi(factor, t) + _C3
    factor = tl.umulhi(factor, t) + _C2
    factor = tl.umulhi(factor, t) + _C1
    factor = tl.umulhi(factor, t).to(tl.int64) + 2147483648
    return (factor << shift) >> (-power).to(tl.int64)
