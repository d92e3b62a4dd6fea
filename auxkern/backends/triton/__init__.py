"""Triton kernels for CUDA and ROCm GPUs; on the CPU through Triton's interpreter.

Importing this package imports Triton; ``backends.choice`` does so when it is first asked for.
"""

from __future__ import annotations

from auxkern.backends.triton.draws import GivenDraw
from auxkern.backends.triton.heads_loss.losses import HeadsLoss
from auxkern.backends.triton.logits_loss.launches import LogitsLoss


class Triton(HeadsLoss, LogitsLoss, GivenDraw):
    """Its kernels, one folder for each family."""

    name = "triton"


BACKEND = Triton()
