"""What tells a call from one that looks like it: all but the addresses and the content of its tensors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from auxkern.core.terms import Head, Logits, Sparse


class TermFacts(NamedTuple):
    """Terms as an operator is given them, which nobody has checked.

    Attributes:
        facts: all but the tensors; which of them there are is told.
        tensors: of every term, in order.
        scales: those that are tensors, in order.
    """

    facts: Hashable
    tensors: list[Tensor]
    scales: list[Tensor]


def facts_of(terms: object) -> TermFacts | None:
    """What is known of terms without looking at a tensor; None of what are no terms."""
    listed = terms if type(terms) in (list, tuple) else (terms,)
    facts: list[object] = []
    tensors: list[Tensor] = []
    scales: list[Tensor] = []
    for term in listed:  # type: ignore[attr-defined]
        kind = type(term)
        if kind is Tensor or kind is Parameter:
            facts.append(kind)
            tensors.append(term)
            continue
        if kind is Sparse:
            facts.append(kind)
            tensors += (term.ids, term.values)
            continue
        if kind is Logits:
            tensors.append(term.values)
            bias = None
        elif kind is Head:
            bias = term.bias
            tensors += (term.hidden, term.weight) if bias is None else (term.hidden, term.weight, bias)
        else:
            return None
        scale = term.scale
        if isinstance(scale, Tensor):
            scales.append(scale)
            scale = None
        facts.append((kind, bias is None, scale, term.softcap))
    return TermFacts(tuple(facts), tensors, scales) if tensors else None


def is_eager() -> bool:
    """Whether a call runs at once, unseen: no graph, dispatch mode, profiler, forward mode or transform."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.autograd._profiler_enabled()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def are_plain(values: Sequence[Any]) -> TypeGuard[Sequence[Tensor]]:
    """Whether these are strided tensors of one device whose memory holds what they say: no lazy negations.

    Args:
        values: a tensor, and whatever may be one.
    """
    device = values[0].device
    for x in values:
        kind = type(x)
        if (
            (kind is not Tensor and kind is not Parameter)
            or x.device != device
            or x.layout is not torch.strided
            or x.is_neg()
        ):
            return False
    return True
