"""The sum of the terms, written out: for who needs the logits themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from auxkern.core.checks import checked_vocabulary, one_device, tensors_of
from auxkern.core.loss import row_dtype
from auxkern.core.terms import Head, Logits, Sparse, as_terms, softcapped
from auxkern.ops import logit_chunks
from auxkern.ops.derivatives import is_differentiated
from auxkern.ops.linear import kernel_for, product
from auxkern.ops.torch_ops import apart_from_autocast


@apart_from_autocast
def dense_logits(terms: Any, *, vocab_size: int | None = None) -> Tensor:
    """(..., V) sum of the terms in float32, float64 if any of them is; differentiable.

    It takes the memory that ``cross_entropy`` and ``sample`` save.

    Args:
        terms: as in ``auxkern.sample``.
        vocab_size: V, where the terms' vocabularies differ.

    Raises:
        TypeError, ValueError: the terms do not fit each other.
    """
    terms = as_terms(terms)
    one_device(terms)
    V = checked_vocabulary(terms, vocab_size)
    V = V or next(term.vocabulary for term in terms if not isinstance(term, Sparse))
    dtype = row_dtype(tensors_of(terms))
    summed = [_scaled(term, V, dtype) for term in terms if not isinstance(term, Sparse)]
    total = summed[0]
    for z in summed[1:]:
        total = total + z
    for term in terms:
        if isinstance(term, Sparse):
            total = total.scatter_add(-1, term.ids.long(), term.values.to(dtype))
    return total


def _scaled(term: Logits | Head, V: int, dtype: torch.dtype) -> Tensor:
    z = term.values[..., :V].to(dtype) if isinstance(term, Logits) else _products(term, V, dtype)
    z = softcapped(z, term.softcap)
    if isinstance(term.scale, Tensor):
        return z * term.scale[..., None].to(dtype)
    return z if term.scale == 1.0 else z * term.scale


def _products(head: Head, V: int, dtype: torch.dtype) -> Tensor:
    if is_differentiated(head.tensors.values()):
        bias = None if head.bias is None else head.bias[:V].to(dtype)
        return product(head.hidden.to(dtype), head.weight[:V].to(dtype), bias)
    N = head.leading.numel()
    z = torch.empty((N, V), dtype=dtype, device=head.hidden.device)
    logit_chunks.add_head(z, head, slice(0, N), V, 1.0, keep=False, kernel=kernel_for(z, head.weight))
    return z.view(*head.leading, V)
