"""Sampling on a CPU: what the native kernel takes of each row."""

from __future__ import annotations

import ctypes
from ctypes import c_void_p

import torch
from torch import Tensor

from auxkern.backends.cpu import library
from auxkern.ops.registry import Draws


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
    # Bound to names: a temporary would be freed before the kernel reads it.
    floats = [
        t.contiguous()
        for t in (
            draws.temperature,
            draws.top_p,
            draws.log_min_p,
            draws.repetition,
            draws.presence,
            draws.frequency,
            draws.added,
            draws.bias,
        )
    ]
    temperature, top_p, log_min_p, repetition, presence, frequency, added, bias = floats
    integers = [
        t.contiguous()
        for t in (
            draws.top_k,
            draws.seed,
            draws.position,
            draws.prompt,
            draws.history,
            draws.added_ids,
            draws.bias_ids,
        )
    ]
    top_k, seed, position, prompt, history, added_ids, bias_ids = integers
    scales = (c_void_p * len(terms))()
    for i, scale in enumerate(draws.row_scales):
        scales[i] = None if scale is None else scale.data_ptr()
    sampling = library.Sampling(
        temperature=temperature.data_ptr(),
        top_k=top_k.data_ptr(),
        top_p=top_p.data_ptr(),
        log_min_p=log_min_p.data_ptr(),
        repetition=repetition.data_ptr(),
        presence=presence.data_ptr(),
        frequency=frequency.data_ptr(),
        seed=seed.data_ptr(),
        position=position.data_ptr(),
        prompt=_row_ids(prompt),
        history=_row_ids(history),
        added=_row_ids(added_ids),
        bias=_row_ids(bias_ids),
        added_values=added.data_ptr(),
        bias_values=bias.data_ptr(),
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
