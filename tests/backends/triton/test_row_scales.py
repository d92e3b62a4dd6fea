"""Heads whose scale is one number for each row, in the kernels that make tiles, interpreted and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from auxkern import Head, SamplingParams
from auxkern.core.loss import Loss
from auxkern.core.sums import Sum
from auxkern.core.terms import like
from tests.support.draws import assert_equal, seeds
from tests.support.heads import D32 as F
from tests.support.heads import B, H, check_rows, heads, targets
from tests.support.machines import INTERPRETED

pytest.importorskip("triton")

from auxkern.backends.triton.heads import heads_sum
from auxkern.backends.triton.heads_loss import launches as heads_loss

pytestmark = [
    pytest.mark.usefixtures("machine", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

HALF = H if INTERPRETED else B  # the interpreter multiplies the bits of bfloat16 matrices
N, V = 9, 131
SCALES = torch.tensor([1.0, 0.0, -1.5, 0.3, 40.0, 1e-6, 2.0, 0.0, 0.7])
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-3}

SUMS: dict[str, dict[str, Any]] = {
    "alone": {"dtypes": (F,)},
    "16 bits, before another scale": {"dtypes": (HALF, F), "scales": (None, 0.5)},
    "behind a number": {"dtypes": (F, HALF), "scales": (1.0, None)},
    "two of them": {"dtypes": (HALF, F, F), "scales": (None, None, -2.0), "biases": (1, 1, 0)},
    "before a scale that is too small to share": {"dtypes": (F, F), "scales": (None, 1e-9)},
    "capped": {"dtypes": (HALF, F), "softcaps": (3.0, None), "scales": (None, None)},
}


def scaled(settings: dict[str, Any]) -> list[Head]:
    """Heads with those scales; ``SCALES`` in place of None."""
    settings = dict(settings)
    scales = settings.pop("scales", (None,))
    given = heads(N, V, (48, 16, 32)[: len(settings["dtypes"])], **settings)
    own = SCALES[torch.arange(N)]
    return [like(h, scale=own if s is None else s) for h, s in zip(given, scales, strict=True)]


@pytest.mark.parametrize("options", [{}, EVERYTHING, {**EVERYTHING, "stats": True}], ids=["", "all", "stats"])
@pytest.mark.parametrize("name", SUMS)
def test_losses_and_gradients(machine, name, options):
    given = scaled(SUMS[name])
    assert machine.backend.heads_refusal(Sum.of(given, V)) is None
    check_rows(machine.backend, Sum.of(given, V, 4), targets(N, V), Loss(**options), torch.linspace(-1, 2, N))


@pytest.mark.parametrize("recompute", [False, True])
def test_both_schemes_in_16_bits(machine, recompute, monkeypatch):
    """A row's scale may be so large that a product of it and a hidden state is beyond float16."""
    monkeypatch.setattr(heads_loss, "one_write", lambda *_: not recompute)
    head = heads(N, V, (48,), (HALF,))[0]
    given = [like(head, weight=head.weight * 1e-5, scale=torch.where(torch.arange(N) == 3, 1e6, SCALES))]
    check_rows(machine.backend, Sum.of(given, V, 4), targets(N, V), Loss(), torch.ones(N))


def test_a_row_of_scale_zero_takes_part_without_a_division(machine):
    given = [
        like(h, scale=s) for h, s in zip(heads(3, V, (16, 16), (F, F)), (torch.zeros(3), 0.5), strict=True)
    ]
    both, second = (
        machine.backend.losses(Sum.of(terms, V), targets(3, V), Loss(), None, ())
        for terms in (given, given[1:])
    )
    assert torch.equal(both.nll, second.nll)


def test_groups_begin_at_rows_scales():
    given = scaled({"dtypes": (F, F, F), "scales": (2.0, None, None)})
    summed = heads_sum(given, V, False)
    assert summed.group_of == [1, 0, 1]
    assert [g.softcap for g in summed.groups] == [0.0, 0.0]
    assert summed.groups[1].scale == 2.0


@pytest.mark.parametrize("rows", [3, 20])
def test_draws(machine, rows):
    given = heads(rows, 290, (24, 17), (F, F), softcaps=(3.0, None), biases=(0, 1))
    own = torch.linspace(-1, 3, rows)
    assert_equal([like(h, scale=own) for h in given], SamplingParams(), seed=seeds(rows))
