"""A list of terms as a flat list of tensors, which is what torch's operators take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auxkern.core.memory import GradientMemory
from auxkern.core.terms import Logits, Sparse, Term
from auxkern.ops.library import as_rows

# How a term's tensors stand in the flat list that the operator takes, and how many there are.
LOGITS, HEAD, HEAD_WITH_BIAS, SPARSE = range(4)
TENSORS = {LOGITS: 1, HEAD: 2, HEAD_WITH_BIAS: 3, SPARSE: 2}


def flat_inputs(terms: Sequence[Term]) -> tuple[list[Tensor], list[int], list[float], list[float]]:
    """The terms as the operator takes them: tensors, kinds, scales, softcaps (0 for none)."""
    tensors: list[Tensor] = []
    kinds, scales, softcaps = [], [], []
    for term in terms:
        tensors.extend(term.tensors.values())
        if isinstance(term, Sparse):
            kinds.append(SPARSE)
            scales.append(1.0)
            softcaps.append(0.0)
            continue
        if isinstance(term, Logits):
            kinds.append(LOGITS)
        else:
            kinds.append(HEAD if term.bias is None else HEAD_WITH_BIAS)
        # ``cross_entropy`` refuses a scale for each row.
        scales.append(float(term.scale))
        softcaps.append(term.softcap or 0.0)
    return tensors, kinds, scales, softcaps


@dataclass
class Part:
    """One term's tensors, flattened to rows, and where they stand in the flat list."""

    kind: int
    first: int
    tensors: list[Tensor]
    scale: float
    softcap: float


def flat_parts(
    tensors: list[Tensor], kinds: list[int], scales: list[float], softcaps: list[float]
) -> list[Part]:
    parts = []
    first = 0
    for index, (kind, scale, softcap) in enumerate(zip(kinds, scales, softcaps, strict=True)):
        own = list(tensors[first : first + TENSORS[kind]])
        if kind == LOGITS:
            own[0] = as_rows(index, own[0])
        elif kind == SPARSE:
            own = [t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in own]
        else:
            own[0] = own[0].reshape(own[0].shape[:-1].numel(), own[0].shape[-1])
        parts.append(Part(kind, first, own, scale, softcap))
        first += TENSORS[kind]
    return parts


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one call, in large pages on a CPU."""
    if device.type == "cpu":
        return GradientMemory().empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)
