"""Short texts of a batch in one row, where each sees what stands before all of them and itself.

Nothing is padded then, and what stands before them is attended to once for all, where a batch of B rows has
B copies of its keys and values. Attention multiplies all pairs of a row's tokens, so that rows stay short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from auxkern.model.trials import EXACT, ROUNDED, farthest

MOST = 1_024  # tokens of a row of several texts: from there on attention costs more than padding


class PackedRow(NamedTuple):
    """N tokens of some texts, one after the other.

    Attributes:
        rows, columns: (N,) int64, where each token stands in the batch.
        positions: (1, N) int64 of each in its text, behind what stands before all.
        seen: (1, 1, N, P + N) bool, what each sees: all of the P before, and its own text up to itself.
    """

    rows: Tensor
    columns: Tensor
    positions: Tensor
    seen: Tensor

    def take(self, values: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)"""
        return values[self.rows, self.columns][None]


def packed_rows(mask: Tensor, P: int, most: int) -> Iterator[PackedRow]:
    """The texts of a batch in rows, in their order; a text that is longer has one of its own.

    Args:
        mask: (B, T), 1 for real tokens.
        P: tokens before all texts.
        most: tokens of a row of several texts.
    """
    lengths = (mask != 0).sum(1).tolist()
    first, count = 0, 0
    for row, length in enumerate(lengths):
        if count and count + length > most:
            yield _row(mask, first, row, P)
            first, count = row, 0
        count += length
    if count:
        yield _row(mask, first, len(lengths), P)


def _row(mask: Tensor, first: int, end: int, P: int) -> PackedRow:
    real = mask[first:end] != 0
    rows, columns = real.nonzero(as_tuple=True)
    positions = P - 1 + real.cumsum(1)[rows, columns]
    own = (rows[:, None] == rows).tril()
    before = own.new_ones(len(rows), P)
    return PackedRow(rows + first, columns, positions[None], torch.cat([before, own], 1)[None, None])


def read_packed(
    values: Tensor, mask: Tensor, run: Callable[[Tensor, PackedRow], Tensor], P: int, most: int
) -> Tensor:
    """What a model makes of a batch that it reads packed, at the batch's own places; zeros at padding.

    Args:
        values: (B, T, ...) what is read.
        mask: (B, T), 1 for real tokens.
        run: the model, of values (1, N, ...) and their row: what it makes (1, N, D).
        P: tokens before all texts.
        most: tokens of a row of several texts.

    Returns:
        (B, T, D).
    """
    rows = list(packed_rows(mask, P, most))
    made = torch.cat([run(row.take(values), row)[0] for row in rows])
    places = tuple(torch.cat([getattr(row, name) for row in rows]) for name in ("rows", "columns"))
    return made.new_zeros(*mask.shape, made.shape[-1]).index_put(places, made)


def packing_refusal(packed: Callable[[], Tensor], padded: Callable[[], Tensor], mask: Tensor) -> str | None:
    """Why a model cannot read packed texts: a mask for each token is more than some families take.

    Args:
        packed, padded: what it makes (B, T, D) of the same batch in both ways.
        mask: (B, T), 1 for real tokens.

    Returns:
        None if it can.
    """
    with torch.no_grad(), torch.autocast(mask.device.type, enabled=False):
        expected = padded()
        try:
            found = packed()
        except Exception as error:
            # Whatever a family does with such a mask, it reads padded batches: nothing is lost.
            return f"it does not run with a mask for each token ({type(error).__name__}: {error})"
    real = mask != 0
    difference = farthest(expected[real], found[real])
    if not difference <= (EXACT if expected.dtype in (torch.float32, torch.float64) else ROUNDED):
        return f"texts in one row change each other by {difference:.1e}"
    return None
