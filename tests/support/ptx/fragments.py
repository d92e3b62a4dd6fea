"""Register fragments of tensor-core instructions as matrices, and what the instructions compute.

n lanes are whole warps of 32 (``mma``, ``ldmatrix``) or whole warpgroups of 128 (``wgmma``). A register
is a uint32 array (n,) and an operand a tuple of registers. Layouts are those of NVIDIA's "Parallel
Thread Execution ISA", version 9.1. In all of them a warp is eight groups of four threads, and a
group holds the pieces of one row:

    row = lane // 4,    first column of register 0 = (elements per register) * (lane % 4)

Products and sums are float64 and the result is rounded once. Real tensor cores cut the addends to
fewer bits instead; that is not modelled.
"""

from __future__ import annotations

import numpy as np

from tests.support.ptx.arithmetic import F32, F64, U16, U32, U64, canonical

Registers = tuple[np.ndarray, ...]

# (registers of A, registers of B) by shape and operand type. Shapes name m, n and k.
_OPERANDS = {
    ("m16n8k16", "f16"): (4, 2),
    ("m16n8k16", "bf16"): (4, 2),
    ("m16n8k8", "f16"): (2, 1),
    ("m16n8k8", "bf16"): (2, 1),
    ("m16n8k8", "tf32"): (4, 2),
    ("m16n8k4", "tf32"): (2, 1),
}


