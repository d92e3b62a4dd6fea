"""What of a condition stands in a text, and what that adds to logits, each a native call for a token."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from auxkern.backends.cpu.abi import CCoverage, COfText, CPointer, Native, address, float32
from auxkern.core.coverage import Coverage, CoverageStep, PointerStep


class Stretches(Native):
    """The stretches that a text and its condition share."""

    def coverage(self, step: CoverageStep) -> Coverage:
        (B, K), (D,) = step.condition_ids.shape, step.weights[0].shape
        past = None if step.past is None else step.past.contiguous()
        share, lacking, written = float32(3, B, 1, 1).unbind(0)
        begun, marks = float32(B, 1, K), float32(B, 1, D)
        stretches = torch.empty((B, K, 2), dtype=torch.int64, device="cpu")
        call = CCoverage(
            B,
            K,
            D,
            step.ids.data_ptr(),
            step.ids.stride(0),
            step.mask.data_ptr(),
            step.mask.stride(0),
            step.condition_ids.data_ptr(),
            *step.condition_ids.stride(),
            step.condition_mask.data_ptr(),
            *step.condition_mask.stride(),
            address(past),
            *(weight.data_ptr() for weight in step.weights),
            share.data_ptr(),
            lacking.data_ptr(),
            written.data_ptr(),
            begun.data_ptr(),
            marks.data_ptr(),
            stretches.data_ptr(),
        )
        self.library.auxkern_coverage_step(byref(call))
        return Coverage(share, lacking, written, begun, marks, stretches)

    def pointed(self, step: PointerStep) -> tuple[Tensor, Tensor]:
        keys, lacking, begun = step.keys, step.lacking.contiguous(), step.begun.contiguous()
        (B, K, d), lm_scores = keys.shape, None
        against = COfText()
        if step.against is not None and step.lm_scores is not None:
            against, lm_scores = _of_text(step.against), step.lm_scores.contiguous()
        keys = keys if keys.stride(2) == 1 else keys.contiguous()
        scores, end = float32(B, 1, K), float32(B, 1)
        call = CPointer(
            B,
            K,
            d,
            *(_of_text(each) for each in (step.query, step.start, step.follow, step.closing)),
            against,
            keys.data_ptr(),
            *keys.stride()[:2],
            begun.data_ptr(),
            lacking.data_ptr(),
            address(lm_scores),
            step.lm_logit,
            step.spread,
            scores.data_ptr(),
            end.data_ptr(),
        )
        self.library.auxkern_pointer_step(byref(call))
        return scores, end


def _of_text(each: Tensor) -> COfText:
    """Of (B, 1, width), contiguous in the last dimension."""
    return COfText(each.data_ptr(), each.stride(0))
