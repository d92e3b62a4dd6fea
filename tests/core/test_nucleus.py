"""Where a nucleus ends when the mass equals p: one rule, whatever the order of sums, backend and type."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import SamplingParams
from auxkern.core.mass import COEFFICIENTS, SLACK, mass_shift, masses
from tests.support.cases import available_backends, device_of
from tests.support.nuclei import kept_count, rows, with_edges

backends = pytest.mark.parametrize("backend", available_backends())


def kept(row: Tensor, params: SamplingParams, backend: str, draws: int = 600) -> set[int]:
    """Ids that are drawn; of a row in which every one that is kept is likely."""
    z = row.expand(draws, -1).to(device_of(backend))
    seed = torch.arange(draws, device=z.device)
    return set(auxkern.sample(z, params, seed=seed, position=0, backend=backend).tokens.tolist())


@backends
@pytest.mark.parametrize("temperature", [1.0, 0.3, 7.0])
@pytest.mark.parametrize("offset", [0.0, -1234.5])
@pytest.mark.parametrize("V", [1, 2, 5, 131, 1000])
def test_a_share_of_k_of_equal_ids_keeps_k(backend, V, offset, temperature):
    k = torch.arange(1, V + 1)
    params = SamplingParams(temperature, top_p=(k.double() / V).to(device_of(backend)))
    found = kept_count(torch.full((V, V), offset, device=device_of(backend)), params, backend)
    assert torch.equal(found, k)


@backends
@pytest.mark.parametrize("V", [50257, 262144])
def test_a_share_of_k_of_many_equal_ids_keeps_k(backend, V):
    k = torch.tensor([1, 2, 3, 1000, V // 3, V - 1])
    params = SamplingParams(top_p=(k.double() / V).to(device_of(backend)))
    found = kept_count(torch.zeros(len(k), V, device=device_of(backend)), params, backend)
    # float32 knows the log-probability of one in 262,144 to about 1e-6 of it.
    assert ((found - k).abs() <= (k * 2e-6).long()).all()


@backends
@pytest.mark.parametrize("p", [0.4, torch.tensor([0.4]), torch.tensor([0.4], dtype=torch.float64)], ids=str)
def test_two_of_five_reach_two_fifths_in_every_type(backend, p):
    p = p.expand(600).to(device_of(backend)) if isinstance(p, Tensor) else p
    assert kept(torch.zeros(5), SamplingParams(top_p=p), backend) == {0, 1}


@backends
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_whole_numbers_for_shares(backend, dtype):
    ones, zeros = (f(600, dtype=dtype, device=device_of(backend)) for f in (torch.ones, torch.zeros))
    row = torch.tensor([0.0, 0.5, 0.0])
    assert kept(row, SamplingParams(top_p=ones, min_p=zeros), backend) == {0, 1, 2}
    assert kept(row, SamplingParams(top_p=zeros), backend) == {1}
    assert kept(row, SamplingParams(min_p=ones), backend) == {1}


@backends
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("offset", [0.0, -20.0, 25.0])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 0, 1], [1, 3, 0, 2]])
def test_a_sum_of_probabilities_that_is_p_on_paper_reaches_it(backend, order, offset, temperature):
    p = torch.tensor([0.3, 0.1, 0.1, 0.5], dtype=torch.float64)  # Hugging Face's own test of top-p
    z = (temperature * p.log() + offset).float()[order]
    likely = {order.index(0), order.index(3)}
    assert kept(z, SamplingParams(temperature, top_p=0.8), backend) == likely
    assert kept(z, SamplingParams(temperature, top_p=0.5), backend) == {order.index(3)}
    assert len(kept(z, SamplingParams(temperature, top_p=0.9), backend)) == 3
    assert len(kept(z, SamplingParams(temperature, top_p=0.9001), backend)) == 4


@backends
def test_no_share_keeps_the_most_likely_id(backend):
    z = torch.tensor([0.0, 2, 1, 2])
    for p in (0, 0.0, -0.0, 1e-300, SLACK, torch.zeros(600, device=device_of(backend))):
        assert kept(z, SamplingParams(top_p=p), backend) == {1}


@backends
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 1 / 7])
def test_min_p_keeps_an_id_that_has_just_that_share_of_the_largest(backend, ratio, temperature):
    p = torch.tensor([0.5 * ratio, 0.5, 0.5 * ratio * (1 - 1e-5)], dtype=torch.float64)
    z = (temperature * p.log()).float()
    for given in (ratio, torch.full((600,), ratio, device=device_of(backend))):
        assert kept(z, SamplingParams(temperature, min_p=given), backend, 600) == {0, 1}


@backends
@pytest.mark.parametrize("temperature", [1.0, 0.37])
@pytest.mark.parametrize("V", [7, 60])
def test_every_backend_keeps_the_references_ids(backend, V, temperature):
    z, p = with_edges(rows(V), temperature, 24)
    N = len(z)
    made, wanted = (
        auxkern.sample(
            z.to(device),
            SamplingParams(temperature, top_p=p.to(device)),
            seed=torch.arange(N, device=device),
            position=0,
            return_logprobs=True,
            backend=name,
        )
        for name, device in ((backend, device_of(backend)), ("reference", "cpu"))
    )
    assert torch.equal(made.tokens.cpu(), wanted.tokens)
    torch.testing.assert_close(made.processed_logprob.cpu(), wanted.processed_logprob, rtol=0, atol=2e-6)


def test_masses_are_exponentials():
    d = torch.cat([torch.zeros(1), -torch.rand(20000) * 20])
    one = 2.0 ** (31 + mass_shift(131))
    error = masses(d, 131).double() / one / d.double().exp() - 1
    assert masses(d, 131)[0] == one
    # The polynomial, 22 bits of a logarithm cut off, and a product rounded to float32 (20 log2(e) * 2**-24).
    assert error.abs().max() < 1e-7 + math.log(2) * 2**-22 + 29 * 2**-24
    assert masses(torch.tensor([-44.0, -1e30, -math.inf]), 131).tolist() == [0, 0, 0]


@pytest.mark.parametrize("V", [1, 3, 131, 50257, 262144, 2**20])
def test_no_sum_of_masses_overflows(V):
    assert V * int(masses(torch.zeros(1), V)) < 2**63
    # 2**t for t just below 1 is the largest factor, and is at most 2.
    assert sum(COEFFICIENTS) <= 2**31
