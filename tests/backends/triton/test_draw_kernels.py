"""The kernels that draw tokens on small shapes: the reference's tokens, interpreted and compiled."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Logits, SamplingParams, Sparse
from auxkern.core import mass
from tests.support.draws import PARAMS, assert_equal, both, logits, seeds
from tests.support.machines import INTERPRETED
from tests.support.nuclei import kept_count, rows, with_edges

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from auxkern.backends.triton.device.mass import masses  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("machine", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("V", [1, 67, 2049] if INTERPRETED else [1, 67, 2048, 2049])
@pytest.mark.parametrize("settings", PARAMS.values(), ids=PARAMS)
def test_equals_the_reference(settings, V):
    terms = [logits(3, V), Logits(logits(3, V, 1, torch.float16), scale=0.5, softcap=4.0)]
    assert_equal(terms, SamplingParams(**settings), seed=seeds(3))


@pytest.mark.nan
def test_rows_with_their_own_parameters():
    N = 6
    params = SamplingParams(
        temperature=torch.tensor([0.0, 1, 0.5, 2, 1, 0]),
        top_k=torch.tensor([0, 3, 0, 5000, 1, 4]),
        top_p=torch.tensor([0.5, 1, 0.9, 0.7, 1, 1]),
        min_p=torch.tensor([0.0, 0, 0.2, 0, 0.9, 0.5]),
    )
    assert_equal(logits(N, 1100), params, seed=seeds(N))


def test_ties_of_top_k_and_of_a_nucleus():
    z = torch.zeros(16, 300)
    z[:, 7] = 1
    for params in (SamplingParams(top_p=0.4), SamplingParams(top_k=2), SamplingParams(top_k=1)):
        assert_equal(z, params, seed=seeds(16))
    greedy = auxkern.sample(
        z[:2] * 0, SamplingParams(temperature=0), seed=seeds(2), position=0, backend="triton"
    )
    assert greedy.tokens.tolist() == [0, 0]


@pytest.mark.parametrize(("V", "temperature"), [(60, 0.37)])
def test_a_nucleus_ends_where_the_references_does(V, temperature):
    z, p = with_edges(rows(V), temperature, 2)
    assert_equal(z, SamplingParams(temperature, top_p=p), seed=seeds(len(z)))


def test_a_share_of_k_of_equal_ids_keeps_k():
    k = torch.arange(3, 131, 32)
    found = kept_count(torch.full((len(k), 131), 7.5), SamplingParams(top_p=k.double() / 131), "triton")
    assert torch.equal(found, k)


@triton.jit
def _masses_kernel(d, out, shift, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, masses(tl.load(d + at), shift))


def test_masses_are_the_references_bit_by_bit(machine):
    d = torch.cat(
        [-40 * torch.rand(4000), torch.tensor([0.0, -0.0, -44, -1e30, -torch.inf]), torch.zeros(91)]
    )
    out = torch.empty(4096, dtype=torch.int64)
    machine.launch(_masses_kernel, {"d": d, "out": out, "shift": mass.mass_shift(50257)}, BLOCK=4096)
    assert torch.equal(out, mass.masses(d, 50257))


@pytest.mark.nan
def test_bad_rows():
    z = logits(5, 300)
    z[1, 7], z[2, 299], z[3] = torch.nan, torch.inf, -torch.inf
    for params in (None, SamplingParams(top_k=5, top_p=0.9), SamplingParams(temperature=0)):
        made, wanted = both(z, params, seed=seeds(5))
        assert made.status.tolist() == [0, 1, 3, 2, 0]
        assert torch.equal(made.tokens, wanted.tokens)


@pytest.mark.nan
def test_penalties_biases_and_sparse_terms():
    N, V = 4, 700
    g = torch.Generator().manual_seed(5)
    history = torch.randint(-1, V, (N, 30), generator=g)
    history[:, 4] = history[:, 9] = history[:, 11]
    ids = torch.randint(0, V, (N, 5), generator=g)
    ids[:, 1] = ids[:, 2]
    params = SamplingParams(
        repetition_penalty=1.4,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        logit_bias={3: 4.0, 5: -math.inf},
    )
    terms = [logits(N, V), Sparse(ids, torch.randn(N, 5, generator=g))]
    assert_equal(terms, params, seed=seeds(N), history=history, prompt=history[:, :7])


def test_heads_row_scales_and_strides():
    N, V = 4, 500
    g = torch.Generator().manual_seed(6)
    wide = logits(N, V + 13, 2, torch.float16)
    terms = [
        Logits(wide[:, 3 : V + 3], scale=torch.linspace(-1, 2, N)),
        Head(torch.randn(N, 8, generator=g), torch.randn(V, 8, generator=g)),
        Logits(logits(V, N, 3).T),
    ]
    assert_equal(terms, seed=seeds(N))


HEAD_SUMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": torch.float16},
    "soft cap": {"softcap": 3.0},
    "greedy": {"params": SamplingParams(temperature=0)},
    "filters": {"params": SamplingParams(top_k=7, top_p=0.9)},
    "sparse": {"sparse": True},
}


# Of one tile of 16 rows, of one of 64, and of two; a filter takes logits row by row, however they came.
@pytest.mark.parametrize(
    ("name", "rows"), [(n, rows) for n in HEAD_SUMS for rows in (3, 20, 70) if (n, rows) != ("filters", 70)]
)
def test_heads_alone(machine, name, rows, monkeypatch):
    V, options = 290, HEAD_SUMS[name]
    g = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(options.get("dtype", torch.float32))

    terms = [
        Head(random(rows, 24), random(V, 24)),
        Head(random(rows, 17), random(V, 17), random(V), scale=0.5, softcap=options.get("softcap")),
    ]
    if options.get("sparse"):
        terms.append(Sparse(torch.randint(0, V, (rows, 3), generator=g), random(rows, 3)))
    called = []
    heads_draw = machine.backend.heads_draw
    monkeypatch.setattr(type(machine.backend), "heads_draw", lambda _, *a: called.append(1) or heads_draw(*a))
    assert_equal(terms, options.get("params"), seed=seeds(rows))
    assert called == [1]


@pytest.mark.nan
def test_bad_rows_of_heads():
    heads = [Head(torch.randn(4, 8), torch.randn(200, 8))]
    heads[0].hidden[1] = torch.nan
    heads[0].hidden[2, 0] = torch.inf
    made, wanted = both(heads, seed=seeds(4))
    assert made.status[1] == 1
    assert (made.tokens[1:3] == -1).all()
    assert torch.equal(made.tokens[[0, 3]], wanted.tokens[[0, 3]])


def in_batches(z: Tensor, seed: Tensor, sizes: list[int]) -> None:
    """The same tokens in batches of every size and in another order."""
    N = len(z)
    params = {"temperature": torch.linspace(0, 2, N), "top_k": torch.arange(N) % 9}

    def draw(rows: Tensor) -> Tensor:
        chosen = SamplingParams(**{name: value[rows] for name, value in params.items()})
        return auxkern.sample(z[rows], chosen, seed=seed[rows], position=3, backend="triton").tokens

    together = draw(torch.arange(N))
    for size in sizes:
        assert torch.equal(torch.cat([draw(rows) for rows in torch.arange(N).split(size)]), together)
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(shuffled), together[shuffled])


def test_batches_change_nothing():
    in_batches(logits(16, 150), seeds(16), [1, 5])


@pytest.mark.slow
def test_a_thousand_requests_in_batches(machine):
    N = 64 if machine.compiled else 1000  # a launch takes as long executed as ten interpreted
    in_batches(logits(N, 150), seeds(N), [1, 16, 256])
