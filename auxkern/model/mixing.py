"""The terms of a base and of its auxiliaries, as the terms of one sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from auxkern.core.terms import Head, Logits, Sparse, Term, like
from auxkern.model.caches import AuxiliaryRows
from auxkern.ops.dense import dense_logits

Added = list[tuple[AuxiliaryRows, list[Term]]]  # which rows an auxiliary serves, and its terms of them


class Alone(NamedTuple):
    """The terms of either side by itself.

    Attributes:
        lm: of the base.
        auxiliary: of the auxiliaries; none where there are none.
    """

    lm: list[Term]
    auxiliary: list[Term]


def mixed(lm_term: Term, added: Added, V: int, others: Sequence[Term] = ()) -> list[Term]:
    """The sum's terms, rows (B, T).

    What goes through the base's embedding is one product with it: hidden states are added up. A row's numbers
    are made in the same way whichever auxiliaries serve the rows beside it.

    Args:
        lm_term: of all rows.
        added: a row may be served by several.
        V: ids.
        others: of other language models, of all rows.
    """
    sparse: list[tuple[Tensor | None, Sparse]] = []
    apart: list[tuple[Tensor | None, Term]] = []
    for part, (first, *rest) in added:
        sparse += [(part.rows, term) for term in rest if isinstance(term, Sparse)]
        if isinstance(first, Head) and isinstance(first.scale, Tensor):
            first = like(first, hidden=first.scale[..., None] * first.hidden.float(), scale=1.0)
        if _takes_hidden(lm_term) and isinstance(first, Head) and lm_term.weight is first.weight:
            hidden, more = lm_term.hidden.float(), first.scale * first.hidden.float()
            hidden = hidden + more if part.rows is None else hidden.index_add(0, part.rows, more)
            lm_term = like(lm_term, hidden=hidden)
        else:
            apart.append((part.rows, first))
    terms = [term for _, term in apart]
    if apart and (others or len(apart) > 1 or apart[0][0] is not None):
        # One sum, so that a row's is made in one order, whichever rows stand beside it.
        total: Tensor | None = None
        for rows, term in apart:
            if isinstance(term, Head):
                # As a product that is added to the base's takes it.
                term = like(term, hidden=term.hidden * term.scale, scale=1.0)
            total = _written(total, rows, [term], lm_term.leading, V)
        terms = [] if total is None else [Logits(total)]
    return [lm_term, *terms, *_spread(sparse, lm_term.leading), *others]


def with_frozen(terms: list[Term], frozen: Sequence[list[Term]]) -> list[Term]:
    """The terms of ``mixed`` and those of auxiliaries held frozen, all of rows (B, T).

    None is written out, which would take the memory of the logits: what goes through the base's embedding is
    added to its hidden states, sparse terms become one, and other heads stay terms of their own.
    """
    lm_term, *rest = terms
    sparse: list[Sparse] = []
    for first, *more in frozen:
        if _takes_hidden(lm_term) and isinstance(first, Head) and lm_term.weight is first.weight:
            hidden = lm_term.hidden.float() + first.scale * first.hidden.float()
            lm_term = like(lm_term, hidden=hidden)
        else:
            rest.append(first)
        sparse += [term for term in more if isinstance(term, Sparse)]
    if sparse:
        ids, values = ([getattr(term, name) for term in sparse] for name in ("ids", "values"))
        rest.append(Sparse(torch.cat(ids, -1), torch.cat(values, -1)))
    return [lm_term, *rest]


def alone(lm_term: Term, added: Added, V: int) -> Alone:
    """The terms of either side, rows (B, T); arguments as of ``mixed``."""
    if len(added) == 1 and added[0][0].rows is None:
        return Alone([lm_term], added[0][1])
    total: Tensor | None = None
    for part, terms in added:
        total = _written(total, part.rows, terms, lm_term.leading, V)
    return Alone([lm_term], [] if total is None else [Logits(total)])


def _written(
    total: Tensor | None, rows: Tensor | None, terms: list[Term], leading: torch.Size, V: int
) -> Tensor:
    """Logits (B, T, V) with those of some rows, or of all, written out; zeros where there were none."""
    z = dense_logits(terms, vocab_size=V).float()
    if rows is None:
        return z if total is None else total + z
    return (z.new_zeros(*leading, V) if total is None else total).index_add(0, rows, z)


def _takes_hidden(lm_term: Term) -> TypeGuard[Head]:
    """Whether hidden states may be added to the base's before its embedding."""
    if not isinstance(lm_term, Head) or isinstance(lm_term.scale, Tensor):
        return False
    return lm_term.softcap is None and lm_term.scale == 1.0


def _spread(sparse: list[tuple[Tensor | None, Sparse]], leading: torch.Size) -> list[Sparse]:
    """Those of some rows each as one of all rows (B, T), where what is left adds 0."""
    if not sparse or (len(sparse) == 1 and sparse[0][0] is None):
        return [term for _, term in sparse]
    first, width = sparse[0][1], sum(term.ids.shape[-1] for _, term in sparse)
    ids = first.ids.new_zeros(*leading, width)
    values = first.values.new_zeros(*leading, width)
    begin = 0
    for rows, term in sparse:
        own = slice(begin, begin + term.ids.shape[-1])
        begin, some = own.stop, slice(None) if rows is None else rows
        ids[some, :, own], values[some, :, own] = term.ids, term.values
    return [Sparse(ids, values)]


def sequences_of(term: Term, rows: Tensor) -> Term:
    """A term of some sequences, (R,) int64, of rows (B, T)."""
    if isinstance(term, Sparse):
        return like(term, ids=term.ids[rows], values=term.values[rows])
    scale = term.scale[rows] if isinstance(term.scale, Tensor) else term.scale
    if isinstance(term, Logits):
        return like(term, values=term.values[rows], scale=scale)
    return like(term, hidden=term.hidden[rows], scale=scale)
