"""Rows of logits on a CPU."""

from __future__ import annotations

from ctypes import Array, c_void_p

import torch
from torch import Tensor

from auxkern.backends.chunked import RowKernels
from auxkern.backends.cpu.abi import CGradient, Native, c_terms
from auxkern.core.loss import Coefficients, Loss, RowLosses, RowSlopes
from auxkern.core.sums import Sum, Wanted


class LogitRows(Native, RowKernels):
    """Losses and gradients of logits that exist."""

    fuses = True

    def logits_losses(
        self, sum: Sum, target: Tensor, loss: Loss, weight: Tensor | None, wanted: Wanted
    ) -> RowLosses:
        rows, request = RowLosses.empty(target, torch.float32, len(sum.terms), loss), None
        if weight is not None:
            # Bound to a name: a temporary would be freed before the kernel reads it.
            weight = weight.contiguous()
            request = CGradient(weight.data_ptr(), loss.label_smoothing, loss.z_loss, _pointers(wanted))
        self.library.auxkern_cross_entropy_forward(
            c_terms(sum.logits),
            len(sum.terms),
            target.data_ptr(),
            target.shape[0],
            sum.V,
            loss.ignore_index,
            *[t.data_ptr() if t.numel() else None for t in rows[:-1]],
            request,
            self.execution(),
        )
        return rows.summed()

    def logits_gradients(self, sum: Sum, target: Tensor, slopes: RowSlopes, wanted: Wanted) -> None:
        rows = Coefficients(*[c.contiguous() for c in slopes.coefficients(sum.dtype)])
        self.library.auxkern_cross_entropy_backward(
            c_terms(sum.logits),
            len(sum.terms),
            target.data_ptr(),
            target.shape[0],
            sum.V,
            *[c.data_ptr() for c in rows],
            _pointers(wanted),
            self.execution(),
        )


def _pointers(wanted: Wanted) -> Array[c_void_p]:
    """A pointer for every term; null where no gradient is wanted."""
    pointers = (c_void_p * len(wanted))()
    for i, gradient in enumerate(wanted):
        if gradient:
            pointers[i] = gradient["values"].data_ptr()
    return pointers
