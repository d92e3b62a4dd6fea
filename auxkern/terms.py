"""The vocabulary of the package: what a row of logits is a sum of.

Shapes: N rows (leading dimensions flattened), V vocabulary, T positions, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_TERMS = 8
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits that already exist: the term ``scale * softcap(values)``.

    ``softcap(x) = softcap * tanh(x / softcap)``, and the identity when ``softcap`` is None.

    Args:
        values: (..., V) float16, bfloat16, float32 or float64 logits, any strides; they are
            read where they lie, never copied.
        scale: finite float that multiplies the (soft-capped) logits; a constant, no gradient.
        softcap: positive finite float or None (Gemma 2 Team 2024, arXiv 2408.00118, section 2).

    Raises:
        TypeError: ``values`` is not a strided floating-point tensor, or ``scale`` or ``softcap`` is
            not a number.
        ValueError: ``values`` has no vocabulary dimension, or ``scale`` or ``softcap`` is
            out of range.
    """

    values: Tensor
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor):
            raise TypeError(f"Logits.values must be a torch.Tensor, got {type(self.values).__name__}")
        if self.values.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"Logits.values has dtype {self.values.dtype}; use float16, bfloat16, float32 or float64"
            )
        if self.values.layout != torch.strided:
            raise TypeError(
                f"Logits.values has layout {self.values.layout}; pass a strided tensor, "
                "such as values.to_dense()"
            )
        if self.values.dim() == 0:
            raise ValueError("Logits.values has no dimensions; its shape must be (..., V)")
        object.__setattr__(self, "scale", _number("Logits.scale", self.scale))
        if self.softcap is not None:
            softcap = _number("Logits.softcap", self.softcap)
            if softcap <= 0:
                raise ValueError(f"Logits.softcap is {softcap}; it must be positive, or None for no cap")
            if softcap < torch.finfo(torch.float32).tiny:
                raise ValueError(f"Logits.softcap is {softcap}, which float32 arithmetic takes for no cap")
            object.__setattr__(self, "softcap", softcap)


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        gradient = " that requires grad" if value.requires_grad else ""
        raise TypeError(
            f"{name} is a tensor{gradient}; pass a Python float. To learn a scale, multiply the "
            "values by it before they become a term"
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    largest = torch.finfo(torch.float32).max
    if not -largest <= value <= largest:
        raise ValueError(f"{name} is {value}; it must be finite in float32, at most {largest:.2e}")
    return float(value)


def as_terms(terms: Any) -> list[Logits]:
    """The terms of a sum as a list; bare tensors become ``Logits``.

    Args:
        terms: a sequence of 1 to 8 ``Logits`` or (..., V) tensors, or one of these alone.

    Raises:
        TypeError: an entry is neither a term nor a tensor.
        ValueError: there are no terms, or more than 8.
    """
    if isinstance(terms, (Tensor, Logits)):
        terms = [terms]
    if not isinstance(terms, Sequence) or isinstance(terms, (str, bytes)):
        raise TypeError(f"terms must be a sequence of auxkern.Logits or tensors, got {type(terms).__name__}")
    if not 1 <= len(terms) <= MAX_TERMS:
        raise ValueError(f"terms has {len(terms)} entries; a sum has 1 to {MAX_TERMS} terms")
    listed = []
    for index, term in enumerate(terms):
        if isinstance(term, Tensor):
            term = Logits(term)
        elif not isinstance(term, Logits):
            raise TypeError(
                f"terms[{index}] is a {type(term).__name__}; use auxkern.Logits or a (..., V) tensor"
            )
        listed.append(term)
    return listed