def values(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers that bit patterns stand for, float64.

    Args:
        bits: uint16 for "f16" and "bf16", uint32 for "tf32", whose lower 13 bits do not count.
    """
    if dtype == "f16":
        return bits.view(np.float16).astype(F64)
    if dtype == "bf16":
        return (bits.astype(U32) << U32(16)).view(F32).astype(F64)
    if dtype == "tf32":
        return (bits & U32(0xFFFFE000)).view(F32).astype(F64)
    raise ValueError(f"unknown operand type {dtype!r}; f16, bf16 and tf32 are modelled")


def _elements(words: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers of packed registers, float64: the last axis holds words, the lower half first."""
    words = np.ascontiguousarray(words)
    return values(words if dtype == "tf32" else words.view(U16), dtype)


def _rows_of_a(registers: Registers, dtype: str) -> np.ndarray:
    """(warps, 16, k) float64: even registers hold rows 0 to 7, odd ones 8 to 15; a pair per part of k."""
    parts = len(registers) // 2
    words = np.stack(registers).reshape(parts, 2, -1, 8, 4)
    part, half, warp, group, thread = range(5)
    words = words.transpose(warp, half, group, part, thread)
    return _elements(words.reshape(-1, 16, 4 * parts), dtype)


def _columns_of_b(registers: Registers, dtype: str) -> np.ndarray:
    """(warps, 8, k) float64, a row per column of B: a group holds one column, a register a part of k."""
    parts = len(registers)
    part, warp, group, thread = range(4)
    words = np.stack(registers).reshape(parts, -1, 8, 4).transpose(warp, group, part, thread)
    return _elements(words.reshape(-1, 8, 4 * parts), dtype)


def mma(shape: str, dtype: str, a: Registers, b: Registers, c: Registers) -> Registers:
    """``mma.sync.aligned.SHAPE.row.col``: the registers of A B + C.

    Args:
        shape: "m16n8k16" or "m16n8k8"; for "tf32" "m16n8k8" or "m16n8k4".
        dtype: "f16", "bf16" or "tf32", of A and B.
        c: four registers of float32, or two of packed float16; the result is alike.
    Raises:
        ValueError: a shape or a number of registers that is not modelled.
    """
    if (shape, dtype) not in _OPERANDS:
        raise ValueError(f"mma.{shape} of {dtype} is not modelled; {sorted(_OPERANDS)} are")
    if (len(a), len(b)) != _OPERANDS[shape, dtype] or len(c) not in (2, 4):
        raise ValueError(f"mma.{shape} of {dtype} got {len(a)}, {len(b)} and {len(c)} registers")
    products = _rows_of_a(a, dtype) @ _columns_of_b(b, dtype).swapaxes(1, 2)
    warps = len(products)
    if len(c) == 2:
        terms = np.stack(c).reshape(2, warps, 8, 4).swapaxes(0, 1)
        sums = products + _elements(terms, "f16").reshape(warps, 16, 8)
        # Straight from float64: by way of float32 it would be rounded twice.
        halves = np.where(np.isnan(sums), U16(0x7FFF), sums.astype(np.float16).view(U16))
        words = halves.view(U32).reshape(warps, 2, -1).swapaxes(0, 1)
        return tuple(words.reshape(2, -1))
    products = products.reshape(warps, 2, 8, 4, 2)  # rows in halves of 8, columns in pairs
    terms = np.stack(c).view(F32).reshape(2, 2, warps, 8, 4)
    sums = products.transpose(1, 4, 0, 2, 3) + terms.astype(F64)
    return tuple(canonical(sums.astype(F32)).view(U32).reshape(4, -1))


def ldmatrix(rows: np.ndarray, trans: bool) -> Registers:
    """``ldmatrix.m8n8`` of 16-bit elements.

    Args:
        rows: (warps, 1, 2 or 4 matrices, 8 rows, 4 words) uint32, as read from shared memory.
        trans: each thread gets elements of a column (``.trans``).
    """
    if trans:
        rows = _transposed(rows)
    return tuple(np.ascontiguousarray(rows[:, i]).reshape(-1) for i in range(rows.shape[1]))


def stmatrix(registers: Registers, trans: bool) -> np.ndarray:
    """``stmatrix.m8n8`` of 16-bit elements: (warps, matrices, 8 rows, 4 words) uint32 to be stored."""
    rows = np.stack(registers, axis=0).reshape(len(registers), -1, 8, 4).swapaxes(0, 1)
    return _transposed(rows) if trans else np.ascontiguousarray(rows)


def _transposed(rows: np.ndarray) -> np.ndarray:
    """Matrices of 8 rows of 4 words, their 8 by 8 elements of 16 bits transposed."""
    elements = np.ascontiguousarray(rows).view(U16)
    return np.ascontiguousarray(elements.swapaxes(-1, -2)).view(U32)


# wgmma

# Bytes of a row of the swizzle pattern, by the descriptor's bits 62 and 63.
_SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}
_DESCRIPTOR_FIELDS = U64(0xC00E_3FFF_3FFF_3FFF)
_BASE_OFFSET = U64(7 << 49)


def _field(descriptor: np.ndarray, first: int) -> np.ndarray:
    """A byte count of a descriptor (14 bits, in units of 16): (groups, 1, 1), or (1, 1, 1) if all agree."""
    size = ((descriptor >> U64(first) & U64(0x3FFF)) << U64(4)).astype(np.int64)[:, None, None]
    return size[:1] if (size == size[0]).all() else size


