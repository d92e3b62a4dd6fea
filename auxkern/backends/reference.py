"""The specification: the formulas in plain PyTorch, on any device, float64 when given float64.

Fast backends are compared with this. It takes several (N, V) buffers and is in no hurry.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from auxkern.core.mass import masses, needed
from auxkern.core.noise import first_largest, gumbel, random_bits
from auxkern.ops.registry import NO_TARGET, ROW_EMPTY, ROW_INFINITE, ROW_NAN, ROW_OK, Draws, Rows


def _contributions(values: list[Tensor], scales: list[float], softcaps: list[float], V: int) -> list[Tensor]:
    """Each term's share of z: I tensors (N, V) in float32 or float64."""
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
    shares = []
    for x, scale, softcap in zip(values, scales, softcaps, strict=True):
        x = x[..., :V].to(dtype).reshape(-1, V)
        shares.append(scale * (softcap * torch.tanh(x / softcap) if softcap else x))
    return shares


def _nll(z: Tensor, y: Tensor) -> Tensor:
    return -torch.log_softmax(z, dim=-1).gather(-1, y[:, None])[:, 0]


class Reference:
    name = "reference"

    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        return None

    def cross_entropy_forward(
        self,
        values: list[Tensor],
        target: Tensor,
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        ignore_index: int,
        want_smooth: bool,
        want_stats: bool,
    ) -> Rows:
        shares = _contributions(values, scales, softcaps, vocab_size)
        z = torch.stack(shares).sum(0)
        ignored = target == ignore_index
        elsewhere = ~ignored & (target == NO_TARGET)
        outside = ~ignored & ~elsewhere & ((target < 0) | (target >= vocab_size))
        y = target.masked_fill(ignored | elsewhere | outside, 0)

        def rows(x: Tensor) -> Tensor:
            return x.masked_fill(outside, torch.nan).masked_fill(ignored, 0)

        def nll(x: Tensor) -> Tensor:
            return rows(_nll(x, y).masked_fill(elsewhere, torch.inf))

        row_max = z.amax(-1)
        log_sum = torch.logsumexp(z - row_max.masked_fill(row_max == -torch.inf, 0)[:, None], dim=-1)
        return Rows(
            nll=nll(z),
            row_max=rows(row_max),
            log_sum=rows(log_sum),
            smooth=rows(-torch.log_softmax(z, dim=-1).mean(-1)) if want_smooth else z.new_empty(0),
            argmax=z.argmax(-1).masked_fill(ignored, -1) if want_stats else target.new_empty(0),
            term_nll=torch.stack([nll(s) for s in shares]) if want_stats else z.new_empty(0, 0),
        )

    def cross_entropy_backward(
        self,
        values: list[Tensor],
        target: Tensor,
        row_max: Tensor,
        exp_coefficient: Tensor,
        constant: Tensor,
        target_gradient: Tensor,
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        wanted: list[int],
    ) -> list[Tensor]:
        z = torch.stack(_contributions(values, scales, softcaps, vocab_size)).sum(0)
        dz = exp_coefficient[:, None] * torch.exp(z - row_max[:, None]) - constant[:, None]
        is_target = torch.arange(vocab_size, device=z.device) == target[:, None]
        dz = torch.where(is_target, target_gradient[:, None], dz)
        counts = (exp_coefficient != 0) | (constant != 0) | (target_gradient != 0)
        dz = dz.masked_fill(~counts[:, None], 0)

        gradients = []
        for i in wanted:
            x, scale, softcap = values[i], scales[i], softcaps[i]
            d = dz * scale
            if softcap:
                slope = 1 - torch.tanh(x[..., :vocab_size].to(z).reshape(z.shape) / softcap) ** 2
                d = (d * slope).masked_fill(~counts[:, None], 0)
            gradient = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            gradient[..., :vocab_size] = d.to(x.dtype).view(*x.shape[:-1], vocab_size)
            gradients.append(gradient)
        return gradients

    def sample(
        self,
        values: list[Tensor],
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        draws: Draws,
        want_logprob: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shares = _contributions(values, scales, softcaps, vocab_size)
        for i, scale in enumerate(draws.row_scales):
            shares[i] = shares[i] if scale is None else scale[:, None] * shares[i]
        z = torch.stack(shares).sum(0)
        z = _adjusted(z, draws)
        top = z.amax(-1, keepdim=True)
        status = torch.full(z.shape[:1], ROW_OK, dtype=torch.int32, device=z.device)
        status[top[:, 0] == torch.inf] = ROW_INFINITE
        status[top[:, 0] == -torch.inf] = ROW_EMPTY
        status[z.isnan().any(-1)] = ROW_NAN

        temperature = draws.temperature[:, None]
        d = (z - top) / torch.where(temperature == 0, 1.0, temperature)
        kept = _kept(z, d, draws)
        noise = gumbel(random_bits(draws.seed, draws.position, vocab_size)).to(z.dtype)
        score = torch.where(kept, d + noise, -torch.inf)
        token = torch.where(draws.temperature == 0, first_largest(z), first_largest(score))
        token = torch.where(status == ROW_OK, token, -1)
        if not want_logprob:
            return token, status, z.new_empty(0)
        logprob = torch.log_softmax(torch.where(kept, d, -torch.inf), -1)
        logprob = logprob.gather(-1, token.clamp(min=0)[:, None])[:, 0]
        logprob = torch.where(draws.temperature == 0, 0.0, logprob)
        return token, status, torch.where(status == ROW_OK, logprob, torch.nan)


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


def _adjusted(z: Tensor, draws: Draws) -> Tensor:
    """z after sparse terms, bias and penalties."""
    z = _add_at(z, draws.added_ids, draws.added)
    z = _add_at(z, draws.bias_ids, draws.bias)
    generated = _counts(draws.history, z.shape[1])
    seen = (generated + _counts(draws.prompt, z.shape[1])) > 0
    penalty = draws.repetition[:, None]
    z = torch.where(seen & (penalty != 1), torch.where(z > 0, z / penalty, z * penalty), z)
    paid = draws.presence[:, None] + draws.frequency[:, None] * generated
    return torch.where(generated > 0, z - paid, z)


def _kept(z: Tensor, d: Tensor, draws: Draws) -> Tensor:
    """(N, V) bool: top-k, then top-p, then min-p."""
    V = z.shape[1]
    # Stable: equal logits come by rising id. 0.0 + z, because a sort may set 0.0 and -0.0 apart.
    order = torch.sort(0.0 + z, dim=-1, descending=True, stable=True)
    smallest = order.values.gather(-1, draws.top_k.clamp(max=V)[:, None] - 1)
    kept = (z >= smallest) & (z > -torch.inf)
    mass = torch.where(kept, masses(d, V), 0).gather(-1, order.indices)
    before = mass.cumsum(-1) - mass
    in_nucleus = before < needed(draws.top_p[:, None], mass.sum(-1, keepdim=True))
    nucleus = torch.zeros_like(kept).scatter(-1, order.indices, in_nucleus)
    return kept & torch.where(draws.top_p[:, None] < 1, nucleus, True) & (d >= draws.log_min_p[:, None])


BACKEND = Reference()
