"""Cross-entropy over a vocabulary that is cut over ranks: each rank's rows, and how they become one.

    lse[n]   = log sum_r exp lse_r[n]          over ranks r
    nll[n]   = lse[n] - z[n, target[n]]        the second from the rank that has the target

A rank's rows say what its own ids add up to (``RowLosses``); a target is known to the rank that has it and to
no other (``NO_TARGET``), so nothing ever stands in for it. The ranks exchange a few numbers a row, once, and
each makes the gradient of its own logits from the maximum and the sum over all ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from auxkern.core.loss import NO_TARGET, Loss, RowLosses, RowSlopes, RowSums
from auxkern.ops.parallel.share import IGNORED, Share
from auxkern.ops.parallel.vocabulary import local_ids
from auxkern.ops.torch_ops import refuse_second_derivatives


def rows_over_ranks(
    share: Share, tensors: Sequence[Tensor], target: Tensor, loss: Loss
) -> tuple[Tensor, ...]:
    """``torch_ops.loss_rows`` of a sum that is cut over ranks; every rank calls it, and has the same bits.

    Args:
        share: this rank's part.
        tensors: of its terms.
        target: (N,) ids from 0 to V, or ``loss.ignore_index``. Of an id outside no rank knows: its row is
            NaN.
    """
    counts = target != loss.ignore_index
    here, ids = local_ids(target, share.shard)
    local = torch.where(counts, torch.where(here, ids, NO_TARGET), IGNORED)
    owner = share.shard.owner_of(target)
    with torch.autocast(target.device.type, enabled=False):
        rows: Callable[..., tuple[Tensor, ...]] = _ShardedRows.apply
        return rows(share, loss, local, owner, *tensors)


def _columns(rows: RowLosses) -> list[Tensor]:
    return [rows.nll.double(), rows.row_max.double(), rows.log_sum.double()]


def _totals(of_ranks: Tensor, owner: Tensor) -> RowSums:
    """The sums of all ranks; the owner's nll keeps what its 1 - p is, which a difference would cancel.

    Args:
        of_ranks: (R, 3, N) ``_columns`` of each rank.
        owner: (N,) rank that has the target; where it is -1, nll and sum are NaN.
    """
    nll_of, max_of, log_sum_of = of_ranks.unbind(1)
    row_max = max_of.amax(0)
    empty = row_max == -torch.inf
    pivot = row_max.masked_fill(empty, 0)
    log_sum = torch.logsumexp(max_of - pivot + log_sum_of, 0)
    its = owner.clamp_min(0)[None]
    its_nll, its_max, its_log = (x.gather(0, its)[0] for x in (nll_of, max_of, log_sum_of))
    # log of each rank's sum, less the target's logit; the owner's is its nll.
    z = its_max + its_log - its_nll
    ranks = torch.arange(len(of_ranks), device=owner.device)[:, None]
    others = (max_of - z + log_sum_of).masked_fill(ranks == its, -torch.inf)
    apart = torch.logsumexp(torch.cat([others, its_nll[None]]), 0)
    # expm1 of a large nll overflows, and 1 + it loses nothing.
    sure = torch.log1p(torch.expm1(its_nll) + others.exp().sum(0))
    nll = torch.where((apart < 1) & (others < 1).all(0), sure, apart)
    impossible = (its_nll == torch.inf) | (its_max == -torch.inf) & ~its_log.isnan()
    nll = torch.where(impossible & ~log_sum.isnan(), torch.inf, nll)
    nll = torch.where(empty, torch.nan, nll)
    nowhere = owner < 0
    return RowSums(nll.masked_fill(nowhere, torch.nan), row_max, log_sum.masked_fill(nowhere, torch.nan))


def _mean_distance(smooth_of: Tensor, of_ranks: Tensor, totals: RowSums, sizes: Tensor) -> Tensor:
    """(N,) mean over all ids of lse - z, from each rank's over its own.

    Args:
        smooth_of: (R, N) ``RowLosses.smooth``.
        of_ranks: (R, 3, N) ``_columns``.
        sizes: (R,) ids of each rank.
    """
    raised = totals.row_max - of_ranks[:, 1] + totals.log_sum - of_ranks[:, 2]
    # A rank with nothing but -inf has logits that are infinitely far below, and NaN in its mean.
    empty = (of_ranks[:, 1] == -torch.inf) & ~of_ranks[:, 2].isnan()
    distance = torch.where(empty & (totals.row_max > -torch.inf), torch.inf, smooth_of + raised)
    return (distance * sizes[:, None]).sum(0) / sizes.sum()


class _ShardedRows(torch.autograd.Function):
    """The loss of each row, and this rank's part of its gradient.

    Gradients of hidden states and sparse values are summed over the ranks, in float32, before they are
    rounded to their dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, share: Share, loss: Loss, target: Tensor, owner: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        smoothing, stats, shard = loss.smooth, loss.stats, share.shard
        rows, *alone = share.rows(tensors, target, loss)
        columns = [c for one in (rows, *alone) for c in _columns(one)]
        columns += [rows.smooth.double()] if smoothing else []
        columns += [(rows.argmax + shard.first_id).double()] if stats else []
        everyone = shard.gathered(torch.stack(columns))
        sums, *each = [_totals(everyone[:, i : i + 3], owner) for i in range(0, 3 * (1 + len(alone)), 3)]
        rest = list(everyone[:, 3 * (1 + len(alone)) :].unbind(1))
        mean = sums.nll
        if smoothing:
            used = torch.tensor(shard.used_sizes(share.V), device=owner.device)
            mean = _mean_distance(rest.pop(0), everyone, sums, used)
        lse = sums.row_max + sums.log_sum
        row = loss.of_rows(sums.nll, lse, mean)
        counts, dtype = target != IGNORED, rows.nll.dtype
        ctx.save_for_backward(target, *sums, *tensors)
        ctx.share, ctx.loss = share, loss
        argmax, term_nll = owner.new_empty(0), sums.nll.new_empty(0, 0)
        if stats:
            best = everyone[:, 1].argmax(0, keepdim=True)
            argmax = torch.where(counts, rest[0].gather(0, best)[0].long(), -1)
            term_nll = torch.stack([torch.where(counts, one.nll, 0.0) for one in each])
        row, nll, lse = (torch.where(counts, x, 0.0).to(dtype) for x in (row, sums.nll, lse))
        ctx.mark_non_differentiable(nll, lse, argmax, term_nll := term_nll.to(dtype))
        return row, nll, lse, argmax, term_nll

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        share, loss = ctx.share, ctx.loss
        target, nll, row_max, log_sum, *tensors = ctx.saved_tensors
        before = len(ctx.needs_input_grad) - len(tensors)
        wanted = [i for i in range(len(tensors)) if ctx.needs_input_grad[before + i]]
        sums, counts = RowSums(nll, row_max, log_sum), target != IGNORED
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            slopes = RowSlopes(g.double(), sums, counts, replace(loss, ignore_index=IGNORED), share.V)
            summed = share.gradients(tensors, target, slopes, wanted)
            for i in wanted:
                if share.is_whole(tensors, i):
                    dist.all_reduce(summed[i], group=share.shard.group)
        gradients = tuple(summed[i].to(x.dtype) if i in summed else None for i, x in enumerate(tensors))
        return (None,) * before + refuse_second_derivatives(gradients, (g, *tensors))
