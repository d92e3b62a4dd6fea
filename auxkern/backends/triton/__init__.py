"""Triton kernels for CUDA and ROCm GPUs; on the CPU through Triton's interpreter.

Importing this package imports Triton; the registry does so when it is first asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
import triton
from torch import Tensor

from auxkern.backends.triton import plans
from auxkern.ops.registry import Rows

_OLDEST = (3, 6)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


class Triton:
    name = "triton"

    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        if _version() < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            return f"Triton {triton.__version__} is older than {oldest}; pip install 'triton>={oldest}'"
        if torch.float64 in dtypes:
            return 'its kernels sum in float32; use backend="reference" for float64'
        # Kernels were decorated for one or the other when this package was imported.
        interpreted = not isinstance(plans.forward_kernel, triton.JITFunction)
        if device.type == "cuda" or (device.type == "cpu" and interpreted):
            return None
        if device.type == "cpu":
            return "its kernels need a GPU; set TRITON_INTERPRET=1 before Python starts to interpret them"
        return f"its kernels run on CUDA and ROCm GPUs, not on {device.type!r}"

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
        settings = (scales, softcaps, vocab_size, ignore_index, want_smooth, want_stats)
        rows, launches = plans.forward(values, target, *settings, _multiprocessors(target.device))
        with _on(target.device):
            for launch in launches:
                launch.run()
        return rows

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
        rows = (row_max, exp_coefficient, constant, target_gradient)
        settings = (scales, softcaps, vocab_size, wanted)
        gradients, launch = plans.backward(values, target, *rows, *settings, _multiprocessors(target.device))
        with _on(target.device):
            launch.run()
        return gradients


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    # Triton launches on the current device, whatever device its tensors are on.
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


BACKEND = Triton()
