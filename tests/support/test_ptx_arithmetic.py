"""PTX arithmetic against exact rational arithmetic and the ISA's definitions, bit by bit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest

from tests.support.exact_floats import EDGES, exactly_rounded, floats, registers, same_bits, signed_value
from tests.support.one_opcode import executed, translated
from tests.support.ptx import arithmetic
from tests.support.ptx.parser import PtxError

F32, F64, U32 = np.float32, np.float64, np.uint32
NAN = np.array([0x7FFFFFFF], U32).view(F32)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def fma_cases() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Operands whose exact sums lie a hair beside the middle of two floats, and random ones.

    The product of 1 + i e and 1 - i e (e the last place) is 1 - (i e)^2: half a last place of c, but for
    a part that a sum rounded to float64 first loses. With i - 1 in the second factor it is above a half.
    """
    digits, least = 23, -149
    rng = np.random.default_rng(0)
    spans = [(-3, 3), (-40, 40), (-70, -60), (50, 63), (-149, 127)]
    cases = [[floats(7 * k + j, 500, span) for j in range(3)] for k, span in enumerate(spans)]
    # Half a last place of c in [1, 2), and of subnormal c and its neighbours among the normal ones.
    small = np.concatenate([rng.integers(0, 2**digits, 900), 2**digits + np.arange(-50, 50)])
    usual = rng.integers(2**digits, 2 ** (digits + 1), 1000)
    for middle, count, scale in ((digits + 1, usual, -digits), (1 - least, small, least)):
        i = rng.integers(1, 2000, 1000)
        signs = rng.choice([-1, 1], (2, 1000))
        low, high = middle // 2, middle - middle // 2
        a = np.ldexp(1 + i * 2.0**-digits, -low)
        b = np.ldexp(1 - (i - i % 2) * 2.0**-digits, -high) * signs[0]
        cases.append([x.astype(F32) for x in (a, b, np.ldexp(count.astype(F64), scale) * signs[1])])
    return tuple(np.concatenate(part) for part in zip(*cases, strict=True))


