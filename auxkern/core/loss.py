"""What the loss of one row is made of, and its slope: shared by every way of computing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


def row_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any input is, float32 otherwise: the dtype that logits, rows and sums have."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def row_loss(nll: Tensor, lse: Tensor, smooth: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """(N,) loss of each row: (1 - s) nll + s smooth + q lse**2."""
    row = nll if label_smoothing == 0 else (1 - label_smoothing) * nll + label_smoothing * smooth
    return row if z_loss == 0 else row + z_loss * lse.square()


def gradient_coefficients(
    g: Tensor,
    nll: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    counts: Tensor,
    label_smoothing: float,
    z_loss: float,
    V: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``Backend.cross_entropy_backward`` needs of each row: exp_coefficient, constant, target_gradient.

    With p = softmax(z), y the target, s the smoothing, q the z-loss and g the gradient of the row's loss,

        dz[v] = g (1 + 2 q lse) p[v] - g (1 - s) [v = y] - g s / V

    At v = y the difference p - 1 cancels when the model is sure, so that entry is computed from the
    nll, with p = exp(-nll) and p - 1 = expm1(-nll), and handed over apart.

    Args:
        g, nll, row_max, log_sum: (N,) float32 or float64.
        counts: (N,) bool, False for rows that are ignored: their coefficients are 0.
    """
    z_slope = 2 * z_loss * (row_max + log_sum)
    constant = g * (label_smoothing / V)
    at_target = g * (1 - label_smoothing) * torch.expm1(-nll) - constant
    at_target = at_target + g * (label_smoothing + z_slope) * torch.exp(-nll)
    exp_coefficient = g * (1 + z_slope) * torch.exp(-log_sum)
    exp_coefficient, constant, at_target = (
        torch.where(counts, c, 0.0) for c in (exp_coefficient, constant, at_target)
    )
    return exp_coefficient, constant, at_target


class RowSums(NamedTuple):
    """What the logits of each row add up to; (N,) each, as in ``registry.Rows``."""

    nll: Tensor
    row_max: Tensor
    log_sum: Tensor


@dataclass(frozen=True)
class RowSlopes:
    """What the gradient of each row's logits is made of, where their sums are known already.

    Attributes:
        g: (N,) gradient of the row's loss.
        sums: over all ids.
        counts: (N,) bool, False for rows that are ignored.
        label_smoothing, z_loss: of the loss.
        vocab_size: V, all ids.
    """

    g: Tensor
    sums: RowSums
    counts: Tensor
    label_smoothing: float
    z_loss: float
    vocab_size: int

    def rows(self, rows: Any, counts: Tensor) -> RowSlopes:
        """The same for some rows, of which (C,) ``counts`` count."""
        sums = RowSums(*(x[rows] for x in self.sums))
        return replace(self, g=self.g[rows], sums=sums, counts=counts)

    def coefficients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N,) row_max, exp_coefficient, constant, target_gradient for ``cross_entropy_backward``."""
        sums = self.sums
        made = gradient_coefficients(
            self.g, *sums, self.counts, self.label_smoothing, self.z_loss, self.vocab_size
        )
        row_max, exp_coefficient, constant, at_target = (c.to(dtype) for c in (sums.row_max, *made))
        return row_max, exp_coefficient, constant, at_target
