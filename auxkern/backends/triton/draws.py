"""A draw from what an operator was given, whichever kernels make it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.heads_draw import launches as heads_draw
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_draw import launches as logits_draw
from auxkern.core.draws import Draws, RowTokens
from auxkern.core.sums import Sum


class GivenDraw(heads_draw.HeadsDraw, logits_draw.LogitsDraw):
    """Draws that launch again what an equal call has launched, without checking it once more."""

    def draw_given(
        self,
        given: Callable[[], tuple[Sum, Draws]],
        inputs: Sequence[Tensor],
        facts: Hashable,
        want_logprob: bool,
    ) -> RowTokens:
        gpu = self.gpu(inputs[0].device)
        return self.run_plan(
            lambda: self._draw_plan(*given(), want_logprob, gpu),
            inputs,
            ("draw", facts, want_logprob, gpu, torch.get_float32_matmul_precision()),
            lambda: self.draw(*given(), want_logprob),
        )

    def _draw_plan(
        self, sum: Sum, draws: Draws, want_logprob: bool, gpu: Gpu
    ) -> tuple[RowTokens, list[Launch]]:
        """As ``run_plan`` takes it; no launches where there is no plan of the whole."""
        if not sum.heads:
            return logits_draw.plan(sum, logits_draw.RowDraws.of(sum, draws), want_logprob, gpu)
        if not sum.logits and self.heads_refusal(sum) is None:
            return heads_draw.plan(sum, logits_draw.RowDraws.of(sum, draws), want_logprob, gpu)
        return self.draw(sum, draws, want_logprob), []
