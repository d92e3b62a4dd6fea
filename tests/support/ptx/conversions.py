"""PTX's conversions between types, on whole arrays of lanes.

Everything that ``arithmetic`` says about lanes, registers and names holds here. The rules are those of
the section "Data Movement and Conversion Instructions: cvt".
"""

from __future__ import annotations

import numpy as np

from tests.support.ptx.arithmetic import (
    F32,
    F64,
    U8,
    U16,
    U32,
    U64,
    Lanes,
    canonical,
    integral,
    rounded,
    signed_view,
    sum_error,
)

_CANONICAL_16 = U16(0x7FFF)
_UNSIGNED = {8: U8, 16: U16, 32: U32, 64: U64}


def to_f16(x: Lanes, mode: str = "rn") -> Lanes:
    """float32 to the bits of float16, uint16; mode "rn" or "rz"."""
    half = x.astype(np.float16)
    bits = half.view(U16)
    if mode == "rz":
        bits = bits - (np.abs(half.astype(F32)) > np.abs(x)).astype(U16)
    elif mode != "rn":
        raise ValueError(f"unknown rounding mode {mode!r} to f16; rn and rz are modelled")
    return np.where(np.isnan(x), _CANONICAL_16, bits)


def to_bf16(x: Lanes, mode: str = "rn") -> Lanes:
    """float32 to the bits of bfloat16, uint16; mode "rn" or "rz"."""
    bits = x.view(U32)
    if mode == "rn":
        bits = bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))
    elif mode != "rz":
        raise ValueError(f"unknown rounding mode {mode!r} to bf16; rn and rz are modelled")
    return np.where(np.isnan(x), _CANONICAL_16, (bits >> U32(16)).astype(U16))


def from_f16(bits: Lanes) -> Lanes:
    """The bits of float16 (uint16) to float32, exactly."""
    return canonical(bits.view(np.float16).astype(F32))


def from_bf16(bits: Lanes) -> Lanes:
    """The bits of bfloat16 (uint16) to float32, exactly; a NaN keeps its payload."""
    return (bits.astype(U32) << U32(16)).view(F32)


def to_tf32(bits: Lanes, mode: str = "rna") -> Lanes:
    """The bits of float32 rounded to TF32's 10 bits of mantissa, uint32; "rna", "rn" or "rz"."""
    if mode == "rna":
        more = U32(0x1000)
    elif mode == "rn":
        more = U32(0x0FFF) + ((bits >> U32(13)) & U32(1))
    elif mode == "rz":
        more = U32(0)
    else:
        raise ValueError(f"unknown rounding mode {mode!r} to tf32; rna, rn and rz are modelled")
    nan = (bits & U32(0x7FFFFFFF)) > U32(0x7F800000)
    return np.where(nan, U32(0x7FFFFFFF), (bits + more) & U32(0xFFFFE000))


def narrow(x: Lanes, mode: str = "rn") -> Lanes:
    """float64 to float32; mode "rn", "rz", "rm" or "rp"."""
    return rounded(x, mode)


def _integer(name: str) -> tuple[bool, int]:
    """(signed, bits) of an integer type's name."""
    if name[:1] not in ("s", "u") or name[1:] not in ("8", "16", "32", "64"):
        raise ValueError(f"{name!r} is no integer type; s8 to s64 and u8 to u64 are")
    return name[0] == "s", int(name[1:])


def _limits(name: str) -> tuple[int, int]:
    signed, bits = _integer(name)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def to_integer(x: Lanes, target: str, mode: str) -> Lanes:
    """float32 or float64 to an integer type, clamped to its range.

    NaN gives 0 where neither the source is float64 nor the target 64 bits wide, else the target's
    highest bit alone.

    Args:
        target: "s8" to "u64"; the result is unsigned of that width.
        mode: "rni", "rzi", "rmi" or "rpi".
    """
    signed, bits = _integer(target)
    least, most = _limits(target)
    unsigned = _UNSIGNED[bits]
    kind = np.int64 if signed else U64
    value = integral(x, mode).astype(F64)
    # most is odd: as a float64 it may be most + 1, and is then never equal to a value in range.
    above, below = value >= F64(most + 1), value <= F64(least)
    inside = np.where(above | below | np.isnan(value), F64(0), value).astype(kind)
    result = np.where(above, kind(most), np.where(below, kind(least), inside)).astype(unsigned)
    wide = x.dtype.type is F64 or bits == 64
    return np.where(np.isnan(x), unsigned(2 ** (bits - 1) if wide else 0), result)


def from_integer(x: Lanes, source: str, target: str, mode: str = "rn") -> Lanes:
    """An integer register to float32 ("f32") or float64 ("f64"), rounded once.

    Args:
        x: unsigned; the low bits of the source type's width count.
        source: "s8" to "u64".
        mode: "rn", "rz", "rm" or "rp".
    """
    dtype = {"f32": F32, "f64": F64}[target]
    wide = to_width(x, source, "s64" if source[0] == "s" else "u64")
    signed = wide.view(np.int64) if source[0] == "s" else wide
    high = (signed >> signed.dtype.type(32)).astype(F64) * F64(2.0**32)
    low = (wide & U64(0xFFFFFFFF)).astype(F64)
    total = high + low
    return rounded((total, sum_error(high, low, total)), mode, dtype)


def to_width(x: Lanes, source: str, target: str, saturated: bool = False) -> Lanes:
    """An integer register as another integer type: cut, extended or (``.sat``) clamped.

    A destination register wider than the target type is a second call, to the register's width.

    Args:
        x: unsigned; the low bits of the source type's width count.
        source, target: "s8" to "u64"; the result is unsigned of the target's width.
    """
    (source_signed, source_bits), (_, bits) = _integer(source), _integer(target)
    value = x.astype(_UNSIGNED[source_bits])
    if source_signed:
        value = signed_view(value)
    if saturated:
        least, most = _limits(source)
        low, high = _limits(target)
        value = np.clip(value, value.dtype.type(max(low, least)), value.dtype.type(min(high, most)))
    return value.astype(_UNSIGNED[bits])
