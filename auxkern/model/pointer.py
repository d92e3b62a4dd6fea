"""The pointer: what an auxiliary adds to the logits of the condition's own tokens, and to the end's."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from auxkern.core.coverage import Coverage, CoverageStep, PointerStep
from auxkern.model.interface import AuxiliaryInputs
from auxkern.model.layers import ZeroLinear, row_products
from auxkern.model.native.packed_layers import cpu_backend
from auxkern.nn import FrozenLinear, JoinedLinears
from auxkern.ops.packed import pack_refusal
from auxkern.ops.torch_ops import is_differentiated

# Logits of language models lie around 10, and differ by about as much.
_LM_LOGIT, _SPREAD = 10.0, 10.0


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

        h'[t]       = h[t] + u share[t] + v written[t]
        score[t, j] = q(h'[t]) . k(m[j]) / sqrt(d)  +  s(h'[t]) [j = 0]  +  10 f(h'[t]) begun[t, j]
                      +  a(h'[t]) (z_LM[t, c[j]] - 10) / 10
        end[t]      = 10 e(h'[t]) lacking[t]

    share, written, begun and lacking are ``Coverage``'s; the auxiliary's own transformer is told of them
    too, as part of its input (``Coverage.marks``). A condition is written from its first token on, the
    second part of a score; the third writes what was begun to its end. The fourth knows how far the base
    is from writing the token itself: what has to be added to make a token likely differs by ten nats and
    more between one that fits and one that does not. The end's score keeps a text from ending before the
    condition is written. The factors of ten let parts that all examples agree on be learnt in few steps.

    Args:
        D: width of the hidden states.
        size: d, width of queries and keys.
        reads_lm: whether scores have the fourth part.
        exact: whether the marks start at zero too, so that the transformer's input is what it was.
    """

    def __init__(self, D: int, size: int, *, reads_lm: bool = True, exact: bool = False) -> None:
        super().__init__()
        start = torch.zeros if exact else torch.randn
        self.mark_share = nn.Parameter(start(D))
        self.mark_lacking = nn.Parameter(start(D))
        self.mark_written = nn.Parameter(start(D))
        self.covered = nn.Parameter(torch.zeros(D))
        self.completed = nn.Parameter(torch.zeros(D))
        self.query = ZeroLinear(D, size)
        self.key = nn.Linear(D, size)
        self.start = ZeroLinear(D, 1)
        self.follow = ZeroLinear(D, 1)
        self.against_lm = ZeroLinear(D, 1) if reads_lm else None
        self.end = ZeroLinear(D, 1)
        self._of_hidden = JoinedLinears()

    def keys(self, memory: Tensor) -> Tensor:
        """(B, K, D) -> (B, K, d)"""
        return self.key(memory)

    def coverage(self, inputs: AuxiliaryInputs, past: Tensor | None) -> Coverage:
        """What of the condition stands in the text.

        Args:
            inputs: of this call; padding stands before a text or after it.
            past: (B, K, 2) ``Coverage.stretches`` of the past tokens; None if there are none.
        """
        step = self._step(inputs, past)
        if step is not None:
            return cpu_backend().coverage(step)
        ids, condition = inputs.input_ids[:, :, None], inputs.condition_ids[:, None, :]
        T, K = ids.shape[1], condition.shape[2]
        real = (inputs.condition_mask != 0)[:, None, :]
        text = inputs.attention_mask[:, -T:, None] != 0
        if past is None and inputs.told is not None:
            # What tells the base the condition is not its text yet.
            text &= text.cumsum(1) > inputs.told[:, None, None]
        if past is None:
            past = condition.new_zeros(len(ids), K, 2)
        equal = (ids == condition) & real & text
        # On a GPU most calls are of one token, and there every operation counts.
        runs, longest, kept = _of_one(equal, text, past) if T == 1 else _of_many(equal, text, past)
        count = real.sum(-1, keepdim=True)
        place = torch.arange(1, K + 1, device=ids.device)
        whole = runs == place
        dtype = self.covered.dtype
        # Without a condition a column of zeros, so that there is a largest one.
        longest = longest if K else longest.new_zeros(*longest.shape[:2], 1)
        # In float32 whatever the program's default dtype, so that a native step agrees.
        share = (longest.amax(-1, keepdim=True).float() / count.clamp_min(1)).to(dtype)
        lacking = count.clamp_max(1) - share
        written = (whole & (place == count)).any(-1, keepdim=True).to(dtype)
        begun = nn.functional.pad(whole, (1, 0))[:, :, :-1].to(dtype)
        marks = share * self.mark_share + lacking * self.mark_lacking + written * self.mark_written
        return Coverage(share, lacking, written, begun, marks, kept)

    def _step(self, inputs: AuxiliaryInputs, past: Tensor | None) -> CoverageStep | None:
        """The inputs of one native call; None where torch makes the coverage.

        A native call is of one token, after ``use_native_kernels``, and nothing is trained.
        """
        if not self._steps(inputs):
            return None
        step = CoverageStep(
            inputs.input_ids,
            inputs.attention_mask[:, -1:],
            inputs.condition_ids,
            inputs.condition_mask,
            past,
            (self.mark_share, self.mark_lacking, self.mark_written),
        )
        return step if step.fits() and not is_differentiated((*step[:5], *step.weights)) else None

    def _steps(self, inputs: AuxiliaryInputs) -> bool:
        """Whether a call may be a native one."""
        query = self.query
        if inputs.input_ids.shape[1] != 1 or not isinstance(query, FrozenLinear) or query.compute is None:
            return False
        eager = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
        return eager and pack_refusal() is None

    def forward(self, hidden: Tensor, keys: Tensor, inputs: AuxiliaryInputs, coverage: Coverage) -> Pointed:
        """What is added to logits.

        Args:
            hidden: (B, T, D).
            keys: (B, K, d).
            inputs: of this call.
            coverage: of this call.

        Raises:
            ValueError: the pointer reads the base's logits and inputs have none.
        """
        hidden = hidden + coverage.share * self.covered + coverage.written * self.completed
        reads = [] if self.against_lm is None else [self.against_lm]
        layers = (self.query, self.start, self.follow, self.end, *reads)
        query, start, follow, end, *against_lm = self._of_hidden.of(layers, hidden)
        lm_scores, against = inputs.lm_scores, next(iter(against_lm), None)
        if against is not None and lm_scores is None:
            raise ValueError("inputs.lm_scores is None, but the pointer reads them; pass (B, T, K)")
        # How many positions a first call has depends on the texts beside: torch takes one as it takes many.
        if inputs.cache is not None and self._steps(inputs):
            step = PointerStep(
                *(query, start, follow, end, against, keys, coverage.begun, coverage.lacking),
                *(lm_scores, _LM_LOGIT, _SPREAD),
            )
            if step.fits() and not is_differentiated(step[:9]):
                return Pointed(hidden, *cpu_backend().pointed(step))
        scores = row_products(query, keys) / math.sqrt(keys.shape[-1])
        first = torch.arange(keys.shape[1], device=keys.device) == 0
        scores = scores + start * first + _SPREAD * follow * coverage.begun
        if against is not None and lm_scores is not None:
            scores = scores + against * ((lm_scores.to(hidden.dtype) - _LM_LOGIT) / _SPREAD)
        return Pointed(hidden, scores, (_SPREAD * end * coverage.lacking)[:, :, 0])


