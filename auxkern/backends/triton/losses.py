"""What both losses hand to their kernels beside the terms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossRows(NamedTuple):
    """``registry.Rows`` as a kernel takes it."""

    nll: Tensor
    row_max: Tensor
    log_sum: Tensor
    smooth: Tensor
    argmax: Tensor
    term_nll: Tensor


def loss_rows(target: Tensor, terms: int, want_smooth: bool, want_stats: bool) -> LossRows:
    """Uninitialised rows; what is not wanted has no elements."""
    N = target.shape[0]

    def floats(*shape: int) -> Tensor:
        return target.new_empty(shape, dtype=torch.float32)

    return LossRows(
        nll=floats(N),
        row_max=floats(N),
        log_sum=floats(N),
        smooth=floats(N if want_smooth else 0),
        argmax=target.new_empty(N if want_stats else 0),
        term_nll=floats(terms, N) if want_stats else floats(0, 0),
    )


class Coefficients(NamedTuple):
    """Of each row's gradient, (N,) float32: see ``registry.Backend.cross_entropy_backward``."""

    row_max: Tensor
    exp_coefficient: Tensor
    constant: Tensor
    target_gradient: Tensor
