"""What every operator asks of its terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from auxkern.core.terms import Head, Sparse, Term, as_number


def tensors_of(terms: Sequence[Term]) -> list[Tensor]:
    """Every tensor of every term, but for scales."""
    return [tensor for term in terms for tensor in term.tensors.values()]


def one_device(terms: Sequence[Term]) -> tuple[str, torch.device]:
    """Name of the first tensor, and the device that all of them are on.

    Raises:
        ValueError: they are on several.
    """
    named = [(f"terms[{i}].{name}", t) for i, term in enumerate(terms) for name, t in term.tensors.items()]
    first, device = named[0][0], named[0][1].device
    for name, tensor in named:
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first} is on {device}; move them to one device"
            )
    return first, device


def check_sparse_ids(name: str, ids: Tensor, V: int) -> None:
    """Raises ValueError if one of the ids lies outside [0, V); looks at them, which stops a GPU."""
    if ids.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= V:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} holds {wrong}, outside [0, {V}); give padding id 0 and value 0")


def check_sparse_terms(terms: Sequence[Term], V: int) -> None:
    """``check_sparse_ids`` of every sparse term."""
    for index, term in enumerate(terms):
        if isinstance(term, Sparse):
            check_sparse_ids(f"terms[{index}].ids", term.ids, V)


def checked_vocabulary(terms: Sequence[Term], vocab_size: int | None) -> int | None:
    """``vocab_size`` as given, once it fits every term.

    Raises:
        TypeError: it is no int.
        ValueError: it is larger than a term's vocabulary, or None where these differ.
    """
    sizes = {
        f"terms[{index}].{'weight' if isinstance(term, Head) else 'values'}": term.vocabulary
        for index, term in enumerate(terms)
        if not isinstance(term, Sparse)
    }
    (first, V), smallest = next(iter(sizes.items())), min(sizes.values())
    vocab_size = as_number(vocab_size)
    if vocab_size is None:
        for name, size in sizes.items():
            if size != V:
                raise ValueError(
                    f"{name} has {size} ids but {first} has {V}; pass vocab_size={smallest} to use the "
                    "shared ids only"
                )
    elif isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt)):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    else:
        V = vocab_size
    if V < 1:
        raise ValueError(f"the vocabulary has {V} ids; there must be at least 1")
    for name, size in sizes.items():
        if size < V:
            raise ValueError(
                f"vocab_size is {V} but {name} has {size} ids; pass vocab_size={smallest} or less"
            )
    return vocab_size
