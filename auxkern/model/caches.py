"""The caches of a pair: the base's and those of its auxiliaries, each over its own inputs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

# What transformers' models call the cache that they take and return; 5.24 has renamed it.
_RETURNED = {one.name for one in fields(BaseModelOutputWithPast)}
CACHE_NAME = "cache" if "cache" in _RETURNED else "past_key_values"


@dataclass
class AuxiliaryRows:
    """The cache of one auxiliary, and the sequences of the batch that it serves.

    Attributes:
        name: of the auxiliary.
        rows: (R,) int64 indices of the batch; None for all of it.
        cache: what the auxiliary returned.
        places: (R,) int64, where it stands among the auxiliaries of each; None where a sequence has one
            condition and one weight.
    """

    name: str
    rows: Tensor | None
    cache: Any
    places: Tensor | None = None

    def of(self, values: Tensor, per_auxiliary: bool) -> Tensor:
        """What its sequences have of values (B, ...), or (B, A, ...) with one for each auxiliary.

        Raises:
            ValueError: there is one for each, but nothing says which auxiliaries a sequence has.
        """
        if not per_auxiliary:
            return values if self.rows is None else values[self.rows]
        if self.places is None:
            raise ValueError(
                f"shape {tuple(values.shape)} has several conditions or weights for a sequence; give "
                "auxiliary_ids (B, A) that say which auxiliaries they are for"
            )
        rows = torch.arange(len(values), device=values.device) if self.rows is None else self.rows
        return values[rows, self.places]


class PairCache:
    """Keys and values of the base over the text, and of each auxiliary over its condition and the text."""

    is_compileable = False  # read by transformers' generate

    def __init__(
        self,
        lm: Any,
        auxiliaries: list[AuxiliaryRows],
        mask: Tensor | None = None,
        *,
        before: int = 0,
        short: bool = False,
    ) -> None:
        """The caches of a call.

        Args:
            lm, auxiliaries: of the models.
            mask: (B, columns) int64 of the base's cache, where it holds more than the text.
            before: how many of the columns that is.
            short: whether they are of the base's first layers only.
        """
        self.lm = lm
        self.auxiliaries = auxiliaries
        self.mask, self.before, self.short = mask, before, short

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Text positions seen so far, padding included."""
        return self.lm.get_seq_length(layer_idx) - self.before

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the sequences ``beam_idx`` (B,), as beam search asks.

        A sequence is only ever replaced by another beam of its own request, so it keeps its auxiliary.
        """
        self.lm.reorder_cache(beam_idx)
        self.mask = None if self.mask is None else self.mask[beam_idx]
        for part in self.auxiliaries:
            if part.rows is None:
                part.cache.reorder_cache(beam_idx)
                continue
            # Where each sequence of the batch stands among this auxiliary's.
            place = torch.zeros(len(beam_idx), dtype=torch.int64, device=beam_idx.device)
            place[part.rows] = torch.arange(len(part.rows), device=beam_idx.device)
            part.cache.reorder_cache(place[beam_idx[part.rows]])
