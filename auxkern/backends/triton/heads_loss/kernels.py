"""Cross-entropy of a sum of output heads: tiles of logits are made, used and dropped on chip.

Forward: one program makes a tile of z, the dot products of every head in one float32 accumulator,
and leaves its maximum, sum and so on; a second kernel combines the tiles of a row in fixed order.
The target is left out of the sums, as in ``logits_loss/kernels.py``: a sure row's nll does not cancel.

Gradient, one-write: the forward also writes e = exp(z - m) in 16 bits, m the maximum of the row
within the tile, so that e lies in [0, 1] whatever the logits; when the rows' sums are known, one
light pass turns e into dz. Gradient, recompute: the tile is made a second time and dz written.
"""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from auxkern.backends.triton.device.entries import entries_of, with_entries
from auxkern.backends.triton.device.numerics import tanh_slope
from auxkern.backends.triton.device.softmax import (
    NO_COLUMN,
    NO_KEY,
    NO_TARGET,
    absent_logit,
    coefficients_of,
    fold_best,
    nll_of,
    pivot_of,
)
from auxkern.backends.triton.device.terms import total_of
from auxkern.backends.triton.device.tiles import group_shares, products_of, tile_indices, tile_of_program


@triton.jit
def _tile_softmax(z):
    """(maximum, sum of exp(z - maximum), exp(z - maximum)) of each row; -inf is left out."""
    top = tl.max(z, axis=1)
    e = tl.exp(z - pivot_of(top)[:, None])
    return top, tl.sum(e, axis=1), e


