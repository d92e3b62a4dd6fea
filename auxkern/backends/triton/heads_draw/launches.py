"""From checked output heads to the launches that draw tokens, run by dispatch or compiled ahead of time."""

from __future__ import annotations

from dataclasses import replace

from auxkern.backends.triton import configs
from auxkern.backends.triton.heads_draw.kernels import heads_draw_kernel
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_draw.launches import NOISE_FLOPS, Drawing, RowTokens
from auxkern.backends.triton.sums import heads_sum
from auxkern.ops.registry import Draws, HeadRows


def sample(
    heads: list[HeadRows], V: int, draws: Draws, want_logprob: bool, precision: str
) -> tuple[RowTokens, list[Launch]]:
    """Tokens, statuses and log-probabilities, and the launches that fill them, in order.

    Args:
        precision: of products of float32: "ieee" or "tf32".
    """
    drawing = Drawing.of(draws, V, want_logprob)
    summed = heads_sum(heads, V, False, precision)
    summed = replace(summed, config=configs.draw_tiles(summed.config, drawing.N))
    write = drawing.writes
    tiles = drawing.padded // summed.config.ids if write else summed.tiles
    partial, z = drawing.partial(0 if write else tiles), drawing.logits()
    drawn = summed.launch(
        heads_draw_kernel,
        {"draws": drawing.rows, "partial": partial, "z_out": z},
        {"LOGPROB": want_logprob, "WRITE": write},
        bytes_moved=summed.input_bytes + (4 * drawing.N * V if write else 0),
        logit_flops=2 if write else NOISE_FLOPS,
        tiles=tiles,
    )
    rest = drawing.from_logits(z) if write else [drawing.choose(partial)]
    return drawing.tokens, [drawn, *rest]
