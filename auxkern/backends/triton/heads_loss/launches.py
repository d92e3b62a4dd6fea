"""From checked output heads to kernel launches: what the backend runs, and what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from auxkern.backends.triton.entries.launches import Entries, EntriesArgument
from auxkern.backends.triton.entries.launches import none as no_entries
from auxkern.backends.triton.heads import HALF, HeadsSum
from auxkern.backends.triton.heads_loss.kernels import (
    heads_combine_kernel,
    heads_forward_kernel,
    heads_gradient_kernel,
    heads_scale_kernel,
)
from auxkern.backends.triton.launch import Launch, RowsArgument
from auxkern.core.loss import Coefficients, Loss, RowLosses
from auxkern.core.sums import Sum, Wanted

# Scale, maximum, difference, exp, add: per logit, beside the products.
_LOGIT_FLOPS = 6
# dz lies in [-1, 1]; float16 keeps its small entries from underflow in the upper half of its range.
MAGNIFIED = {torch.float16: 2.0**12, torch.bfloat16: 1.0, torch.float32: 1.0}


_COMBINE_REGISTERS = 64  # of a thread


class _Partial(NamedTuple):
    """What ``heads_forward_kernel`` leaves for ``heads_combine_kernel``; G groups."""

    sums: Tensor  # (2, 3 or 3 + 2 G, tiles, N) float32
    best: Tensor  # (2, tiles, N) int32
    target: Tensor  # (1 or 1 + G, N) float32


@dataclass(frozen=True)
class AddedEntries:
    """What the tiles add beside the heads.

    Attributes:
        entries: of sparse terms; None for none.
        store: whether z at each of them is wanted.
    """

    entries: Entries | None = None
    store: bool = False

    def argument(self, placeholder: Tensor) -> EntriesArgument:
        """Of a kernel that makes tiles."""
        return no_entries(placeholder) if self.entries is None else self.entries.argument

    @property
    def constants(self) -> dict[str, object]:
        """Of that kernel."""
        there = self.entries is not None
        return {"ENTRIES": there, "STORE_ENTRIES": there and self.store}


NOTHING_ADDED = AddedEntries()


def gradient_dtype(sum: Sum, wanted: Wanted) -> torch.dtype:
    """What dz is rounded to for these gradients: their 16-bit dtype if they agree on one, else float32.

    It is multiplied by operands of its own dtype then, and float16 has not the range of others.

    Args:
        wanted: of each head.
    """
    results, operands = set(), set()
    for head, gradients in zip(sum.heads, wanted, strict=True):
        results |= {head.tensors[name].dtype for name in gradients}
        if gradients:
            operands |= {head.hidden.dtype, head.weight.dtype}
    if results == {torch.bfloat16} or results == operands == {torch.float16}:
        return results.pop()
    return torch.float32


def e_dtype(dtype: torch.dtype) -> torch.dtype:
    """What e, which lies in [0, 1], is rounded to: float16 has three bits more than bfloat16 there."""
    return torch.float16 if dtype in HALF else torch.float32


def one_write(heads: HeadsSum, wanted: Sequence[int]) -> bool:
    """Whether e is written and turned into dz, not dz made from the hidden states again.

    A narrow sum is cheaper to make again than to read and write once more; float32 products are
    not. The slope of a soft cap needs its head's own products, which e does not hold.
    """
    if any(heads.slope_of(i) >= 0 for i in wanted):
        return False
    return not heads.in_tensor_cores or heads.width > heads.choices.recomputed_width


def forward(
    heads: HeadsSum, target: Tensor, loss: Loss, e: Tensor | None, added: AddedEntries = NOTHING_ADDED
) -> tuple[RowLosses, Tensor, list[Launch]]:
    """The launches of a forward pass, in order, the rows they fill, and the tiles' (tiles, N) maxima.

    Args:
        heads: separate if the loss wants stats.
        e: ``heads.buffer(...)`` that receives exp(z - the tile's maximum), or None.
        added: to the heads.
    """
    N, want_smooth, want_stats = heads.N, loss.smooth, loss.stats
    groups = len(heads.groups)
    fields = 3 + 2 * groups if want_stats else 3 if want_smooth else 2
    partial = _Partial(
        sums=target.new_empty((fields, heads.tiles, N), dtype=torch.float32),
        best=target.new_empty((2 if want_stats else 0, heads.tiles, N), dtype=torch.int32),
        target=target.new_empty((1 + groups if want_stats else 1, N), dtype=torch.float32),
    )
    rows = RowLosses.empty(target, torch.float32, groups, loss)
    options = {"SMOOTH": want_smooth, "STATS": want_stats}
    tiles = heads.launch(
        heads_forward_kernel,
        {
            "entries": added.argument(target),
            "target": target,
            "partial": partial,
            "e_out": partial.sums if e is None else e,
        },
        options | {"WRITE": e is not None, "SLICES": heads.config.slices} | added.constants,
        bytes_moved=heads.input_bytes + (0 if e is None else N * heads.V * e.element_size()),
        logit_flops=_LOGIT_FLOPS,
    )
    sizes, config = fields * heads.tiles * N, heads.choices.combine
    combine = Launch(
        heads_combine_kernel,
        (-(-N // config.taken),),
        {
            "target": target,
            "partial": partial,
            "out": RowsArgument(*rows),
            "N": N,
            "V": heads.V,
            "ignore_index": loss.ignore_index,
            "tiles": heads.tiles,
        },
        options
        | {
            "GROUPS": groups,
            "BLOCK_V": heads.config.ids,
            "R": config.taken,
            "LANES": config.step,
        },
        config.warps,
        bytes_moved=4 * sizes,
        flops=2 * sizes,
        # Left to itself the compiler spills 8 bytes of statistics, so that more programs fit.
        registers=_COMBINE_REGISTERS,
    )
    return rows, partial.sums[0], [tiles, combine]


def scale(
    heads: HeadsSum, target: Tensor, e: Tensor, tops: Tensor, coefficients: Coefficients, dtype: torch.dtype
) -> tuple[Tensor, Launch]:
    """The launch that turns ``e`` into dz of ``dtype``, and dz (N, V), in the memory of ``e``."""
    d = e.view(dtype)
    N, config = heads.N, heads.choices.scale
    launch = Launch(
        heads_scale_kernel,
        (-(-N // config.block), heads.tiles),
        {
            "e_in": e,
            "d_out": d,
            "target": target,
            "tops": tops,
            "coefficients": coefficients,
            "N": N,
            "tiles": heads.tiles,
        },
        {"R": config.block, "BLOCK_V": heads.config.ids},
        config.warps,
        bytes_moved=2 * N * heads.V * e.element_size(),
        flops=2 * N * heads.V,
    )
    return d[:, : heads.V], launch


def gradient(
    heads: HeadsSum,
    target: Tensor,
    coefficients: Coefficients,
    capped: Sequence[int],
    dtype: torch.dtype,
    added: AddedEntries = NOTHING_ADDED,
) -> tuple[list[Tensor], Launch]:
    """The launch that makes dz (N, V) from the hidden states again, and the tensors it fills.

    Args:
        capped: for each tensor, the group whose slope multiplies dz, or -1 for dz itself.
        added: to the heads.
    """
    out = [heads.buffer(dtype) for _ in capped]
    launch = heads.launch(
        heads_gradient_kernel,
        {
            "entries": added.argument(target),
            "target": target,
            "coefficients": coefficients,
            "d_out": tuple(out),
        },
        {"SLOPES": tuple(capped), "SLICES": heads.config.slices, **added.constants},
        bytes_moved=heads.input_bytes + sum(heads.N * heads.V * d.element_size() for d in out),
        logit_flops=_LOGIT_FLOPS,
    )
    return [d[:, : heads.V] for d in out], launch
