"""What of a condition stands in a text, and what it becomes with one more token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


class Coverage(NamedTuple):
    """What of the condition stands in the text (See et al. 2017), in stretches: tokens in a row in both.

    Attributes:
        share: (B, T, 1) longest stretch in x[..t], over K; 0 without a condition.
        lacking: (B, T, 1) what is missing to 1; 0 without a condition.
        written: (B, T, 1) 1 where x[..t] ends with the whole condition, else 0.
        begun: (B, T, K) 1 where x[..t] ends with c[..j - 1] and j > 0, else 0.
        marks: (B, T, D) to add to the text's input vectors: each of the first three times its weight.
        stretches: (B, K, 2) int64, the longest stretch of the text that ends with token j of the condition,
            and the one that the text ends with now.
    """

    share: Tensor
    lacking: Tensor
    written: Tensor
    begun: Tensor
    marks: Tensor
    stretches: Tensor


class CoverageStep(NamedTuple):
    """One more token of each text, on the CPU.

    Attributes:
        ids: (B, 1) int64.
        mask: (B, 1) int64, 0 where the token is padding.
        condition_ids: (B, K) int64.
        condition_mask: (B, K) int64, 0 for padding.
        past: (B, K, 2) int64 ``Coverage.stretches`` of the tokens before; None if there are none.
        weights: of the marks, those of share, lacking and written: (D,) float32 contiguous.
    """

    ids: Tensor
    mask: Tensor
    condition_ids: Tensor
    condition_mask: Tensor
    past: Tensor | None
    weights: tuple[Tensor, Tensor, Tensor]

    def fits(self) -> bool:
        """Whether shapes, dtypes and devices are as above, and all is memory that a kernel can read."""
        B, K = self.condition_ids.shape
        shapes = ((B, 1), (B, 1), (B, K), (B, K), (B, K, 2))
        for tensor, shape in zip(self[:5], shapes, strict=True):
            if tensor is not None and not _is_plain(tensor, shape, torch.int64):
                return False
        width = self.weights[0].shape[:1]
        return all(_is_plain(one, width, torch.float32) and one.is_contiguous() for one in self.weights)


class PointerStep(NamedTuple):
    """What scores of one position are made of, float32 on the CPU; names as in ``auxkern_pointer``.

    Attributes:
        query: (B, 1, d).
        start, follow, closing: (B, 1, 1).
        against: (B, 1, 1), or None where nothing reads the base's logits.
        keys: (B, K, d).
        begun: (B, 1, K).
        lacking: (B, 1, 1).
        lm_scores: (B, 1, K), or None.
        lm_logit, spread: the factors of the formula.
    """

    query: Tensor
    start: Tensor
    follow: Tensor
    closing: Tensor
    against: Tensor | None
    keys: Tensor
    begun: Tensor
    lacking: Tensor
    lm_scores: Tensor | None
    lm_logit: float
    spread: float

    def fits(self) -> bool:
        """Whether shapes, dtypes and devices are as above."""
        B, K, d = self.keys.shape
        one, each = (B, 1, 1), (B, 1, K)
        shapes = ((B, 1, d), one, one, one, one, (B, K, d), each, one, each)
        return all(
            tensor is None or _is_plain(tensor, shape, torch.float32)
            for tensor, shape in zip(self[:9], shapes, strict=True)
        )


def _is_plain(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> bool:
    kind = type(tensor) in (Tensor, Parameter)
    return kind and tensor.dtype is dtype and tensor.is_cpu and tensor.shape == shape
