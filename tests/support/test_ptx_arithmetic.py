"""PTX arithmetic against exact rational arithmetic and the ISA's definitions, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest

from tests.support.exact_floats import EDGES, exactly_rounded, floats, registers, same_bits, signed_value
from tests.support.ptx import arithmetic

F32, F64, U16, U32, U64 = np.float32, np.float64, np.uint16, np.uint32, np.uint64
MODES = ["rn", "rz", "rm", "rp"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def rounded_sum(product: Fraction, signs: tuple[float, float], c: float, mode: str, name: str) -> float:
    """product + c rounded once; signs are those of the product and of c, for a sum of zero."""
    total = product + Fraction(c)
    if total != 0:
        return exactly_rounded(total, mode, name)
    if signs[0] == signs[1]:
        return math.copysign(0.0, signs[0])
    return -0.0 if mode == "rm" else 0.0


def fma_cases(dtype: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Operands whose exact sums lie a hair beside the middle of two floats, and random ones.

    The product of 1 + i e and 1 - i e (e the last place) is 1 - (i e)^2: half a last place of c, but for
    a part that a sum rounded to float64 first loses. With i - 1 in the second factor it is above a half.
    """
    digits, least = (23, -149) if dtype is F32 else (52, -1074)
    rng = np.random.default_rng(0)
    spans = [(-3, 3), (-40, 40), (-70, -60), (50, 63), (-149, 127)]
    cases = [[floats(7 * k + j, 500, span, dtype) for j in range(3)] for k, span in enumerate(spans)]
    # Half a last place of c in [1, 2), and of subnormal c and its neighbours among the normal ones.
    for middle, scale in ((digits + 1, -digits), (1 - least, least)):
        i = rng.integers(1, 2000, 1000)
        low, high = middle // 2, middle - middle // 2
        a = np.ldexp((1 + i * 2.0**-digits).astype(dtype), -low)
        b = np.ldexp((1 - (i - i % 2) * 2.0**-digits).astype(dtype), -high) * rng.choice(
            [-1, 1], 1000
        ).astype(dtype)
        if scale == least:
            count = np.concatenate([rng.integers(0, 2**digits, 900), 2**digits + np.arange(-50, 50)])
        else:
            count = rng.integers(2**digits, 2 ** (digits + 1), 1000)
        c = np.ldexp(count.astype(F64), scale).astype(dtype) * rng.choice([-1, 1], 1000).astype(dtype)
        cases.append([a.astype(dtype), b.astype(dtype), c])
    return tuple(np.concatenate(part) for part in zip(*cases, strict=True))


def exact_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str, name: str) -> np.ndarray:
    want = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        signs = math.copysign(1, x) * math.copysign(1, y), math.copysign(1, z)
        want.append(rounded_sum(Fraction(x) * Fraction(y), signs, z, mode, name))
    return np.array(want, a.dtype)


@pytest.mark.parametrize("mode", MODES)
def test_fma_is_rounded_once(mode: str) -> None:
    a, b, c = fma_cases(F32)
    same_bits(arithmetic.fma(a, b, c, mode), exact_fma(a, b, c, mode, "f32"))


def test_fma_of_float64_is_rounded_once() -> None:
    a, b, c = fma_cases(F64)
    # Operands anywhere, products beyond the range that c brings back, and sums of exactly zero.
    spans = [
        [(-1074, 1023)] * 3,
        [(508, 512), (510, 514), (1020, 1024)],
        [(-560, -520)] * 2 + [(-1074, -1050)],
    ]
    parts = [
        [floats(50 + 3 * k + j, 200, span, F64) for j, span in enumerate(case)]
        for k, case in enumerate(spans)
    ]
    zero = np.array([[3.0, 5.0, -15.0], [-3.0, 5.0, 15.0], [2.0**-600, 2.0**-474, -(2.0**-1074)]]).T
    a, b, c = (np.concatenate([x, *more]) for x, *more in zip((a, b, c), *parts, zero, strict=True))
    same_bits(arithmetic.fma64(a, b, c), exact_fma(a, b, c, "rn", "f64"))


