"""The mask of a step, for models with "auxkern" attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask


def step_mask(*args: Any, **options: Any) -> Tensor | None:
    """What ``transformers.masking_utils.sdpa_mask`` makes of these arguments, (B, 1, T, P) bool or None.

    One new token on a CPU comes after all others, so its mask is that of real tokens, as it is; transformers
    would compare each column's index with the token's, for every model at every step.
    """
    real = options.get("attention_mask")
    if args or options.get("q_length") != 1 or type(real) is not Tensor or not _is_of_last(real, options):
        return sdpa_mask(*args, **options)
    if options.get("allow_is_causal_skip") and bool(real.all()):
        return None
    return real[:, None, None]


def _is_of_last(real: Tensor, options: dict[str, Any]) -> bool:
    """Whether a mask (B, P) is of all columns up to one new token, which attends to all of them."""
    P, q_offset = options.get("kv_length"), options.get("q_offset")
    return (
        options.get("mask_function") is causal_mask_function
        and real.dtype is torch.bool
        and real.is_cpu
        and type(q_offset) is int
        and real.shape == (options.get("batch_size"), P)
        and q_offset + 1 == P
        and options.get("kv_offset", 0) == 0
        and options.get("local_size") is None
        and not options.get("use_vmap")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )
