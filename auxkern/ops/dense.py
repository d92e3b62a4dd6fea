"""The sum of the terms, written out: for who needs the logits themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from auxkern.backends.choice import choose
from auxkern.backends.chunked import add_head
from auxkern.core.loss import Loss
from auxkern.core.sums import checked_vocabulary, one_device, row_dtype, tensors_of, vocabulary_of
from auxkern.core.terms import Head, Logits, Sparse, Term, Terms, as_terms, softcapped
from auxkern.ops.linear import product
from auxkern.ops.torch_ops import apart_from_autocast, is_differentiated


@apart_from_autocast
def dense_logits(terms: Terms, *, vocab_size: int | None = None) -> Tensor:
    """(..., V) sum of the terms in float32, float64 if any of them is; differentiable.

    It takes the memory that ``cross_entropy`` and ``sample`` save.

    Args:
        terms: as in ``auxkern.sample``.
        vocab_size: V, where the terms' vocabularies differ.

    Raises:
        TypeError, ValueError: the terms do not fit each other.
    """
    listed = as_terms(terms)
    one_device(listed)
    V = vocabulary_of(listed, checked_vocabulary(listed, vocab_size))
    dtype = row_dtype(tensors_of(listed))
    summed = [_scaled(term, V, dtype) for term in listed if not isinstance(term, Sparse)]
    total = summed[0]
    for z in summed[1:]:
        total = total + z
    for term in listed:
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
    backend = choose(None, z.device, (z.dtype, head.weight.dtype))
    add_head(backend, z, head.as_rows(), 1.0, keep=False)
    return z.view(*head.leading, V)


def dense_rows(
    terms: Sequence[Term], target: Tensor, vocab_size: int | None, loss: Loss
) -> tuple[Tensor, ...]:
    """``torch_ops.loss_rows`` of (N,) targets from whole logits, by torch's own functions.

    For derivatives that kernels lack: right in every mode of differentiation, of (N, V) memory.
    """
    counts = target != loss.ignore_index
    whole = dense_logits(terms, vocab_size=vocab_size)
    V = whole.shape[-1]
    inside = (target >= 0) & (target < V)
    y = torch.where(counts & inside, target, 0)
    # Looking at the targets would end a trace: one outside of [0, V) makes its row NaN.
    spoilt = torch.where(counts & ~inside, torch.nan, 0.0).to(whole.dtype)[:, None]

    def read(z: Tensor) -> Tensor:
        # A row that is ignored is not read: a NaN there must not reach a derivative.
        return torch.where(counts[:, None], z.reshape(counts.shape[0], V), 0.0) + spoilt

    def nll_of(z: Tensor) -> Tensor:
        return torch.where(counts, -z.log_softmax(-1).gather(-1, y[:, None])[:, 0], 0.0)

    z = read(whole)
    nll, lse = nll_of(z), torch.where(counts, z.logsumexp(-1), 0.0)
    smooth = torch.where(counts, -z.log_softmax(-1).mean(-1), 0.0) if loss.smooth else nll
    row = loss.of_rows(nll, lse, smooth)
    if not loss.stats:
        none = z.new_empty(0)
        return row, nll.detach(), lse.detach(), none.long(), none.view(0, 0)
    argmax = torch.where(counts, z.argmax(-1), -1)
    alone = [nll_of(read(_alone(term, V, whole))) for term in terms]
    return row, nll.detach(), lse.detach(), argmax, torch.stack(alone).detach()


def _alone(term: Term, V: int, whole: Tensor) -> Tensor:
    """(..., V) logits of a term alone; a sparse one's are 0 but for its ids."""
    if isinstance(term, Sparse):
        return torch.zeros_like(whole).scatter_add(-1, term.ids.long(), term.values.to(whole.dtype))
    return dense_logits([term], vocab_size=V).to(whole.dtype)
