"""Launches of these kernels that stand for the rest; ``../kernels.py`` registers them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from auxkern.backends.triton import cases
from auxkern.backends.triton.cases import H, Kernel
from auxkern.backends.triton.entries import launches
from auxkern.backends.triton.entries.kernels import (
    entries_gradient_kernel,
    entries_nll_kernel,
    entries_order_kernel,
)
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.launch import Launch
from auxkern.core.loss import Loss
from auxkern.core.sums import Sum
from auxkern.core.terms import Sparse

ROWS, K = 4096, 40  # a chunk, and the tokens of a condition


def sparse_of(rows: int, dtype: torch.dtype = torch.float32, ids: torch.dtype = torch.int64) -> Sparse:
    """A pointer over a condition."""
    return Sparse(
        torch.empty(rows, K, dtype=ids, device="meta"), torch.empty(rows, K, dtype=dtype, device="meta")
    )


def ordered(
    V: int, gpu: Gpu, dtype: torch.dtype = torch.float32, ids: torch.dtype = torch.int64
) -> tuple[launches.Entries, Launch]:
    """The entries of ``ROWS`` rows and the launch that sorts them."""
    block = gpu.configs.entry_ids
    return launches.order(Sum((sparse_of(ROWS, dtype, ids),), V), -(-V // block), block, gpu.configs)


def _order_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    yield "fp32", ordered(V, gpu)[1]
    yield "fp16, int32 ids", ordered(V, gpu, H, torch.int32)[1]


def _gradient_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    coefficients, factor = cases.coefficients_of(ROWS), cases.float_row(ROWS)
    yield "int64 ids", launches.gradient(ordered(V, gpu)[0], cases.target_of(ROWS), coefficients, factor)[1]


def _nll_cases(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    yield (
        "int64 ids",
        launches.term_nll(sparse_of(ROWS), V, cases.target_of(ROWS), Loss(stats=True), gpu.configs)[1][1],
    )


KERNELS = (
    Kernel(entries_order_kernel, _order_cases, ROWS),
    Kernel(entries_gradient_kernel, _gradient_cases, ROWS),
    Kernel(entries_nll_kernel, _nll_cases, ROWS),
)
