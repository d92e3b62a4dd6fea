"""How kernels find, align and read the rows of a sum of terms.

A row of an odd vocabulary does not begin at a 16-byte boundary, and Triton then reads it element by
element. So a row is cut at the boundaries of one of its streams (a term read or a gradient written):

    [ head | body: whole granules of G columns, at 16-byte boundaries | tail ]

``head`` and ``tail`` are shorter than G columns. The other streams whose rows begin equally far from
a boundary are aligned with it; the host finds out which (``alignment``), kernels only where the row
begins. Columns count from the end of the head, so that tiles of the body carry no run-time shift.
"""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16
_UNBOUNDED = 2**30 - 2  # an inner size that no row number reaches; its code is an int32


class Term(NamedTuple):
    """A term, or a gradient, as kernels take it: [n // inner, n % inner, v] of a strided tensor."""

    logits: Any  # Tensor
    outer_stride: int  # coded, in elements, like the three that follow
    inner_stride: int
    inner: int
    column_stride: int
    scale: float
    softcap: float


def as_term(x: Tensor, scale: float = 1.0, softcap: float = 0.0) -> Term:
    """The (outer, inner, V) tensor ``x`` as a kernel argument; a ``softcap`` of 0 is none."""
    outer_stride, inner_stride, inner, column_stride = map(encode, (*_row_steps(x), x.stride(2)))
    return Term(x, outer_stride, inner_stride, inner, column_stride, scale, softcap)


def _row_steps(x: Tensor) -> tuple[int, int, int]:
    """(outer stride, inner stride, inner size)."""
    # With one outer index the inner size is N: fixed instead, so that no kernel depends on N.
    if x.shape[0] == 1:
        return 0, x.stride(1), _UNBOUNDED
    return x.stride(0), x.stride(1), x.shape[1]


def encode(n: int) -> int:
    """A stride or a size as kernels take it."""
    # Triton compiles anew for ints in tuples that are 1 or divisible by 16; odd ones above 1 are
    # neither, so no batch size or length compiles anything.
    return 2 * n + 3


class Alignment(NamedTuple):
    """Which streams can be read or written 16 bytes at a time.

    Attributes:
        leader: index of the stream at whose boundaries rows are cut; -1 if no stream has adjacent
            columns.
        aligned: per stream, whether its rows begin as far from a boundary as the leader's.
        granule: columns that a vector of the narrowest aligned stream holds.
    """

    leader: int
    aligned: tuple[bool, ...]
    granule: int


@dataclass(frozen=True)
class _Steps:
    """Where the rows of one stream begin, in elements from a multiple of 16 bytes."""

    first: int
    outer: int
    inner: int
    inner_size: int
    lanes: int  # elements in 16 bytes

    def modulo(self, lanes: int) -> tuple[int, int, int, int]:
        """Equal for streams whose rows all begin equally far from a boundary of ``lanes``."""
        outer, inner, size = self.outer % lanes, self.inner % lanes, self.inner_size
        if size == _UNBOUNDED or outer == inner * size % lanes:
            outer = size = 0
        return self.first % lanes, outer, inner, size


def alignment(streams: list[Tensor]) -> Alignment:
    """Choose the boundaries that let the most bytes move in whole vectors.

    Args:
        streams: (outer, inner, V) tensors, read or written.
    """
    steps = {}
    for index, x in enumerate(streams):
        if x.stride(2) == 1:
            first, lanes = x.data_ptr() // x.element_size(), VECTOR_BYTES // x.element_size()
            # A single row goes nowhere, whatever its strides say.
            by_row = _row_steps(x) if x.shape[0] * x.shape[1] > 1 else (0, 0, _UNBOUNDED)
            steps[index] = _Steps(first, *by_row, lanes)
    best, chosen = -1, Alignment(-1, (False,) * len(streams), 8)
    # The narrowest dtypes first: mostly one of them serves all, and the search is over.
    for leader, its in sorted(steps.items(), key=lambda item: -item[1].lanes):
        aligned = tuple(
            i in steps
            and steps[i].lanes <= its.lanes
            and steps[i].modulo(steps[i].lanes) == its.modulo(steps[i].lanes)
            for i in range(len(streams))
        )
        gain = sum(x.element_size() for x, yes in zip(streams, aligned, strict=True) if yes)
        if gain > best:
            best, chosen = gain, Alignment(leader, aligned, its.lanes)
        if all(aligned):
            break
    return chosen


@triton.jit
def decode(code):
    """The stride or size that ``encode`` made ``code`` of."""
    return (code >> 1) - 1


@triton.jit
def row_pointer(term, row, ALIGNED: tl.constexpr = False):
    """Pointer to [row, 0] of a term; offsets in int64, for N * V passes 2**31.

    ALIGNED says that it is a multiple of 16 bytes, here and not in the caller, where the compiler
    would lose it with the call.
    """
    inner = decode(term.inner)
    outer_offset = (row // inner).to(tl.int64) * decode(term.outer_stride)
    pointer = term.logits + outer_offset + (row % inner).to(tl.int64) * decode(term.inner_stride)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def contiguous_width(term):
    """Columns in a row of a contiguous tensor."""
    return decode(term.inner_stride)


@triton.jit
def head_columns(term, row, G: tl.constexpr):
    """Columns of a row before its first 16-byte boundary; the term's vector holds G columns."""
    pointer = row_pointer(term, row)
    itemsize: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    begin = (pointer.to(tl.int64) // itemsize % G).to(tl.int32)
    return (G - begin) % G


@triton.jit
def body_pointer(term, row, head, ALIGNED: tl.constexpr):
    """Pointer to [row, head]: what columns count from."""
    pointer = row_pointer(term, row) + head.to(tl.int64) * decode(term.column_stride)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def body_pointers(terms, row, head, ALIGNED: tl.constexpr):
    """``body_pointer`` of each term, as a tuple."""
    pointers = ()
    for i in tl.static_range(len(terms)):
        pointers += (body_pointer(terms[i], row, head, ALIGNED[i]),)
    return pointers


@triton.jit
def read(term, pointer, columns, mask, UNIT: tl.constexpr):
    """values[row, columns] in float32, 0 where ``mask`` forbids; columns count from ``pointer``."""
    if not UNIT:
        columns = columns.to(tl.int64) * decode(term.column_stride)
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)
