"""Drawing over a vocabulary that is cut over ranks: every rank draws the token that one device would."""

from __future__ import annotations

import torch
from torch import Tensor

from auxkern.core.draws import (
    ROW_EMPTY,
    ROW_INFINITE,
    ROW_NAN,
    ROW_OK,
    Draws,
    RowTokens,
    first_largest,
    gumbel,
    random_bits,
)
from auxkern.ops.parallel.vocabulary import VocabularyShard


def drawn_over_ranks(z: Tensor, draws: Draws, shard: VocabularyShard, want_logprob: bool) -> RowTokens:
    """Token, status and log-probability of each row, without filters and penalties.

        token = argmax over v of (z[v] - max z) / temperature + noise[v],    max z over all ranks

    The noise is that of the ids over all ranks, so it is the same however they are cut. Ranks exchange two
    numbers a row, and then two more; three for the log-probability.

    Args:
        z: (N, V of this rank) sum of the terms.
        draws: of the rows; the ids of sparse terms are in z already.
        shard: of this rank.
        want_logprob: whether the last is wanted.

    Returns:
        As ``Backend.draw``; the same bits on every rank.
    """
    top_r, wrong = z.amax(-1), z.isnan().any(-1)
    tops, wrongs = shard.gathered(
        torch.stack([top_r.nan_to_num(-torch.inf, torch.inf, -torch.inf), wrong.to(z.dtype)])
    ).unbind(1)
    top = tops.amax(0)
    status = torch.full(top.shape, ROW_OK, dtype=torch.int32, device=z.device)
    status = torch.where(top == torch.inf, ROW_INFINITE, status)
    status = torch.where(top == -torch.inf, ROW_EMPTY, status)
    status = torch.where(wrongs.sum(0) > 0, ROW_NAN, status)

    greedy = (draws["temperature"] == 0)[:, None]
    d = (z - top[:, None]) / torch.where(greedy, 1.0, draws["temperature"][:, None])
    bits = random_bits(draws.seed, draws.position, z.shape[1], shard.first_id)
    score = torch.where(greedy, z, d + gumbel(bits).to(z.dtype)).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    # A row of nothing but -inf has its first id; its status says that it is none.
    best = first_largest(score)
    columns = [score.gather(-1, best[:, None])[:, 0].double(), (best + shard.first_id).double()]
    if want_logprob:
        columns += [d.gather(-1, best[:, None])[:, 0].double(), torch.logsumexp(d.double(), -1)]
    scores, ids, *rest = shard.gathered(torch.stack(columns)).unbind(1)
    winner = scores.argmax(0, keepdim=True)
    token = torch.where(status == ROW_OK, ids.gather(0, winner)[0].long(), -1)
    if not want_logprob:
        return RowTokens(token, status, z.new_empty(0))
    logprob = rest[0].gather(0, winner)[0] - torch.logsumexp(rest[1], 0)
    logprob = torch.where(greedy[:, 0], 0.0, logprob)
    return RowTokens(token, status, torch.where(status == ROW_OK, logprob, torch.nan).to(z.dtype))
