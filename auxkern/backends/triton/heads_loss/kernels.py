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
from auxkern.backends.triton.device.numerics import exp, tanh_slope
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
from auxkern.backends.triton.device.tiles import (
    group_shares,
    product_slices,
    products_of,
    tile_indices,
    tile_of_program,
)


@triton.jit
def _counted(s, hit, ids, WIDTH: tl.constexpr):
    """(R, WIDTH), of slice s of a tile: which columns are ids, and which are not the row's target.

    Args:
        hit: (R,) int32, column of the row's target in the tile; -1 for none.
        ids: in the tile and behind it.
    """
    column = tl.arange(0, WIDTH)[None, :]
    return column < ids - s * WIDTH, column != (hit - s * WIDTH)[:, None]


@triton.jit
def _without_target(slices, hit, ids):
    """(z of each row at its target or 0, slices with -inf there and beyond the ids, the rows' maxima)."""
    goal = tl.zeros_like(slices[0])
    top = tl.full(goal.shape, -float("inf"), tl.float32)
    masked = ()
    for s in tl.static_range(len(slices)):
        valid, other = _counted(s, hit, ids, goal.shape[1])
        goal = tl.where(other, goal, slices[s])
        z = tl.where(valid & other, slices[s], -float("inf"))
        top = tl.maximum(top, z)
        masked += (z,)
    return tl.sum(goal, axis=1), masked, tl.max(top, axis=1)


@triton.jit
def _sums_of(slices, pivot, hit, ids, e_at, present, WRITE: tl.constexpr, SMOOTH: tl.constexpr):
    """Of each row the sums of exp(z - pivot) and, if SMOOTH, of pivot - z; exp too at ``e_at`` if WRITE.

    Args:
        slices: with -inf where a column does not count.
        e_at: (R, 1) pointers to the tile's first column.
    """
    WIDTH: tl.constexpr = slices[0].shape[1]
    total = tl.zeros_like(slices[0])
    gaps = total
    for s in tl.static_range(len(slices)):
        d = slices[s] - pivot[:, None]
        e = exp(d)
        total += e
        if WRITE:
            at = e_at + (s * WIDTH + tl.arange(0, WIDTH))
            tl.store(at, e.to(at.dtype.element_ty), mask=present[:, None])
        if SMOOTH:
            # Of a logit of -inf that counts the gap is infinite.
            valid, other = _counted(s, hit, ids, WIDTH)
            gaps -= tl.where(valid & other, d, 0.0)
    return tl.sum(total, axis=1), tl.sum(gaps, axis=1)


