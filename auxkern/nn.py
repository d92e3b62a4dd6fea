"""``torch.nn.Module`` faces of the operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from auxkern.ops.cross_entropy import cross_entropy
from auxkern.ops.memory import GradientMemory
from auxkern.terms import Term


class CrossEntropyLoss(torch.nn.Module):
    """``auxkern.cross_entropy`` with its options fixed; no parameters.

    Args:
        ignore_index, reduction, label_smoothing, z_loss, shift, vocab_size, return_stats,
            chunk_rows, backend: as in ``auxkern.cross_entropy``.

    Example:
        >>> loss_fn = auxkern.nn.CrossEntropyLoss(label_smoothing=0.1, shift=True)
        >>> loss = loss_fn([lm_logits, aux_logits], labels)
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        shift: bool = False,
        vocab_size: int | None = None,
        return_stats: bool = False,
        chunk_rows: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "shift": shift,
            "vocab_size": vocab_size,
            "return_stats": return_stats,
            "chunk_rows": chunk_rows,
            "backend": backend,
        }

    def forward(
        self,
        terms: Sequence[Term | Tensor] | Term | Tensor,
        target: Tensor,
        *,
        normalizer: float | Tensor | None = None,
        token_weight: Tensor | None = None,
        gradient_memory: GradientMemory | None = None,
    ) -> Any:
        """The loss of (..., V) terms against (...) targets; see ``auxkern.cross_entropy``."""
        return cross_entropy(
            terms,
            target,
            normalizer=normalizer,
            token_weight=token_weight,
            gradient_memory=gradient_memory,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
