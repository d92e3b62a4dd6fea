"""``SamplingParams``: what it refuses, what it takes from Hugging Face, and equal sets of kept tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import available_backends, device_of, generator
from hypothesis import given
from hypothesis import strategies as st

import auxkern
from auxkern import Head, SamplingParams, Sparse
from auxkern.ops import registry

transformers = pytest.importorskip("transformers")

backends = pytest.mark.parametrize(
    "backend", [p for p in available_backends() if hasattr(registry.load(p.values[0]), "sample")]
)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"temperature": -1.0}, ValueError, r"temperature is -1.0.*\[0.0, inf\)"),
        ({"temperature": math.nan}, ValueError, "temperature is nan"),
        ({"temperature": "1"}, TypeError, "temperature must be a number or a tensor.*str"),
        ({"temperature": True}, TypeError, "temperature must be a number.*bool"),
        ({"top_k": -1}, ValueError, "top_k is -1"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int"),
        ({"top_p": 0.0}, ValueError, r"top_p is 0.0.*\(0.0, 1.0\]"),
        ({"top_p": 1.1}, ValueError, "top_p is 1.1"),
        ({"min_p": 1.5}, ValueError, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty is 0.0"),
        ({"presence_penalty": math.inf}, ValueError, "presence_penalty is inf"),
        ({"logit_bias": [1]}, TypeError, "logit_bias must be a dict.*list"),
        ({"logit_bias": {-1: 1.0}}, ValueError, "logit_bias has the key -1"),
        ({"logit_bias": {1: math.inf}}, ValueError, r"logit_bias\[1\] is inf"),
        ({"temperature": 0, "top_k": 5}, ValueError, "temperature is 0.*drop top_k"),
        ({"temperature": 0.0, "top_p": 0.5}, ValueError, "temperature is 0.*drop top_p"),
        ({"top_p": torch.tensor([0.5, 1.5])}, ValueError, "top_p holds 1.5"),
        ({"top_k": torch.ones(3)}, TypeError, "top_k has dtype torch.float32; it must be integers"),
        ({"top_p": torch.ones(3), "min_p": torch.zeros(2)}, ValueError, "3 entries but min_p has 2"),
        ({"top_p": torch.ones(2, 2)}, ValueError, r"top_p has shape \(2, 2\)"),
    ],
)
def test_refusals(settings, error, words):
    with pytest.raises(error, match=words):
        SamplingParams(**settings)


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=1)


Z = torch.zeros(3, 9)
CALL: dict[str, Any] = {"seed": torch.arange(3), "position": 0}


@pytest.mark.parametrize(
    ("terms", "options", "error", "words"),
    [
        ([Z], {"seed": 5}, ValueError, r"seed is the int 5 but there are 3 rows.*torch.arange\(3\)"),
        ([Z], {"seed": torch.arange(2)}, ValueError, "seed has 2 entries but there are 3 rows"),
        ([Z], {"seed": torch.ones(3)}, TypeError, "seed has dtype torch.float32"),
        ([Z], {"seed": 1.5}, TypeError, "seed must be an int"),
        ([Z], {"position": None}, TypeError, "position must be an int"),
        ([Z], {"position": 2**70}, ValueError, "position is .* must fit 64 bits"),
        ([Z], {"history": torch.zeros(3)}, TypeError, "history must be an integer tensor"),
        ([Z], {"history": torch.zeros(2, 4).long()}, ValueError, r"history has shape \(2, 4\)"),
        ([Z], {"prompt": [1]}, TypeError, "prompt must be an integer tensor"),
        ([Z], {"params": {"top_k": 3}}, TypeError, "params must be auxkern.SamplingParams.*dict"),
        ([Z], {"params": SamplingParams(top_k=torch.ones(2).long())}, ValueError, "top_k has 2 entries"),
        ([Z], {"params": SamplingParams(logit_bias={9: 1.0})}, ValueError, r"id 9, outside \[0, 9\)"),
        ([Z], {"top_logprobs": 10}, ValueError, "top_logprobs is 10.*V = 9"),
        ([Z], {"backend": "cuda"}, ValueError, "backend is 'cuda'; choose one of"),
        ([Z, torch.zeros(2, 9)], {}, ValueError, r"terms\[1\] has rows \(2,\) but terms\[0\] has \(3,\)"),
        ([Z, torch.zeros(3, 8)], {}, ValueError, "8 ids.*vocab_size=8"),
        ([Z, Sparse(torch.full((3, 1), 9), torch.zeros(3, 1))], {}, ValueError, "Sparse.ids holds 9"),
        ([Head(torch.zeros(3, 4), torch.zeros(9, 4))], {"vocab_size": 10}, ValueError, "vocab_size is 10"),
    ],
)
def test_refusals_of_a_call(terms, options, error, words):
    with pytest.raises(error, match=words):
        auxkern.sample(terms, **{**CALL, **options})


def test_reads_a_generation_config():
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.2,
        sequence_bias={(5,): -2.0},
    )
    made = SamplingParams.from_generation_config(config)
    assert (made.temperature, made.top_k, made.top_p, made.min_p) == (0.7, 40, 0.9, 0.05)
    assert made.repetition_penalty == 1.2
    assert made.logit_bias == {5: -2.0}
    assert SamplingParams.from_generation_config(transformers.GenerationConfig()).temperature == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3]]},
        {"do_sample": True, "typical_p": 0.5},
        {"do_sample": True, "eta_cutoff": 0.1},
        {"sequence_bias": {(5, 6): 1.0}},
        {"suppress_tokens": [1]},
        {"min_new_tokens": 3},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_refuses_a_generation_config_that_it_cannot_honour(settings):
    with pytest.raises(ValueError, match=f"generation_config.{next(reversed(settings))}"):
        SamplingParams.from_generation_config(transformers.GenerationConfig(**settings))


@backends
@given(data=st.data())
def test_keeps_what_hugging_faces_warpers_keep(backend, data):
    V = data.draw(st.integers(2, 80))
    temperature = data.draw(st.sampled_from([0.3, 1.0, 2.5]))
    top_k = data.draw(st.integers(0, V + 3))
    top_p = data.draw(st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]))
    min_p = data.draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    # Sixteenths, so that top-k meets ties; distinct where a nucleus would cut ties, which torch.sort
    # orders as it likes.
    g = generator(data.draw(st.integers(0, 2**20)))
    if top_p < 1:
        row = torch.randperm(V, generator=g).float() / 16
    else:
        row = (32 * torch.randn(V, generator=g)).round() / 16
    scores = row[None] / temperature
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = transformers.MinPLogitsWarper(min_p)(None, scores)
    allowed = scores[0] > -torch.inf
    params = SamplingParams(temperature, top_k, top_p, min_p)
    # The log-probability of a token among what is kept says how large the kept mass is.
    many = auxkern.sample(
        row.expand(200, V).to(device_of(backend)),
        params,
        seed=torch.arange(200, device=device_of(backend)),
        position=0,
        return_logprobs=True,
        backend=backend,
    )
    tokens, logprobs = many.tokens.cpu(), many.processed_logprob.cpu().double()
    assert allowed[tokens].all()
    wanted = torch.where(allowed, row.double() / temperature, -torch.inf).log_softmax(0)[tokens]
    torch.testing.assert_close(logprobs, wanted, rtol=0, atol=1e-5)
