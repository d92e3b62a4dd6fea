"""What the loss of one row is made of, and its slope: shared by every way of computing it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# The target of a row whose target is not among these ids but among those of another shard.
NO_TARGET = -(2**63)


@dataclass(frozen=True)
class Loss:
    """What is asked of each row, beside its logits and its target y.

        row = (1 - label_smoothing) nll + label_smoothing smooth + z_loss lse**2

    Attributes:
        ignore_index: the target of rows that do not count.
        label_smoothing: in [0, 1] (Szegedy et al. 2016).
        z_loss: not negative (Chowdhery et al. 2022).
        stats: whether ``argmax`` and ``term_nll`` are wanted.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    stats: bool = False

    @property
    def smooth(self) -> bool:
        """Whether the rows' mean distance is needed."""
        return self.label_smoothing > 0

    @property
    def without_stats(self) -> Loss:
        """The same, of which no statistics are wanted."""
        return replace(self, stats=False) if self.stats else self

    def of_rows(self, nll: Tensor, lse: Tensor, smooth: Tensor) -> Tensor:
        """(N,) loss of each row.

        Args:
            nll, lse: (N,) as in ``RowLosses``.
            smooth: (N,) mean distance; not read unless ``self.smooth``.
        """
        s = self.label_smoothing
        row = nll if s == 0 else (1 - s) * nll + s * smooth
        return row if self.z_loss == 0 else row + self.z_loss * lse.square()


class RowSums(NamedTuple):
    """What the logits of each row add up to; (N,) each, as in ``RowLosses``."""

    nll: Tensor
    row_max: Tensor
    log_sum: Tensor


class RowLosses(NamedTuple):
    """What a backend says of each row.

    Float fields are float32 (float64 if any term is float64); a field that was not asked for
    has no elements. Rows whose target is ``ignore_index`` are not read: they hold 0 (argmax -1).
    Rows whose target lies outside [0, V) hold NaN in ``nll`` and ``row_max``; but a row whose target is
    ``NO_TARGET`` is one whose target has a logit of -inf: its ``nll`` is infinite, the rest is what its
    V ids add up to. A row of nothing but -inf has -inf in ``row_max`` and ``log_sum``, NaN in ``nll``.

    z is the sum of the terms over the first V ids, y the target.
    """

    nll: Tensor  # (N,)   lse - z[y], precise also when p[y] is close to 1
    row_max: Tensor  # (N,)   max_v z[v]
    log_sum: Tensor  # (N,)   log sum_v exp(z[v] - row_max)
    smooth: Tensor  # (N,)   mean_v (lse - z[v])
    argmax: Tensor  # (N,)   int64, lowest id among equals
    term_nll: Tensor  # (I, N) nll of the target under softmax(term i alone)
    lse: Tensor  # (N,)   row_max + log_sum, rounded once

    @classmethod
    def empty(cls, target: Tensor, dtype: torch.dtype, terms: int, loss: Loss) -> RowLosses:
        """Memory for the rows of a sum of so many terms, not initialised; on the target's device."""
        N = target.shape[0]
        stats = N if loss.stats else 0
        return cls(
            nll=target.new_empty(N, dtype=dtype),
            row_max=target.new_empty(N, dtype=dtype),
            log_sum=target.new_empty(N, dtype=dtype),
            smooth=target.new_empty(N if loss.smooth else 0, dtype=dtype),
            argmax=target.new_empty(stats),
            term_nll=target.new_empty((terms if stats else 0, stats), dtype=dtype),
            lse=target.new_empty(N, dtype=dtype),
        )

    def cleared(self) -> RowLosses:
        """These, holding what rows that are ignored hold."""
        for field in self:
            field.zero_()
        self.argmax.fill_(-1)
        return self

    @property
    def sums(self) -> RowSums:
        """What a gradient needs of them."""
        return RowSums(self.nll, self.row_max, self.log_sum)

    def summed(self) -> RowLosses:
        """These, with ``lse``, once a kernel has written the rest."""
        torch.add(self.row_max, self.log_sum, out=self.lse)
        return self

    def store(self, rows: slice | Tensor, some: RowLosses) -> None:
        """Puts what a backend says of some rows, a range or (C,) indices, where it belongs."""
        for whole, part in zip(self, some, strict=True):
            if part.numel():
                whole[..., rows] = part.to(whole.dtype)


class Coefficients(NamedTuple):
    """What the gradient of each row's logits is made of; (N,) each.

        dz[n, v] = target_gradient[n]                              v = target[n], if that is in [0, V)
        dz[n, v] = exp_coefficient[n] * exp(z[n, v] - row_max[n]) - constant[n]   other v < V
        dz[n, v] = 0                                                          v >= V

    A row whose last three are all 0 is 0 whatever its logits hold.
    """

    row_max: Tensor
    exp_coefficient: Tensor
    constant: Tensor
    target_gradient: Tensor


@dataclass(frozen=True)
class RowSlopes:
    """The gradient of each row's loss, where what its logits add up to is known.

    Attributes:
        g: (N,) gradient of the row's loss.
        sums: over all ids.
        counts: (N,) bool, False for rows that are ignored: their coefficients are 0. Rows of logits are those
            whose target is ``loss.ignore_index``.
        loss: what the row's loss is.
        V: all ids, of every shard.
        written: (N,) the g whose gradients the memory for gradients of logits already holds; None if it holds
            none. Rows where it equals ``g`` may be left as they are.
    """

    g: Tensor
    sums: RowSums
    counts: Tensor
    loss: Loss
    V: int
    written: Tensor | None = None

    def rows(self, rows: slice | Tensor, counts: Tensor) -> RowSlopes:
        """The same for some rows, of which (C,) ``counts`` count; of their gradients nothing is written."""
        sums = RowSums(*(x[rows] for x in self.sums))
        return replace(self, g=self.g[rows], sums=sums, counts=counts, written=None)

    def coefficients(self, dtype: torch.dtype) -> Coefficients:
        """What a kernel makes dz of, in this dtype.

        With p = softmax(z), y the target, s the smoothing, q the z-loss and g the gradient of the row's loss,

            dz[v] = g (1 + 2 q lse) p[v] - g (1 - s) [v = y] - g s / V

        At v = y the difference p - 1 cancels when the model is sure, so that entry is computed from the
        nll, with p = exp(-nll) and p - 1 = expm1(-nll), and handed over apart.
        """
        g, s, (nll, row_max, log_sum) = self.g, self.loss.label_smoothing, self.sums
        z_slope = 2 * self.loss.z_loss * (row_max + log_sum)
        constant = g * (s / self.V)
        at_target = g * (1 - s) * torch.expm1(-nll) - constant
        at_target = at_target + g * (s + z_slope) * torch.exp(-nll)
        exp_coefficient = g * (1 + z_slope) * torch.exp(-log_sum)
        slopes = [torch.where(self.counts, c, 0.0).to(dtype) for c in (exp_coefficient, constant, at_target)]
        return Coefficients(row_max.to(dtype), *slopes)