@triton.jit
def _best_of(slices, first, V):
    """(key, lowest column) of the largest z of each row of a tile whose first column is ``first``."""
    R: tl.constexpr = slices[0].shape[0]
    WIDTH: tl.constexpr = slices[0].shape[1]
    best = (tl.full([R], NO_KEY, tl.int32), tl.full([R], NO_COLUMN, tl.int32))
    for s in tl.static_range(len(slices)):
        columns = first + s * WIDTH + tl.arange(0, WIDTH)
        best = fold_best(best, slices[s], columns[None, :], (columns < V)[None, :])
    return best


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
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics of a tile (BLOCK_N rows, BLOCK_V ids) of z, and exp(z - its maximum) if WRITE.

    And z at the tile's entries if STORE_ENTRIES.
    """
    block, tile = tile_of_program(tl.program_id(0), row_blocks, tiles, GROUP)
    rows, _, read_rows, read_ids = tile_indices(block, tile, N, V, BLOCK_N, BLOCK_V)
    present = rows < N
    products = products_of(
        heads, read_rows, read_ids,
        D, UNIT_HIDDEN, UNIT_WEIGHT, EVEN, BIAS, BEGINS, RESCALED, PARTS, BLOCK_D, PRECISION,
    )  # fmt: skip
    shares = ()
    slices = ()
    parts = product_slices(products, SLICES)
    for s in tl.static_range(SLICES):
        shares += (group_shares(groups, parts[s], read_rows, CAPPED),)
        slices += (total_of(shares[s]),)
    column = tile * BLOCK_V
    if ENTRIES:
        first, end = entries_of(entries, read_rows, tile)
        slices = with_entries(slices, entries, read_rows, present, column, first, end, STORE_ENTRIES)
    y = tl.load(target + read_rows)
    # Only the tile that holds the target has it: one writer.
    here = (y >= column) & (y < tl.minimum(column + BLOCK_V, V))
    hit = tl.where(here, y - column, -1).to(tl.int32)
    here &= present
    plane = N.to(tl.int64) * tiles
    at = partial.sums + tile.to(tl.int64) * N + rows
    goal, masked, top = _without_target(slices, hit, V - column)
    tl.store(partial.target + rows, goal, mask=here)
    tl.store(at, top, mask=present)
    # Rows are as wide as whole tiles: no mask along them, so that stores stay wide.
    width = tl.multiple_of(tiles * BLOCK_V, BLOCK_V)
    e_at = e_out + rows.to(tl.int64)[:, None] * width + tl.multiple_of(column, BLOCK_V)
    total, gaps = _sums_of(masked, pivot_of(top), hit, V - column, e_at, present, WRITE, SMOOTH)
    tl.store(at + plane, total, mask=present)
    if SMOOTH:
        tl.store(at + 2 * plane, gaps, mask=present)
    if STATS:
        key, lowest = _best_of(slices, column, V)
        best = partial.best + tile.to(tl.int64) * N + rows
        tl.store(best, key, mask=present)
        tl.store(best + plane, lowest, mask=present)
        for g in tl.static_range(len(groups)):
            of_group = ()
            for s in tl.static_range(SLICES):
                of_group += (shares[s][g],)
            goal, masked, top = _without_target(of_group, hit, V - column)
            tl.store(at + (3 + 2 * g) * plane, top, mask=present)
            total, _ = _sums_of(masked, pivot_of(top), hit, V - column, e_at, present, False, False)
            tl.store(at + (4 + 2 * g) * plane, total, mask=present)
            tl.store(partial.target + (1 + g) * N.to(tl.int64) + rows, goal, mask=here)


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
        total += tl.sum(tl.load(there + plane, mask, 0.0) * exp(tops - pivot[None, :]), axis=0)
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
    factor = tl.where(live, e * exp(top - row_max), 0.0)
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
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz of a tile, made from the hidden states again; times the slope of group SLOPES[j] if >= 0."""
    block, tile = tile_of_program(tl.program_id(0), row_blocks, tiles, GROUP)
    rows, _, read_rows, read_ids = tile_indices(block, tile, N, V, BLOCK_N, BLOCK_V)
    present = rows < N
    products = products_of(
        heads, read_rows, read_ids,
        D, UNIT_HIDDEN, UNIT_WEIGHT, EVEN, BIAS, BEGINS, RESCALED, PARTS, BLOCK_D, PRECISION,
    )  # fmt: skip
    parts = product_slices(products, SLICES)
    slices = ()
    for s in tl.static_range(SLICES):
        slices += (total_of(group_shares(groups, parts[s], read_rows, CAPPED)),)
    column = tile * BLOCK_V
    if ENTRIES:
        first, end = entries_of(entries, read_rows, tile)
        slices = with_entries(slices, entries, read_rows, present, column, first, end, STORE_ENTRIES)
    row_max, e, c, t, live = coefficients_of(coefficients, read_rows, present)
    y = tl.load(target + read_rows)
    hit = tl.where((y >= column) & (y < column + BLOCK_V), y - column, -1).to(tl.int32)
    width = tl.multiple_of(tiles * BLOCK_V, BLOCK_V)
    WIDTH: tl.constexpr = BLOCK_V // SLICES
    along = tl.arange(0, WIDTH)[None, :]
    at = rows.to(tl.int64)[:, None] * width + tl.multiple_of(column, BLOCK_V) + along
    for s in tl.static_range(SLICES):
        # A fused 0, lest z's product be fused with the difference: rounded otherwise than in the forward, the
        # largest z would not be the row's maximum.
        dz = e[:, None] * exp((slices[s] + 0.0) - row_max[:, None]) - c[:, None]
        dz = tl.where(along == (hit - s * WIDTH)[:, None], t[:, None], dz)
        for j in tl.static_range(len(d_out)):
            d = dz
            if SLOPES[j] >= 0:
                d *= tanh_slope(parts[s][SLOPES[j]] * (1.0 / groups[SLOPES[j]].softcap))
            # A dead row's logits may be NaN; its gradient is 0 all the same.
            d = tl.where(live[:, None], d, 0.0)
            tl.store(d_out[j] + (at + s * WIDTH), d.to(d_out[j].dtype.element_ty), mask=present[:, None])
