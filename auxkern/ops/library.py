"""The operators as ``torch.library`` kernels: what torch.compile and the profiler see.

Here the logits become rows that a backend can read, and ids are checked where reading them stops
no device. Importing this module registers the kernels under ``torch.ops.auxkern``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from auxkern.core.loss import row_dtype
from auxkern.ops import registry
from auxkern.ops.torch_ops import implements


def loaded(backend: str, values: list[Tensor]) -> Any:
    """The backend of that name, or for "" the first that can run on these tensors."""
    name = registry.choose(backend or None, values[0].device, tuple(v.dtype for v in values))
    return registry.load(name)


def as_rows(index: int, values: Tensor) -> Tensor:
    """(..., V) as (outer, inner, V) without a copy; row n is [n // inner, n % inner]."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(values.shape[:-1], values.stride()[:-1], strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    if len(groups) > 2:
        raise ValueError(
            f"terms[{index}].values of shape {tuple(values.shape)} and strides {tuple(values.stride())} "
            "cannot be read as rows without a copy; pass values.contiguous()"
        )
    while len(groups) < 2:
        groups.insert(0, (1, 0))
    (outer, outer_stride), (inner, inner_stride) = groups
    return values.as_strided(
        (outer, inner, values.shape[-1]), (outer_stride, inner_stride, values.stride(-1))
    )


def check_target_range(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raises ValueError if an id of (N,) lies outside [0, V) and is not ``ignore_index``."""
    wrong = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"target[{row}] (flattened) is {int(target[row])}, outside [0, {vocab_size}); "
            f"use ignore_index={ignore_index} for rows that do not count"
        )


torch.library.define(
    "auxkern::cross_entropy_forward",
    "(Tensor[] values, Tensor target, float[] scales, float[] softcaps, SymInt vocab_size, "
    "int ignore_index, bool want_smooth, bool want_stats, str backend) "
    "-> (Tensor nll, Tensor row_max, Tensor log_sum, Tensor smooth, Tensor argmax, Tensor term_nll)",
)
torch.library.define(
    "auxkern::cross_entropy_forward_gradient",
    "(Tensor[] values, Tensor target, Tensor row_weight, float[] scales, float[] softcaps, "
    "SymInt vocab_size, int ignore_index, float label_smoothing, float z_loss, bool want_stats, "
    "int[] wanted, Tensor(a!)[] gradients, str backend) "
    "-> (Tensor nll, Tensor row_max, Tensor log_sum, Tensor smooth, Tensor argmax, Tensor term_nll)",
)
torch.library.define(
    "auxkern::cross_entropy_backward",
    "(Tensor[] values, Tensor target, Tensor row_max, Tensor exp_coefficient, Tensor constant, "
    "Tensor target_gradient, float[] scales, float[] softcaps, SymInt vocab_size, int[] wanted, "
    "str backend) -> Tensor[]",
)


@implements("auxkern::cross_entropy_forward")
def _cross_entropy_forward(
    values: list[Tensor],
    target: Tensor,
    scales: list[float],
    softcaps: list[float],
    vocab_size: int,
    ignore_index: int,
    want_smooth: bool,
    want_stats: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    if target.numel() == 0:
        return empty_rows(values, target, want_smooth, want_stats)
    if target.device.type == "cpu":
        check_target_range(target, vocab_size, ignore_index)
    rows = [as_rows(i, v) for i, v in enumerate(values)]
    return (
        loaded(backend, values)
        .cross_entropy_forward(
            rows, target, scales, softcaps, vocab_size, ignore_index, want_smooth, want_stats
        )
        .tensors()
    )


@torch.library.register_fake("auxkern::cross_entropy_forward")
def _cross_entropy_forward_fake(
    values: list[Tensor],
    target: Tensor,
    scales: list[float],
    softcaps: list[float],
    vocab_size: int,
    ignore_index: int,
    want_smooth: bool,
    want_stats: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    return empty_rows(values, target, want_smooth, want_stats)


def empty_rows(
    values: list[Tensor], target: Tensor, want_smooth: bool, want_stats: bool
) -> tuple[Tensor, ...]:
    N, dtype = target.shape[0], row_dtype(values)
    return (
        target.new_empty(N, dtype=dtype),
        target.new_empty(N, dtype=dtype),
        target.new_empty(N, dtype=dtype),
        target.new_empty(N if want_smooth else 0, dtype=dtype),
        target.new_empty(N if want_stats else 0),
        target.new_empty((len(values), N) if want_stats else (0, 0), dtype=dtype),
    )


@implements("auxkern::cross_entropy_forward_gradient")
def _cross_entropy_forward_gradient(
    values: list[Tensor],
    target: Tensor,
    row_weight: Tensor,
    scales: list[float],
    softcaps: list[float],
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_stats: bool,
    wanted: list[int],
    gradients: list[Tensor],
    backend: str,
) -> tuple[Tensor, ...]:
    if target.numel() == 0:
        return empty_rows(values, target, label_smoothing > 0, want_stats)
    if target.device.type == "cpu":
        check_target_range(target, vocab_size, ignore_index)
    views = [as_rows(i, v) for i, v in enumerate(values)]
    out = [g.view(views[i].shape) for i, g in zip(wanted, gradients, strict=True)]
    rows, _ = loaded(backend, values).cross_entropy_forward_gradient(
        views,
        target,
        row_weight,
        scales,
        softcaps,
        vocab_size,
        ignore_index,
        label_smoothing,
        z_loss,
        want_stats,
        wanted,
        out,
    )
    return rows.tensors()


@torch.library.register_fake("auxkern::cross_entropy_forward_gradient")
def _cross_entropy_forward_gradient_fake(
    values: list[Tensor],
    target: Tensor,
    row_weight: Tensor,
    scales: list[float],
    softcaps: list[float],
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_stats: bool,
    wanted: list[int],
    gradients: list[Tensor],
    backend: str,
) -> tuple[Tensor, ...]:
    return empty_rows(values, target, label_smoothing > 0, want_stats)


def _empty_like(values: list[Tensor], wanted: list[int]) -> list[Tensor]:
    return [values[i].new_empty(values[i].shape) for i in wanted]


@implements("auxkern::cross_entropy_backward")
def _cross_entropy_backward(
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
    backend: str,
) -> list[Tensor]:
    if target.numel() == 0:
        return _empty_like(values, wanted)
    rows = [as_rows(i, v) for i, v in enumerate(values)]
    gradients = loaded(backend, values).cross_entropy_backward(
        rows,
        target,
        row_max,
        exp_coefficient,
        constant,
        target_gradient,
        scales,
        softcaps,
        vocab_size,
        wanted,
    )
    return [g.view(values[i].shape) for i, g in zip(wanted, gradients, strict=True)]


@torch.library.register_fake("auxkern::cross_entropy_backward")
def _cross_entropy_backward_fake(
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
    backend: str,
) -> list[Tensor]:
    return _empty_like(values, wanted)
