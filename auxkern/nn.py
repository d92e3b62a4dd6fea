"""``torch.nn.Module`` faces of the operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from auxkern.core.memory import GradientMemory, LargePages
from auxkern.core.packed import PackedWeight
from auxkern.core.terms import Term
from auxkern.ops.cross_entropy import cross_entropy
from auxkern.ops.linear import linear
from auxkern.ops.packed import pack, pack_refusal, packed_linear
from auxkern.ops.torch_ops import is_differentiated


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


class FrozenLinear(torch.nn.Linear):
    """``torch.nn.Linear`` whose weight may be narrower than what goes through it.

    What comes out has the dtype of what goes in. With a ``compute`` a float32 input on a CPU is multiplied
    with the weight packed; else, and where a gradient is wanted, by ``auxkern.ops.linear`` with the weight as
    it is.

    Attributes:
        compute: "float32", "bfloat16" or "int8", the arithmetic of such a product; None for none.
    """

    compute: str | None = None
    _kept: tuple[object, PackedWeight] | None = None  # what it was packed from, and the packed weight

    @classmethod
    def of(cls, layer: torch.nn.Linear) -> FrozenLinear:
        """A layer that shares the weight and bias of another."""
        frozen = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        frozen.weight, frozen.bias = layer.weight, layer.bias
        return frozen.train(layer.training)

    def packed(self) -> PackedWeight | None:
        """The weight, packed when it is first asked for and after each change.

        Returns:
            None without a ``compute``, and where no kernel reads it.

        Raises:
            ValueError: it has values that ``compute`` cannot keep.
        """
        weight, compute = self.weight, self.compute
        plain = type(weight) is torch.nn.Parameter and weight.device.type == "cpu"
        if compute is None or not plain or not weight.numel():
            return None
        # An in-place change counts the version up.
        state = (
            weight.data_ptr(),
            weight.dtype,
            0 if weight.is_inference() else weight._version,
            compute,
        )
        if self._kept is None or self._kept[0] != state:
            if pack_refusal() is not None:
                return None
            self._kept = state, pack(weight, compute).moved(LargePages())
        return self._kept[1]

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed weight; 0 as long as there is none."""
        return 0 if self._kept is None else self._kept[1].nbytes

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        wanted = x.dtype is torch.float32 and x.device.type == "cpu"
        if wanted and not is_differentiated((x, self.weight, self.bias)):
            packed = self.packed()
            if packed is not None:
                return packed_linear(x, packed, self.bias)
        return linear(x, self.weight, self.bias)


class FrozenEmbedding(torch.nn.Embedding):
    """``torch.nn.Embedding`` whose rows come out in float32, whatever the weight's dtype."""

    @classmethod
    def of(cls, layer: torch.nn.Embedding) -> FrozenEmbedding:
        """An embedding that shares the weight of another.

        Raises:
            ValueError: it has options that this one lacks.
        """
        if layer.max_norm is not None:
            raise ValueError("an embedding with max_norm writes to its weight; it cannot be frozen")
        frozen = cls(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        frozen.weight = layer.weight
        return frozen.train(layer.training)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 to (..., D) float32."""
        return super().forward(ids).float()
