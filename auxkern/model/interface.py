"""What an auxiliary model is given, what it returns and keeps, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from auxkern.model.prefix import PrefixStates


@dataclass
class AuxiliaryInputs:
    """What an auxiliary model sees. B sequences, T new tokens after P past ones, K condition tokens.

    Attributes:
        input_ids: (B, T) int64 new tokens of the text.
        attention_mask: (B, P + T) int64, 1 for real tokens; padding may be on either side.
        condition_ids, condition_mask: (B, K) int64; K may be 0.
        lm_states: (B, T, L, D_lm) the base's hidden states at the new tokens, for ``config.lm_layers``.
        lm_embedding: (V, D_lm) the base's frozen input embedding.
        lm_scores: (B, T, K) the base's own logits of the condition's tokens, for a pointer that reads
            them; else None.
        scores_of: gives these (B, T, K) for final hidden states (B, T, D_lm), of the base's kind.
        cache: what the module returned for the past tokens; None at the first call.
        use_cache: whether it must return a cache.
        told: (B,) int64, how many of the first real tokens tell the base the condition and are none of its
            text; None for none.
        lm_final: (B, T, D_lm) the base's final hidden states at the new tokens; zeros where it does not make
            them.
        prefix: at the first call, the base's keys and values of what it reads before every text, for one that
            ``reads_prefix``; else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    condition_ids: Tensor
    condition_mask: Tensor
    lm_states: Tensor
    lm_embedding: Tensor
    lm_scores: Tensor | None = None
    cache: Any = None
    use_cache: bool = False
    told: Tensor | None = None
    lm_final: Tensor | None = None
    scores_of: Callable[[Tensor], Tensor] | None = None
    prefix: PrefixStates | None = None


@dataclass
class AuxiliaryOutput:
    """What an auxiliary model returns.

    Attributes:
        hidden: (B, T, D) final hidden states; the pair's head makes logits of them.
        pointer: (B, T, K) what to add to the logits of the condition's tokens, or None.
        end: (B, T) what to add to the logit of the end token, where there is a condition, or None.
        cache: for the next call; it has ``reorder_cache(rows)``, which takes (B',) int64 indices and
            keeps these sequences. None without ``use_cache``.
    """

    hidden: Tensor
    pointer: Tensor | None = None
    end: Tensor | None = None
    cache: Any = None

    def positions(self, chosen: Callable[[Tensor], Tensor]) -> AuxiliaryOutput:
        """The same choice of positions of each part, without the cache."""
        pointer = None if self.pointer is None else chosen(self.pointer)
        return AuxiliaryOutput(chosen(self.hidden), pointer, None if self.end is None else chosen(self.end))


class AuxiliaryModule(Protocol):
    """A module of any kind that can be an auxiliary, with ``architecture="custom"``.

    ``hidden_size`` is the width D of what it returns. Its output at a position may depend on the
    text up to there, on the condition, and on nothing else. One that is also an ``AuxiliaryTraits`` says
    more of itself.
    """

    hidden_size: int

    def __call__(self, inputs: AuxiliaryInputs) -> AuxiliaryOutput: ...


class AuxiliaryTraits:
    """What an auxiliary says of itself beside its output: here as it is of a module that says nothing."""

    @property
    def counts_positions(self) -> bool:
        """Whether it takes each token's position as an input; the T5 family compares columns."""
        return False

    @property
    def needs_condition(self) -> bool:
        """Whether it cannot do without a condition: an encoder has nothing to read."""
        return False

    @property
    def reads_prefix(self) -> bool:
        """Whether it attends to what the base reads before every text, in a cache of the base's width."""
        return False

    @property
    def transformer_config(self) -> Any:
        """The config of its transformer, whose positions and windows are then known; None for none."""
        return None

    @property
    def input_vectors(self) -> nn.Module | None:
        """A module without weights that its input vectors pass through, for hooks; None for none."""
        return None


def traits_of(auxiliary: Any) -> AuxiliaryTraits:
    """What a module says of itself."""
    return auxiliary if isinstance(auxiliary, AuxiliaryTraits) else AuxiliaryTraits()


# Fields of ``AuxiliaryCache``, (B, K, ...) each: what is kept of the condition.
OF_CONDITION = ("memory", "keys", "stretches")


@dataclass
class AuxiliaryCache:
    """Keys and values of the text so far, and what was made of the condition, once.

    Attributes:
        attention: a transformers cache; an ``EncoderDecoderCache`` where memory is attended to.
        mask: (B, columns of the cache) int64, 1 where it holds a real token.
        memory: (B, K, D) states of the condition, for cross-attention; None in a decoder.
        keys: (B, K, d) the pointer's keys; None without one.
        stretches: (B, K, 2) of the pointer's ``Coverage``; None without a pointer.
    """

    attention: Any
    mask: Tensor
    memory: Tensor | None
    keys: Tensor | None
    stretches: Tensor | None

    def reorder_cache(self, rows: Tensor) -> None:
        self.attention.reorder_cache(rows)
        self.mask = self.mask[rows]
        for name in OF_CONDITION:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[rows])