@pytest.mark.parametrize("mode", MODES)
def test_fma_of_zeros_and_the_ends_of_the_range(mode: str) -> None:
    finite = EDGES[np.isfinite(EDGES)]
    # Every fifth: 5 and 18 have no common divisor, so each operand takes every value.
    a, b, c = (x.reshape(-1)[::5] for x in np.meshgrid(finite, finite, finite))
    same_bits(arithmetic.fma(a, b, c, mode), exact_fma(a, b, c, mode, "f32"))


@pytest.mark.parametrize("mode", MODES)
def test_fma_and_add_of_infinities_and_nan(mode: str) -> None:
    a, b, c = (x.reshape(-1) for x in np.meshgrid(EDGES, EDGES, EDGES))
    special = ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    a, b, c = a[special], b[special], c[special]
    # No sum here is finite, so float64 gives the same infinities and NaN.
    wide = a.astype(F64) * b.astype(F64) + c.astype(F64)
    nan = np.array([0x7FFFFFFF], U32).view(F32)
    want = np.where(np.isnan(wide), nan, wide.astype(F32))
    same_bits(arithmetic.fma(a, b, c, mode), want)
    one = a == 1
    same_bits(arithmetic.add(b[one], c[one], mode), want[one])


def test_fma_of_float64_specials() -> None:
    edges = EDGES.astype(F64)
    a, b, c = (x.reshape(-1) for x in np.meshgrid(edges, edges, edges))
    # Products of float32 are exact: only sums that are rounded need more than two operations.
    want, got = a * b + c, arithmetic.fma64(a, b, c)
    special = ~np.isfinite(want) | (want == 0)
    np.testing.assert_array_equal(got[special], want[special])
    np.testing.assert_array_equal(np.signbit(got[want == 0]), np.signbit(want[want == 0]))


def test_fma_takes_scalars() -> None:
    assert arithmetic.fma(F32(2), F32(3), F32(4)) == 10
    got = arithmetic.fma(np.array([1, 2], F32), F32(0.5), np.array([np.nan, 1], F32))
    same_bits(got, np.array([0x7FFFFFFF, 0x40000000], U32).view(F32))


@pytest.mark.parametrize("mode", MODES)
def test_add_sub_and_mul_round_as_told(mode: str) -> None:
    finite = EDGES[np.isfinite(EDGES)]
    x, y = (part.reshape(-1) for part in np.meshgrid(finite, finite))
    x = np.concatenate([x, *(floats(k, 300, e) for k, e in enumerate([(-2, 2), (-30, 30), (-149, 127)]))])
    y = np.concatenate([y, *(floats(9 + k, 300, e) for k, e in enumerate([(-2, 2), (-30, 30), (-149, 127)]))])
    one = np.ones_like(x)
    same_bits(arithmetic.add(x, y, mode), exact_fma(x, one, y, mode, "f32"))
    same_bits(arithmetic.sub(x, y, mode), exact_fma(x, one, -y, mode, "f32"))
    # A zero product has its factors' sign whatever the mode: add a zero of that sign.
    zero = np.where(np.signbit(x) ^ np.signbit(y), F32(-0.0), F32(0.0))
    same_bits(arithmetic.mul(x, y, mode), exact_fma(x, y, zero, mode, "f32"))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: arithmetic.add(x, x, "rna"),
        lambda x: arithmetic.integral(x, "rn"),
        lambda x: arithmetic.prmt(x.view(U32), x.view(U32), x.view(U32), "f8e"),
    ],
)
def test_unknown_modes_are_refused(call: Callable[[np.ndarray], object]) -> None:
    with pytest.raises(ValueError, match="modelled"):
        call(np.ones(1, F32))


