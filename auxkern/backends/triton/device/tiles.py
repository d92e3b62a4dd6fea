"""Tiles of logits made from hidden states and weights, in float32, without memory of their own."""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from auxkern.backends.triton.device.rows import decode
from auxkern.backends.triton.device.terms import scaled


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
def _powers(largest):
    """(power of two that brings a positive number to [2**14, 2**15), its inverse), both exact.

    For numbers below 2**-64 it stays what it is there, lest the accumulator that it multiplies overflow.
    """
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 127 - 64)
    power = ((127 + 14 + 127 - exponent) << 23).to(tl.float32, bitcast=True)
    return power, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _powers_of(head, rows, ids):
    """``_powers`` of an operand's rows, (R, 1) or (1, C), if its parts have the range of float16; else 1."""
    hidden: tl.constexpr = head.hidden.dtype.element_ty
    weight: tl.constexpr = head.weight.dtype.element_ty
    powers = (1.0, 1.0)
    if hidden == tl.float32 and weight == tl.float16:
        powers = _powers(tl.load(head.largest + rows)[:, None])
    elif hidden == tl.float16 and weight == tl.float32:
        powers = _powers(tl.load(head.largest + ids)[None, :])
    return powers


@triton.jit
def _leading(rest, dtype: tl.constexpr):
    """(the leading bits of float32 ``rest`` in a 16-bit ``dtype``, what is left of it), exactly.

    Of an infinite number NaN is left.
    """
    if dtype == tl.bfloat16:
        # Cut off: rounded, the largest of float32 would be infinite.
        value = (rest.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
        part = value.to(dtype)
    else:
        part = rest.to(dtype)
        value = part.to(tl.float32)
    return part, rest - value


@triton.jit
def _add_product(x, w, power, accumulator, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """accumulator (R, C) + x (R, K) @ w (K, C), the operand of more bits times ``power``, in PARTS."""
    if PARTS == 1:
        accumulator = tl.dot(x, w, accumulator, input_precision=PRECISION)
    elif x.dtype.fp_mantissa_width > w.dtype.fp_mantissa_width:
        rest = x.to(tl.float32) * power
        for _ in tl.static_range(PARTS):
            part, rest = _leading(rest, w.dtype)
            accumulator = tl.dot(part, w, accumulator)
    else:
        rest = w.to(tl.float32) * power
        for _ in tl.static_range(PARTS):
            part, rest = _leading(rest, x.dtype)
            accumulator = tl.dot(x, part, accumulator)
    return accumulator


@triton.jit
def _product(
    head, accumulator, power, rows, ids,
    D: tl.constexpr, UNIT_HIDDEN: tl.constexpr, UNIT_WEIGHT: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """accumulator (R, C) + power * hidden[rows] (R, D) @ weight[ids].T (D, C), in float32."""
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
        accumulator = _add_product(x, w, power, accumulator, PARTS, PRECISION)
    return accumulator


@triton.jit
def _of_rows(scale, rows):
    """A number as it is; of a pointer to a number for each row, theirs (R, 1)."""
    # The interpreter's numbers are Python's.
    if hasattr(scale, "dtype") and scale.dtype.is_ptr():
        scale = tl.load(scale + rows)[:, None]
    return scale


@triton.jit
def products_of(
    heads, rows, ids,
    D: tl.constexpr, UNIT_HIDDEN: tl.constexpr, UNIT_WEIGHT: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, BEGINS: tl.constexpr, RESCALED: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
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
            accumulator *= _of_rows(heads[i].rows_rescale, rows) * heads[i].rescale
        power, inverse = _powers_of(heads[i], rows, ids)
        accumulator = inverse * _product(
            heads[i], accumulator * power, power, rows, ids,
            D[i], UNIT_HIDDEN[i], UNIT_WEIGHT[i], EVEN[i], PARTS[i], BLOCK_D, PRECISION,
        )  # fmt: skip
        if BIAS[i]:
            bias = tl.load(heads[i].bias + ids.to(tl.int64) * decode(heads[i].bias_stride))
            accumulator += bias.to(tl.float32)[None, :]
    products += (accumulator,)
    return products


@triton.jit
def group_shares(groups, products, rows, CAPPED: tl.constexpr):
    """Each group's share of z at ``rows``, as a tuple."""
    shares = ()
    for g in tl.static_range(len(groups)):
        shares += (scaled(groups[g], _of_rows(groups[g].scale, rows), products[g], CAPPED[g]),)
    return shares


@triton.jit
def _halves_of(x):
    """The first and the last half of the columns of x (R, C): registers that stay where they are."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _slices_of(x, COUNT: tl.constexpr):
    """The columns of x (R, C) in COUNT parts, in order; 1, 2, 4 or 8."""
    slices = (x,)
    for level in tl.static_range(3):
        if COUNT >> level > 1:
            halves = ()
            for s in tl.static_range(len(slices)):
                halves += _halves_of(slices[s])
            slices = halves
    return slices


@triton.jit
def product_slices(products, COUNT: tl.constexpr):
    """The products of COUNT equal parts of a tile's ids, in order: a tuple of each group's, for each part.

    Products take registers enough; what is made of a slice is gone before the next one is looked at.
    """
    by_group = ()
    for g in tl.static_range(len(products)):
        by_group += (_slices_of(products[g], COUNT),)
    slices = ()
    for s in tl.static_range(COUNT):
        its = ()
        for g in tl.static_range(len(products)):
            its += (by_group[g][s],)
        slices += (its,)
    return slices


@triton.jit
def tile_indices(block, tile, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """(rows, columns, rows to read, ids to read): beyond the end the last one is read again."""
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    return rows, columns, tl.minimum(rows, N - 1), tl.minimum(columns, V - 1)