class _Stretches(NamedTuple):
    """Lengths of stretches that end with tokens of the condition, int64.

    Attributes:
        runs: (B, T, K) of the one that the text ends with at each position.
        longest: (B, T, K) of the longest so far.
        kept: (B, K, 2) as in ``Coverage.stretches``.
    """

    runs: Tensor
    longest: Tensor
    kept: Tensor


def _of_one(equal: Tensor, text: Tensor, past: Tensor) -> _Stretches:
    """Stretches after one more token: one that ended with the token before grows, all others end.

    Args:
        equal: (B, 1, K) bool, whether both are one token.
        text: (B, 1, 1) bool, whether it is no padding.
        past: (B, K, 2) as in ``Coverage.stretches``.
    """
    most, last = past.unbind(2)
    grown = nn.functional.pad(last + 1, (1, 0), value=1)[:, :-1]
    runs = equal[:, 0] * grown
    longest = torch.maximum(most, runs)
    kept = torch.stack([longest, torch.where(text[:, 0], runs, last)], 2)
    return _Stretches(runs[:, None], longest[:, None], kept)


def _of_many(equal: Tensor, text: Tensor, past: Tensor) -> _Stretches:
    """Stretches after T more tokens; as ``_of_one``, with T for 1."""
    runs = _stretch_lengths(equal, past[:, :, 1])
    longest = torch.cat([past[:, None, :, 0], runs], 1).cummax(1).values[:, 1:]
    kept = torch.stack([longest[:, -1], _last(runs, text, past[:, :, 1])], 2)
    return _Stretches(runs, longest, kept)


def _stretch_lengths(equal: Tensor, past: Tensor) -> Tensor:
    """(B, T, K) int64 length of the stretch that ends at position t of the text and token j of the condition.

    Args:
        equal: (B, T, K) bool, whether both are one token.
        past: (B, K) the lengths before position 0.
    """
    runs = torch.zeros_like(equal, dtype=past.dtype)
    longer = equal
    for length in range(1, equal.shape[2] + 1):
        runs = runs + longer
        before = torch.cat([(past >= length)[:, None], longer[:, :-1]], 1)
        longer = equal & nn.functional.pad(before, (1, 0))[:, :, :-1]
    return runs


def _last(runs: Tensor, text: Tensor, past: Tensor) -> Tensor:
    """(B, K) runs at the last position that text (B, T, 1) marks, past (B, K) where it marks none."""
    T = runs.shape[1]
    place = (torch.arange(T, device=runs.device)[:, None] * text).amax(1, keepdim=True)
    last = runs.take_along_dim(place, 1)[:, 0]
    return torch.where(text.any(1), last, past)
