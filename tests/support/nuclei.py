"""Rows whose probabilities reach top-p exactly at an id, where careless sums keep another one or drop it."""

from __future__ import annotations

import torch
from torch import Tensor

import auxkern
from auxkern import SamplingParams
from auxkern.core.mass import SLACK, masses
from tests.support.cases import generator

LARGE_TAIL = -18.0


def rows(V: int) -> Tensor:
    """(N, V) float32 logits of every kind that has ties, exact sums, or ids of no or little probability."""
    g = generator(V)
    steps = torch.arange(V).float()
    uniform = torch.zeros(V)
    dyadic = -torch.randint(0, 12, (V,), generator=g).float() * torch.tensor(2.0).log()
    normal = 3 * torch.randn(V, generator=g)
    listed = [uniform, -steps * 0.05, -steps * 0.7, dyadic, normal, normal + 1e4, normal * 30]
    listed += [(4 * normal).round() / 4, torch.where(steps == V // 2, 0.0, LARGE_TAIL)]
    hidden = torch.rand(V, generator=g) < 0.5
    hidden[V // 3] = False
    for impossible in (-torch.inf, torch.finfo(torch.float32).min):
        listed += [torch.where(hidden, impossible, row) for row in (uniform, normal)]
    listed.append(torch.where(steps % 2 == 0, 0.0, -0.0))
    return torch.stack([row[torch.randperm(V, generator=g)] for row in listed])


def with_edges(z: Tensor, temperature: float, per_row: int) -> tuple[Tensor, Tensor]:
    """Rows, and for each a p (float64) such that the integer mass before some id reaches p to the last bit.

    Two backends whose masses differ by a unit anywhere in a row keep different ids for about every other p.
    """
    z = z.repeat_interleave(per_row, 0)
    d = (z - z.amax(-1, keepdim=True)) / torch.full((len(z), 1), temperature)
    falling = masses(d.sort(-1, descending=True).values, z.shape[1])
    share = falling.cumsum(-1).double() / falling.sum(-1, keepdim=True).double()
    column = torch.randint(0, z.shape[1], (len(z), 1), generator=generator(per_row))
    return z, (share.gather(1, column)[:, 0] + SLACK).clamp(max=1)


def kept_count(z: Tensor, params: SamplingParams, backend: str) -> Tensor:
    """(N,) how many ids are kept of rows of equal logits: their share is what a token's probability says."""
    drawn = auxkern.sample(
        z,
        params,
        seed=torch.arange(len(z), device=z.device),
        position=0,
        return_logprobs=True,
        backend=backend,
    )
    return (-drawn.processed_logprob.double()).exp().round().long().cpu()
