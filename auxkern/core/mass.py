"""Probability mass in fixed point: sums of integers are the same in every order, tile and split.

Which ids top-p keeps hangs on comparing sums. In floating point they depend on who adds what first, so that
two backends, or two ways of one, would keep different sets where a sum lies at p. Here exp(d) is an integer
that every backend makes bit by bit alike: one product and one conversion in floating point, the rest
in integers. ``kernels/cpu/mass.h`` and ``backends/triton/device/mass.py`` do the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

FRACTION_BITS = 22  # of log2 exp(d): with fewer, p = k/V of a large flat vocabulary could not be told apart
# float32's log2(e): the product with a float32 is rounded once, and has no sum that could be fused with it.
OCTAVES = float(torch.tensor(1.4426950408889634, dtype=torch.float32)) * 2**FRACTION_BITS
MOST_OCTAVES = 63 * 2**FRACTION_BITS  # from there on the mass is 0
# 2**t = 1 + t (c1 + t (c2 + ...)) on [0, 1), fitted for the least relative error, 9e-8; times 2**31.
COEFFICIENTS = (1488531108, 515749229, 119829402, 19363924, 4009632)

# Taken from p, so that a sum which is p on paper reaches it. Float32 rounds a logit of up to 32
# temperatures by 2**-20 at most; masses are right to 2.5e-7; a share s of the row moves by at most
# 2 s (1 - s) <= 1/2 of such errors: 6e-7. Not more, so that p = k/V keeps k of V equal logits as long as
# 1/V is larger.
SLACK = 2.0**-20


def mass_shift(V: int) -> int:
    """Bits by which masses are shifted left: as large as they may be for the sum of V to stay below 2**63."""
    return 31 - V.bit_length()


def masses(d: Tensor, V: int) -> Tensor:
    """int64 exp(d) * 2**(31 + mass_shift(V)), to 2.5e-7 and cut off, of d <= 0 (float32 or float64)."""
    octaves = (-d * OCTAVES).clamp(0, MOST_OCTAVES).long()
    # 2**-octaves as a power of two and a factor in [1, 2).
    power, t = -octaves >> FRACTION_BITS, (-octaves & (2**FRACTION_BITS - 1)) << (32 - FRACTION_BITS)
    factor = torch.full_like(t, COEFFICIENTS[-1])
    for coefficient in (*COEFFICIENTS[-2::-1], 2**31):
        factor = coefficient + (factor * t >> 32)
    mass: Tensor = factor << mass_shift(V) >> -power
    return mass


def needed(top_p: Tensor, total: Tensor) -> Tensor:
    """int64 mass that reaches ``top_p`` (float64, less ``SLACK``) of ``total``; at least 1: one id stays."""
    return (top_p * total.double()).long().clamp(min=1)