@triton.jit(do_not_specialize=["target", "N", "V", "row_blocks", "tiles"])
def heads_forward_kernel(
    heads,  # I of (N, D) hidden states and (>= V, D) weights
    groups,  # scale and softcap of each accumulator
    entries,  # Entries: of sparse terms beside the heads, if ENTRIES
    target,  # (N,) int64
    partial,  # (2.., tiles, N) float32, (2, tiles, N) int32 and (1.., N) float32, out
    e_out,  # (N, tiles * BLOCK_V) float16 or float32, out, if WRITE
    N, V, row_blocks, tiles,
    D: tl.constexpr, UNIT_HIDDEN: tl.constexpr, UNIT_WEIGHT: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, BEGINS: tl.constexpr, RESCALED: tl.constexpr, PARTS: tl.constexpr,
    CAPPED: tl.constexpr, SMOOTH: tl.constexpr, STATS: tl.constexpr, WRITE: tl.constexpr,
    ENTRIES: tl.constexpr, STORE_ENTRIES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics of a tile (BLOCK_N rows, BLOCK_V ids) of z, and exp(z - its maximum) if WRITE.

    And z at the tile's entries if STORE_ENTRIES.
    """
    block, tile = tile_of_program(tl.program_id(0), row_blocks, tiles, GROUP)
    rows, columns, read_rows, read_ids = tile_indices(block, tile, N, V, BLOCK_N, BLOCK_V)
    present = rows < N
    products = products_of(
        heads, read_rows, read_ids,
        D, UNIT_HIDDEN, UNIT_WEIGHT, EVEN, BIAS, BEGINS, RESCALED, PARTS, BLOCK_D, PRECISION,
    )  # fmt: skip
    shares = group_shares(groups, products, read_rows, CAPPED)
    z = total_of(shares)
    if ENTRIES:
        first, end = entries_of(entries, read_rows, tile)
        z = with_entries(z, entries, read_rows, present, columns, first, end, STORE_ENTRIES)

    y = tl.load(target + read_rows)
    valid = (columns < V)[None, :]
    hit = (columns[None, :] == y[:, None]) & valid
    counted = valid & (columns[None, :] != y[:, None])
    top, total, e = _tile_softmax(tl.where(counted, z, -float("inf")))
    if WRITE:
        # Rows are as wide as whole tiles: no mask along them, so that stores stay wide.
        width = tiles * BLOCK_V
        at = e_out + rows.to(tl.int64)[:, None] * tl.multiple_of(width, BLOCK_V) + columns[None, :]
        tl.store(at, e.to(e_out.dtype.element_ty), mask=present[:, None])

    plane = N.to(tl.int64) * tiles
    at = partial.sums + tile.to(tl.int64) * N + rows
    tl.store(at, top, mask=present)
    tl.store(at + plane, total, mask=present)
    # Only the tile that holds the target has it: one writer.
    here = present & (y >= tile * BLOCK_V) & (y < (tile + 1) * BLOCK_V) & (y < V)
    tl.store(partial.target + rows, tl.sum(tl.where(hit, z, 0.0), axis=1), mask=here)
    if SMOOTH:
        gaps = tl.where(counted, pivot_of(top)[:, None] - z, 0.0)
        tl.store(at + 2 * plane, tl.sum(gaps, axis=1), mask=present)
    if STATS:
        nothing = (tl.full([BLOCK_N], NO_KEY, tl.int32), tl.full([BLOCK_N], NO_COLUMN, tl.int32))
        key, column = fold_best(nothing, z, columns[None, :], valid)
        best = partial.best + tile.to(tl.int64) * N + rows
        tl.store(best, key, mask=present)
        tl.store(best + plane, column, mask=present)
        for g in tl.static_range(len(shares)):
            share_top, share_total, _ = _tile_softmax(tl.where(counted, shares[g], -float("inf")))
            tl.store(at + (3 + 2 * g) * plane, share_top, mask=present)
            tl.store(at + (4 + 2 * g) * plane, share_total, mask=present)
            its = tl.sum(tl.where(hit, shares[g], 0.0), axis=1)
            tl.store(partial.target + (1 + g) * N.to(tl.int64) + rows, its, mask=here)


@triton.jit
def _combined(at, plane, N, tiles, present, R: tl.constexpr, LANES: tl.constexpr):
    """The online softmax (maximum, sum) of R rows from their tiles' at ``at`` and ``at + plane``."""
    top = tl.full([R], -float("inf"), tl.float32)
    lane = tl.arange(0, LANES)
    for first in range(0, tiles, LANES):
        mask = (first + lane < tiles)[:, None] & present[None, :]
        there = at[None, :] + (first + lane).to(tl.int64)[:, None] * N
        top = tl.maximum(top, tl.max(tl.load(there, mask, -float("inf")), axis=0))
    pivot = pivot_of(top)
    total = tl.zeros([R], tl.float32)
    for first in range(0, tiles, LANES):
        mask = (first + lane < tiles)[:, None] & present[None, :]
        there = at[None, :] + (first + lane).to(tl.int64)[:, None] * N
        tops = tl.load(there, mask, -float("inf"))
        total += tl.sum(tl.load(there + plane, mask, 0.0) * tl.exp(tops - pivot[None, :]), axis=0)
    return top, total


@triton.jit
def _combined_distance(
    at, plane, N, V, tiles, y, pivot, present, R: tl.constexpr, LANES: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Sum of pivot - z over the columns that are not the target."""
    distance = tl.zeros([R], tl.float32)
    for first in range(0, tiles, LANES):
        tile = first + tl.arange(0, LANES)
        mask = (tile < tiles)[:, None] & present[None, :]
        there = at[None, :] + tile.to(tl.int64)[:, None] * N
        tops = tl.load(there, mask, 0.0)
        # Of the target's tile one column was left out.
        its = (y // BLOCK_V == tile[:, None]).to(tl.int32)
        counted = (tl.minimum(BLOCK_V, V - tile * BLOCK_V)[:, None] - its).to(tl.float32)
        moved = tl.load(there + 2 * plane, mask, 0.0) + counted * (pivot[None, :] - pivot_of(tops))
        distance += tl.sum(tl.where(mask, moved, 0.0), axis=0)
    return distance


@triton.jit
def _combined_best(at, plane, N, tiles, present, R: tl.constexpr, LANES: tl.constexpr):
    """The lowest column of the largest key of R rows."""
    key = tl.full([R], NO_KEY, tl.int32)
    column = tl.full([R], NO_COLUMN, tl.int32)
    for first in range(0, tiles, LANES):
        tile = first + tl.arange(0, LANES)
        mask = (tile < tiles)[:, None] & present[None, :]
        there = at[None, :] + tile.to(tl.int64)[:, None] * N
        keys = tl.load(there, mask, NO_KEY)
        top = tl.max(keys, axis=0)
        columns = tl.load(there + plane, mask, NO_COLUMN)
        lowest = tl.min(tl.where(keys == top[None, :], columns, NO_COLUMN), axis=0)
        # Tiles come in order: an equal key later on has a higher column.
        column = tl.where(top > key, lowest, column)
        key = tl.maximum(key, top)
    return column


@triton.jit(do_not_specialize=["target", "N", "V", "ignore_index", "tiles"])
def heads_combine_kernel(
    target,  # (N,) int64
    partial,  # written by heads_forward_kernel
    out,  # Rows: (N,) float32 and so on
    N, V, ignore_index, tiles,
    GROUPS: tl.constexpr, SMOOTH: tl.constexpr, STATS: tl.constexpr, BLOCK_V: tl.constexpr,
    R: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Statistics of R rows from their tiles, in fixed order."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    present = rows < N
    y = tl.load(target + rows, present, 0)
    ignored = y == ignore_index
    in_range = present & (y >= 0) & (y < V) & (ignored == 0)
    plane = N.to(tl.int64) * tiles
    at = partial.sums + rows
    softmax = _combined(at, plane, N, tiles, present, R, LANES)
    goal = tl.where(in_range, tl.load(partial.target + rows, in_range, 0.0), absent_logit(y))
    nll, largest, log_sum = nll_of(softmax, goal)
    tl.store(out.nll + rows, tl.where(ignored, 0.0, nll), mask=present)
    row_max = tl.where(log_sum == log_sum, largest, float("nan"))
    tl.store(out.row_max + rows, tl.where(ignored, 0.0, row_max), mask=present)
    tl.store(out.log_sum + rows, tl.where(ignored, 0.0, log_sum), mask=present)
    if SMOOTH:
        pivot = pivot_of(softmax[0])
        holder = tl.where(in_range, y, -BLOCK_V)[None, :]
        distance = _combined_distance(at, plane, N, V, tiles, holder, pivot, present, R, LANES, BLOCK_V)
        # Of a row with its target elsewhere the largest is the pivot.
        distance += tl.where(y == NO_TARGET, 0.0, (V - 1) * (largest - pivot) + (largest - goal))
        tl.store(out.smooth + rows, tl.where(ignored, 0.0, log_sum + distance / V), mask=present)
    if STATS:
        column = _combined_best(partial.best + rows, plane, N, tiles, present, R, LANES)
        tl.store(out.argmax + rows, tl.where(ignored, -1, column).to(tl.int64), mask=present)
        for g in tl.static_range(GROUPS):
            its = tl.load(partial.target + (1 + g) * N.to(tl.int64) + rows, in_range, 0.0)
            its = tl.where(in_range, its, absent_logit(y))
            softmax = _combined(at + (3 + 2 * g) * plane, plane, N, tiles, present, R, LANES)
            term_nll, _, _ = nll_of(softmax, its)
            there = out.term_nll + g * N.to(tl.int64) + rows
            tl.store(there, tl.where(ignored, 0.0, term_nll), mask=present)


@triton.jit(do_not_specialize=["target", "N", "tiles"])
def heads_scale_kernel(
    e_in,  # (N, tiles * BLOCK_V) float16 or float32: exp(z - maximum of the row within the tile)
    d_out,  # of the same size, out; the same memory
    target,  # (N,) int64
    tops,  # (tiles, N) float32: those maxima
    coefficients,  # (N,) float32 each
    N, tiles,
    R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dz[n, v] = exp_coefficient * exp(z - row_max) - constant, target_gradient at the target."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    tile = tl.program_id(1)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    present = rows < N
    row_max, e, c, t, live = coefficients_of(coefficients, rows, present)
    y = tl.load(target + rows, present, -1)
    top = tl.load(tops + tile.to(tl.int64) * N + rows, present, 0.0)
    factor = tl.where(live, e * tl.exp(top - row_max), 0.0)
    offset = rows.to(tl.int64)[:, None] * tl.multiple_of(tiles * BLOCK_V, BLOCK_V) + columns[None, :]
    x = tl.load(e_in + offset, present[:, None] & live[:, None], 0.0).to(tl.float32)
    d = factor[:, None] * x - c[:, None]
    d = tl.where(columns[None, :] == y[:, None], t[:, None], d)
    tl.store(d_out + offset, d.to(d_out.dtype.element_ty), mask=present[:, None])


@triton.jit(do_not_specialize=["target", "N", "V", "row_blocks", "tiles"])
def heads_gradient_kernel(
    heads, groups, entries,  # as in the forward
    target,  # (N,) int64
    coefficients,  # (N,) float32 each
    d_out,  # J of (N, tiles * BLOCK_V), out
    N, V, row_blocks, tiles,
    D: tl.constexpr, UNIT_HIDDEN: tl.constexpr, UNIT_WEIGHT: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, BEGINS: tl.constexpr, RESCALED: tl.constexpr, PARTS: tl.constexpr,
    CAPPED: tl.constexpr, SLOPES: tl.constexpr, ENTRIES: tl.constexpr, STORE_ENTRIES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz of a tile, made from the hidden states again; times the slope of group SLOPES[j] if >= 0."""
    block, tile = tile_of_program(tl.program_id(0), row_blocks, tiles, GROUP)
    rows, columns, read_rows, read_ids = tile_indices(block, tile, N, V, BLOCK_N, BLOCK_V)
    present = rows < N
    products = products_of(
        heads, read_rows, read_ids,
        D, UNIT_HIDDEN, UNIT_WEIGHT, EVEN, BIAS, BEGINS, RESCALED, PARTS, BLOCK_D, PRECISION,
    )  # fmt: skip
    z = total_of(group_shares(groups, products, read_rows, CAPPED))
    if ENTRIES:
        first, end = entries_of(entries, read_rows, tile)
        z = with_entries(z, entries, read_rows, present, columns, first, end, STORE_ENTRIES)
    row_max, e, c, t, live = coefficients_of(coefficients, read_rows, present)
    y = tl.load(target + read_rows)
    dz = e[:, None] * tl.exp(z - row_max[:, None]) - c[:, None]
    dz = tl.where(columns[None, :] == y[:, None], t[:, None], dz)
    width = tl.multiple_of(tiles * BLOCK_V, BLOCK_V)
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    for j in tl.static_range(len(d_out)):
        d = dz
        if SLOPES[j] >= 0:
            d *= tanh_slope(products[SLOPES[j]] * (1.0 / groups[SLOPES[j]].softcap))
        # A dead row's logits may be NaN; its gradient is 0 all the same.
        d = tl.where(live[:, None], d, 0.0)
        tl.store(d_out[j] + at, d.to(d_out[j].dtype.element_ty), mask=present[:, None])
