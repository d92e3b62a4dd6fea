"""What a backend is: the arithmetic of every operator, on checked inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from auxkern.core.coverage import Coverage, CoverageStep, PointerStep
from auxkern.core.decoder import DecoderLayer, DecoderParts, DecoderStack, Norm
from auxkern.core.draws import Draws, RowTokens
from auxkern.core.loss import Loss, RowLosses, RowSlopes
from auxkern.core.packed import PackedWeight, StoredRows
from auxkern.core.sums import Sum, Wanted


@dataclass(frozen=True)
class Route:
    """The way that a backend takes with a sum.

    Attributes:
        name: such as "segments" or "chunks of logits".
        fused: whether gradients are made with the losses, for the incoming gradient that is expected.
        rescales: whether these are float32, so that another incoming gradient, which is a multiple of the
            one expected, may multiply them.
        mends: whether ``gradients`` brings those of logits up to date on the device, row by row, where
            another incoming gradient comes than was expected.
        refusals: by the name of each faster way, why it is not taken.
    """

    name: str
    fused: bool = False
    rescales: bool = False
    mends: bool = False
    refusals: Mapping[str, str] = field(default_factory=dict)


class Backend(ABC):
    """The arithmetic of every operator, on checked inputs.

    ``wanted`` holds, for each term of a sum, contiguous memory for gradients by the name of the tensor. It is
    written, not added to; rows that do not count get 0.

    Attributes:
        remembers: whether it knows calls like earlier ones by their facts; see ``draw_given``.
    """

    name: str
    remembers = False

    @abstractmethod
    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        """Why this backend cannot run on these inputs; None if it can."""

    @abstractmethod
    def route(self, sum: Sum, loss: Loss) -> Route:
        """The way that ``losses`` takes, and why it is not a faster one."""

    def counted(self, target: Tensor, ignore_index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """0-d number of rows whose target (N,) counts, 1 if none does, and its reciprocal."""
        number = (target != ignore_index).sum().clamp(min=1).to(dtype)
        return number, number.reciprocal()

    @abstractmethod
    def losses(
        self, sum: Sum, target: Tensor, loss: Loss, weight: Tensor | None, wanted: Wanted
    ) -> RowLosses:
        """What the loss of each row is made of and, with a weight, the gradients of sum_n weight[n] row[n].

        Args:
            sum: N rows of terms over V ids.
            target: (N,) int64 in [0, V), ``loss.ignore_index`` or ``NO_TARGET``, contiguous.
            loss: what is asked of each row.
            weight: (N,) float32 or float64; None for no gradients.
            wanted: where the gradients go.
        """

    @abstractmethod
    def gradients(self, sum: Sum, target: Tensor, slopes: RowSlopes, wanted: Wanted) -> None:
        """The gradients where what the rows' logits add up to is known, over more shards maybe.

        Args:
            sum: N rows of terms over V ids.
            target: (N,) int64 in [0, V), or another id where the row's target is none of these; contiguous.
            slopes: of the rows.
            wanted: where the gradients go.
        """

    @abstractmethod
    def draw(self, sum: Sum, draws: Draws, want_logprob: bool) -> RowTokens:
        """A token for each of N >= 1 rows, as ``auxkern_sample`` in kernels/include/auxkern.h says."""

    def draw_given(
        self,
        given: Callable[[], tuple[Sum, Draws]],
        inputs: Sequence[Tensor],
        facts: Hashable,
        want_logprob: bool,
    ) -> RowTokens:
        """``draw`` of what is given; a backend need not ask for it where it knows the call from its facts.

        Args:
            given: checks the inputs and makes of them what ``draw`` takes.
            inputs: every tensor that it reads, on one device; at least one.
            facts: everything else that it depends on.
        """
        return self.draw(*given(), want_logprob)

    def linear_refusal(self, x: Tensor, weight: Tensor) -> str | None:
        """Why it leaves the product of x (M, K) and weight (N, K) to torch; None if it takes it."""
        return "it has no kernel for linear layers"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, accumulate: bool) -> None:
        """``y = x @ weight.T + bias``, plus what y held if ``accumulate``, summed in float32.

        A row of y does not depend on the other rows.

        Args:
            x: (M, K) float32.
            weight: (N, K) float32, float16 or bfloat16, that ``linear_refusal`` takes.
            bias: (N,) or None.
            y: (M, N) float32, rows contiguous, written.
        """
        raise NotImplementedError(self.linear_refusal(x, weight))

    def pack_refusal(self) -> str | None:
        """Why it packs no weights; None if it does."""
        return "it has no kernels for packed weights"

    def pack(self, weights: Sequence[Tensor], like: PackedWeight) -> PackedWeight:
        """Weights whose rows follow each other, packed.

        Args:
            weights: (rows, K) each, N rows together; float32, float16 or bfloat16, of any strides.
            like: the result without its memory.

        Raises:
            ValueError: a weight is NaN or infinite and ``like`` is of int8.
        """
        raise NotImplementedError(self.pack_refusal())

    def pack_stored(self, stored: Sequence[StoredRows], like: PackedWeight) -> PackedWeight:
        """The same with weights in the blocks of a GGUF file.

        Args:
            stored: at least one, of the kind of ``like``.
            like: as in ``pack``.

        Raises:
            ValueError: a scale or minimum is NaN or infinite.
        """
        raise NotImplementedError(self.pack_refusal())

    def packed_linear(
        self,
        x: Tensor,
        packed: PackedWeight,
        bias: Tensor | None,
        y: Tensor,
        accumulate: bool,
        activation: str = "identity",
    ) -> None:
        """``y = activation(x @ weight.T + bias)``, plus what y held if ``accumulate``.

        Of a gated weight ``y = activation(gate) * up``, the halves of the product. A row of y does not
        depend on the other rows.

        Args:
            x: (M, K) float32.
            packed: what ``pack`` of this backend made.
            bias: (N,) or None.
            y: (M, the first columns) float32, rows contiguous, written.
            accumulate: with "identity" and a weight that is not gated only.
            activation: of ``core.packed.ACTIVATIONS``.
        """
        raise NotImplementedError(self.pack_refusal())

    def attention_refusal(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
        """Why it leaves these to torch; None if it takes them."""
        return "it has no kernel for attention"

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, out: Tensor
    ) -> None:
        """As ``auxkern.ops.attention.attention``.

        A row does not depend on the others, nor on what it does not see.

        Args:
            query: (B, H, T, D) float32.
            key, value: (B, G, P, D) float32.
            mask: (B or 1, 1, T or 1, P or 1) bool; None: position t sees P - T + t + 1 columns.
            scale: of the products.
            out: (B, T, H, D) float32, contiguous, written.
        """
        raise NotImplementedError(self.attention_refusal(query, key, value, mask))

    def decoder_layer(self, parts: DecoderParts) -> DecoderLayer:
        """A decoder layer that is not trained, as one step; its parts must not change."""
        raise NotImplementedError(self.pack_refusal())

    def decoder_stack(self, layers: Sequence[DecoderLayer]) -> DecoderStack:
        """Layers that this backend has made, one or more, as one step."""
        raise NotImplementedError(self.pack_refusal())

    def normed(self, norm: Norm, x: Tensor) -> Tensor:
        """A norm of rows that are not trained, x (..., width) float32 contiguous."""
        raise NotImplementedError(self.pack_refusal())

    def coverage(self, step: CoverageStep) -> Coverage:
        """What of the conditions stands in the texts after one more token each; T is 1."""
        raise NotImplementedError(self.pack_refusal())

    def pointed(self, step: PointerStep) -> tuple[Tensor, Tensor]:
        """Scores (B, 1, K) and end (B, 1) of ``Pointed``, of one position."""
        raise NotImplementedError(self.pack_refusal())
