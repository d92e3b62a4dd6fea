"""What is done to a row's entries, K ids and values of all its sparse terms, outside of the tiles.

Before: they are sorted by id, so that a tile finds its own. After: the tiles have left z at every entry,
and the gradient of its value is that of z there, in float32, never rounded to the 16 bits of a dz.
"""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from auxkern.backends.triton.device.numerics import exp
from auxkern.backends.triton.device.softmax import (
    NO_COLUMN,
    absent_logit,
    coefficients_of,
    nll_of,
    pivot_of,
)


@triton.jit
def _keys(ids, k, K, V):
    """int32 ids at places k; behind all others if there is none, or if it is outside of the vocabulary."""
    found = tl.load(ids + k.to(tl.int64), mask=k < K, other=-1).to(tl.int64)
    return tl.where((found >= 0) & (found < V), found, NO_COLUMN).to(tl.int32)


@triton.jit(do_not_specialize=["ids", "values", "ids_stride", "values_stride", "K", "V", "tiles"])
def entries_order_kernel(
    ids, values,  # (N, K) integers and floats, columns adjacent
    entries,  # Entries: sorted (N, K) int32 ids and float32 values, (N, tiles + 1) int32 first, out
    last,  # (N, K) int32, out: place of the last of the equal ids, sorted
    ids_stride, values_stride,  # between rows
    K, V, tiles,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """LANES entries of a row go where as many are before them, and LANES tiles learn where theirs begin."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    key = _keys(ids + row * ids_stride, lane, K, V)
    begins = lane * BLOCK_V
    before = tl.zeros([LANES], tl.int32)
    up_to = tl.zeros([LANES], tl.int32)
    below = tl.zeros([LANES], tl.int32)
    for start in range(0, K, STEP):
        other = start + tl.arange(0, STEP)
        its = _keys(ids + row * ids_stride, other, K, V)[None, :]
        below += tl.sum((its < begins[:, None]).to(tl.int32), axis=1)
        # There are more tiles than entries.
        if tl.program_id(1) * LANES < K:
            # Equal ids stay in the order given, in which their values add up.
            sooner = (its < key[:, None]) | ((its == key[:, None]) & (other[None, :] < lane[:, None]))
            before += tl.sum(sooner.to(tl.int32), axis=1)
            up_to += tl.sum((its <= key[:, None]).to(tl.int32), axis=1)
    there = lane < K
    value = tl.load(values + row * values_stride + lane, mask=there, other=0.0).to(tl.float32)
    to = row * K + before
    tl.store(entries.ids + to, key, mask=there)
    tl.store(entries.logits + to, value, mask=there)
    tl.store(last + row * K + lane, up_to - 1, mask=there)
    tl.store(entries.first + row * (tiles + 1) + lane, below, mask=lane <= tiles)


@triton.jit(do_not_specialize=["ids", "target", "ids_stride", "N", "K", "V"])
def entries_gradient_kernel(
    ids,  # (N, K) integers, columns adjacent
    entries,  # Entries: z at the sorted ones
    last,  # from entries_order_kernel
    target,  # (N,) int64
    coefficients,  # (N,) float32 each
    factor,  # (N,) float32
    d_out,  # (N, K) float32, out
    ids_stride, N, K, V,
    R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """factor * dz at each entry; 0 outside of the vocabulary."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    present = rows < N
    k = (tl.program_id(1) * STEP + tl.arange(0, STEP))[None, :]
    row_max, e, c, t, live = coefficients_of(coefficients, rows, present)
    y = tl.load(target + rows, present, -1)
    its_factor = tl.load(factor + rows, present, 0.0)
    there = present[:, None] & (k < K)
    at = rows[:, None] * K + k
    found = tl.load(ids + rows[:, None] * ids_stride + k, mask=there, other=-1).to(tl.int64)
    inside = (found >= 0) & (found < V)
    # Nobody wrote z where the id is outside.
    place = tl.load(last + at, mask=inside, other=0)
    z = tl.load(entries.z + rows[:, None] * K + place, mask=inside, other=0.0)
    d = e[:, None] * exp(z - row_max[:, None]) - c[:, None]
    d = tl.where(found == y[:, None], t[:, None], d) * its_factor[:, None]
    # A dead row's logits may be NaN; its gradient is 0 all the same.
    tl.store(d_out + at, tl.where(inside & live[:, None], d, 0.0), mask=there)


@triton.jit(do_not_specialize=["target", "N", "K", "V", "ignore_index", "end"])
def entries_nll_kernel(
    entries,  # Entries of one term, sorted
    target,  # (N,) int64
    nll,  # (N,) float32, out
    N, K, V, ignore_index,
    end,  # K + 1: a logit is complete when another id begins, behind the last entry, too
    R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """nll of R rows under the softmax of their entries and 0 elsewhere."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    present = rows < N
    y = tl.load(target + rows, present, 0)
    top = tl.full([R], -float("inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    its = tl.zeros([R], tl.float32)  # the target's logit
    others = tl.zeros([R], tl.int32)  # distinct ids that are not the target
    current = tl.full([R], NO_COLUMN, tl.int32)
    logit = tl.zeros([R], tl.float32)
    for start in range(0, end, STEP):
        for i in tl.static_range(STEP):
            k = start + i
            there = present & (k < K)
            ids = tl.load(entries.ids + rows * K + k, mask=there, other=NO_COLUMN)
            values = tl.load(entries.logits + rows * K + k, mask=there, other=0.0)
            complete = (ids != current) & (current != NO_COLUMN)
            other = complete & (current != y)
            new_top = tl.where(other, tl.maximum(top, logit), top)
            pivot = pivot_of(new_top)
            total = total * exp(top - pivot) + tl.where(other, exp(logit - pivot), 0.0)
            top = new_top
            others += other.to(tl.int32)
            its = tl.where(complete & (current == y), logit, its)
            logit = tl.where(ids == current, logit + values, values)
            current = ids
    in_range = (y >= 0) & (y < V)
    zeros = V - others - in_range.to(tl.int32)
    new_top = tl.where(zeros > 0, tl.maximum(top, 0.0), top)
    pivot = pivot_of(new_top)
    total = total * exp(top - pivot) + tl.where(zeros > 0, zeros * exp(0.0 - pivot), 0.0)
    row, _, _ = nll_of((new_top, total), tl.where(in_range, its, absent_logit(y)))
    tl.store(nll + rows, tl.where(y == ignore_index, 0.0, row), mask=present)
