"""Entries of sparse terms in a tile of logits."""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from auxkern.backends.triton.device.rows import decode


@triton.jit
def entries_of(entries, rows, tile):
    """(first, end): places of the entries that a tile has of each row (R,), in a row's sorted ones."""
    at = entries.first + rows.to(tl.int64) * decode(entries.tiles) + tile
    return tl.load(at), tl.load(at + 1)


@triton.jit
def with_entries(slices, entries, rows, present, column, first, end, STORE: tl.constexpr):
    """z of a tile and the entries of its columns; what it then is at each, in memory if STORE.

    The last of equal ids has all of them in its z.

    Args:
        slices: z (R, WIDTH) of equal parts of the tile's columns, in order, the first of which is ``column``.
        rows, present: (R,), and which of them to store for.
        first, end: as ``entries_of`` says. Most tiles have none, and the loop does not turn.
    """
    WIDTH: tl.constexpr = slices[0].shape[1]
    begin = rows.to(tl.int64) * decode(entries.K) + first
    count = end - first
    for i in range(tl.max(count, axis=0)):
        there = i < count
        at = begin + i
        place = tl.load(entries.ids + at, mask=there, other=-1) - column
        values = tl.load(entries.logits + at, mask=there, other=0.0)
        its = tl.zeros_like(slices[0])
        added = ()
        for s in tl.static_range(len(slices)):
            hit = tl.arange(0, WIDTH)[None, :] == (place - s * WIDTH)[:, None]
            # A product with a mask would make NaN of what is infinite.
            z = tl.where(hit, slices[s] + values[:, None], slices[s])
            its = tl.where(hit, z, its)
            added += (z,)
        slices = added
        if STORE:
            tl.store(entries.z + at, tl.sum(its, axis=1), mask=there & present)
    return slices
