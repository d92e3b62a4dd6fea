"""From written logits to the launches that filter and draw."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from auxkern.backends.triton.configs import FilterConfig
from auxkern.backends.triton.filters.kernels import (
    finish_kernel,
    gather_kernel,
    histogram_kernel,
    peak_kernel,
)
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.launch import MAX_SPLITS, Launch, splits
from auxkern.core.draws import RowTokens
from auxkern.core.mass import mass_shift

# Of one id: reach and bin; a mass; ten rounds of Philox for four ids and two logarithms.
_BIN_FLOPS, _MASS_FLOPS, _NOISE_FLOPS = 4, 12, 40
_THRESHOLDS = 6  # numbers of a row that one kernel leaves for the next


class Bins(NamedTuple):
    """A histogram of each row."""

    counts: Tensor  # (N, BINS) int32 ids
    masses: Tensor  # (N, BINS) int64


class Parts(NamedTuple):
    """What programs that share a row leave."""

    floats: Tensor  # (7, N, splits) float32: largest logit, whether one is NaN, score of the draw, 4 bounds
    ints: Tensor  # (2, N, splits) int32: id of the draw, how many are listed
    mass: Tensor  # (N, splits) int64 of what was kept
    listed: Tensor  # (N, splits, capacity) int32 ids


class FiltersArgument(NamedTuple):
    """What a row is drawn with, as kernels take it: a number of all rows, or (N,)."""

    temperature: float | Tensor
    seed: Tensor
    position: Tensor
    top_k: float | Tensor  # an integer, coded where it is one of all rows
    top_p: float | Tensor  # (N,) float64, or 1
    log_min_p: float | Tensor


class Written(NamedTuple):
    """What filters take.

    Attributes:
        z: (N, padded) float32 logits, -inf from V on, rows as wide as whole tiles.
        V: ids.
        draws: of the rows.
        tokens: to fill.
        want_logprob: whether log-probabilities are filled.
    """

    z: Tensor
    V: int
    draws: FiltersArgument
    tokens: RowTokens
    want_logprob: bool


def plan(written: Written, gpu: Gpu) -> list[Launch]:
    """The launches that fill the tokens, in order."""
    z, V, N, config = written.z, written.V, written.z.shape[0], gpu.configs.filter
    programs = splits(N, -(-V // config.block), gpu.multiprocessors, config.programs)
    capacity = max(config.listed // programs, config.least_listed)
    bins = Bins(
        z.new_empty((N, config.bins), dtype=torch.int32), z.new_empty((N, config.bins), dtype=torch.int64)
    )
    parts = Parts(
        z.new_empty((7, N, programs)),
        z.new_empty((2, N, programs), dtype=torch.int32),
        z.new_empty((N, programs), dtype=torch.int64),
        z.new_empty((N, programs, capacity), dtype=torch.int32),
    )
    thresholds = z.new_empty((N, _THRESHOLDS), dtype=torch.int64)
    shift = mass_shift(V)
    shares = {"z_in": z, "parts": parts, "N": N, "V": V, "stride": z.shape[1], "splits": programs}
    draws, logprob = {"draws": written.draws}, {"LOGPROB": written.want_logprob}
    block = {"BINS": config.bins, "BLOCK": config.block}
    tiles = block | {"SPLITS": MAX_SPLITS}
    lists = {"thresholds": thresholds, "capacity": capacity, "shift": shift}
    grid, read = (N, programs), 4 * N * V
    listed = 4 * N * programs * capacity
    return [
        Launch(peak_kernel, grid, shares | {"bins": bins}, block, config.warps, read, N * V),
        Launch(
            histogram_kernel,
            grid,
            shares | draws | {"bins": bins, "shift": shift},
            tiles,
            config.warps,
            read,
            N * V * (_BIN_FLOPS + _MASS_FLOPS),
        ),
        Launch(
            gather_kernel,
            grid,
            shares | draws | lists | {"bins": bins},
            tiles | logprob,
            config.warps,
            read,
            N * V * (_BIN_FLOPS + _NOISE_FLOPS),
        ),
        Launch(
            finish_kernel,
            (N,),
            shares
            | draws
            | lists
            | {"out": written.tokens, "bits": _bits(programs, config), "unit": _unit(shift)},
            block | {"SPLITS": MAX_SPLITS, "BLOCK": config.finish_block} | logprob,
            config.finish_warps,
            listed,
            listed * _NOISE_FLOPS,
        ),
    ]


def _bits(programs: int, config: FilterConfig) -> int:
    """log2 of the ids that a tile of the last kernel takes of each list: all lists side by side."""
    return (config.finish_block >> (programs - 1).bit_length()).bit_length() - 1


def _unit(shift: int) -> float:
    return 2.0 ** -(31 + shift)
