"""Entries of sparse terms in a tile of logits."""

# Triton's language is not Python's: kernels have no annotations.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from auxkern.backends.triton.device.rows import decode


@triton.jit
def entries_of(entries, rows, tile):
    """(first, end): places of the entries that a tile has of each row (R,), in a row's sorted ones."""
    at = entries.first + rows.to(tl.int64) * decode(entries.tiles) + tile
    return tl.load(at), tl.load(at + 1)


@triton.jit
def with_entries(z, entries, rows, present, columns, first, end, STORE: tl.constexpr):
    """z (R, C) and the entries of its columns (C,); what it then is at each, in memory if STORE.

    The last of equal ids has all of them in its z.

    Args:
        rows, present: (R,), and which of them to store for.
        first, end: as ``entries_of`` says. Most tiles have none, and the loop does not turn.
    """
    begin = rows.to(tl.int64) * decode(entries.K) + first
    count = end - first
    for i in range(tl.max(count, axis=0)):
        there = i < count
        at = begin + i
        ids = tl.load(entries.ids + at, mask=there, other=-1)
        values = tl.load(entries.logits + at, mask=there, other=0.0)
        hit = columns[None, :] == ids[:, None]
        # A product with a mask would make NaN of what is infinite.
        z = tl.where(hit, z + values[:, None], z)
        if STORE:
            tl.store(entries.z + at, tl.sum(tl.where(hit, z, 0.0), axis=1), mask=there & present)
    return z
