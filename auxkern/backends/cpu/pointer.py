"""What of a condition stands in a text, after one more token, as one call of the native library."""

from __future__ import annotations

from ctypes import byref

import torch

from auxkern.backends.cpu.abi import CCoverage, Native, address, float32
from auxkern.core.coverage import Coverage, CoverageStep


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
