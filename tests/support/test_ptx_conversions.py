"""PTX conversions against torch's casts, exact rational arithmetic and Python's integers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.support.exact_floats import EDGES, exactly_rounded, floats, registers, same_bits, signed_value
from tests.support.one_opcode import executed
from tests.support.ptx import arithmetic

F32, F64, U16, U32, U64 = np.float32, np.float64, np.uint16, np.uint32, np.uint64


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def all_kinds(seed: int) -> np.ndarray:
    """float32 of every kind: edges, random bits, and the middles between 16-bit values."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, 20000, U32)
    middles = [(bits[:3000] & ~U32(0x1FFF)) | U32(0x1000), (bits[:3000] & ~U32(0xFFFF)) | U32(0x8000)]
    near = floats(seed, 5000, (-26, 17))
    near_middles = (near.view(U32) & ~U32(0x1FFF)) | U32(0x1000)
    return np.concatenate([EDGES, np.concatenate([bits, *middles, near_middles]).view(F32), near])


def test_float32_to_16_bits() -> None:
    x = all_kinds(0)
    nan = np.isnan(x)
    for function, dtype in ((arithmetic.to_f16, torch.float16), (arithmetic.to_bf16, torch.bfloat16)):
        want = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(U16)
        same_bits(function(x), np.where(nan, U16(0x7FFF), want))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_float32_cut_to_16_bits(name: str) -> None:
    x = all_kinds(1)[:5000]
    x = x[np.isfinite(x) & (x != 0)]
    got = getattr(arithmetic, f"to_{name}")(x, "rz")
    back = getattr(arithmetic, f"from_{name}")(got)
    want = [exactly_rounded(Fraction(v), "rz", name) for v in x.tolist()]
    same_bits(back, np.array(want, F32))
    specials = np.array([np.inf, -np.inf, 0.0, -0.0], F32)
    same_bits(
        getattr(arithmetic, f"from_{name}")(getattr(arithmetic, f"to_{name}")(specials, "rz")), specials
    )


def test_16_bits_to_float32() -> None:
    bits = np.arange(2**16, dtype=U16)
    for function, dtype in ((arithmetic.from_f16, torch.float16), (arithmetic.from_bf16, torch.bfloat16)):
        want = torch.from_numpy(bits.view(np.int16)).view(dtype).to(torch.float32).numpy()
        got, nan = function(bits), np.isnan(want)
        np.testing.assert_array_equal(np.isnan(got), nan)
        same_bits(got[~nan], want[~nan])


def test_float32_to_tf32() -> None:
    x = all_kinds(2)
    finite = x[np.isfinite(x) & (x != 0)][:3000]
    for mode in ("rna", "rn", "rz"):
        got = arithmetic.to_tf32(finite.view(U32), mode).view(F32)
        assert (got.view(U32) & U32(0x1FFF) == 0).all()
        for v, result in zip(finite.tolist(), got.tolist(), strict=True):
            unit = Fraction(2) ** max(math.frexp(v)[1] - 11, -136)  # 10 bits of mantissa, or of subnormals
            count, rest = divmod(abs(Fraction(v)), unit)
            tie = {"rna": True, "rn": count % 2 == 1, "rz": False}[mode]
            up = mode != "rz" and (2 * rest > unit or (2 * rest == unit and tie))
            exact = (count + up) * unit
            want = math.inf if exact >= Fraction(2) ** 128 else float(exact)
            assert result == math.copysign(want, v), (mode, v)
    specials = np.array([np.inf, -np.inf, 0.0, -0.0], F32).view(U32)
    same_bits(arithmetic.to_tf32(specials), specials)
    nan = np.array([0x7FFFFFFF, 0xFFC00000, 0x7F800001], U32)
    same_bits(arithmetic.to_tf32(nan), np.full(3, 0x7FFFFFFF, U32))


INTEGERS = [sign + str(bits) for sign in "su" for bits in (16, 32, 64)]


def limits(name: str) -> tuple[int, int]:
    bits = int(name[1:])
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if name[0] == "s" else (0, 2**bits - 1)


def unsigned(name: str) -> type:
    return {16: U16, 32: U32, 64: U64}[int(name[1:])]