def test_flush_and_saturate() -> None:
    x = np.array([2**-126, -(2**-126), 2**-127, -(2**-149), 0.0, -0.0, 3.0, np.inf], F32)
    same_bits(arithmetic.flush(x), np.array([2**-126, -(2**-126), 0.0, -0.0, 0.0, -0.0, 3, np.inf], F32))
    x = np.array([-1, 0.25, 1, 7, np.inf, -np.inf, np.nan], F32)
    same_bits(arithmetic.saturate(x), np.array([0, 0.25, 1, 1, 1, 0, 0], F32))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_maximum_and_minimum(dtype: type) -> None:
    x, y = (part.reshape(-1).astype(dtype) for part in np.meshgrid(EDGES, EDGES))

    def key(v: float) -> tuple[float, float]:
        return v, math.copysign(1, v)

    greatest, least, greatest_nan, least_nan = [], [], [], []
    for pair in zip(x.tolist(), y.tolist(), strict=True):
        numbers = [v for v in pair if v == v] or [math.nan]
        greatest.append(max(numbers, key=key))
        least.append(min(numbers, key=key))
        missing = len(numbers) < 2
        greatest_nan.append(math.nan if missing else greatest[-1])
        least_nan.append(math.nan if missing else least[-1])
    for function, want in (
        (arithmetic.maximum, greatest),
        (arithmetic.minimum, least),
        (arithmetic.maximum_nan, greatest_nan),
        (arithmetic.minimum_nan, least_nan),
    ):
        got, expected = function(x, y), np.array(want, dtype)
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(got), nan)
        same_bits(got[~nan], expected[~nan])
        if dtype is F32:
            assert (got[nan].view(U32) == 0x7FFFFFFF).all()


# Integers, by the pseudocode of their sections


AMOUNTS = np.array([0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 2**31, 2**32 - 1], U32)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits: int) -> None:
    x, amount = (part.reshape(-1) for part in np.meshgrid(registers(0, bits, 40), AMOUNTS))
    pairs = list(zip(x.tolist(), amount.tolist(), strict=True))
    # Python shifts by any amount; capped only to keep its numbers small.
    left = [(v << min(n, bits)) % 2**bits for v, n in pairs]
    right = [v >> min(n, bits) for v, n in pairs]
    arithmetic_right = [(signed_value(v, bits) >> min(n, bits)) % 2**bits for v, n in pairs]
    same_bits(arithmetic.shl(x, amount), np.array(left, x.dtype))
    same_bits(arithmetic.shr(x, amount), np.array(right, x.dtype))
    same_bits(arithmetic.shr(x, amount, signed=True), np.array(arithmetic_right, x.dtype))
    same_bits(arithmetic.shl(x, U32(3)), np.array([(v << 3) % 2**bits for v in x.tolist()], x.dtype))


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_upper_half_of_a_product(bits: int, signed: bool) -> None:
    x, y = registers(1, bits), registers(2, bits)
    want = []
    for v, w in zip(x.tolist(), y.tolist(), strict=True):
        if signed:
            v, w = signed_value(v, bits), signed_value(w, bits)
        want.append((v * w >> bits) % 2**bits)
    same_bits(arithmetic.mulhi(x, y, signed), np.array(want, x.dtype))


def bit_field(a: int, position: int, length: int, bits: int, signed: bool) -> int:
    position, length = position & 0xFF, length & 0xFF
    sign = a >> min(position + length - 1, bits - 1) & 1 if signed and length else 0
    return sum(
        (a >> (position + i) & 1 if i < length and position + i < bits else sign) << i for i in range(bits)
    )


def inserted(a: int, b: int, position: int, length: int, bits: int) -> int:
    position, length = position & 0xFF, length & 0xFF
    for i in range(length):
        if position + i < bits:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(bits: int) -> None:
    position, length = (part.reshape(-1) for part in np.meshgrid(AMOUNTS, AMOUNTS))
    a, b = (registers(k, bits, len(position))[: len(position)] for k in (3, 4))
    cases = list(zip(*(x.tolist() for x in (a, b, position, length)), strict=True))
    for signed in (False, True):
        want = [bit_field(v, at, n, bits, signed) for v, _, at, n in cases]
        same_bits(arithmetic.bfe(a, position, length, signed), np.array(want, a.dtype))
        want = [bit_field(v, 4, 9, bits, signed) for v in a.tolist()]
        same_bits(arithmetic.bfe(a, U32(4), U32(9), signed), np.array(want, a.dtype))
    want = [inserted(v, w, at, n, bits) for v, w, at, n in cases]
    same_bits(arithmetic.bfi(a, b, position, length), np.array(want, a.dtype))
    want = [inserted(v, w, 4, 9, bits) for v, w, _, _ in cases]
    same_bits(arithmetic.bfi(a, b, U32(4), U32(9)), np.array(want, a.dtype))


