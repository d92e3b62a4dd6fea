"""Draws from logits on a CPU."""

from __future__ import annotations

from ctypes import c_void_p

import torch
from torch import Tensor

from auxkern.backends.chunked import RowKernels
from auxkern.backends.cpu.abi import CRowIds, CSampling, Native, address, c_terms, float32
from auxkern.core.draws import Draws, RowTokens
from auxkern.core.sums import Sum


class LogitDraws(Native, RowKernels):
    """Tokens from logits that exist, beside sparse terms."""

    def logits_draw(self, sum: Sum, draws: Draws, want_logprob: bool) -> RowTokens:
        N, terms = draws.seed.shape[0], sum.logits
        # Bound to names: a temporary would be freed before the kernel reads it.
        numbers = {name: draws[name] for name in draws.numbers}
        added_ids, added = sum.entries()
        scales = [term.scale.contiguous() if isinstance(term.scale, Tensor) else None for term in terms]
        sampling = CSampling(
            **{name: number.data_ptr() for name, number in numbers.items()},
            seed=draws.seed.data_ptr(),
            position=draws.position.data_ptr(),
            prompt=_row_ids(draws.prompt),
            history=_row_ids(draws.history),
            added=_row_ids(added_ids),
            bias=_row_ids(draws.bias_ids),
            added_values=added.data_ptr(),
            bias_values=draws.bias.data_ptr(),
            row_scales=(c_void_p * len(terms))(*map(address, scales)),
        )
        drawn = RowTokens(
            token=torch.empty(N, dtype=torch.int64, device="cpu"),
            status=torch.empty(N, dtype=torch.int32, device="cpu"),
            logprob=float32(N if want_logprob else 0),
        )
        self.library.auxkern_sample(
            c_terms(terms),
            len(terms),
            N,
            sum.V,
            sampling,
            drawn.token.data_ptr(),
            drawn.status.data_ptr(),
            drawn.logprob.data_ptr() if want_logprob else None,
            self.execution(),
        )
        return drawn


def _row_ids(ids: Tensor) -> CRowIds:
    return CRowIds(ids.data_ptr() or None, ids.shape[1])
