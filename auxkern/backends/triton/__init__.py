"""Triton kernels for CUDA and ROCm GPUs; on the CPU through Triton's interpreter.

Importing this package imports Triton; ``backends.choice`` does so when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton

from auxkern.backends.triton.heads_draw.launches import HeadsDraw
from auxkern.backends.triton.heads_loss.losses import HeadsLoss
from auxkern.backends.triton.logits_draw.launches import LogitsDraw
from auxkern.backends.triton.logits_loss.kernels import forward_kernel
from auxkern.backends.triton.logits_loss.launches import LogitsLoss

_OLDEST = (3, 6)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


class Triton(HeadsLoss, HeadsDraw, LogitsLoss, LogitsDraw):
    """Its kernels, one folder for each family."""

    name = "triton"

    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        if _version() < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            return f"Triton {triton.__version__} is older than {oldest}; pip install 'triton>={oldest}'"
        if torch.float64 in dtypes:
            return 'its kernels sum in float32; use backend="reference" for float64'
        # Kernels were decorated for one or the other when this package was imported.
        interpreted = not isinstance(forward_kernel, triton.JITFunction)
        if device.type == "cuda" or (device.type == "cpu" and interpreted):
            return None
        if device.type == "cpu":
            return "its kernels need a GPU; set TRITON_INTERPRET=1 before Python starts to interpret them"
        return f"its kernels run on CUDA and ROCm GPUs, not on {device.type!r}"


BACKEND = Triton()