def test_permuted_bytes() -> None:
    a, b = np.array([0x83828180], U32), np.array([0x07060504], U32)  # bytes 0 to 3 have their sign set
    # The bytes of (b, a) numbered 0 to 7; 0x8 of a selector replicates the byte's sign.
    for selector, want in [
        (0x3210, 0x83828180),
        (0x7654, 0x07060504),
        (0x0123, 0x80818283),
        (0x5140, 0x05810480),
        (0xB4FC, 0xFF040000),
        (0x8888, 0xFFFFFFFF),
    ]:
        same_bits(arithmetic.prmt(a, b, np.array([selector], U32)), np.array([want], U32))
        same_bits(arithmetic.prmt(a, b, U32(selector)), np.array([want], U32))


@pytest.mark.parametrize(
    ("mode", "place"),
    [
        ("f4e", lambda s, j: s + j),
        ("b4e", lambda s, j: (s - j) % 8),
        ("rc8", lambda s, j: s),
        ("ecl", lambda s, j: max(s, j)),
        ("ecr", lambda s, j: min(s, j)),
        ("rc16", lambda s, j: 2 * (s % 2) + j % 2),
    ],
)
def test_permutation_modes(mode: str, place: Callable[[int, int], int]) -> None:
    a, b, selector = registers(5, 32), registers(6, 32), registers(7, 32)
    want = []
    for v, w, s in zip(a.tolist(), b.tolist(), selector.tolist(), strict=True):
        source = v.to_bytes(4, "little") + w.to_bytes(4, "little")
        want.append(int.from_bytes(bytes(source[place(s & 3, j)] for j in range(4)), "little"))
    same_bits(arithmetic.prmt(a, b, selector, mode), np.array(want, U32))


@pytest.mark.parametrize(
    ("table", "function"),
    [
        # The ISA's way to find a table: the function of 0xF0, 0xCC and 0xAA.
        (0xF0 & 0xCC & 0xAA, lambda a, b, c: a & b & c),
        (0xF0 | 0xCC | 0xAA, lambda a, b, c: a | b | c),
        (0xF0 & 0xCC & (~0xAA & 0xFF), lambda a, b, c: a & b & ~c),
        ((0xF0 & 0xCC | 0xAA) ^ 0xF0, lambda a, b, c: (a & b | c) ^ a),
        (0x00, lambda a, b, c: 0),
        (0xFF, lambda a, b, c: 2**32 - 1),
    ],
)
def test_function_of_three_bits(table: int, function: Callable[[int, int, int], int]) -> None:
    a, b, c = (registers(k, 32) for k in (8, 9, 10))
    want = [function(*v) % 2**32 for v in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    same_bits(arithmetic.lop3(a, b, c, table), np.array(want, U32))


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(mode: str) -> None:
    amount = np.resize(AMOUNTS, 408)
    low, high = registers(11, 32), registers(12, 32)
    left, right = [], []
    for v, w, c in zip(low.tolist(), high.tolist(), amount.tolist(), strict=True):
        n = c & 31 if mode == "wrap" else min(c, 32)
        left.append(((w << n) | (v >> (32 - n))) % 2**32)
        right.append(((w << (32 - n)) | (v >> n)) % 2**32)
    same_bits(arithmetic.shf(low, high, amount, "l", mode), np.array(left, U32))
    same_bits(arithmetic.shf(low, high, amount, "r", mode), np.array(right, U32))


@pytest.mark.parametrize("bits", [32, 64])
def test_counted_and_reversed_bits(bits: int) -> None:
    x = registers(13, bits)
    texts = [format(v, f"0{bits}b") for v in x.tolist()]
    same_bits(arithmetic.popc(x), np.array([t.count("1") for t in texts], U32))
    same_bits(arithmetic.clz(x), np.array([len(t) - len(t.lstrip("0")) for t in texts], U32))
    same_bits(arithmetic.brev(x), np.array([int(t[::-1], 2) for t in texts], x.dtype))
    for signed in (False, True):
        want, amounts = [], []
        for text in texts:
            place = text.find("0" if signed and text[0] == "1" else "1")
            want.append(2**32 - 1 if place < 0 else bits - 1 - place)
            amounts.append(2**32 - 1 if place < 0 else place)
        same_bits(arithmetic.bfind(x, signed), np.array(want, U32))
        same_bits(arithmetic.bfind(x, signed, shift=True), np.array(amounts, U32))
