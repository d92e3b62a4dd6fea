"""Sampling on a CPU: what the native kernel takes of each row."""

from __future__ import annotations

import ctypes
from ctypes import c_void_p

import torch
from torch import Tensor

from auxkern.backends.cpu import library
from auxkern.ops.registry import Draws

# Of ``Draws`` and of ``library.Sampling``: one number for each row.
_PER_ROW = (
    "temperature",
    "top_k",
    "top_p",
    "log_min_p",
    "repetition",
    "presence",
    "frequency",
    "seed",
    "position",
)


def draw(
    native: ctypes.CDLL,
    execution: library.Execution,
    terms: ctypes.Array[library.Term],
    V: int,
    draws: Draws,
    want_logprob: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``BackendWithSample.sample``; what ``terms`` point to is the caller's to keep."""
    N = draws.temperature.shape[0]
    # Bound to a name: a temporary would be freed before the kernel reads it.
    given = {name: x.contiguous() for name, x in vars(draws).items() if isinstance(x, Tensor)}
    scales = (c_void_p * len(terms))()
    for i, scale in enumerate(draws.row_scales):
        scales[i] = None if scale is None else scale.data_ptr()
    sampling = library.Sampling(
        **{name: given[name].data_ptr() for name in _PER_ROW},
        prompt=_row_ids(given["prompt"]),
        history=_row_ids(given["history"]),
        added=_row_ids(given["added_ids"]),
        bias=_row_ids(given["bias_ids"]),
        added_values=given["added"].data_ptr(),
        bias_values=given["bias"].data_ptr(),
        row_scales=scales,
    )
    token = torch.empty(N, dtype=torch.int64, device="cpu")
    status = torch.empty(N, dtype=torch.int32, device="cpu")
    logprob = torch.empty(N if want_logprob else 0, dtype=torch.float32, device="cpu")
    library.check(
        native.auxkern_sample(
            terms,
            len(terms),
            N,
            V,
            sampling,
            token.data_ptr(),
            status.data_ptr(),
            logprob.data_ptr() if want_logprob else None,
            execution,
        )
    )
    return token, status, logprob


def _row_ids(ids: Tensor) -> library.RowIds:
    return library.RowIds(ids.data_ptr() or None, ids.shape[1])
