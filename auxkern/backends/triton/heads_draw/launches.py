"""From checked heads to the launches that draw tokens, run by the backend or compiled ahead of time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from auxkern.backends.triton.entries import launches as entry_launches
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.heads import HeadsSum, heads_sum
from auxkern.backends.triton.heads_draw.kernels import heads_choose_kernel, heads_draw_kernel
from auxkern.backends.triton.heads_loss.launches import AddedEntries
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_draw.launches import NOISE_FLOPS, Drawing, RowDraws
from auxkern.backends.triton.running import TritonKernels
from auxkern.core.draws import Draws, RowTokens
from auxkern.core.sums import Sum


class TileDraws(NamedTuple):
    """What tiles leave of their draws for ``heads_choose_kernel``; NaN as z says that a tile has one."""

    z: Tensor  # (N, tiles) float32
    ids: Tensor  # (N, tiles) int32
    parts: (
        Tensor  # (N, tiles, 2) float32: largest logit and sum of exp((z - largest) / temperature), if wanted
    )


class HeadsDraw(TritonKernels):
    """Tokens from heads beside sparse terms, the logits not written where no filter reads them."""

    def heads_draw(self, sum: Sum, draws: Draws, want_logprob: bool) -> RowTokens:
        gpu = self.gpu(draws.seed.device)
        given = RowDraws.of(sum, draws)
        return self.run_plan(
            lambda: plan(sum, given, want_logprob, gpu),
            [*sum.every_tensor, *given.tensors],
            (sum.facts, given.facts, want_logprob, gpu, torch.get_float32_matmul_precision()),
        )


def plan(
    sum: Sum, given: RowDraws, want_logprob: bool, gpu: Gpu, precision: str | None = None
) -> tuple[RowTokens, list[Launch]]:
    """Tokens, statuses and log-probabilities, and the launches that fill them, in order.

    Args:
        given: for a draw from this sum.
        precision: as in ``heads_sum``; None for what torch is told.
    """
    drawing, V = Drawing.of(sum.V, given, want_logprob, gpu), sum.V
    precision = precision or gpu.float32_products
    tiled = heads_sum(sum.heads, V, False, precision, choices=gpu.configs, draws=True)
    write = drawing.rewrites
    added, ordered = (AddedEntries(), []) if write else _entries(drawing, sum, tiled)
    tiles = drawing.padded // tiled.config.ids if write else tiled.tiles
    kept = 0 if write else tiles
    ids = given.draws.seed.new_empty((drawing.N, kept), dtype=torch.int32)
    partial = TileDraws(drawing.floats(kept), ids, drawing.parts(kept))
    z = drawing.logits() if write else drawing.floats(0)
    drawn = tiled.launch(
        heads_draw_kernel,
        {
            "draws": drawing.noise,
            "partial": partial,
            "z_out": z,
            "entries": added.argument(given.draws.seed),
        },
        {"LOGPROB": want_logprob, "WRITE": write, "ENTRIES": added.entries is not None},
        bytes_moved=tiled.input_bytes + (4 * drawing.N * V if write else 0),
        logit_flops=2 if write else NOISE_FLOPS,
        tiles=tiles,
    )
    rest = drawing.from_written(z) if write else [_chosen(drawing, partial)]
    return drawing.tokens, [*ordered, drawn, *rest]


def _entries(drawing: Drawing, sum: Sum, tiled: HeadsSum) -> tuple[AddedEntries, list[Launch]]:
    """What sparse terms and biases add to the tiles, and the launch that sorts it."""
    if not drawing.given.added:
        return AddedEntries(), []
    entries, launch = entry_launches.order(
        Sum(tuple(drawing.given.added), sum.V), tiled.tiles, tiled.config.ids, tiled.choices
    )
    return AddedEntries(entries), [launch]


def _chosen(drawing: Drawing, partial: TileDraws) -> Launch:
    """The best of what tiles have drawn."""
    (N, tiles), config = partial.ids.shape, drawing.gpu.configs.choose_tile
    return Launch(
        heads_choose_kernel,
        (N,),
        {"draws": drawing.noise, "partial": partial, "out": drawing.tokens, "tiles": tiles},
        {"LOGPROB": drawing.want_logprob, "LANES": config.block},
        config.warps,
        bytes_moved=8 * N * tiles * (1 + drawing.want_logprob),
        flops=NOISE_FLOPS * N * tiles,
    )
