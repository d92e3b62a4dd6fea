"""The terms of a base and of its auxiliaries, as the terms of one sum."""

from __future__ import annotations

import torch
from torch import Tensor

from auxkern.core.terms import Head, Logits, Term
from auxkern.model.caches import AuxiliaryRows
from auxkern.ops.dense import dense_logits


def merged(lm_term: Term, added: list[Term]) -> list[Term]:
    """The LM's term and an auxiliary's; as one product where both go through the same embedding."""
    first = added[0]
    if (
        isinstance(lm_term, Head)
        and isinstance(first, Head)
        and lm_term.weight is first.weight
        and lm_term.softcap is None
        and lm_term.scale == 1.0
    ):
        scale = first.scale[..., None] if isinstance(first.scale, Tensor) else first.scale
        hidden = lm_term.hidden.float() + scale * first.hidden.float()
        return [Head(hidden, lm_term.weight, lm_term.bias, packed=lm_term.packed), *added[1:]]
    return [lm_term, *added]


def scattered(hidden: Tensor, added: list[tuple[AuxiliaryRows, list[Term]]], V: int) -> list[Term]:
    """Logits of auxiliaries that serve some rows each, as one term (B, T, V); none without auxiliaries.

    Args:
        hidden: (B, T, D_lm) of the rows.
        added: which rows, and the auxiliary's terms of them.
        V: ids.
    """
    if not added:
        return []
    total = torch.zeros(*hidden.shape[:2], V, device=hidden.device)
    for part, terms in added:
        rows = torch.arange(len(total), device=total.device) if part.rows is None else part.rows
        total = total.index_copy(0, rows, dense_logits(terms, vocab_size=V).float())
    return [Logits(total)]
