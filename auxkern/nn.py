"""``torch.nn.Module`` faces of the operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from auxkern.core.memory import GradientMemory, LargePages
from auxkern.core.packed import STORED_COMPUTES, PackedWeight, StoredRows
from auxkern.core.terms import Term
from auxkern.ops.cross_entropy import cross_entropy
from auxkern.ops.linear import linear
from auxkern.ops.packed import pack, pack_refusal, pack_stored, packed_linear
from auxkern.ops.torch_ops import is_differentiated


class CrossEntropyLoss(torch.nn.Module):
    """``auxkern.cross_entropy`` with its options fixed; no parameters.

    Args:
        ignore_index, reduction, label_smoothing, z_loss: as in ``auxkern.cross_entropy``.
        shift, vocab_size, return_stats, chunk_rows, backend: as there.

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
        stored: finds a weight among the tensors of the file that it was loaded from; None if there is none.
    """

    compute: str | None = None
    stored: Callable[[Tensor], StoredRows | None] | None = None
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
        state = self.weight_state()
        if state is None:
            return None
        if self._kept is None or self._kept[0] != state:
            if pack_refusal() is not None:
                return None
            rows = self.stored_rows(state[0])
            packed = pack(self.weight, state[0]) if rows is None else pack_stored(rows, state[0])
            self._kept = state, packed.moved(LargePages())
        return self._kept[1]

    def stored_rows(self, compute: str) -> StoredRows | None:
        """The weight as its file has it; None if none has these numbers, or ``compute`` widens them."""
        if self.stored is None or compute not in STORED_COMPUTES:
            return None
        return self.stored(self.weight)

    def weight_state(self) -> tuple[str, object] | None:
        """The compute, and what changes with the weight; None if that is not packed."""
        weight, compute = self.weight, self.compute
        plain = type(weight) is torch.nn.Parameter and weight.device.type == "cpu"
        if compute is None or not plain or not weight.numel():
            return None
        return compute, _state_of(weight)

    @property
    def last_packed(self) -> PackedWeight | None:
        """The packed weight, if there is one by now."""
        return None if self._kept is None else self._kept[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        wanted = x.dtype is torch.float32 and x.device.type == "cpu"
        if wanted and not is_differentiated((x, self.weight, self.bias)):
            packed = self.packed()
            if packed is not None:
                return packed_linear(x, packed, self.bias)
        return linear(x, self.weight, self.bias)


def _state_of(tensor: Tensor) -> object:
    # An in-place change counts the version up.
    return tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version


class JoinedLinears:
    """Layers of one input: small ones of which each is a ``FrozenLinear`` that is packed run as one product.

    To call a product of 64 columns takes longer than the product. Each layer's results are, to the last bit,
    what it makes alone; layers of another kind, with hooks, or that are trained run one by one.
    """

    _kept: tuple[object, PackedWeight, Tensor] | None = None  # from which weights, packed, and biases

    def of(self, layers: Sequence[torch.nn.Module], x: Tensor) -> Sequence[Tensor]:
        """(..., N) of x (..., K) for each layer of N rows."""
        joined = self._joined(layers, x)
        if joined is None:
            return [layer(x) for layer in layers]
        packed, bias = joined
        return packed_linear(x, packed, bias).split([layer.out_features for layer in layers], -1)

    def _joined(self, layers: Sequence[torch.nn.Module], x: Tensor) -> tuple[PackedWeight, Tensor] | None:
        if type(x) is not Tensor or x.dtype is not torch.float32 or x.device.type != "cpu":
            return None
        if torch.compiler.is_compiling():
            return None
        states: list[object] = []
        computes, given = set(), [x]
        for layer in layers:
            if type(layer) is not FrozenLinear or layer._forward_hooks or layer._forward_pre_hooks:
                return None
            weight, bias, state = layer.weight, layer.bias, layer.weight_state()
            if state is None or bias is None or layer.stored is not None:
                return None
            computes.add(state[0])
            given += [weight, bias]
            states += [state, _state_of(bias)]
        if len(computes) != 1 or is_differentiated(given):
            return None
        kept = self._kept
        if kept is None or kept[0] != states:
            if pack_refusal() is not None:
                return None
            weights, biases = given[1::2], given[2::2]
            joined = torch.cat([one.detach().float() for one in biases])
            self._kept = kept = states, pack(weights, computes.pop()), joined
        return kept[1:]


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
