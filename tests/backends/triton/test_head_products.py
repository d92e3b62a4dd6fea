"""The products behind a gradient of logits, against float64, for every mixture of dtypes that they meet."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from auxkern.backends.triton.heads_loss import products
from auxkern.backends.triton.heads_loss.launches import gradient_dtype
from auxkern.core.sums import Sum
from tests.support.heads import D32 as F
from tests.support.heads import B, H, heads

C, V, D = 12, 8200, 24  # more ids than are converted at a time
# (dz, the other operand, what the result is rounded to)
MIXTURES = [
    (F, F, F), (F, B, F), (F, H, F), (F, B, B), (F, H, H), (F, F, B), (F, F, H), (F, B, H), (F, H, B),
    (B, B, B), (B, F, B), (B, H, B), (H, H, H),
]  # fmt: skip
# A result in float32 is held to torch's; another one to a rounding of each factor and of itself.
ROUNDING = {F: 2.0**-23, B: 3 * 2.0**-8, H: 3 * 2.0**-11}


@pytest.fixture
def dz() -> Tensor:
    """float32 (C, V): gradients of losses of unlikely and of sure targets."""
    source = torch.Generator().manual_seed(1)
    z = 3 * torch.randn(C, V, generator=source)
    z[::2, 7] = 30.0
    gradient = z.softmax(-1)
    gradient[:, 7] -= 1.0
    return gradient


def error(result: Tensor, exact: Tensor) -> float:
    """Largest, as a share of the largest entry."""
    return float((result.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: " ".join(str(d).rpartition(".")[2] for d in m))
def test_dz_times_a_weight(dz, mixture):
    own, operand, result = mixture
    raised = 2.0**12 if own == H else 1.0
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(2)).to(operand)
    made = products.times((raised * dz).to(own), weight, result) / raised
    assert made.dtype == F
    exact = dz.double() @ weight.double()
    torchs = error(dz @ weight.float(), exact) if result == F else 0.0
    assert error(made.to(result), exact) <= torchs + ROUNDING[result]


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: " ".join(str(d).rpartition(".")[2] for d in m))
@pytest.mark.parametrize("largest", [1.0, 3e4, 1e-6])
def test_dz_transposed_times_hidden_states(dz, mixture, largest):
    own, operand, result = mixture
    raised = 2.0**12 if own == H else 1.0
    source = torch.Generator().manual_seed(2)
    hidden = torch.randn(C, D, generator=source).to(operand)
    share = torch.rand(C, generator=source)
    if own == F:
        share *= largest
    share[3] = 0.0
    kept = hidden.double() * share.double()[:, None]
    hidden[3] = math.nan
    before = torch.randn(V, D, generator=source) * share.max()
    made = before.clone()
    products.add_transposed(made, (raised * dz).to(own), hidden, share, 0.5 / raised, result)
    exact = before.double() + 0.5 * dz.double().T @ kept
    torchs = error(before + 0.5 * dz.T @ kept.float(), exact) if result == F else 0.0
    assert error(made.to(result) if result != H else made, exact) <= torchs + ROUNDING[result]


def test_hidden_states_beyond_float16_are_not_cast_to_it(dz):
    hidden, share = torch.full((C, D), 1e6), torch.ones(C)
    made = torch.zeros(V, D)
    products.add_transposed(made, dz, hidden, share, 1.0, H)
    assert error(made, dz.double().T @ hidden.double()) < 2.0**-11


@pytest.mark.parametrize(
    ("dtypes", "names", "expected"),
    [
        ((B, B), ("hidden", "weight"), B),
        ((H, H), ("weight",), H),
        ((F, B), ("hidden", "weight"), F),
        ((F, B), ("weight",), B),
        ((B, F), ("hidden",), B),
        ((F, H), ("weight",), F),  # hidden states may not fit float16
        ((H, F), ("hidden",), F),
        ((B, H), ("hidden",), B),
    ],
)
def test_dz_is_as_exact_as_the_gradients_that_are_made_of_it(dtypes, names, expected):
    given = heads(3, 40, (16, 16), (dtypes, F))
    wanted = [dict.fromkeys(names, torch.empty(0)), {}]
    assert gradient_dtype(Sum.of(given, 40), wanted) == expected
    assert gradient_dtype(Sum.of(given, 40), [wanted[0], {"weight": torch.empty(0)}]) == F