def exact_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once; a sum of zero is -0 where product and c are negative."""
    want = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        total = Fraction(x) * Fraction(y) + Fraction(z)
        negative = math.copysign(1, x) * math.copysign(1, y) < 0 and math.copysign(1, z) < 0
        want.append(exactly_rounded(total, "rn", "f32") if total else -0.0 if negative else 0.0)
    return np.array(want, F32)


def test_fma_is_rounded_once() -> None:
    a, b, c = fma_cases()
    same_bits(arithmetic.fma(a, b, c), exact_fma(a, b, c))


def test_fma_of_zeros_and_the_ends_of_the_range() -> None:
    finite = EDGES[np.isfinite(EDGES)]
    # Every fifth: 5 and 18 have no common divisor, so each operand takes every value.
    a, b, c = (x.reshape(-1)[::5] for x in np.meshgrid(finite, finite, finite))
    same_bits(arithmetic.fma(a, b, c), exact_fma(a, b, c))


def test_fma_of_infinities_and_nan() -> None:
    a, b, c = (x.reshape(-1) for x in np.meshgrid(EDGES, EDGES, EDGES))
    special = ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    a, b, c = a[special], b[special], c[special]
    # No sum here is finite, so float64 gives the same infinities and NaN.
    wide = a.astype(F64) * b.astype(F64) + c.astype(F64)
    same_bits(arithmetic.fma(a, b, c), np.where(np.isnan(wide), NAN, wide.astype(F32)))


def test_fma_takes_scalars() -> None:
    assert arithmetic.fma(F32(2), F32(3), F32(4)) == 10
    got = arithmetic.fma(np.array([1, 2], F32), F32(0.5), np.array([np.nan, 1], F32))
    same_bits(got, np.array([0x7FFFFFFF, 0x40000000], U32).view(F32))


@pytest.mark.parametrize("opcode", ["add.f32", "sub.rn.f32", "mul.f32", "div.rn.f32", "add.ftz.f32"])
def test_opcodes_of_two_floats(opcode: str) -> None:
    x, y = (part.reshape(-1) for part in np.meshgrid(EDGES, EDGES))
    x, y = (np.concatenate([e, floats(k, 300, (-149, 127))]) for k, e in enumerate((x, y)))
    wide = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[opcode[:3]]
    flushed = [np.where(np.abs(v) < 2.0**-126, v * F32(0), v) if "ftz" in opcode else v for v in (x, y)]
    # float64 has more than twice float32's bits, so that rounding twice is rounding once.
    want = wide(*flushed, dtype=F64).astype(F32)
    if "ftz" in opcode:
        want = np.where(np.abs(want) < 2.0**-126, want * F32(0), want)
    same_bits(executed(opcode, F32, x, y), np.where(np.isnan(want), NAN, want))


@pytest.mark.parametrize(
    ("opcode", "widths", "reason"),
    [
        ("add.rz.f32", [4] * 3, "opcode"),
        ("mul.rm.f32", [4] * 3, "opcode"),
        ("fma.rp.f32", [4] * 4, "opcode"),
        ("fma.rn.sat.f32", [4] * 4, "opcode"),
        ("fma.rn.f64", [8] * 4, "opcode"),
        ("sin.approx.f32", [4] * 2, "opcode"),
        ("cos.approx.f32", [4] * 2, "opcode"),
        ("tanh.approx.f32", [4] * 2, "opcode"),
        ("clz.b32", [4] * 2, "opcode"),
        ("brev.b32", [4] * 2, "opcode"),
        ("bfind.u32", [4] * 2, "opcode"),
        ("prmt.b32.f4e", [4] * 4, "opcode"),
        ("mul.hi.u64", [8] * 3, "opcode"),
        ("cvt.rm.f32.s32", [4] * 2, "modifier"),
        ("cvt.rz.f32.f64", [4, 8], "modifier"),
        ("cvt.rp.f16x2.f32", [4] * 3, "modifier"),
        ("cvt.rn.relu.bf16x2.f32", [4] * 3, "modifier"),
        ("cvt.sat.s32.u32", [4] * 2, "modifier"),
        ("cvt.rn.f16.s32", [2, 4], "types"),
        ("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32", [4] * 4, "types"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16", [4] * 4, "types"),
    ],
)
def test_what_is_not_modelled_is_refused_when_it_is_translated(
    opcode: str, widths: list[int], reason: str
) -> None:
    with pytest.raises(PtxError, match=rf"{re.escape(opcode)} %r0.*{reason}"):
        translated(opcode, widths)


def test_flush() -> None:
    x = np.array([2**-126, -(2**-126), 2**-127, -(2**-149), 0.0, -0.0, 3.0, np.inf], F32)
    same_bits(arithmetic.flush(x), np.array([2**-126, -(2**-126), 0.0, -0.0, 0.0, -0.0, 3, np.inf], F32))


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


@pytest.mark.parametrize("bits", [16, 32])
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
        for literal in (f"{selector:#x}", f"{selector:#x}U", f"{selector}"):
            same_bits(executed("prmt.b32", U32, a, b, literals=[literal]), np.array([want], U32))


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
def test_counted_bits(bits: int) -> None:
    x = registers(13, bits)
    same_bits(arithmetic.popc(x), np.array([format(v, "b").count("1") for v in x.tolist()], U32))


def test_packed_sums_do_not_carry_and_other_packed_types_are_unknown():
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 2**32, (2, 1000), dtype=U32)
    want = (x.view(np.uint16) + y.view(np.uint16)).view(U32)
    for opcode in ("add.s16x2", "add.u16x2"):
        assert np.array_equal(executed(opcode, U32, x, y), want)
    assert not np.array_equal(want, x + y)
    for opcode in ("sub.s16x2", "add.f16x2", "add.rn.bf16x2"):
        with pytest.raises(PtxError):
            executed(opcode, U32, x, y)