@pytest.mark.parametrize("target", INTEGERS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_floats_to_integers_clamp(target: str, dtype: type) -> None:
    bits = int(target[1:])
    edges = [
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        *(sign * 2.0**p for p in (15, 16, 31, 32, 63, 64) for sign in (1, -1)),
    ]
    near = np.array(edges, dtype)
    x = np.concatenate(
        [EDGES.astype(dtype), near, np.nextafter(near, dtype(0)), np.nextafter(near, dtype(np.inf)),
         floats(3, 300, (-2, 66), dtype)]
    )  # fmt: skip
    roundings = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    least, most = limits(target)
    for mode, function in roundings.items():
        want = []
        for v in x.tolist():
            if math.isnan(v):
                # The only targets of 0 are narrow ones of narrow sources.
                want.append(0 if dtype is F32 and bits < 64 else 2 ** (bits - 1))
            elif math.isinf(v):
                want.append((most if v > 0 else least) % 2**bits)
            else:
                want.append(min(max(function(v), least), most) % 2**bits)
        same_bits(arithmetic.to_integer(x, target, mode), np.array(want, unsigned(target)))


def test_floats_rounded_to_integral_values() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.7, 2.7, 1e30, np.inf], F32)
    for mode, want in {
        "rni": [0.0, 2, 2, -0.0, -2, -3, 3],
        "rzi": [0.0, 1, 2, -0.0, -1, -2, 2],
        "rmi": [0.0, 1, 2, -1, -2, -3, 2],
        "rpi": [1, 2, 3, -0.0, -1, -2, 3],
    }.items():
        same_bits(arithmetic.integral(x, mode), np.array([*want, 1e30, np.inf], F32))


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", ["f32", "f64"])
def test_integers_to_floats(source: str, target: str) -> None:
    bits, kind = int(source[1:]), unsigned(source)
    rng = np.random.default_rng(4)
    edges = [0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1]
    x = np.concatenate([np.array(edges, kind), rng.integers(0, 2**bits, 200, kind)])
    # Middles of float32 and float64 values, and their neighbours.
    for digits in (24, 53):
        if bits > digits:
            middle = (2**digits + 2 * np.arange(20) + 1).astype(kind) << kind(bits - digits - 2)
            x = np.concatenate([x, middle, middle + kind(1), middle - kind(1)])
    dtype = F32 if target == "f32" else F64
    values = [signed_value(v, bits) if source[0] == "s" else v for v in x.tolist()]
    want = [exactly_rounded(Fraction(v), "rn", target) if v else 0.0 for v in values]
    same_bits(executed(f"cvt.rn.{target}.{source}", dtype, x), np.array(want, dtype))


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_integers_of_another_width(source: str, target: str) -> None:
    from_bits, to_bits = int(source[1:]), int(target[1:])
    wide = registers(14, 64)
    x = wide.astype(unsigned(source))
    values = [signed_value(v, from_bits) if source[0] == "s" else v for v in x.tolist()]
    cut = np.array([v % 2**to_bits for v in values], unsigned(target))
    opcode = f"cvt.{target}.{source}"
    same_bits(executed(opcode, unsigned(target), x), cut)
    # Registers may be wider than their types: bits above the source do not count, the target fills them.
    filled = [signed_value(v, to_bits) % 2**64 if target[0] == "s" else v for v in cut.tolist()]
    same_bits(executed(opcode, U64, wide), np.array(filled, U64))


def test_float64_to_float32_and_back() -> None:
    x = np.concatenate([floats(5, 2000, (-155, 129), F64), floats(6, 500, (127, 128), F64)])
    middles = (x.view(U64) & ~U64(0x1FFFFFFF) | U64(0x10000000)).view(F64)
    x = np.concatenate([x, middles])
    want = [exactly_rounded(Fraction(v), "rn", "f32") for v in x.tolist()]
    narrow = executed("cvt.rn.f32.f64", F32, x)
    same_bits(narrow, np.array(want, F32))
    same_bits(executed("cvt.f64.f32", F64, narrow), np.array(want, F64))
    specials = np.array([0.0, -0.0, np.inf, -np.inf, -np.nan])
    same_bits(
        executed("cvt.rn.f32.f64", F32, specials),
        np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FFFFFFF], U32).view(F32),
    )
