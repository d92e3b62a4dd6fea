"""Ids and masks of a call of the pair, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auxkern.model.base import OutputHead
from auxkern.model.caches import AuxiliaryRows
from auxkern.model.interface import AuxiliaryInputs
from auxkern.model.prefix import PrefixStates


class PairInputs:
    """What the base and the auxiliaries read.

    Args:
        input_ids: (B, T) int64 new tokens.
        attention_mask: (B, P + T) int64, 1 for real tokens; all are if None.
        condition_ids, condition_mask: (B, K) int64, or (B, A, K), one for each of a sequence's
            auxiliaries; no condition if None.
        told: (B,) int64, how many of the first tokens are the base prompt; none if None.
        past: P, tokens that came before.

    Raises:
        ValueError: shapes disagree.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        condition_ids: Tensor | None = None,
        condition_mask: Tensor | None = None,
        told: Tensor | None = None,
        *,
        past: int = 0,
    ) -> None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be (B, T)")
        B, T = input_ids.shape
        if attention_mask is None:
            attention_mask = input_ids.new_ones(B, past + T)
        if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but input_ids "
                f"{tuple(input_ids.shape)}; it covers the tokens in the cache and the new ones"
            )
        self.input_ids, self.attention_mask = input_ids, attention_mask
        self.condition_ids, self.condition_mask = _conditions(input_ids, condition_ids, condition_mask)
        if told is not None and told.shape != (B,):
            raise ValueError(f"told has shape {tuple(told.shape)} but there are {B} sequences; give each one")
        self.told = told

    def rows(self, rows: Tensor) -> PairInputs:
        """The same for some sequences, (R,) int64 indices."""
        of_rows: dict[str, Any] = {
            name: None if one is None else one[rows] for name, one in vars(self).items()
        }
        return PairInputs(**of_rows)

    def of(self, part: AuxiliaryRows) -> PairInputs:
        """What one auxiliary reads, with one condition for each of its sequences."""
        several = self.condition_ids.dim() == 3
        if part.rows is None and not several:
            return self
        return PairInputs(
            part.of(self.input_ids, False),
            part.of(self.attention_mask, False),
            part.of(self.condition_ids, several),
            part.of(self.condition_mask, several),
            None if self.told is None else part.of(self.told, False),
        )

    def for_auxiliary(
        self,
        lm_states: Tensor,
        lm_embedding: Tensor,
        lm_scores: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        *,
        prefix: PrefixStates | None = None,
        scores_of: Callable[[Tensor], Tensor] | None = None,
    ) -> AuxiliaryInputs:
        """With what comes from the base and from the auxiliary's own cache.

        Args:
            lm_states: (B, T, 1 + L, D_lm) the base's final hidden states, then those of the layers.
            lm_embedding, lm_scores, cache, use_cache, prefix, scores_of: as of ``AuxiliaryInputs``.
        """
        return AuxiliaryInputs(
            **vars(self),
            lm_states=lm_states[:, :, 1:],
            lm_embedding=lm_embedding,
            lm_scores=lm_scores,
            cache=cache,
            use_cache=use_cache,
            lm_final=lm_states[:, :, 0],
            prefix=prefix,
            scores_of=scores_of,
        )


def checked_weights(aux_scale: Any, shape: Sequence[int], device: torch.device) -> float | Tensor:
    """A mixing weight, or a float32 tensor of them.

    Args:
        aux_scale: one for all, (B,) for each sequence, or (B, A) for each of its auxiliaries.
        shape: (B,), or (B, A) where sequences have several.
        device: of the sequences.

    Raises:
        TypeError: it is no number.
        ValueError: it has another shape, or is not finite.
    """
    if isinstance(aux_scale, (bool, str)):
        raise TypeError(f"aux_scale must be a number, or one for each, got {aux_scale!r}")
    if isinstance(aux_scale, (int, float)):
        if not math.isfinite(aux_scale):
            raise ValueError(f"aux_scale is {aux_scale}; it must be finite")
        return float(aux_scale)
    scale = torch.as_tensor(aux_scale, device=device).float()
    if scale.shape not in (shape[:1], shape):
        raise ValueError(
            f"aux_scale has shape {tuple(scale.shape)} but there are {shape[0]} inputs; give each one, or "
            "each of their auxiliaries one"
        )
    if not bool(scale.isfinite().all()):
        raise ValueError(f"aux_scale is {scale.tolist()}; each must be finite")
    return scale


class BaseSide(NamedTuple):
    """What the base made of some rows, for an auxiliary.

    Attributes:
        states: (R, T, 1 + L, D) its final hidden states, then those of the layers.
        layers: which these are.
        logits: (R, T, V) its own, with ``lm_term="logits"``; else None.
        head: its output embedding; None with ``lm_term="logits"``.
    """

    states: Tensor
    layers: list[int]
    logits: Tensor | None
    head: OutputHead | None


def _conditions(input_ids: Tensor, ids: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    B = input_ids.shape[0]
    if ids is None:
        if mask is not None:
            raise ValueError("condition_mask is given without condition_ids; pass both")
        ids = input_ids.new_zeros(B, 0)
    if ids.dim() not in (2, 3) or ids.shape[0] != B:
        raise ValueError(
            f"condition_ids has shape {tuple(ids.shape)} but input_ids {tuple(input_ids.shape)}; give each "
            "sequence its condition, (B, K), or each of its auxiliaries one, (B, A, K)"
        )
    mask = input_ids.new_ones(ids.shape) if mask is None else mask
    if mask.shape != ids.shape:
        raise ValueError(
            f"condition_mask has shape {tuple(mask.shape)} but condition_ids {tuple(ids.shape)}; give "
            "each token of a condition its mask"
        )
    return ids, mask
