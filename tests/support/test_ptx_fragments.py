"""Register fragments against the PTX ISA's formulas, lane by lane, and addresses bit by bit.

Each formula stands as its section of "Parallel Thread Execution ISA" 9.1 has it: which row and column
lane ``l`` holds in element ``i`` of its fragment.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.support.exact_floats import same_bits
from tests.support.ptx import fragments

F32, F64, U16, U32, U64 = np.float32, np.float64, np.uint16, np.uint32, np.uint64
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}
WARPS = 3


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def bits_of(value: float, dtype: str) -> int:
    """The bits of a small whole number or its quarters: exact in every type here."""
    if dtype in ("f32", "tf32"):
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return torch.tensor(value, dtype=TORCH[dtype]).view(torch.int16).item() & 0xFFFF


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Quarters from -3 to 3: sums of their products are exact in float32."""
    return np.random.default_rng(seed).integers(-12, 13, shape) / 4.0


def packed(
    matrices: np.ndarray, place: Callable[[int, int], tuple[int, int]], elements: int, dtype: str
) -> tuple[np.ndarray, ...]:
    """Registers of every lane: element i of lane l is matrices[warp][place(l, i)], low halves first."""
    per = 1 if dtype in ("f32", "tf32") else 2
    warps = len(matrices)
    registers = np.zeros((elements // per, warps * 32), U32)
    for warp in range(warps):
        for lane in range(32):
            for i in range(elements):
                bits = bits_of(float(matrices[warp][place(lane, i)]), dtype)
                registers[i // per, warp * 32 + lane] |= U32(bits << (16 * (i % per)))
    return tuple(registers)


# "Matrix Fragments for mma.m16n8k16 with floating point type"
def a_of_m16n8k16(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if 0 <= i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    col = (lane % 4) * 2 + (i & 1) if i < 4 else (lane % 4) * 2 + (i & 1) + 8
    return row, col


def b_of_m16n8k16(lane: int, i: int) -> tuple[int, int]:
    row = (lane % 4) * 2 + (i & 1) if i < 2 else (lane % 4) * 2 + (i & 1) + 8
    return row, lane >> 2


def c_of_m16n8(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2 if i < 2 else (lane >> 2) + 8), (lane % 4) * 2 + (i & 1)


# "Matrix Fragments for mma.m16n8k8", .f16 and .bf16
def a_of_m16n8k8(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2 if i < 2 else (lane >> 2) + 8), (lane % 4) * 2 + (i & 1)


def b_of_m16n8k8(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4) * 2 + i, lane >> 2


# "Matrix Fragments for mma.m16n8k8", .tf32
def a_of_m16n8k8_tf32(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if i in (0, 2) else (lane >> 2) + 8
    col = lane % 4 if i in (0, 1) else lane % 4 + 4
    return row, col


def b_of_m16n8k8_tf32(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4 if i == 0 else lane % 4 + 4), lane >> 2


MMA = [
    ("m16n8k16", "f16", a_of_m16n8k16, b_of_m16n8k16),
    ("m16n8k16", "bf16", a_of_m16n8k16, b_of_m16n8k16),
    ("m16n8k8", "f16", a_of_m16n8k8, b_of_m16n8k8),
    ("m16n8k8", "bf16", a_of_m16n8k8, b_of_m16n8k8),
    ("m16n8k8", "tf32", a_of_m16n8k8_tf32, b_of_m16n8k8_tf32),
]


@pytest.mark.parametrize(("shape", "dtype", "a_place", "b_place"), MMA)
def test_mma(shape: str, dtype: str, a_place: Callable, b_place: Callable) -> None:
    k = int(shape.split("k")[1])
    a, b, c = numbers(0, WARPS, 16, k), numbers(1, WARPS, k, 8), numbers(2, WARPS, 16, 8)
    got = fragments.mma(
        shape,
        dtype,
        packed(a, a_place, 16 * k // 32, dtype),
        packed(b, b_place, k * 8 // 32, dtype),
        packed(c, c_of_m16n8, 4, "f32"),
    )
    same_bits(np.stack(got), np.stack(packed(a @ b + c, c_of_m16n8, 4, "f32")))


def test_mma_takes_the_upper_19_bits_of_tf32() -> None:
    a = packed(numbers(3, 1, 16, 8), a_of_m16n8k8_tf32, 4, "tf32")
    b = packed(numbers(4, 1, 8, 8), b_of_m16n8k8_tf32, 2, "tf32")
    c = packed(np.zeros((1, 16, 8)), c_of_m16n8, 4, "f32")
    noisy = [tuple(x | U32(0x1FFF) for x in part) for part in (a, b)]
    same_bits(np.stack(fragments.mma("m16n8k8", "tf32", *noisy, c)),
              np.stack(fragments.mma("m16n8k8", "tf32", a, b, c)))  # fmt: skip


def test_mma_rounds_once_and_gives_canonical_nan() -> None:
    # Row 0 sums 1 + 2^-24 + 2^-40, just above a middle; row 1 NaN.
    a, b = np.zeros((1, 16, 8)), np.zeros((1, 8, 8))
    a[0, 0, :3] = 1, 2**-24, 2**-20
    a[0, 1, 0] = np.nan
    b[0, :3, :] = np.array([1, 1, 2.0**-20])[:, None]
    zero = packed(np.zeros((1, 16, 8)), c_of_m16n8, 4, "f32")
    operands = packed(a, a_of_m16n8k8_tf32, 4, "tf32"), packed(b, b_of_m16n8k8_tf32, 2, "tf32")
    first = fragments.mma("m16n8k8", "tf32", *operands, zero)[0]
    assert (first[0], first[4]) == (0x3F800001, 0x7FFFFFFF)


def test_mma_refuses_what_it_does_not_model() -> None:
    register = np.zeros(32, U32)
    with pytest.raises(ValueError, match="m16n8k32 of f16 from"):
        fragments.mma("m16n8k32", "f16", (register,) * 4, (register,) * 2, (register,) * 4)
    with pytest.raises(ValueError, match=r"from \(4, 1, 4\) registers"):
        fragments.mma("m16n8k16", "f16", (register,) * 4, (register,), (register,) * 4)
    with pytest.raises(ValueError, match="unknown operand type 'f8'"):
        fragments.values(register, "f8")


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_in_shared_memory(count: int, trans: bool) -> None:
    # "Warp-level matrix load instruction: ldmatrix": lane l holds two elements of row l / 4 of each
    # matrix, columns 2 (l % 4) and the next; with .trans those of the transposed matrix.
    elements = np.random.default_rng(5).integers(0, 2**16, (WARPS, count, 8, 8), U16)
    want = np.zeros((count, WARPS * 32), U32)
    for warp in range(WARPS):
        for lane in range(32):
            for matrix in range(count):
                pair = []
                for half in (0, 1):
                    row, col = lane // 4, 2 * (lane % 4) + half
                    pair.append(
                        int(elements[(warp, matrix, col, row) if trans else (warp, matrix, row, col)])
                    )
                want[matrix, warp * 32 + lane] = pair[0] | pair[1] << 16
    rows = elements.view(U32)
    same_bits(np.stack(fragments.ldmatrix(rows, trans)), want)
    same_bits(np.ascontiguousarray(fragments.stmatrix(tuple(want), trans)), rows)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "tf32"])
def test_wgmma_takes_a_from_registers(dtype: str) -> None:
    # "Register Fragments", figures for A of wgmma m64nNk16 and m64nNk8: warp w of the group has rows
    # 16 w to 16 w + 15, each as mma.m16n8k16 (m16n8k8 of .tf32) has its A.
    k, place, count = (8, a_of_m16n8k8_tf32, 4) if dtype == "tf32" else (16, a_of_m16n8k16, 8)
    a = numbers(6, 2, 64, k)
    registers = packed(a.reshape(8, 16, k), place, count, dtype)
    np.testing.assert_array_equal(fragments.wgmma_a(registers, dtype), a)


@pytest.mark.parametrize("n", [8, 64, 256])
def test_wgmma_accumulator(n: int) -> None:
    # "Register Fragments", figure for D: register i of lane l of warp w.
    matrix = np.random.default_rng(7).standard_normal((2, 64, n)).astype(F32)
    want = np.zeros((n // 2, 256), F32)
    for thread in range(256):
        group, warp, lane = thread // 128, thread % 128 // 32, thread % 32
        for i in range(n // 2):
            row = 16 * warp + lane // 4 + 8 * (i % 4 // 2)
            column = 8 * (i // 4) + 2 * (lane % 4) + i % 2
            want[i, thread] = matrix[group, row, column]
    registers = fragments.wgmma_registers(matrix)
    same_bits(np.stack(registers), want.view(U32))
    same_bits(np.ascontiguousarray(fragments.wgmma_accumulator(tuple(want.view(U32)))), matrix)


def test_wgmma_multiplies_and_rounds_once() -> None:
    a, b = numbers(8, 2, 64, 16), numbers(9, 2, 24, 16)
    accumulator = numbers(10, 2, 64, 24).astype(F32)
    want = (np.einsum("gmk,gnk->gmn", a, b) + accumulator).astype(F32)
    same_bits(fragments.wgmma(a, b, accumulator), want)
    # 1 + 2^-24 + 2^-40 lies just above the middle of two floats; 1 + 2^-24 lies on it.
    a = np.full((1, 64, 16), 0.0)
    a[:, :, :3] = 1.0, 2.0**-24, 2.0**-40
    got = fragments.wgmma(a, np.ones((1, 8, 16)), np.zeros((1, 64, 8), F32))
    assert (got == 1 + 2.0**-23).all()


def test_values_of_bit_patterns() -> None:
    bits = np.arange(2**16, dtype=U16)
    for dtype, kind in TORCH.items():
        want = torch.from_numpy(bits.view(np.int16)).view(kind).to(torch.float64).numpy()
        np.testing.assert_array_equal(fragments.values(bits, dtype), want)
    # 1.0 with the 11th bit of the mantissa and all below set: only ten bits count.
    np.testing.assert_array_equal(
        fragments.values(np.array([0x3F801FFF, 0x3F802000], U32), "tf32"), [1, 1 + 2**-10]
    )


# Shared memory

MODES = {"none": 0, "32": 3, "64": 2, "128": 1}


def descriptor(start: int, leading: int, stride: int, swizzle: str) -> int:
    """ "Matrix Descriptor Format": each byte count cut to 18 bits and divided by 16."""
    fields = [(x & 0x3FFFF) >> 4 for x in (start, leading, stride)]
    return fields[0] | fields[1] << 16 | fields[2] << 32 | MODES[swizzle] << 62


def swizzled(address: int, swizzle: str) -> int:
    """Bits 4 to 6 of an address, as many as the pattern has, changed by bits 7 to 9."""
    for bit in range({"none": 0, "32": 1, "64": 2, "128": 3}[swizzle]):
        address ^= (address >> (7 + bit) & 1) << (4 + bit)
    return address


def canonical_offset(
    row: int, column: int, itemsize: int, case: tuple[bool, str], strides: tuple[int, int]
) -> int:
    """Bytes from the start by "Canonical Layouts", ((...)):((...)) spelt out; strides are LBO and SBO."""
    (transposed, swizzle), (leading, stride) = case, strides
    T = 16 // itemsize
    if transposed:
        if swizzle == "none":  # ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO))
            return row % T * itemsize + row // T * stride + column % 8 * T * itemsize + column // 8 * leading
        w = int(swizzle) // 16  # ((T,w,m),(8,k)):((1,T,LBO),(wT,SBO))
        inside = row % T + row // T % w * T + column % 8 * w * T
        return inside * itemsize + row // (T * w) * leading + column // 8 * stride
    if swizzle == "none":  # ((8,m),(T,2k)):((1T,SBO),(1,LBO))
        return row % 8 * T * itemsize + row // 8 * stride + column % T * itemsize + column // T * leading
    w = int(swizzle) // 16  # ((8,m),(T,2k)):((wT,SBO),(1,T))
    return (row % 8 * w * T + column) * itemsize + row // 8 * stride


@pytest.mark.parametrize("swizzle", MODES)
@pytest.mark.parametrize(("itemsize", "transposed"), [(2, False), (4, False), (2, True)])
@pytest.mark.parametrize("rows", [64, 8, 128])
def test_addresses_of_a_described_operand(swizzle: str, itemsize: int, transposed: bool, rows: int) -> None:
    k = 32 // itemsize
    # Two warpgroups, the second a step of 32 bytes into a pattern, with strides of its own.
    starts, leading, stride = (0x4000, 0x8020), (2048, 4096), (1024, 3072)
    words = [descriptor(*case, swizzle) for case in zip(starts, leading, stride, strict=True)]
    got = fragments.wgmma_addresses(np.array(words, U64), rows, k, itemsize, transposed)
    want = np.zeros((2, rows, k), np.int64)
    for group in (0, 1):
        strides = leading[group], stride[group]
        for row in range(rows):
            for column in range(k):
                offset = canonical_offset(row, column, itemsize, (transposed, swizzle), strides)
                want[group, row, column] = swizzled(starts[group] + offset, swizzle)
    np.testing.assert_array_equal(got, want)
    shared = fragments.wgmma_addresses(np.array(words[:1] * 2, U64), rows, k, itemsize, transposed)
    np.testing.assert_array_equal(shared, want[[0, 0]])


def test_addresses_of_the_isas_examples() -> None:
    # "Canonical Layouts", examples: the strides in elements, before the swizzle.
    def offsets(leading: int, stride: int, swizzle: str, itemsize: int, transposed: bool) -> np.ndarray:
        word = np.array([descriptor(0, leading * itemsize, stride * itemsize, swizzle)], U64)
        addresses = fragments.wgmma_addresses(word, 16, 32 // itemsize, itemsize, transposed)[0]
        undone = np.vectorize(lambda address: swizzled(int(address), swizzle))(addresses)  # its own inverse
        return undone // itemsize

    # K-major, no swizzling, tf32: ((8,2),(4,4)):((4,32),(1,64)), of which one instruction takes 8 columns.
    row, column = np.mgrid[:16, :8]
    want = row % 8 * 4 + row // 8 * 32 + column % 4 + column // 4 * 64
    np.testing.assert_array_equal(offsets(64, 32, "none", 4, False), want)
    # K-major, 32-byte swizzling, tf32: ((8,2),(4,4)):((8,64),(1,4))
    want = row % 8 * 8 + row // 8 * 64 + column % 4 + column // 4 * 4
    np.testing.assert_array_equal(offsets(1, 64, "32", 4, False), want)
    # MN-major, no swizzling, bf16: ((8,1,2),(8,2)):((1,8,64),(8,128))
    row, column = np.mgrid[:16, :16]
    want = row % 8 + row // 8 * 64 + column % 8 * 8 + column // 8 * 128
    np.testing.assert_array_equal(offsets(128, 64, "none", 2, True), want)
    # MN-major, 32-byte swizzling, bf16: ((8,2,2),(8,2)):((1,8,128),(16,256))
    want = row % 8 + row // 8 * 8 + column % 8 * 16 + column // 8 * 256
    np.testing.assert_array_equal(offsets(128, 256, "32", 2, True), want)


@pytest.mark.parametrize(
    ("words", "k", "itemsize", "transposed", "message"),
    [
        ([1 << 49], 16, 2, False, "base offset"),
        ([1 << 55], 16, 2, False, "reserved bits"),
        ([1 << 62, 2 << 62], 16, 2, False, "different swizzles"),
        ([0], 8, 4, True, "no operand of wgmma"),
        ([0], 8, 2, False, "no operand of wgmma"),
    ],
)
def test_descriptors_that_are_not_modelled(
    words: list[int], k: int, itemsize: int, transposed: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fragments.wgmma_addresses(np.array(words, U64), 64, k, itemsize, transposed)
