"""Plausible tokens and averaged probabilities, against their formulas written as loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Logits, SamplingParams, Sparse
from tests.support.cases import available_backends, device_of, generator, random_logits

backends = pytest.mark.parametrize("backend", available_backends())


def sums(V: int = 53, N: int = 5) -> tuple[list[Any], list[Any]]:
    """Terms of an expert (a head and a pointer) and of an amateur."""
    g = generator(0)
    head = Head(torch.randn(N, 9, generator=g), torch.randn(V, 9, generator=g))
    pointer = Sparse(torch.randint(V, (N, 3), generator=g), torch.randn(N, 3, generator=g))
    return [head, pointer], [Logits(random_logits(N, V + 4, seed=3), scale=0.5)]


def probabilities(terms: list[Any], V: int) -> Tensor:
    return auxkern.ops.dense.dense_logits(terms, vocab_size=V).double().softmax(-1)


# --- plausible --------------------------------------------------------------------------------


def kept(judge: list[Any], alpha: list[float], V: int) -> list[set[int]]:
    """By the definition, row by row; no id of these inputs lies at its row's bound."""
    p = probabilities(judge, V).tolist()
    return [{v for v in range(V) if row[v] >= a * max(row)} for row, a in zip(p, alpha, strict=True)]


@pytest.mark.parametrize("alpha", [0.1, [0.0, 0.05, 0.3, 0.9, 1.0]])
def test_plausible_ids_are_those_of_the_definition(alpha):
    expert, amateur = sums()
    given = torch.tensor(alpha) if isinstance(alpha, list) else alpha
    terms = [*expert, Logits(amateur[0].values, scale=-0.5)]
    z = auxkern.plausible(terms, expert, given, vocab_size=53).values
    whole = auxkern.ops.dense.dense_logits(terms, vocab_size=53)
    wanted = kept(expert, alpha if isinstance(alpha, list) else [alpha] * 5, 53)
    for row, ids in enumerate(wanted):
        inside = torch.zeros(53, dtype=torch.bool)
        inside[list(ids)] = True
        assert torch.equal(z[row, inside], whole[row, inside])
        assert bool((z[row, ~inside] == -torch.inf).all())
    assert wanted[0] != wanted[3] or not isinstance(alpha, list)


@backends
def test_draws_of_contrast_are_plausible_and_the_same_everywhere(backend):
    device = device_of(backend)
    expert, amateur = sums(N=5)
    ids = kept(expert, [0.2] * 5, 53)
    contrast = [
        Head(2 * expert[0].hidden, expert[0].weight),
        Sparse(expert[1].ids, 2 * expert[1].values),
        Logits(amateur[0].values, scale=-0.5),
    ]
    z = auxkern.plausible(contrast, expert, 0.2, vocab_size=53)
    for seed in range(40):
        seeds = torch.arange(5) + 5 * seed
        want = auxkern.sample([z], seed=seeds, position=seed, backend="reference")
        got = auxkern.sample(
            [Logits(z.values.to(device))],
            SamplingParams(),
            seed=seeds.to(device),
            position=seed,
            return_logprobs=True,
            backend=backend,
        )
        assert torch.equal(got.tokens.cpu(), want.tokens)
        assert all(token in ids[row] for row, token in enumerate(got.tokens.tolist()))
        assert bool(got.logprob.isfinite().all())


def test_a_judge_that_knows_nothing_keeps_all_and_a_bad_row_stays_bad():
    z = random_logits(3, 7)
    z[1, 2] = torch.nan
    judge = random_logits(3, 7, seed=1)
    judge[2] = -torch.inf
    made = auxkern.plausible([z], [judge], 0.5).values
    assert bool(made[1].isnan().any())
    assert torch.equal(made[2], z[2])
    judge[0, 3] = torch.nan
    assert torch.equal(auxkern.plausible([z], [judge], 0.5).values[0], z[0])


def test_equal_logits_are_kept_together_although_rounding_differs():
    judge = torch.zeros(1, 6)
    judge[0, 1] = 1e-7  # what another order of additions may make of 0
    assert bool(auxkern.plausible([torch.ones(1, 6)], [judge], 1.0).values.isfinite().all())


@pytest.mark.parametrize(
    ("alpha", "error", "words"),
    [
        (-0.1, ValueError, "at least 0"),
        (1.5, ValueError, "at most 1"),
        (math.nan, ValueError, "nan"),
        (True, TypeError, "bool"),
        ("0.1", TypeError, "str"),
        (torch.ones(3), ValueError, r"\(3,\).*\(5,\)"),
        (torch.full((5,), 2.0), ValueError, "2.0"),
    ],
)
def test_a_bad_alpha_is_told(alpha, error, words):
    expert, _ = sums()
    with pytest.raises(error, match=words):
        auxkern.plausible(expert, expert, alpha)


