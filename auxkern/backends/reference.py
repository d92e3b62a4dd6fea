"""The specification: the formulas in plain PyTorch, on any device, float64 when given float64.

Fast backends are compared with this. It takes several (N, V) buffers and is in no hurry.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from auxkern.ops.registry import Rows


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
        outside = ~ignored & ((target < 0) | (target >= vocab_size))
        y = target.masked_fill(ignored | outside, 0)

        def rows(x: Tensor) -> Tensor:
            return x.masked_fill(outside, torch.nan).masked_fill(ignored, 0)

        row_max = z.amax(-1)
        log_sum = torch.logsumexp(z - row_max[:, None], dim=-1)
        return Rows(
            nll=rows(_nll(z, y)),
            row_max=rows(row_max),
            log_sum=rows(log_sum),
            smooth=rows(-torch.log_softmax(z, dim=-1).mean(-1)) if want_smooth else z.new_empty(0),
            argmax=z.argmax(-1).masked_fill(ignored, -1) if want_stats else target.new_empty(0),
            term_nll=torch.stack([rows(_nll(s, y)) for s in shares]) if want_stats else z.new_empty(0, 0),
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


BACKEND = Reference()