def wgmma_addresses(descriptor: np.ndarray, rows: int, k: int, itemsize: int, transposed: bool) -> np.ndarray:
    """Where in shared memory each element of a described operand lies.

    Sections "Matrix Descriptor Format", "Strides" and "Canonical Layouts" of the asynchronous warpgroup
    level instructions.

    Args:
        descriptor: (groups,) uint64, one per warpgroup.
        rows: of A (64), or the columns of B (n).
        k: 32 bytes' worth of elements, as every wgmma takes.
        itemsize: 2 or 4 bytes.
        transposed: M- or N-major (the instruction's ``imm-trans``), else K-major.
    Returns:
        (groups, rows, k) int64 byte addresses.
    Raises:
        ValueError: what is not modelled or not allowed: a base offset, reserved bits, several
            swizzles in one call, transposed 32-bit elements.
    """
    descriptor = np.asarray(descriptor, U64)
    if (descriptor & _BASE_OFFSET).any():
        raise ValueError(f"a matrix descriptor with a base offset is not modelled: {descriptor}")
    if (descriptor & ~_DESCRIPTOR_FIELDS).any():
        raise ValueError(f"a matrix descriptor has reserved bits set: {descriptor}")
    modes = np.unique(descriptor >> U64(62))
    if len(modes) != 1:
        raise ValueError(f"warpgroups with different swizzles are not modelled: modes {modes}")
    if itemsize not in (2, 4) or k * itemsize != 32 or (transposed and itemsize != 2):
        raise ValueError(
            f"k = {k} of {itemsize} bytes, transposed = {transposed}: wgmma takes 32 bytes of k, "
            "and transposed operands of 2-byte elements only"
        )
    swizzle = _SWIZZLES[int(modes[0])]
    # Broadcast late: the groups of a kernel share strides, often all, and differ in their start.
    start, leading, stride = (_field(descriptor, first) for first in (0, 16, 32))
    row, column = np.arange(rows)[:, None], np.arange(k)[None, :]
    unit = 16 // itemsize  # elements of 16 bytes
    if transposed:
        # Rows are contiguous: the pattern is 16 bytes of them, or a swizzle's row, for each of 8 k.
        span, along = (swizzle, leading) if swizzle else (16, stride)
        across = stride if swizzle else leading
        per = span // itemsize
        offset = row // per * along + row % per * itemsize + column // 8 * across + column % 8 * span
    elif swizzle:
        offset = row // 8 * stride + row % 8 * swizzle + column * itemsize
    else:
        offset = row // 8 * stride + row % 8 * 16 + column // unit * leading + column % unit * itemsize
    address = start + offset
    if swizzle:
        # Units of 16 bytes change places within their row, by the row's number in the pattern.
        address = address ^ (((address >> 7) & (swizzle // 16 - 1)) << 4)
    return np.broadcast_to(address, (len(descriptor), rows, k))


def wgmma_a(registers: Registers, dtype: str) -> np.ndarray:
    """(groups, 64, k) float64: A of a wgmma that takes it from four registers; a warp holds 16 rows.

    Section "Register Fragments" of the asynchronous warpgroup level instructions.
    """
    if len(registers) != 4:
        raise ValueError(f"wgmma takes A from 4 registers, got {len(registers)}")
    a = _rows_of_a(registers, dtype)
    return a.reshape(-1, 64, a.shape[2])


def wgmma_accumulator(registers: Registers) -> np.ndarray:
    """(groups, 64, n) float32 of the n / 2 registers of an accumulator."""
    columns, half, pair = len(registers) // 4, 2, 2
    parts = np.stack(registers).view(F32).reshape(columns, half, pair, -1, 4, 8, 4)
    # -> group, warp, half, row, column, thread, pair
    matrix = parts.transpose(3, 4, 1, 5, 0, 6, 2)
    return matrix.reshape(matrix.shape[0], 64, 8 * columns)


def wgmma_registers(matrix: np.ndarray) -> Registers:
    """The registers of an accumulator (groups, 64, n) float32: the inverse of ``wgmma_accumulator``."""
    groups, _, n = matrix.shape
    parts = matrix.reshape(groups, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
    return tuple(np.ascontiguousarray(parts).view(U32).reshape(n // 2, -1))


def wgmma(a: np.ndarray, b: np.ndarray, accumulator: np.ndarray | None) -> np.ndarray:
    """a b^T + accumulator, (groups, 64, n) float32.

    Args:
        a: (groups, 64, k) float64.
        b: (groups, n, k) float64.
        accumulator: (groups, 64, n) float32; None where the instruction's ``scale-d`` is 0.
    """
    sums = a @ b.swapaxes(1, 2)
    if accumulator is not None:
        sums += accumulator  # in place: a fresh array of this size costs more than the sum
    return canonical(sums.astype(F32))
