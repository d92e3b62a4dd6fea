"""The specification: the formulas in plain PyTorch, on any device, float64 when given float64.

Fast backends are compared with this. It takes several (N, V) buffers and is in no hurry.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from auxkern.backends.chunked import RowKernels
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
from auxkern.core.loss import NO_TARGET, Loss, RowLosses, RowSlopes
from auxkern.core.mass import masses, needed
from auxkern.core.sums import Sum, Wanted
from auxkern.core.terms import Logits, softcapped


def _contributions(sum: Sum) -> list[Tensor]:
    """Each term's share of z: I tensors (N, V) in float32 or float64."""
    shares = []
    for term in sum.logits:
        x = softcapped(term.values[..., : sum.V].to(sum.dtype).reshape(-1, sum.V), term.softcap)
        shares.append((term.scale[:, None] if isinstance(term.scale, Tensor) else term.scale) * x)
    return shares


def _nll(z: Tensor, y: Tensor) -> Tensor:
    return -torch.log_softmax(z, dim=-1).gather(-1, y[:, None])[:, 0]


class Reference(RowKernels):
    name = "reference"

    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        return None

    def logits_losses(
        self, sum: Sum, target: Tensor, loss: Loss, weight: Tensor | None, wanted: Wanted
    ) -> RowLosses:
        shares = _contributions(sum)
        z = torch.stack(shares).sum(0)
        ignored = target == loss.ignore_index
        elsewhere = ~ignored & (target == NO_TARGET)
        outside = ~ignored & ~elsewhere & ((target < 0) | (target >= sum.V))
        y = target.masked_fill(ignored | elsewhere | outside, 0)

        def rows(x: Tensor) -> Tensor:
            return x.masked_fill(outside, torch.nan).masked_fill(ignored, 0)

        def nll(x: Tensor) -> Tensor:
            return rows(_nll(x, y).masked_fill(elsewhere, torch.inf))

        row_max = z.amax(-1)
        log_sum = torch.logsumexp(z - row_max.masked_fill(row_max == -torch.inf, 0)[:, None], dim=-1)
        row_max, log_sum = rows(row_max), rows(log_sum)
        return RowLosses(
            nll=nll(z),
            row_max=row_max,
            log_sum=log_sum,
            smooth=rows(-torch.log_softmax(z, dim=-1).mean(-1)) if loss.smooth else z.new_empty(0),
            argmax=z.argmax(-1).masked_fill(ignored, -1) if loss.stats else target.new_empty(0),
            term_nll=torch.stack([nll(s) for s in shares]) if loss.stats else z.new_empty(0, 0),
            lse=row_max + log_sum,
        )

    def logits_gradients(self, sum: Sum, target: Tensor, slopes: RowSlopes, wanted: Wanted) -> None:
        row_max, exp_coefficient, constant, target_gradient = slopes.coefficients(sum.dtype)
        z = torch.stack(_contributions(sum)).sum(0)
        dz = exp_coefficient[:, None] * torch.exp(z - row_max[:, None]) - constant[:, None]
        is_target = torch.arange(sum.V, device=z.device) == target[:, None]
        dz = torch.where(is_target, target_gradient[:, None], dz)
        counts = (exp_coefficient != 0) | (constant != 0) | (target_gradient != 0)
        dz = dz.masked_fill(~counts[:, None], 0)
        for term, gradients in zip(sum.logits, wanted, strict=True):
            if gradients:
                _write_gradient(gradients["values"], term, dz, counts)

    def logits_draw(self, sum: Sum, draws: Draws, want_logprob: bool) -> RowTokens:
        z = _adjusted(torch.stack(_contributions(sum)).sum(0), sum, draws)
        top = z.amax(-1, keepdim=True)
        status = torch.full(z.shape[:1], ROW_OK, dtype=torch.int32, device=z.device)
        status[top[:, 0] == torch.inf] = ROW_INFINITE
        status[top[:, 0] == -torch.inf] = ROW_EMPTY
        status[z.isnan().any(-1)] = ROW_NAN

        greedy = draws["temperature"] == 0
        d = (z - top) / torch.where(greedy, 1.0, draws["temperature"])[:, None]
        kept = _kept(z, d, draws)
        noise = gumbel(random_bits(draws.seed, draws.position, sum.V)).to(z.dtype)
        score = torch.where(kept, d + noise, -torch.inf)
        token = torch.where(greedy, first_largest(z), first_largest(score))
        token = torch.where(status == ROW_OK, token, -1)
        if not want_logprob:
            return RowTokens(token, status, z.new_empty(0))
        logprob = torch.log_softmax(torch.where(kept, d, -torch.inf), -1)
        logprob = logprob.gather(-1, token.clamp(min=0)[:, None])[:, 0]
        logprob = torch.where(greedy, 0.0, logprob)
        return RowTokens(token, status, torch.where(status == ROW_OK, logprob, torch.nan))


