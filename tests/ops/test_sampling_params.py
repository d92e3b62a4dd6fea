"""``SamplingParams``: what it refuses, what it takes from Hugging Face, and equal sets of kept tokens."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import auxkern
from auxkern import Head, Logits, SamplingParams, Sparse
from auxkern.ops import generation_config
from tests.support.cases import available_backends, device_of, generator

transformers = pytest.importorskip("transformers")

backends = pytest.mark.parametrize("backend", available_backends())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"temperature": -1.0}, ValueError, r"temperature is -1.0.*\[0.0, inf\)"),
        ({"temperature": math.nan}, ValueError, "temperature is nan"),
        ({"temperature": "1"}, TypeError, "temperature must be a number or a tensor.*str"),
        ({"temperature": True}, TypeError, "temperature must be a number.*bool"),
        ({"top_k": -2}, ValueError, "top_k is -2"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int"),
        ({"top_p": -0.1}, ValueError, r"top_p is -0.1.*\[0.0, 1.0\]"),
        ({"top_p": 1.1}, ValueError, "top_p is 1.1"),
        ({"min_p": 1.5}, ValueError, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty is 0.0"),
        ({"presence_penalty": math.inf}, ValueError, "presence_penalty is inf"),
        ({"logit_bias": [1]}, TypeError, "logit_bias must be a dict.*list"),
        ({"logit_bias": {-1: 1.0}}, ValueError, "logit_bias has the key -1"),
        ({"logit_bias": {1: math.inf}}, ValueError, r"logit_bias\[1\] is inf"),
        ({"top_p": torch.ones(3).bool()}, TypeError, "top_p has dtype torch.bool"),
        ({"top_k": torch.tensor([-2])}, ValueError, "top_k holds -2"),
        ({"logit_bias": {1.0: 2.0}}, ValueError, "logit_bias has the key 1.0"),
        ({"logit_bias": {1: math.nan}}, ValueError, r"logit_bias\[1\] is nan"),
        ({"top_p": torch.tensor([0.5, 1.5])}, ValueError, "top_p holds 1.5"),
        ({"top_k": torch.ones(3)}, TypeError, "top_k has dtype torch.float32; it must be integers"),
        ({"top_p": torch.ones(3), "min_p": torch.zeros(2)}, ValueError, "3 entries but min_p has 2"),
        ({"top_p": torch.ones(2, 2)}, ValueError, r"top_p has shape \(2, 2\)"),
    ],
)
def test_refusals(settings, error, words):
    with pytest.raises(error, match=words):
        SamplingParams(**settings)


NUMBERS = [field.name for field in dataclasses.fields(SamplingParams) if field.name != "logit_bias"]


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), "0.5", np.str_("1"), 1j, np.array([1.0]), [1]], ids=repr
)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_named(name, value):
    with pytest.raises(TypeError, match=f"{name} must be"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.array(np.inf)], ids=repr
)
@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "top_k"])
def test_what_is_not_finite_is_named(name, value):
    for number in (value, torch.tensor([1.0, float(value)])):
        with pytest.raises(ValueError, match=rf"{name} (is|holds) "):
            SamplingParams(**{name: number})


@pytest.mark.parametrize("number", [np.float32, np.float64, np.array, torch.tensor], ids=lambda f: f.__name__)
def test_numbers_of_other_libraries_become_pythons(number):
    made = SamplingParams(
        temperature=number(0.5), top_k=np.int32(3), top_p=number(0.25), logit_bias={np.int64(2): number(-1.5)}
    )
    assert (made.temperature, made.top_k, made.top_p, made.logit_bias) == (0.5, 3, 0.25, {2: -1.5})
    kinds = {type(x) for x in (made.temperature, made.top_p, *made.logit_bias.values())}
    assert kinds == {float}
    assert type(made.top_k) is int


@pytest.mark.parametrize("size", [1e300, 1e-300])
@pytest.mark.parametrize(
    "name", ["temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"]
)
def test_a_number_that_float32_does_not_have_is_named(name, size):
    for value in (size, torch.full((3,), size, dtype=torch.float64)):
        with pytest.raises(ValueError, match=rf"{name} is 1e.*float32"):
            auxkern.sample([Z], SamplingParams(**{name: value}), **CALL)
    with pytest.raises(ValueError, match=r"logit_bias is 1e.*float32"):
        auxkern.sample([Z], SamplingParams(logit_bias={1: size}), **CALL)


@backends
def test_no_top_k_as_other_engines_write_it(backend):
    z, seed = torch.randn(50, 9, device=device_of(backend)), torch.arange(50, device=device_of(backend))
    plain = auxkern.sample(z, seed=seed, position=0, backend=backend).tokens
    for top_k in (0, -1, 2**70, torch.full((50,), -1, device=z.device)):
        params = SamplingParams(top_k=top_k)
        assert torch.equal(auxkern.sample(z, params, seed=seed, position=0, backend=backend).tokens, plain)


@backends
def test_temperature_zero_is_greedy_whatever_the_filters(backend):
    z, seed = torch.randn(50, 9, device=device_of(backend)), torch.arange(50, device=device_of(backend))
    for temperature in (0, -0.0, torch.zeros(50, device=z.device)):
        params = SamplingParams(temperature, top_k=5, top_p=0.3, min_p=0.9)
        drawn = auxkern.sample(z, params, seed=seed, position=0, return_logprobs=True, backend=backend)
        assert torch.equal(drawn.tokens, z.argmax(-1))
        assert (drawn.processed_logprob == 0).all()


def test_numpy_numbers_in_a_call():
    z = torch.randn(9)
    plain = auxkern.sample([z], seed=3, position=4, vocab_size=8, top_logprobs=2)
    drawn = auxkern.sample(
        [Logits(z, scale=np.float32(1))],
        seed=np.int64(3),
        position=np.array(4),
        vocab_size=np.int32(8),
        top_logprobs=np.int64(2),
    )
    assert torch.equal(drawn.tokens, plain.tokens)
    assert torch.equal(drawn.top_ids, plain.top_ids)


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
        ([Z], {"top_logprobs": True}, ValueError, "top_logprobs is True"),
        ([Z], {"seed": torch.tensor(5)}, ValueError, "seed is the int 5 but there are 3 rows"),
        ([Z], {"seed": np.float64(1)}, TypeError, "seed must be an int"),
        ([Z], {"position": np.bool_(1)}, TypeError, "position must be an int"),
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


def test_a_config_that_says_nothing_of_top_k_means_generates_50():
    made = SamplingParams.from_generation_config(transformers.GenerationConfig(do_sample=True))
    defaults = transformers.GenerationConfig._get_default_generation_params()
    assert made.top_k == defaults["top_k"]
    assert (made.temperature, made.top_p, made.repetition_penalty) == tuple(
        defaults[name] for name in ("temperature", "top_p", "repetition_penalty")
    )
    off = transformers.GenerationConfig(do_sample=True, top_k=0)
    assert SamplingParams.from_generation_config(off).is_plain


REFUSED = {
    "num_beams": 4,
    "penalty_alpha": 0.6,
    "typical_p": 0.5,
    "epsilon_cutoff": 1e-4,
    "eta_cutoff": 0.1,
    "top_h": 0.5,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]],
    "force_words_ids": [[3]],
    "exponential_decay_length_penalty": (5, 1.1),
    "suppress_tokens": [1],
    "begin_suppress_tokens": [1],
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.0},
    "min_length": 3,
    "min_new_tokens": 3,
    "remove_invalid_values": True,
    "token_healing": True,
    "assistant_ensemble_weight": 0.5,
    "cache_implementation": "quantized",
    "sequence_bias": {(5, 6): 1.0},
    "a_field_of_tomorrow": 1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_a_generation_config_that_it_cannot_honour(name):
    config = transformers.GenerationConfig(do_sample=True)
    setattr(config, name, REFUSED[name])  # the constructor has opinions on some combinations
    with pytest.raises(ValueError, match=rf"generation_config\.{name}"):
        SamplingParams.from_generation_config(config)


@pytest.mark.parametrize("name", sorted(vars(transformers.GenerationConfig())))
def test_every_field_of_a_generation_config_is_known(name):
    assert name.startswith("_") or name in {*generation_config.KNOWN, *generation_config.UNSUPPORTED}


def test_what_generate_has_by_default_is_honoured():
    config = transformers.GenerationConfig(**transformers.GenerationConfig._get_default_generation_params())
    assert SamplingParams.from_generation_config(config).temperature == 0


@pytest.mark.parametrize("config", [None, {"do_sample": True}, 5])
def test_what_is_no_generation_config_is_refused(config):
    with pytest.raises(TypeError, match=r"config must be a transformers\.GenerationConfig"):
        SamplingParams.from_generation_config(config)


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
