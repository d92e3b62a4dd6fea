"""The loss of each row from whole logits, by torch's own functions: for derivatives that kernels lack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from auxkern.core.loss import row_loss
from auxkern.core.terms import Sparse, Term
from auxkern.ops.dense import dense_logits


def dense_rows(
    terms: Sequence[Term], target: Tensor, vocab_size: int | None, options: tuple[int, float, float, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row, nll, lse, argmax and term_nll of (N,) targets, in every mode of differentiation; of (N, V) memory.

    Args:
        options: ignore_index, label_smoothing, z_loss and whether argmax and term_nll are wanted.
    """
    ignore_index, label_smoothing, z_loss, want_stats = options
    counts = target != ignore_index
    whole = dense_logits(terms, vocab_size=vocab_size)
    V = whole.shape[-1]
    inside = (target >= 0) & (target < V)
    y = torch.where(counts & inside, target, 0)
    # Looking at the targets would end a trace: one outside of [0, V) makes its row NaN.
    spoilt = torch.where(counts & ~inside, torch.nan, 0.0).to(whole.dtype)[:, None]

    def read(z: Tensor) -> Tensor:
        # A row that is ignored is not read: a NaN there must not reach a derivative.
        return torch.where(counts[:, None], z.reshape(counts.shape[0], V), 0.0) + spoilt

    def nll_of(z: Tensor) -> Tensor:
        return torch.where(counts, -z.log_softmax(-1).gather(-1, y[:, None])[:, 0], 0.0)

    z = read(whole)
    nll, lse = nll_of(z), torch.where(counts, z.logsumexp(-1), 0.0)
    smooth = torch.where(counts, -z.log_softmax(-1).mean(-1), 0.0) if label_smoothing else nll
    row = row_loss(nll, lse, smooth, label_smoothing, z_loss)
    if not want_stats:
        none = z.new_empty(0)
        return row, nll.detach(), lse.detach(), none.long(), none.view(0, 0)
    argmax = torch.where(counts, z.argmax(-1), -1)
    alone = [nll_of(read(_alone(term, V, whole))) for term in terms]
    return row, nll.detach(), lse.detach(), argmax, torch.stack(alone).detach()


def _alone(term: Term, V: int, like: Tensor) -> Tensor:
    """(..., V) logits of a term alone; a sparse one's are 0 but for its ids."""
    if isinstance(term, Sparse):
        return torch.zeros_like(like).scatter_add(-1, term.ids.long(), term.values.to(like.dtype))
    return dense_logits([term], vocab_size=V).to(like.dtype)
