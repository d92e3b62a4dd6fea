"""Sums that are not plain ones: tokens that one model finds plausible, and probabilities that are averaged.

Both are written out, (..., V), as one ``Logits`` term, which every operator and backend takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from auxkern.core.mass import SLACK
from auxkern.core.sums import checked_vocabulary, vocabulary_of
from auxkern.core.terms import Logits, Term, Terms, as_number, as_terms
from auxkern.ops.dense import dense_logits
from auxkern.ops.torch_ops import apart_from_autocast


@apart_from_autocast
def plausible(terms: Terms, judge: Terms, alpha: float | Tensor, *, vocab_size: int | None = None) -> Logits:
    """The sum of the terms, -inf where a judge finds an id implausible (Li et al. 2023, equation 2).

    An id v is kept where p[v] >= alpha max p, p the softmax of the judge's terms; as with min-p, one whose
    logit lies less than 2**-19 below is kept too, so that backends agree. Log-probabilities of what is drawn
    from the result are among the ids that are kept.

    Args:
        terms: the sum that is drawn from, as in ``auxkern.sample``.
        judge: terms of the same rows, such as those of the expert alone.
        alpha: in [0, 1], or (...) one for each row: 0 keeps all ids, 1 those that the judge likes best.
        vocab_size: V, where the vocabularies differ.

    Returns:
        (..., V) in float32, float64 if any term is; differentiable, but for what is left out.

    Raises:
        TypeError, ValueError: the terms do not fit each other, or alpha is out of range.
    """
    summed, judging = as_terms(terms), as_terms(judge)
    V = _common([summed, judging], vocab_size)
    z, own = dense_logits(summed, vocab_size=V), dense_logits(judging, vocab_size=V)
    if own.shape != z.shape:
        raise ValueError(
            f"judge has rows {tuple(own.shape[:-1])} but terms have {tuple(z.shape[:-1])}; give both the same"
        )
    share = _row_numbers("alpha", alpha, z)
    _check_range("alpha", share, 0.0, 1.0)
    least = own.amax(-1, keepdim=True) + share.log() - 2 * SLACK
    # A NaN stays, for the draw to tell of.
    return Logits(z.masked_fill((own < least) & ~z.isnan(), -torch.inf))


@apart_from_autocast
def mixed_probabilities(
    groups: Sequence[Terms], weights: Sequence[float | Tensor], *, vocab_size: int | None = None
) -> Logits:
    """log sum_i w_i softmax(z_i), z_i the sum of a group's terms: probabilities averaged, not logits added.

    Interpolated models (Jelinek and Mercer 1980) and memories of nearest neighbours (Khandelwal et al. 2020)
    are mixed so. What comes back sums to one: ``auxkern.sample`` draws from it, its log-probabilities are
    the mixture's own, and ``auxkern.cross_entropy`` is the mixture's loss.

    Args:
        groups: terms of each member, all of the same rows (...).
        weights: of each, 0 or more; a number or (...) one for each row. They count in relation to their sum.
        vocab_size: V, where the vocabularies differ.

    Returns:
        (..., V) in float32, float64 if any term is; differentiable.

    Raises:
        TypeError, ValueError: terms or rows do not fit each other, there are not as many weights as
            groups, or a weight is negative, NaN or infinite, or all of a row are 0.
    """
    if len(groups) != len(weights) or not groups:
        raise ValueError(f"there are {len(groups)} groups and {len(weights)} weights; give each group one")
    listed = [as_terms(group) for group in groups]
    V = _common(listed, vocab_size)
    each = [dense_logits(group, vocab_size=V) for group in listed]
    rows = {tuple(z.shape[:-1]) for z in each}
    if len(rows) > 1:
        raise ValueError(f"groups have rows {sorted(rows)}; give all the same")
    shares = [
        _row_numbers(f"weights[{i}]", one, z) for i, (one, z) in enumerate(zip(weights, each, strict=True))
    ]
    for i, share in enumerate(shares):
        _check_range(f"weights[{i}]", share, 0.0, math.inf)
    whole = torch.stack(torch.broadcast_tensors(*shares)).sum(0)
    if whole.device.type == "cpu" and bool((whole == 0).any()):
        raise ValueError("weights are all 0 in a row; give one member some")
    # What a member without a weight says, NaN too, must not count.
    parts = [
        torch.where(share > 0, z.log_softmax(-1) + (share / whole).log(), -torch.inf)
        for z, share in zip(each, shares, strict=True)
    ]
    return Logits(reduce(torch.logaddexp, parts))


def _common(groups: Sequence[list[Term]], vocab_size: int | None) -> int:
    """V of all groups."""
    listed = [term for group in groups for term in group]
    return vocabulary_of(listed, checked_vocabulary(listed, vocab_size))


def _row_numbers(name: str, value: object, z: Tensor) -> Tensor:
    """(..., 1), or () where there is one number for all rows, of z's dtype and device."""
    value = as_number(value)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number or a tensor (...), got {type(value).__name__}")
        return z.new_tensor(float(value))
    if value.shape != z.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} but the rows are {tuple(z.shape[:-1])}; give each row one"
        )
    if value.device != z.device:
        raise ValueError(f"{name} is on {value.device} but the terms are on {z.device}; move it there")
    return value.to(z.dtype)[..., None]


def _check_range(name: str, value: Tensor, low: float, high: float) -> None:
    if value.device.type != "cpu":
        return  # a look would stop the device
    wrong = value[~((value >= low) & (value <= high) & value.isfinite())]
    if wrong.numel():
        most = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(
            f"{name} holds {wrong.flatten()[0].item()}; it must be finite, at least {low:g}{most}"
        )
