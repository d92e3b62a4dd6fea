"""Float32 functions that Triton lacks, or has only as a hardware approximation.

``tl.log`` becomes ``lg2.approx``, whose error is absolute near 1 (CUDA C++ programming guide):
the loss of a confident model would have no correct digit. libdevice has no interpreter.

Errors are relative, in units of 2**-24, the rounding of float32, the largest met as compiled for GPUs;
divisions and contracted products differ between them. ``exp(x)`` is ``ex2.approx(x log2(e))``, whose product
is rounded before it becomes an exponent: up to 1.22 |x| units, 62 of them met at x = -79.
"""

# Triton's language is not Python's: kernels have no annotations.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """exp(x), float32, 0 below 2**-126: two instructions; ``tl.exp`` keeps subnormals and takes five."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def exp_and_expm1(x):
    """(exp(x), exp(x) - 1), float32, each within 2 units; (0, -1) below -87, inf above 88; NaN stays NaN.

    x = k ln 2 + r with |r| at most half of ln 2; of expm1(r) the Taylor series leaves a quarter of a unit.
    """
    bounded = tl.minimum(tl.maximum(x, -87.0), 88.0)
    # At 1.5 * 2**23 a float32 has no digits behind the point: the sum is rounded to an integer.
    k = (bounded * _LOG2_E + 12582912.0) - 12582912.0
    r = (bounded - k * 0.693359375) - k * -2.12194440e-4  # k times the first part is exact
    series = 1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040)))))
    small = r + r * r * series
    power = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    beyond = tl.where(x > 88.0, float("inf"), x)
    inside = (x >= -87.0) & (x <= 88.0)
    whole = tl.where(inside, power + power * small, tl.where(x < -87.0, 0.0, beyond))
    less = tl.where(inside, power * small + (power - 1.0), tl.where(x < -87.0, -1.0, beyond))
    return whole, less


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, float32, within 2.6 to 6 units; NaN stays NaN.

    1 + x = 2**k (1 + f) with 1 + f in [0.70, 1.41), and log(1 + f) = 2 atanh(f / (2 + f)).
    """
    u = 1.0 + x
    # Adding the distance from 1/sqrt(2) to 1 moves the exponent's step to sqrt(2).
    k = ((u.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)) >> 23) - 127
    shrink = ((127 - k) << 23).to(tl.float32, bitcast=True)
    # With k = 0 the rounding of 1 + x never enters.
    f = tl.where(k == 0, x, u * shrink - 1.0)
    s = f / (2.0 + f)
    s2 = s * s
    series = s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11)))))
    return k.to(tl.float32) * 0.6931471805599453 + 2.0 * (s + s * series)


@triton.jit
def _root_of_gap(a):
    """The square root of 1 - tanh(u) = 2 / (1 + exp(2u)) for a = 2u log2(e) >= 0; 0 where that is infinite.

    A reciprocal takes twice the instructions.
    """
    return tl.rsqrt(0.5 + 0.5 * tl.exp2(a))


@triton.jit
def tanh(x, by=1.0):
    """tanh(x * by), float32, within 4.1 to 7 units; ``by`` is positive.

    1 - 2 / (1 + exp(2u)) would cancel near 0, so a polynomial is used there: ours, the relative error of
    tanh on [0, 0.38] minimised to 1.3 units.
    """
    a = tl.abs(x) * (2 * _LOG2_E * by)
    a2 = a * a
    small = a * (0.3465735903 + a2 * (-0.01387557781 + a2 * (0.0006643848178 + a2 * -2.903853972e-05)))
    root = _root_of_gap(a)
    size = tl.where(a < 1.096448231, small, 1.0 - root * root).to(tl.int32, bitcast=True)
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (size | sign).to(tl.float32, bitcast=True)


@triton.jit
def tanh_slope(x, by=1.0):
    """1 - tanh(x * by)**2 within 28 to 30 units to |x * by| of 12, most of them the exponential's.

    The difference itself would cancel for large arguments.
    """
    root = _root_of_gap(tl.abs(x) * (2 * _LOG2_E * by))
    gap = root * root
    return gap * (2.0 - gap)


@triton.jit
def log(x):
    """log(x) of a positive normal float32, within 3 units; no special cases.

    x = 2**k (1 + f) with 1 + f in [0.70, 1.41); the series of log(1 + f) is Chebyshev's of degree 9.
    """
    bits = x.to(tl.int32, bitcast=True)
    octaves = (bits - 0x3F3504F3) & -0x800000
    f = (bits - octaves).to(tl.float32, bitcast=True) - 1.0
    series = 0.09002147614955902 * f + -0.1425737738609314
    series = series * f + 0.14806851744651794
    series = series * f + -0.16575102508068085
    series = series * f + 0.19973084330558777
    series = series * f + -0.25001609325408936
    series = series * f + 0.33333659172058105
    series = series * f + -0.4999999403953552
    return octaves.to(tl.float32) * (0.6931471805599453 * 2.0**-23) + (f * f * series + f)