def _write_gradient(gradient: Tensor, term: Logits, dz: Tensor, counts: Tensor) -> None:
    """The gradient of a term's values, 0 beyond V, from dz (N, V)."""
    V = dz.shape[1]
    d = dz * term.scale
    if term.softcap:
        x = term.values[..., :V].to(dz).reshape(dz.shape)
        d = (d * (1 - torch.tanh(x / term.softcap) ** 2)).masked_fill(~counts[:, None], 0)
    gradient[..., V:] = 0
    gradient[..., :V] = d.to(gradient.dtype).view(*gradient.shape[:-1], V)


def _add_at(z: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    exists = (ids >= 0) & (ids < z.shape[1])
    # Not scatter_add of 0 where there is no id: -inf is a bias too.
    for k in range(ids.shape[1]):
        row = exists[:, k].nonzero()[:, 0]
        z[row, ids[row, k]] += values[row, k].to(z.dtype)
    return z


def _counts(ids: Tensor, V: int) -> Tensor:
    """(N, V) how often each id is in each row of ids (N, K)."""
    exists = (ids >= 0) & (ids < V)
    counts = torch.zeros((ids.shape[0], V), dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(1, ids.clamp(0, V - 1), exists.long())


def _adjusted(z: Tensor, sum: Sum, draws: Draws) -> Tensor:
    """z after sparse terms, bias and penalties."""
    z = _add_at(z, *sum.entries())
    z = _add_at(z, draws.bias_ids, draws.bias)
    generated = _counts(draws.history, z.shape[1])
    seen = (generated + _counts(draws.prompt, z.shape[1])) > 0
    penalty = draws["repetition"][:, None]
    z = torch.where(seen & (penalty != 1), torch.where(z > 0, z / penalty, z * penalty), z)
    paid = draws["presence"][:, None] + draws["frequency"][:, None] * generated
    return torch.where(generated > 0, z - paid, z)


def _kept(z: Tensor, d: Tensor, draws: Draws) -> Tensor:
    """(N, V) bool: top-k, then top-p, then min-p."""
    V = z.shape[1]
    # Stable: equal logits come by rising id. 0.0 + z, because a sort may set 0.0 and -0.0 apart.
    order = torch.sort(0.0 + z, dim=-1, descending=True, stable=True)
    smallest = order.values.gather(-1, draws["top_k"].clamp(max=V)[:, None] - 1)
    kept = (z >= smallest) & (z > -torch.inf)
    mass = torch.where(kept, masses(d, V), 0).gather(-1, order.indices)
    before = mass.cumsum(-1) - mass
    in_nucleus = before < needed(draws["top_p"][:, None], mass.sum(-1, keepdim=True))
    nucleus = torch.zeros_like(kept).scatter(-1, order.indices, in_nucleus)
    return kept & torch.where(draws["top_p"][:, None] < 1, nucleus, True) & (d >= draws["log_min_p"][:, None])


BACKEND = Reference()