def test_a_judge_of_other_rows_is_told():
    with pytest.raises(ValueError, match=r"judge has rows \(2,\).*\(3,\)"):
        auxkern.plausible([random_logits(3, 7)], [random_logits(2, 7)], 0.5)


# --- averaged probabilities -------------------------------------------------------------------


def averaged(groups: list[list[Any]], weights: list[list[float]], V: int) -> Tensor:
    """(N, V) float64: the weighted mean of probabilities; ``weights[i][n]`` of member i in row n."""
    each = [probabilities(group, V) for group in groups]
    rows = []
    for n in range(each[0].shape[0]):
        shares = [w[n] for w in weights]
        rows.append(sum(s * p[n] for s, p in zip(shares, each, strict=True)) / sum(shares))
    return torch.stack(rows)


@pytest.mark.parametrize("by_row", [False, True])
def test_probabilities_are_averaged(by_row):
    groups = [*sums(), [random_logits(5, 60, seed=9) * 30]]
    numbers = [[0.2] * 5, [0.5] * 5, [0.3] * 5]
    if by_row:
        numbers = [[0.0, 1.0, 2.0, 0.5, 1e-6], [1.0, 0.0, 2.0, 0.25, 1.0], [3.0, 1.0, 0.0, 0.25, 1e-6]]
    weights = [torch.tensor(one) if by_row else one[0] for one in numbers]
    z = auxkern.mixed_probabilities(groups, weights, vocab_size=53).values
    want = averaged(groups, numbers, 53)
    # Of a sum of float32 exponentials near 1, a few units.
    torch.testing.assert_close(z.double().exp(), want, rtol=5e-6, atol=1e-12)
    torch.testing.assert_close(z.exp().sum(-1), torch.ones(5), rtol=1e-5, atol=0)


@backends
def test_log_probabilities_of_a_draw_are_the_mixtures(backend):
    device = device_of(backend)
    groups = list(sums())
    z = auxkern.mixed_probabilities(groups, [0.25, 0.75], vocab_size=53)
    drawn = auxkern.sample(
        [Logits(z.values.to(device))],
        seed=torch.arange(5, device=device),
        position=0,
        return_logprobs=True,
        backend=backend,
    )
    want = averaged(groups, [[0.25] * 5, [0.75] * 5], 53).log().gather(1, drawn.tokens.cpu()[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprob.cpu().double(), want, rtol=1e-5, atol=1e-5)


def test_the_loss_of_a_mixture_and_its_gradients_are_those_of_the_formula():
    logits = [random_logits(4, 11, seed=i).double().requires_grad_() for i in range(2)]
    share = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, 0, 10, 4])
    shares = [share.expand(4), (1 - share).expand(4)]
    loss = auxkern.cross_entropy(
        [auxkern.mixed_probabilities([[z] for z in logits], shares)], target, backend="reference"
    )
    plain = -torch.log(
        sum(w * z.softmax(-1).gather(1, target[:, None])[:, 0] for w, z in zip(shares, logits, strict=True))
    ).mean()
    torch.testing.assert_close(loss, plain)
    for got, want in zip(
        torch.autograd.grad(loss, [*logits, share]), torch.autograd.grad(plain, [*logits, share]), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_a_member_without_weight_is_not_heard():
    good, bad = random_logits(3, 9), torch.full((3, 9), torch.nan)
    z = auxkern.mixed_probabilities([[good], [bad]], [1.0, 0.0]).values
    torch.testing.assert_close(z, good.log_softmax(-1))
    rows = torch.tensor([0.0, 1.0, 0.0])
    z = auxkern.mixed_probabilities([[good], [bad]], [torch.ones(3), rows]).values
    assert z.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        ([1.0], ValueError, "2 groups and 1 weights"),
        ([1.0, -0.5], ValueError, r"weights\[1\] holds -0.5"),
        ([math.inf, 1.0], ValueError, "finite"),
        ([0.0, 0.0], ValueError, "all 0"),
        ([torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0])], ValueError, "all 0"),
        (["1", 1.0], TypeError, "str"),
    ],
)
def test_bad_weights_are_told(weights, error, words):
    with pytest.raises(error, match=words):
        auxkern.mixed_probabilities([[random_logits(3, 9)], [random_logits(3, 9)]], weights)


def test_groups_of_other_rows_or_vocabularies_are_told():
    with pytest.raises(ValueError, match="groups have rows"):
        auxkern.mixed_probabilities([[random_logits(3, 9)], [random_logits(2, 9)]], [1, 1])
    with pytest.raises(ValueError, match="vocab_size"):
        auxkern.mixed_probabilities([[random_logits(3, 9)], [random_logits(3, 8)]], [1, 1])
    with pytest.raises(ValueError, match="0 groups"):
        auxkern.mixed_probabilities([], [])
