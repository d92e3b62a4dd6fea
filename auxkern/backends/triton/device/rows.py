"""How kernels find, align and read the rows of a sum of terms.

A row of an odd vocabulary does not begin at a 16-byte boundary, and Triton then reads it element by
element. So a row is cut at the boundaries of one of its streams (a term read or a gradient written):

    [ head | body: whole granules of G columns, at 16-byte boundaries | tail ]

``head`` and ``tail`` are shorter than G columns. The other streams whose rows begin equally far from
a boundary are aligned with it; the host finds out which (``launch.alignment``), kernels only where the row
begins. Columns count from the end of the head, so that tiles of the body carry no run-time shift.
"""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl


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
def share_of_program(split, splits, V, BLOCK: tl.constexpr):
    """(begin, end of whole tiles, end) of the columns that program ``split`` of ``splits`` takes."""
    share = tl.cdiv(tl.cdiv(V, BLOCK), splits) * BLOCK
    # Not cut at V, which would hide from the compiler that it is a multiple of BLOCK.
    begin = split * share
    end = tl.minimum(begin + share, V)
    return begin, begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK, end


@triton.jit
def read(term, pointer, columns, mask, UNIT: tl.constexpr):
    """values[row, columns] in float32, 0 where ``mask`` forbids; columns count from ``pointer``."""
    if not UNIT:
        columns = columns.to(tl.int64) * decode(term.column_stride)
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)
