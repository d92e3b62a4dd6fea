"""Cross-entropy over a vocabulary that is cut over ranks: each rank's rows, and how they become one.

    lse[n]   = log sum_r exp lse_r[n]          over ranks r
    nll[n]   = lse[n] - z[n, target[n]]        the second from the rank that has the target

Each rank runs the operator of one device on its own ids; what ranks exchange is a few numbers a row, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auxkern.ops.dense import dense_logits
from auxkern.ops.parallel.vocabulary import VocabularyShard
from auxkern.terms import Head, Logits, Sparse, Term, rows_of, softcapped


class LocalRows(NamedTuple):
    """What one rank knows of its N rows, each scored against an id of its own.

    Attributes:
        row: (N,) nll under this rank's softmax, differentiable.
        z: (N,) logit of the id that it was scored against, differentiable.
        lse: (N,) over this rank's ids.
        argmax: (N,) int64 of this rank's ids, from 0.
        term_lse: (I, N) as ``lse``, of each term alone; (0, 0) unless wanted.
        z_of_terms: (I, N) as ``z``.
        z_of_argmax: (N,) logit of argmax.
    """

    row: Tensor
    z: Tensor
    lse: Tensor
    argmax: Tensor
    term_lse: Tensor
    z_of_terms: Tensor
    z_of_argmax: Tensor


class GlobalRows(NamedTuple):
    """What all ranks know together; the same bits on each of them.

    Attributes:
        row: (N,) loss of each row, differentiable; 0 where the row is ignored.
        nll, lse: (N,), argmax (N,) int64 in [0, V), term_nll (I, N): as in ``CrossEntropyStats``.
    """

    row: Tensor
    nll: Tensor
    lse: Tensor
    argmax: Tensor
    term_nll: Tensor


def logits_of_ids(terms: Sequence[Term], ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(I, N) logit of one id of each row under each term alone; differentiable.

    Args:
        terms: of rows (...), N of them.
        ids: (N,) int64.
        dtype: of the result, float32 or float64.
    """
    return torch.stack([_logit(term, ids, dtype) for term in terms])


