"""The pointer: what an auxiliary adds to the logits of the condition's own tokens, and to the end's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from auxkern.model.layers import ZeroLinear, row_products

if TYPE_CHECKING:
    from auxkern.model.auxiliary import AuxiliaryInputs

# Logits of language models lie around 10, and differ by about as much.
_LM_LOGIT, _LM_SPREAD = 10.0, 10.0


class Coverage(NamedTuple):
    """What of the condition stands in the text (See et al. 2017).

    Attributes:
        share: (B, T, 1) share of the condition's tokens that occur in x[..t]; 0 without a condition.
        lacking: (B, T, 1) what is missing to 1; 0 without a condition.
        seen: (B, K) bool, which tokens have occurred by the last position.
    """

    share: Tensor
    lacking: Tensor
    seen: Tensor


class Pointed(NamedTuple):
    """What a pointer makes of a call.

    Attributes:
        hidden: (B, T, D) hidden states that know the coverage.
        scores: (B, T, K) to add to the logits of the condition's tokens.
        end: (B, T) to add to the logit of the end token.
    """

    hidden: Tensor
    scores: Tensor
    end: Tensor


class Pointer(nn.Module):
    """Scores of the condition's tokens (Vinyals et al. 2015) and of the end; zero at first.

        h'[t]       = h[t] + v share[t]
        score[t, j] = q(h'[t]) . k(m[j]) / sqrt(d)  +  g(h'[t]) [x[t] = c[j - 1]]
                      +  a(h'[t]) (z_LM[t, c[j]] - 10) / 10
        end[t]      = e(h'[t]) lacking[t]

    share and lacking are ``Coverage``'s; the auxiliary's own transformer is told of them too, as part of
    its input (``marks``). The second part of a score lets a word of several tokens be written to its end:
    it is on where the text's last token is the one that stands before token j of the condition. The
    third knows how far the base is from writing the token itself: what has to be added to make a token
    likely differs by ten nats and more between one that fits and one that does not. The last keeps a text
    from ending before the condition is written.

    Args:
        D: width of the hidden states.
        size: d, width of queries and keys.
        reads_lm: whether it has the third part.
        exact: whether the marks start at zero too, so that the transformer's input is what it was.
    """

    def __init__(self, D: int, size: int, *, reads_lm: bool = True, exact: bool = False) -> None:
        super().__init__()
        start = torch.zeros if exact else torch.randn
        self.mark_share = nn.Parameter(start(D))
        self.mark_lacking = nn.Parameter(start(D))
        self.covered = nn.Parameter(torch.zeros(D))
        self.query = ZeroLinear(D, size)
        self.key = nn.Linear(D, size)
        self.follow = ZeroLinear(D, 1)
        self.against_lm = ZeroLinear(D, 1) if reads_lm else None
        self.end = ZeroLinear(D, 1)

    def keys(self, memory: Tensor) -> Tensor:
        """(B, K, D) -> (B, K, d)"""
        return self.key(memory)

    def coverage(self, inputs: AuxiliaryInputs, seen: Tensor | None) -> Coverage:
        """What of the condition stands in the text.

        Args:
            inputs: of this call.
            seen: (B, K) bool, which tokens occur in the past; None if there is none.
        """
        ids, condition = inputs.input_ids[:, :, None], inputs.condition_ids[:, None, :]
        real = (inputs.condition_mask != 0)[:, None, :]
        here = (ids == condition) & real & (inputs.attention_mask[:, -ids.shape[1] :, None] != 0)
        occurred = here.cumsum(1) > 0
        if seen is not None:
            occurred = occurred | seen[:, None, :]
        count = real.sum(-1, keepdim=True)
        share = occurred.sum(-1, keepdim=True) / count.clamp_min(1)
        return Coverage(share, (count > 0).to(share.dtype) - share, occurred[:, -1])

    def marks(self, coverage: Coverage) -> Tensor:
        """(B, T, D) to add to the input vectors of the text."""
        return coverage.share * self.mark_share + coverage.lacking * self.mark_lacking

    def forward(self, hidden: Tensor, keys: Tensor, inputs: AuxiliaryInputs, coverage: Coverage) -> Pointed:
        """What is added to logits.

        Args:
            hidden: (B, T, D).
            keys: (B, K, d).
            inputs: of this call.
            coverage: of this call.
        """
        ids = inputs.input_ids[:, :, None]
        hidden = hidden + coverage.share * self.covered
        before = nn.functional.pad(inputs.condition_ids[:, :-1], (1, 0), value=-1)[:, None, :]
        scores = row_products(self.query(hidden), keys) / math.sqrt(keys.shape[-1])
        scores = scores + self.follow(hidden) * (ids == before)
        if self.against_lm is not None:
            if inputs.lm_scores is None:
                raise ValueError("inputs.lm_scores is None, but the pointer reads them; pass (B, T, K)")
            distance = (inputs.lm_scores.to(hidden.dtype) - _LM_LOGIT) / _LM_SPREAD
            scores = scores + self.against_lm(hidden) * distance
        return Pointed(hidden, scores, (self.end(hidden) * coverage.lacking)[:, :, 0])
