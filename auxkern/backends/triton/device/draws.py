"""What draws of tokens are made of, from logits or from heads."""

# Triton's language is not Python's: kernels have no annotations.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from auxkern.backends.triton.device.numerics import log1p

NO_ID: tl.constexpr = tl.constexpr(2**31 - 1)
_UNIT: tl.constexpr = tl.constexpr(2.0**-32)


@triton.jit
def gumbel(bits):
    """-log(-log1p(-u)) of u = (bits + 0.5) 2**-32; above a half from 1 - u, then the precise one."""
    below = bits < 0x80000000
    # Below 2**31 in either case, so that it may be converted as a signed number.
    small = tl.where(below, bits, bits ^ 0xFFFFFFFF).to(tl.int32).to(tl.float32)
    u = (small + 0.5) * _UNIT
    w = tl.where(below, log1p(u / (1.0 - u)), -tl.log(u))
    return -tl.log(w)


@triton.jit
def finite_pivot(largest):
    """``largest``, or 0 where it is infinite: inf - inf must not arise."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
