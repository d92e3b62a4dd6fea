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

# Registers of A, B and C by shape and operand type.
MMA = {
    ("m16n8k16", "f16"): (4, 2, 4), ("m16n8k16", "bf16"): (4, 2, 4),
    ("m16n8k8", "f16"): (2, 1, 4), ("m16n8k8", "bf16"): (2, 1, 4), ("m16n8k8", "tf32"): (4, 2, 4),
}  # fmt: skip


def values(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers of uint16 ("f16" and "bf16") or uint32 ("tf32", without its lower 13 bits), float64."""
    if dtype == "f16":
        return bits.view(np.float16).astype(F64)
    if dtype == "bf16":
        return (bits.astype(U32) << U32(16)).view(F32).astype(F64)
    if dtype == "tf32":
        return (bits & U32(0xFFFFE000)).view(F32).astype(F64)
    raise ValueError(f"unknown operand type {dtype!r}; f16, bf16 and tf32 are modelled")


def _rows(registers: Registers, halves: int, dtype: str) -> np.ndarray:
    """(warps, 8 halves, k) float64: a group's row in each register of a part of k, the lower half first."""
    part, half, warp, group, thread = range(5)
    words = np.stack(registers).reshape(-1, halves, len(registers[0]) // 32, 8, 4)
    words = np.ascontiguousarray(words.transpose(warp, half, group, part, thread))
    words = words.reshape(len(words), 8 * halves, -1)
    return values(words if dtype == "tf32" else words.view(U16), dtype)


def mma(shape: str, dtype: str, a: Registers, b: Registers, c: Registers) -> Registers:
    """``mma.sync.aligned.SHAPE.row.col``: registers of A B + C, float32; ValueError if not in ``MMA``."""
    counts = len(a), len(b), len(c)
    if MMA.get((shape, dtype)) != counts:
        raise ValueError(f"mma.{shape} of {dtype} from {counts} registers is not modelled; {MMA} are")
    # A group of B holds a column.
    products = _rows(a, 2, dtype) @ _rows(b, 1, dtype).swapaxes(1, 2)
    products = products.reshape(-1, 2, 8, 4, 2)  # rows in halves of 8, columns in pairs
    terms = np.stack(c).view(F32).reshape(2, 2, -1, 8, 4)
    sums = products.transpose(1, 4, 0, 2, 3) + terms.astype(F64)
    return tuple(canonical(sums.astype(F32)).view(U32).reshape(4, -1))


def ldmatrix(rows: np.ndarray, trans: bool) -> Registers:
    """``ldmatrix.m8n8``: registers of (warps, matrices, 8 rows, 4 words) uint32, read from shared memory."""
    rows = _transposed(rows) if trans else rows
    return tuple(np.ascontiguousarray(rows[:, i]).reshape(-1) for i in range(rows.shape[1]))


def stmatrix(registers: Registers, trans: bool) -> np.ndarray:
    """``stmatrix.m8n8``: what ``ldmatrix`` reads into these registers."""
    rows = np.stack(registers).reshape(len(registers), -1, 8, 4).swapaxes(0, 1)
    return _transposed(rows) if trans else rows


def _transposed(rows: np.ndarray) -> np.ndarray:
    """Matrices of 8 rows of 4 words, their 8 by 8 elements of 16 bits transposed."""
    elements = np.ascontiguousarray(rows).view(U16)
    return np.ascontiguousarray(elements.swapaxes(-1, -2)).view(U32)


# Bytes of a row of wgmma's swizzle pattern, by the descriptor's bits 62 and 63.
_SWIZZLES = (0, 128, 64, 32)
_DESCRIPTOR_FIELDS = U64(0xC000_3FFF_3FFF_3FFF)


def _field(descriptor: np.ndarray, first: int) -> np.ndarray:
    """A byte count of a descriptor (14 bits, in units of 16): (groups, 1, 1), or (1, 1, 1) if all agree."""
    size = ((descriptor >> U64(first) & U64(0x3FFF)) << U64(4)).astype(np.int64)[:, None, None]
    return size[:1] if (size == size[0]).all() else size


def wgmma_addresses(descriptor: np.ndarray, rows: int, k: int, itemsize: int, transposed: bool) -> np.ndarray:
    """Where in shared memory each element of a described operand lies: (groups, rows, k) int64 bytes.

    Sections "Matrix Descriptor Format", "Strides" and "Canonical Layouts" of wgmma's shared memory.

    Args:
        descriptor: (groups,) uint64, one per warpgroup.
        rows: of A (64), or the columns of B (n).
        k: 32 bytes' worth of elements of 2 or 4 bytes.
        transposed: M- or N-major (the instruction's ``imm-trans``), else K-major; of 2 bytes only.
    Raises:
        ValueError: another k, a base offset, reserved bits or several swizzles in one call.
    """
    descriptor = np.asarray(descriptor, U64)
    if (descriptor & ~_DESCRIPTOR_FIELDS).any():
        raise ValueError(f"a matrix descriptor has a base offset or reserved bits: {descriptor}")
    modes = np.unique(descriptor >> U64(62))
    if len(modes) != 1:
        raise ValueError(f"warpgroups with different swizzles are not modelled: modes {modes}")
    if k * itemsize != 32 or (transposed and itemsize != 2):
        raise ValueError(f"k = {k} of {itemsize} bytes, transposed = {transposed}, is no operand of wgmma")
    swizzle = _SWIZZLES[int(modes[0])]
    # Broadcast late: the groups of a kernel share strides, often all, and differ in their start.
    start, leading, stride = (_field(descriptor, first) for first in (0, 16, 32))
    row, column = np.arange(rows)[:, None], np.arange(k)[None, :]
    if transposed:
        # Rows are contiguous: the pattern is 16 bytes of them, or a swizzle's row, for each of 8 k.
        span, along, across = (swizzle, leading, stride) if swizzle else (16, stride, leading)
        per = span // itemsize
        offset = row // per * along + row % per * itemsize + column // 8 * across + column % 8 * span
    elif swizzle:
        offset = row // 8 * stride + row % 8 * swizzle + column * itemsize
    else:
        unit = 16 // itemsize  # elements of 16 bytes
        offset = row // 8 * stride + row % 8 * 16 + column // unit * leading + column % unit * itemsize
    address = start + offset
    if swizzle:
        # Units of 16 bytes change places within their row, by the row's number in the pattern.
        address = address ^ (((address >> 7) & (swizzle // 16 - 1)) << 4)
    return np.broadcast_to(address, (len(descriptor), rows, k))


def wgmma_a(registers: Registers, dtype: str) -> np.ndarray:
    """(groups, 64, k) float64: A of a wgmma that takes it from four registers; a warp holds 16 rows."""
    a = _rows(registers, 2, dtype)
    return a.reshape(-1, 64, a.shape[2])


def wgmma_accumulator(registers: Registers) -> np.ndarray:
    """(groups, 64, n) float32 of the n / 2 registers of an accumulator."""
    parts = np.stack(registers).view(F32).reshape(len(registers) // 4, 2, 2, -1, 4, 8, 4)
    column, half, pair, group, warp, row, thread = range(7)
    matrix = parts.transpose(group, warp, half, row, column, thread, pair)
    return matrix.reshape(len(matrix), 64, -1)


def wgmma_registers(matrix: np.ndarray) -> Registers:
    """The registers of an accumulator (groups, 64, n) float32: the inverse of ``wgmma_accumulator``."""
    groups, _, n = matrix.shape
    group, warp, half, row, column, thread, pair = range(7)
    parts = matrix.reshape(groups, 4, 2, 8, n // 8, 4, 2)
    parts = parts.transpose(column, half, pair, group, warp, row, thread)
    return tuple(np.ascontiguousarray(parts).view(U32).reshape(n // 2, -1))


def wgmma(a: np.ndarray, b: np.ndarray, accumulator: np.ndarray) -> np.ndarray:
    """a b^T + accumulator, (groups, 64, n) float32, of (groups, 64, k) and (groups, n, k) float64."""
    sums = a @ b.swapaxes(1, 2)
    sums += accumulator  # in place: a fresh array of this size costs more than the sum
    return canonical(sums.astype(F32))
