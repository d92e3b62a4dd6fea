"""Triton kernels for CUDA and ROCm GPUs; on the CPU through Triton's interpreter.

Importing this package imports Triton; the registry does so when it is first asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace

import torch
import triton
from torch import Tensor

from auxkern.backends.triton.heads_draw import launches as heads_draw
from auxkern.backends.triton.heads_loss import launches as heads_loss
from auxkern.backends.triton.logits_draw import launches as logits_draw
from auxkern.backends.triton.logits_loss import launches as logits_loss
from auxkern.backends.triton.logits_loss.kernels import forward_kernel
from auxkern.backends.triton.losses import Coefficients
from auxkern.backends.triton.sums import HeadsSum, LogitsSum, heads_refusal, heads_sum
from auxkern.core.loss import RowSlopes, RowSums
from auxkern.ops.registry import Draws, HeadGradients, HeadRows, Rows

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
        interpreted = not isinstance(forward_kernel, triton.JITFunction)
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
        logits = LogitsSum(values, scales, softcaps, vocab_size)
        settings = (ignore_index, want_smooth, want_stats, _multiprocessors(target.device))
        rows, launches = logits_loss.forward(logits, target, *settings)
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
        logits = LogitsSum(values, scales, softcaps, vocab_size)
        coefficients = Coefficients(row_max, exp_coefficient, constant, target_gradient)
        multiprocessors = _multiprocessors(target.device)
        gradients, launch = logits_loss.backward(logits, target, coefficients, wanted, multiprocessors)
        with _on(target.device):
            launch.run()
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
        device = draws.seed.device
        logits = LogitsSum(values, scales, softcaps, vocab_size)
        tokens, launches = logits_draw.sample(logits, draws, want_logprob, _multiprocessors(device))
        with _on(device):
            for launch in launches:
                launch.run()
        return tokens

    def sample_heads(
        self, heads: list[HeadRows], vocab_size: int, draws: Draws, want_logprob: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        settings = (vocab_size, draws, want_logprob, _float32_products())
        tokens, launches = heads_draw.sample(heads, *settings)
        with _on(draws.seed.device):
            for launch in launches:
                launch.run()
        return tokens

    def heads_refusal(self, heads: list[HeadRows]) -> str | None:
        if heads[0].hidden.device.type == "cpu" and any(h.hidden.dtype == torch.bfloat16 for h in heads):
            return "Triton's interpreter multiplies the bits of bfloat16 matrices, not their values"
        return heads_refusal(heads)

    def heads_forward(
        self,
        heads: list[HeadRows],
        target: Tensor,
        vocab_size: int,
        ignore_index: int,
        want_smooth: bool,
        want_stats: bool,
    ) -> Rows:
        summed = heads_sum(heads, vocab_size, want_stats, _float32_products())
        rows, _, launches = heads_loss.forward(summed, target, ignore_index, want_smooth, want_stats, None)
        with _on(target.device):
            for launch in launches:
                launch.run()
        return rows

    def heads_forward_gradient(
        self,
        heads: list[HeadRows],
        target: Tensor,
        counts: Tensor,
        vocab_size: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        want_stats: bool,
        wanted: list[int],
    ) -> tuple[Rows, HeadGradients]:
        summed = heads_sum(heads, vocab_size, want_stats, _float32_products())
        dtype = heads_loss.gradient_dtype([heads[i] for i in wanted])
        e = summed.buffer(heads_loss.e_dtype(dtype)) if heads_loss.one_write(summed, wanted) else None
        rows, tops, launches = heads_loss.forward(
            summed, target, ignore_index, label_smoothing > 0, want_stats, e
        )
        with _on(target.device):
            for launch in launches:
                launch.run()
            sums = RowSums(rows.nll, rows.row_max, rows.log_sum)
            slopes = RowSlopes(rows.nll, sums, counts, label_smoothing, z_loss, vocab_size)
            if e is None:
                return rows, _gradients_made_again(summed, target, slopes, wanted, dtype)
            coefficients, unit = _unit_coefficients(slopes, heads_loss.MAGNIFIED[dtype])
            d, launch = heads_loss.scale(summed, target, e, tops, coefficients, dtype)
            launch.run()
        return rows, HeadGradients([d] * len(wanted), unit, heads_loss.MAGNIFIED[dtype])

    def heads_gradient(
        self, heads: list[HeadRows], target: Tensor, slopes: RowSlopes, vocab_size: int, wanted: list[int]
    ) -> HeadGradients:
        summed = heads_sum(heads, vocab_size, False, _float32_products())
        with _on(target.device):
            dtype = heads_loss.gradient_dtype([heads[i] for i in wanted])
            return _gradients_made_again(summed, target, slopes, wanted, dtype)


def _gradients_made_again(
    summed: HeadsSum, target: Tensor, slopes: RowSlopes, wanted: list[int], dtype: torch.dtype
) -> HeadGradients:
    """Gradients of the heads' products, from their hidden states."""
    coefficients, unit = _unit_coefficients(slopes, heads_loss.MAGNIFIED[dtype])
    groups = [summed.slope_of(i) for i in wanted]
    distinct = list(dict.fromkeys(groups))
    gradients, launch = heads_loss.gradient(summed, target, coefficients, distinct, dtype)
    launch.run()
    products = [gradients[distinct.index(group)] for group in groups]
    return HeadGradients(products, unit, heads_loss.MAGNIFIED[dtype])


def _unit_coefficients(slopes: RowSlopes, magnified: float) -> tuple[Coefficients, Tensor]:
    """Coefficients of a dz that fits a 16-bit number, and the (N,) factor that it is short of.

    ``slopes.g`` is not looked at: it comes in when the products with hidden states and weights are done.
    """
    lse = slopes.sums.row_max + slopes.sums.log_sum
    steepness = (1.0 + (2 * slopes.z_loss * lse).abs()).float()
    # A row that is NaN says so in dz; its factor is finite, lest it spoil the other rows.
    steepness = torch.where(steepness.isfinite(), steepness, 1.0)
    coefficients = replace(slopes, g=magnified / steepness).coefficients(torch.float32)
    return Coefficients(*coefficients), steepness


def _float32_products() -> str:
    """How float32 operands are multiplied: exactly, unless torch is told that TF32 will do."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    # Triton launches on the current device, whatever device its tensors are on.
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


BACKEND = Triton()
