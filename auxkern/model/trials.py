"""Does a model do what a pair relies on? A few tokens show it, before anything is trained.

The future must not reach the past, padding must not reach anything, and a text that is read token by
token with a cache must give what it gives at once. Families break this in many ways: bidirectional
attention, positions that start elsewhere or count columns, convolutions and states that run over padding,
caches that are not taken back. So it is tried and not looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

LENGTH, PADDING = 11, 3  # tokens; more than a twin's windows
_FIRST = 3  # ids below are often special ones
# Largest relative differences of a position that are rounding.
EXACT = 1e-3  # float32 arithmetic in another order stays below 1e-5
ROUNDED = 0.2  # 16 bits and quantised activations through many layers


class Reading(NamedTuple):
    """What a model made of new tokens.

    Attributes:
        values: (B, T, D) that stand for its output: states, logits, or both side by side.
        cache: for the next tokens; None unless asked for.
    """

    values: Tensor
    cache: Any


# (ids (B, T), attention_mask (B, P + T), cache, use_cache) -> Reading
Reader = Callable[[Tensor, Tensor, Any, bool], Reading]


@dataclass(frozen=True)
class Trial:
    """A model under trial.

    Attributes:
        read: runs it over new tokens.
        ids: (1, T) tokens that it reads.
        tolerance: largest relative difference of a position that is rounding.
    """

    read: Reader
    ids: Tensor
    tolerance: float

    @torch.no_grad()
    def flaw(self) -> str | None:
        """What the model does that a pair cannot have; None if nothing."""
        with torch.autocast(self.ids.device.type, enabled=False):
            ids = self.ids
            whole = self.read(ids, torch.ones_like(ids), None, False).values
            if not whole.isfinite().all():
                return "its output is NaN or infinite"
            later = ids.clone()
            later[:, -2:] = ids[:, :2]
            changed = self.read(later, torch.ones_like(ids), None, False).values
            if self._differ(whole[:, :-2], changed[:, :-2]):
                return "later tokens reach the output at earlier ones"
            for beside in (False, True):
                padded, mask = self._padded(beside)
                with_padding = self.read(padded, mask, None, False).values
                if self._differ(whole, with_padding[:1, PADDING:]):
                    return "padding before a text reaches its output"
            padded, mask = self._padded(True)
            if self._differ(whole, self._in_steps(padded, mask)[:1, PADDING:]):
                return "its output with a cache, token by token, is another than at once"
            return None

    def _padded(self, beside: bool) -> tuple[Tensor, Tensor]:
        """The ids behind padding, alone or beside a text without any, and their mask."""
        padding = self.ids.roll(1, 1)[:, :PADDING]  # any ids: a mask says what is real
        padded = torch.cat([padding, self.ids], 1)
        mask = torch.ones_like(padded)
        mask[:, :PADDING] = 0
        if not beside:
            return padded, mask
        return torch.cat([padded, padded.flip(1)]), torch.cat([mask, torch.ones_like(mask)])

    def _in_steps(self, ids: Tensor, mask: Tensor) -> Tensor:
        start = PADDING + self.ids.shape[1] // 2 + 1
        values, cache = self.read(ids[:, :start], mask[:, :start], None, True)
        parts = [values]
        for t in range(start, ids.shape[1]):
            values, cache = self.read(ids[:, t : t + 1], mask[:, : t + 1], cache, True)
            parts.append(values)
        return torch.cat(parts, 1)

    def _differ(self, expected: Tensor, values: Tensor) -> bool:
        if values.shape != expected.shape:
            return True
        return not farthest(expected, values) <= self.tolerance


def farthest(expected: Tensor, values: Tensor) -> float:
    """The largest relative difference of a position, of (..., D) values; NaN where one is."""
    expected, values = expected.float(), values.float()
    distances = (values - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
    return float(distances.max())


def trial_ids(
    V: int, device: torch.device | str = "cpu", avoid: tuple[int, ...] = (), length: int = LENGTH
) -> Tensor:
    """(1, length) ids below V for a trial, special ones left out."""
    free = [i for i in range(min(_FIRST, V - 1), V) if i not in avoid] or [0]
    return torch.tensor([[free[(5 * i) % len(free)] for i in range(length)]], device=device)
