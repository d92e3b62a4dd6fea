"""The native sampling kernel at every instruction set that this CPU has: the reference's tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Logits, SamplingParams
from tests.support.cases import generator
from tests.support.instruction_sets import EACH, substituted
from tests.support.nuclei import rows, with_edges

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PARAMS = {
    "plain": {},
    "temperature": {"temperature": 0.3},
    "greedy": {"temperature": 0},
    "top-k": {"top_k": 11},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.05},
    "many": {"top_k": 1500, "top_p": 0.999},  # more than are handled one by one
    "all": {"temperature": 1.4, "top_k": 60, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
}


@pytest.fixture(params=EACH, autouse=True)
def kernels(request, monkeypatch):
    """Every instruction set in turn."""
    return substituted(request.param, monkeypatch)


def logits(N: int, V: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(N, V, generator=generator(seed))).to(dtype)


@pytest.mark.parametrize("V", [1, 15, 17, 64, 1023, 1025, 4097])
@pytest.mark.parametrize("settings", PARAMS.values(), ids=PARAMS)
def test_draws_the_references_tokens(settings, V):
    N = 25
    terms = [
        logits(N, V, 1),
        Logits(logits(N, V, 2, torch.float16), scale=torch.linspace(0, 1, N)),
        Logits(logits(N, V, 3, torch.bfloat16), scale=0.5, softcap=2.0),
    ]
    history = torch.randint(-1, V, (N, 8), generator=generator(4))
    made, wanted = (
        auxkern.sample(
            terms,
            SamplingParams(**settings),
            seed=torch.arange(N) * 2**35 - 9,
            position=torch.arange(N) * 2**31,
            history=history,
            prompt=history[:, :3],
            return_logprobs=True,
            backend=backend,
        )
        for backend in ("cpu", "reference")
    )
    assert torch.equal(made.tokens, wanted.tokens)
    torch.testing.assert_close(made.processed_logprob, wanted.processed_logprob, rtol=0, atol=2e-5)


def test_equal_logits_are_cut_by_id():
    z = torch.zeros(300, 700)
    z[:, 50] = 1
    for params, allowed in ((SamplingParams(top_p=0.5), 351), (SamplingParams(top_k=1), 51)):
        found = auxkern.sample(z, params, seed=torch.arange(300), position=0, backend="cpu").tokens
        assert (found < allowed).all()
        assert params.top_k == 1 or found.max() > 300


@pytest.mark.parametrize("temperature", [1.0, 0.37])
@pytest.mark.parametrize("V", [7, 60])
def test_a_nucleus_ends_where_the_references_does(V, temperature):
    z, p = with_edges(rows(V), temperature, 24)
    made, wanted = (
        auxkern.sample(
            z,
            SamplingParams(temperature, top_p=p),
            seed=torch.arange(len(z)),
            position=0,
            return_logprobs=True,
            backend=backend,
        )
        for backend in ("cpu", "reference")
    )
    assert torch.equal(made.tokens, wanted.tokens)
    torch.testing.assert_close(made.processed_logprob, wanted.processed_logprob, rtol=0, atol=2e-6)
