"""From checked heads to the launches that draw tokens, run by the backend or compiled ahead of time."""

from __future__ import annotations

from dataclasses import replace

from auxkern.backends.triton.heads import heads_sum
from auxkern.backends.triton.heads_draw.kernels import heads_draw_kernel
from auxkern.backends.triton.launch import Launch, TritonKernels
from auxkern.backends.triton.logits_draw.launches import NOISE_FLOPS, Drawing
from auxkern.core.draws import Draws, RowTokens
from auxkern.core.sums import Sum


class HeadsDraw(TritonKernels):
    """Tokens from heads beside sparse terms, the logits not written where no filter reads them."""

    def heads_draw(self, sum: Sum, draws: Draws, want_logprob: bool) -> RowTokens:
        tokens, launches = plan(sum, draws, want_logprob, self.multiprocessors(draws.seed.device))
        self.run(launches, draws.seed.device)
        return tokens


def plan(
    sum: Sum, draws: Draws, want_logprob: bool, processors: int, precision: str | None = None
) -> tuple[RowTokens, list[Launch]]:
    """Tokens, statuses and log-probabilities, and the launches that fill them, in order.

    Args:
        processors: of the device; filters split rows over them.
        precision: as in ``heads_sum``.
    """
    drawing, V = Drawing.of(sum, draws, want_logprob), sum.V
    tiled = heads_sum(sum.heads, V, False, precision)
    # A decoding step reads its weights once; more rows in a tile than there are would be products of
    # nothing. Sizes of batches fall in two classes, so that a run compiles no more than two kernels.
    # The noise takes registers beside the products: 128 rows would spill.
    few = 16 if drawing.N <= 16 else 64
    tiled = replace(tiled, config=replace(tiled.config, rows=min(tiled.config.rows, few)))
    write = drawing.writes
    tiles = drawing.padded // tiled.config.ids if write else tiled.tiles
    partial, z = drawing.partial(0 if write else tiles), drawing.logits()
    drawn = tiled.launch(
        heads_draw_kernel,
        {"draws": drawing.rows, "partial": partial, "z_out": z},
        {"LOGPROB": want_logprob, "WRITE": write},
        bytes_moved=tiled.input_bytes + (4 * drawing.N * V if write else 0),
        logit_flops=2 if write else NOISE_FLOPS,
        tiles=tiles,
    )
    rest = drawing.from_logits(z, processors) if write else [drawing.choose(partial)]
    return drawing.tokens, [drawn, *rest]