def _logit(term: Term, ids: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(term, Sparse):
        hit = term.ids.reshape(len(ids), -1) == ids[:, None]
        return (term.values.reshape(len(ids), -1).to(dtype) * hit).sum(-1)
    if isinstance(term, Logits):
        z = term.values.gather(-1, ids.view(*term.leading, 1)).reshape(-1).to(dtype)
    else:
        hidden = term.hidden.reshape(len(ids), -1).to(dtype)
        z = (hidden * torch.nn.functional.embedding(ids, term.weight).to(dtype)).sum(-1)
        if term.bias is not None:
            z = z + term.bias[ids].to(dtype)
    return softcapped(z, term.softcap) * term.scale


@torch.no_grad()
def lse_of_terms(terms: Sequence[Term], term_nll: Tensor, z: Tensor, vocab_size: int | None) -> Tensor:
    """(I, N) float64 log-sum-exp of each term alone over this rank's ids.

    Args:
        terms: of this rank.
        term_nll: (I, N) of the ids that the rows were scored against.
        z: (I, N) logits of these ids.
        vocab_size: this rank's ids that count; None for all.
    """
    found = term_nll.double() + z.double()
    for i, term in enumerate(terms):
        # An id of -inf says nothing of the others. It is rare, and looking for it stops a GPU.
        rows = (~found[i].isfinite()).nonzero()[:, 0]
        if len(rows) and not isinstance(term, Sparse):
            found[i, rows] = dense_logits([rows_of(term, rows)], vocab_size=vocab_size).double().logsumexp(-1)
    return found


def logit_sums(terms: Sequence[Term], V: int, rows: int, dtype: torch.dtype) -> Tensor:
    """(N,) sum of the logits of V ids, for label smoothing; differentiable.

    Raises:
        ValueError: a head has a soft cap; its logits cannot be summed without making them.
    """
    total: Tensor | None = None
    for index, term in enumerate(terms):
        if isinstance(term, Sparse):
            part = term.values.reshape(rows, -1).to(dtype).sum(-1)
        elif isinstance(term, Logits):
            z = softcapped(term.values[..., :V].to(dtype), term.softcap)
            part = z.sum(-1).reshape(-1) * term.scale
        else:
            part = _head_sum(index, term, V, rows, dtype)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("there are no terms; pass one at least")
    return total


def _head_sum(index: int, head: Head, V: int, rows: int, dtype: torch.dtype) -> Tensor:
    if head.softcap:
        raise ValueError(
            f"label_smoothing over a process group takes no soft cap, but terms[{index}].softcap is "
            f"{head.softcap}; pass label_smoothing=0"
        )
    z = head.hidden.reshape(rows, -1).to(dtype) @ head.weight[:V].to(dtype).sum(0)
    if head.bias is not None:
        z = z + head.bias[:V].to(dtype).sum()
    return z * head.scale


def combined(
    local: LocalRows,
    shard: VocabularyShard,
    counts: Tensor,
    owned: Tensor,
    z_sum: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
) -> GlobalRows:
    """What the ranks' rows come to; every rank calls it.

    Args:
        local: of this rank.
        shard: of this rank.
        counts: (N,) bool, rows that are not ignored.
        owned: (N,) bool, rows whose target this rank has.
        z_sum: (N,) sum of this rank's logits, with label smoothing.
        label_smoothing, z_loss: as in ``cross_entropy``.
        vocab_size: V over all ranks.
    """
    with torch.no_grad():
        # In float64, and by way of the nll, which a common offset of all logits does not reach.
        by_nll = local.row.double() + local.z.double()
        lse = torch.where(by_nll.isfinite(), by_nll, local.lse.double())
        columns = [lse, torch.where(owned, local.z.double(), 0.0)]
        columns += [local.z_of_argmax.double(), (local.argmax + shard.first_id).double()]
        columns += [] if z_sum is None else [z_sum.double()]
        terms = len(local.term_lse)
        if terms:
            columns += [*local.term_lse.double()]
            columns += [*torch.where(owned, local.z_of_terms.double(), 0.0)]
        everyone = shard.gathered(torch.stack(columns))
    lse_of, z_of, best, best_id, *rest = everyone.unbind(1)
    whole = torch.logsumexp(lse_of, 0)
    target = z_of.sum(0)
    mean = None
    if z_sum is not None:
        mean = rest.pop(0).sum(0) / vocab_size
    values = (counts, owned, lse_of[shard.rank], whole, target, mean, label_smoothing, z_loss, vocab_size)
    inputs = [local.row, local.z] + ([] if z_sum is None else [z_sum])
    row = _CombinedRows.apply(values, *inputs)
    dtype = local.row.dtype
    kept = torch.where(counts, whole, 0.0)
    nll = torch.where(counts, whole - target, 0.0)
    argmax = best_id.gather(0, best.argmax(0, keepdim=True))[0].long()
    term_nll = local.term_lse
    if terms:
        parts = torch.stack(rest)  # (2 I, R, N)
        term_nll = torch.logsumexp(parts[:terms], 1) - parts[terms:].sum(1)
        term_nll = torch.where(counts, term_nll, 0.0).to(dtype)
    return GlobalRows(row, nll.to(dtype), kept.to(dtype), torch.where(counts, argmax, -1), term_nll)


class _CombinedRows(torch.autograd.Function):
    """The loss of each row from this rank's nll, its logit and its sum of logits.

    With a = exp(lse_r - lse), the share of this rank, and f = 1 + 2 q lse, the slope of lse,

        d row / d row_r = f a,    d row / d z_r = f a - (1 - s) [owned],    d row / d sum_r = - s / V

    For the owner of a sure target f a - 1 is expm1(lse_r - lse), which does not cancel.
    """

    @staticmethod
    def forward(ctx: Any, values: tuple[Any, ...], row: Tensor, z: Tensor, *z_sum: Tensor) -> Tensor:
        counts, owned, lse_r, whole, target, mean, s, q, V = values
        nll = whole - target
        loss = nll if mean is None else (1 - s) * nll + s * (whole - mean)
        if q:
            loss = loss + q * whole.square()
        ctx.values, ctx.smoothed = (counts, owned, lse_r, whole, s, q, V), bool(z_sum)
        ctx.dtype = row.dtype
        return torch.where(counts, loss, 0.0).to(row.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        counts, owned, lse_r, whole, s, q, V = ctx.values
        g = torch.where(counts, g.double(), 0.0)
        share = torch.exp(lse_r - whole)
        slope = 2 * q * whole * share
        d_row = g * (share + slope)
        at_target = torch.where(owned, torch.expm1(lse_r - whole) + slope + s, share + slope)
        found = [d_row, g * at_target] + ([-g * s / V] if ctx.smoothed else [])
        return None, *(torch.where(counts, d, 0.0).to(ctx.dtype) for d in found)
