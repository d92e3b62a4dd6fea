"""Tiles of logits made from hidden states and weights, in float32, without memory of their own."""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from auxkern.backends.triton.device.rows import decode
from auxkern.backends.triton.device.terms import share_of


@triton.jit
def tile_of_program(program, row_blocks, tiles, GROUP: tl.constexpr):
    """(row block, vocabulary tile): rows fastest within a group, so that a weight is read from L2."""
    first = program // (GROUP * tiles) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * tiles)
    return first + within % size, within // size


@triton.jit
def _operand(pointer, stride, rows, EVEN: tl.constexpr):
    """Pointers to column 0 of ``rows`` of a strided matrix."""
    step = decode(stride).to(tl.int64)
    if EVEN:
        step = tl.multiple_of(step, 8)
    return pointer + rows.to(tl.int64) * step


@triton.jit
def _along(columns, stride, UNIT: tl.constexpr):
    """Offsets of columns; int64 unless they are adjacent, for a weight stored (D, V) passes 2**31."""
    if not UNIT:
        columns = columns.to(tl.int64) * decode(stride)
    return columns


@triton.jit
def _product(
    head, accumulator, rows, ids,
    D: tl.constexpr, UNIT_HIDDEN: tl.constexpr, UNIT_WEIGHT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """accumulator (R, C) + hidden[rows] (R, D) @ weight[ids].T (D, C), in float32."""
    a = _operand(head.hidden, head.hidden_stride, rows, EVEN)
    b = _operand(head.weight, head.weight_stride, ids, EVEN)
    k = tl.arange(0, BLOCK_D)
    for d in range(0, D, BLOCK_D):
        here = d + k
        x_at = a[:, None] + _along(here, head.hidden_column, UNIT_HIDDEN)[None, :]
        w_at = b[None, :] + _along(here, head.weight_column, UNIT_WEIGHT)[:, None]
        if D % BLOCK_D == 0:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(here < D)[None, :], other=0.0)
            w = tl.load(w_at, mask=(here < D)[:, None], other=0.0)
        if x.dtype != w.dtype:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        accumulator = tl.dot(x, w, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def products_of(
    heads, rows, ids,
    D: tl.constexpr, UNIT_HIDDEN: tl.constexpr, UNIT_WEIGHT: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, BEGINS: tl.constexpr, RESCALED: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One (R, C) accumulator for each group of heads, in units of its last head's scale."""
    products = ()
    accumulator = tl.zeros([rows.shape[0], ids.shape[0]], tl.float32)
    for i in tl.static_range(len(heads)):
        if BEGINS[i]:
            if i > 0:
                products += (accumulator,)
                accumulator = tl.zeros([rows.shape[0], ids.shape[0]], tl.float32)
        elif RESCALED[i]:
            accumulator *= heads[i].rescale
        accumulator = _product(
            heads[i], accumulator, rows, ids,
            D[i], UNIT_HIDDEN[i], UNIT_WEIGHT[i], EVEN[i], BLOCK_D, PRECISION,
        )  # fmt: skip
        if BIAS[i]:
            bias = tl.load(heads[i].bias + ids.to(tl.int64) * decode(heads[i].bias_stride))
            accumulator += bias.to(tl.float32)[None, :]
    products += (accumulator,)
    return products


@triton.jit
def group_shares(groups, products, CAPPED: tl.constexpr):
    """Each group's share of z, as a tuple."""
    shares = ()
    for g in tl.static_range(len(groups)):
        shares += (share_of(groups[g], products[g], CAPPED[g]),)
    return shares


@triton.jit
def tile_indices(block, tile, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """(rows, columns, rows to read, ids to read): beyond the end the last one is read again."""
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    return rows, columns, tl.minimum(rows, N - 1), tl.minimum(columns, V - 1)
