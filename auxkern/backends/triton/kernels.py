"""Every kernel that the backend launches, each with launches that stand for the rest.

This is the one place where kernels register: what compiles, inspects or tests them ahead of time
walks ``KERNELS``.
"""

from __future__ import annotations

from auxkern.backends.triton.entries import cases as entries
from auxkern.backends.triton.filters import cases as filters
from auxkern.backends.triton.heads_draw import cases as heads_draw
from auxkern.backends.triton.heads_loss import cases as heads_loss
from auxkern.backends.triton.logits_draw import cases as logits_draw
from auxkern.backends.triton.logits_loss import cases as logits_loss

KERNELS = (
    *logits_loss.KERNELS,
    *heads_loss.KERNELS,
    *entries.KERNELS,
    *logits_draw.KERNELS,
    *heads_draw.KERNELS,
    *filters.KERNELS,
)
