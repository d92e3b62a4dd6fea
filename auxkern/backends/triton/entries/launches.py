"""From the sparse terms of a sum to the launches that order their entries and make their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from auxkern.backends.triton.configs import Configs
from auxkern.backends.triton.entries.kernels import (
    entries_gradient_kernel,
    entries_nll_kernel,
    entries_order_kernel,
)
from auxkern.backends.triton.launch import Launch, encode
from auxkern.core.loss import Coefficients, Loss
from auxkern.core.sums import Sum
from auxkern.core.terms import Sparse


class EntriesArgument(NamedTuple):
    """A row's entries as kernels take them, sorted by id, equal ids in the order given."""

    ids: Tensor  # (N, K) int32; those outside of the vocabulary last, as 2**31 - 1
    logits: Tensor  # (N, K) float32: the values
    first: Tensor  # (N, tiles + 1) int32: entries before each tile
    z: Tensor  # (N, K) float32, written by the tiles where it is wanted
    K: int  # coded
    tiles: int  # coded, with one more


@dataclass(frozen=True)
class Entries:
    """The entries of all sparse terms of N rows.

    Attributes:
        argument: sorted.
        ids, values: (N, K) as given, columns adjacent.
        last: (N, K) int32, where in the sorted ones the last of the ids equal to each stands.
        V: ids.
        choices: of the GPU.
    """

    argument: EntriesArgument
    ids: Tensor
    values: Tensor
    last: Tensor
    V: int
    choices: Configs


def none(placeholder: Tensor) -> EntriesArgument:
    """The argument of a kernel that reads no entries."""
    x = placeholder
    return EntriesArgument(x, x, x, x, encode(0), encode(1))


def order(sum: Sum, tiles: int, block: int, choices: Configs) -> tuple[Entries, Launch]:
    """The entries, and the launch that sorts them.

    Args:
        tiles, block: of the vocabulary, and the ids in one.
        choices: of the GPU.
    """
    (ids, values), config = _given(sum), choices.entry_order
    N, K = ids.shape
    argument = EntriesArgument(
        ids=ids.new_empty((N, K), dtype=torch.int32),
        logits=values.new_empty((N, K), dtype=torch.float32),
        first=ids.new_empty((N, tiles + 1), dtype=torch.int32),
        z=values.new_empty((N, K), dtype=torch.float32),
        K=encode(K),
        tiles=encode(tiles + 1),
    )
    entries = Entries(argument, ids, values, torch.empty_like(argument.ids), sum.V, choices)
    launch = Launch(
        entries_order_kernel,
        (N, -(-max(K, tiles + 1) // config.taken)),
        {
            "ids": ids,
            "values": values,
            "entries": argument,
            "last": entries.last,
            "ids_stride": ids.stride(0),
            "values_stride": values.stride(0),
            "K": K,
            "V": sum.V,
            "tiles": tiles,
        },
        {"BLOCK_V": block, "LANES": config.taken, "STEP": config.step},
        config.warps,
        bytes_moved=N * K * (ids.element_size() + values.element_size() + 12) + 4 * N * (tiles + 1),
        flops=0,
    )
    return entries, launch


def _given(sum: Sum) -> tuple[Tensor, Tensor]:
    """(N, K) ids, int32 or int64, and values of all sparse terms, columns adjacent; no copy of one term."""
    sparse = sum.sparse
    if len(sparse) != 1:
        return sum.entries()
    ids, values = sparse[0].ids, sparse[0].values
    if ids.dtype not in (torch.int32, torch.int64):
        ids = ids.int()
    return (
        ids if ids.stride(1) == 1 else ids.contiguous(),
        values if values.stride(1) == 1 else values.contiguous(),
    )


def gradient(
    entries: Entries, target: Tensor, coefficients: Coefficients, factor: Tensor
) -> tuple[Tensor, Launch]:
    """(N, K) float32 gradient of the values, and the launch that makes it.

    Args:
        coefficients: of dz.
        factor: (N,) float32 that multiplies it.
    """
    N, K = entries.ids.shape
    d, config = torch.empty_like(entries.argument.logits), entries.choices.entry_gradient
    launch = Launch(
        entries_gradient_kernel,
        (-(-N // config.taken), -(-K // config.step)),
        {
            "ids": entries.ids,
            "entries": entries.argument,
            "last": entries.last,
            "target": target,
            "coefficients": coefficients,
            "factor": factor,
            "d_out": d,
            "ids_stride": entries.ids.stride(0),
            "N": N,
            "K": K,
            "V": entries.V,
        },
        {"R": config.taken, "STEP": config.step},
        config.warps,
        bytes_moved=N * K * (entries.ids.element_size() + 12),
        flops=4 * N * K,
    )
    return d, launch


def term_nll(
    term: Sparse, V: int, target: Tensor, loss: Loss, choices: Configs
) -> tuple[Tensor, list[Launch]]:
    """(N,) float32 nll under the softmax of one term alone, and the launches that make it, in order."""
    result = target.new_empty(target.shape, dtype=torch.float32)
    block, config = choices.entry_ids, choices.entry_nll
    entries, sorting = order(Sum((term,), V), -(-V // block), block, choices)
    N, K = entries.ids.shape
    launch = Launch(
        entries_nll_kernel,
        (-(-N // config.taken),),
        {
            "entries": entries.argument,
            "target": target,
            "nll": result,
            "N": N,
            "K": K,
            "V": V,
            "ignore_index": loss.ignore_index,
            "end": K + 1,
        },
        {"R": config.taken, "STEP": config.step},
        config.warps,
        bytes_moved=8 * N * K,
        flops=4 * N * K,
    )
    return result, [sorting, launch]
