"""``auxkern.sample`` on every backend: the draw, filters, penalties, and what a batch must not change."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Logits, Sample, SamplingParams, Sparse
from auxkern.core.draws import gumbel, philox, random_bits
from tests.support.cases import available_backends, device_of, generator

backends = pytest.mark.parametrize("backend", available_backends())


def logits(N: int, V: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(N, V, generator=generator(seed))).to(dtype)


def seeds(N: int, first: int = 100) -> Tensor:
    return torch.arange(first, first + N)


def moved(x: Any, device: str) -> Any:
    """Every tensor in a term, in parameters, in a list, on ``device``."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, list):
        return [moved(one, device) for one in x]
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(
            x, **{field.name: moved(getattr(x, field.name), device) for field in dataclasses.fields(x)}
        )
    return x


def sample(terms: Any, params: SamplingParams | None = None, *, backend: str, **options: Any) -> Sample:
    """``auxkern.sample`` on the backend's device; what it returns, on the CPU."""
    device = device_of(backend)
    options = {name: moved(value, device) for name, value in {"position": 0, **options}.items()}
    found = auxkern.sample(moved(terms, device), moved(params, device), backend=backend, **options)
    return moved(found, "cpu")


def tokens(z: Any, params: SamplingParams | None = None, *, backend: str, **options: Any) -> Tensor:
    return sample(z, params, backend=backend, **options).tokens


def kept_by_drawing(row: Tensor, params: SamplingParams, backend: str, draws: int = 4000) -> set[int]:
    many = row.expand(draws, -1)
    return set(tokens(many, params, seed=seeds(draws), backend=backend).tolist())


# ---- randomness ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Known answers of the Random123 library (Salmon et al. 2011), philox4x32, 10 rounds.
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    made = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(word) for word in made] == words


def test_the_ends_of_the_uniform_numbers_are_finite():
    noise = gumbel(torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]))
    assert noise.isfinite().all()
    assert noise[0] == pytest.approx(33 * math.log(2), rel=1e-9)
    assert noise[-1] == pytest.approx(-math.log(33 * math.log(2)), rel=1e-9)


@backends
@pytest.mark.parametrize("V", [1, 3, 63, 64, 65, 257, 1025, 5000])
def test_every_backend_draws_the_token_of_the_formula(backend, V):
    z, seed = logits(50, V), seeds(50)
    seed[3], seed[4] = -1, 2**62 + 12345
    position = torch.arange(50) * (2**31 + 7)
    noise = gumbel(random_bits(seed, position, V))
    wanted = (z.double() + noise).argmax(-1)
    # Rounding may decide where the two largest are within float32's rounding of them: not with these.
    assert torch.equal(tokens(z, seed=seed, position=position, backend=backend), wanted)


@backends
def test_seeds_positions_and_places_matter_as_they_should(backend):
    z = torch.zeros(1, 700).expand(64, -1)
    assert len(set(tokens(z, seed=torch.full((64,), 7), backend=backend).tolist())) == 1
    assert len(set(tokens(z, seed=seeds(64), backend=backend).tolist())) > 50
    by_position = tokens(z, seed=torch.full((64,), 7), position=torch.arange(64), backend=backend)
    assert len(set(by_position.tolist())) > 50


@backends
def test_a_request_draws_the_same_token_in_every_batch(backend):
    N, V = 1000, 500
    z, other, seed = logits(N, V), logits(N, V, 1, torch.float16), seeds(N)
    params = {
        "temperature": torch.linspace(0, 2, N),
        "top_k": torch.arange(N) % 40,
        "top_p": torch.linspace(0.3, 1, N),
    }

    def draw(rows: Tensor) -> Tensor:
        chosen = SamplingParams(**{name: value[rows] for name, value in params.items()})
        return tokens([z[rows], other[rows]], chosen, seed=seed[rows], position=3, backend=backend)

    together = draw(torch.arange(N))
    for size in (1, 16, 256):
        assert torch.equal(torch.cat([draw(rows) for rows in torch.arange(N).split(size)]), together)
    shuffled = torch.randperm(N, generator=generator(4))
    assert torch.equal(draw(shuffled), together[shuffled])


# ---- distributions ---------------------------------------------------------------------------------


def expected_probabilities(row: Tensor, params: SamplingParams) -> Tensor:
    """float64 probabilities after the filters, by sorting, as the papers define them."""
    z = row.double() / params.temperature
    order = z.argsort(descending=True, stable=True)
    keep = torch.ones(len(z), dtype=torch.bool)
    if params.top_k:
        keep &= z >= z[order[min(params.top_k, len(z)) - 1]]
    if params.top_p < 1:
        p = z.masked_fill(~keep, -torch.inf).softmax(0)[order]
        inside = torch.zeros_like(keep)
        inside[order[(p.cumsum(0) - p) < params.top_p]] = True
        keep &= inside
    if params.min_p:
        p = z.masked_fill(~keep, -torch.inf).softmax(0)
        keep &= p >= params.min_p * p.max()
    return z.masked_fill(~keep, -torch.inf).softmax(0)


FILTERS = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 1.7": {"temperature": 1.7},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 12, "top_p": 0.95, "min_p": 0.05},
}


@backends
@pytest.mark.parametrize("settings", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("V", [5, 40, 333])
def test_tokens_follow_the_exact_probabilities(backend, settings, V):
    params = SamplingParams(**settings)
    row = 2 * torch.randn(V, generator=generator(V))
    p = expected_probabilities(row, params)
    draws = 8000
    found = tokens(row.expand(draws, -1), params, seed=seeds(draws), backend=backend)
    counts = torch.bincount(found, minlength=V).double()
    assert counts[p == 0].sum() == 0
    # Pearson's test over classes of at least 5 expected draws; the rest are one class.
    wanted = p * draws
    common = wanted >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([wanted[common], wanted[~common].sum()[None]])
    statistic = ((counts - wanted) ** 2 / wanted.clamp(min=1e-9))[wanted > 0].sum().item()
    freedom = int((wanted > 0).sum()) - 1
    # Six standard deviations above the mean (Wilson & Hilferty 1931): fixed seeds, so no flakes.
    limit = freedom * (1 - 2 / (9 * max(freedom, 1)) + 6 * math.sqrt(2 / (9 * max(freedom, 1)))) ** 3
    assert statistic <= max(limit, 1e-9)


@backends
def test_top_k_keeps_all_that_equal_the_last(backend):
    row = torch.tensor([0.4, 0.3, 0.3, 0.0]).log()
    assert kept_by_drawing(row, SamplingParams(top_k=2), backend) == {0, 1, 2}
    assert kept_by_drawing(row, SamplingParams(top_k=1), backend) == {0}


@backends
def test_top_k_comes_before_top_p(backend):
    row = torch.tensor([0.35, 0.25, 0.20, 0.05, 0.03, 0.12]).log()
    # Of the four largest (0.92 together) 0.82 is reached by the third: (0.35 + 0.25 + 0.20) / 0.92 = 0.87.
    assert kept_by_drawing(row, SamplingParams(top_k=4, top_p=0.82), backend) == {0, 1, 2}
    # Of all, the third reaches 0.80 only.
    assert kept_by_drawing(row, SamplingParams(top_p=0.82), backend) == {0, 1, 2, 5}


@backends
def test_a_nucleus_is_minimal_and_cuts_equals_by_id(backend):
    row = torch.zeros(10)
    assert kept_by_drawing(row, SamplingParams(top_p=0.35), backend) == {0, 1, 2, 3}
    row = torch.tensor([0.1, 0.5, 0.1, 0.1, 0.2]).log()
    assert kept_by_drawing(row, SamplingParams(top_p=0.75), backend) == {1, 4, 0}
    assert kept_by_drawing(row, SamplingParams(top_p=1e-6), backend) == {1}


@backends
def test_a_large_nucleus_in_a_flat_row(backend):
    V = 6000
    row = 1e-3 * torch.randn(V, generator=generator(0))
    p = row.double().softmax(0)
    order = p.argsort(descending=True, stable=True)
    size = int((p[order].cumsum(0) < 0.9).sum()) + 1
    allowed = set(order[:size].tolist())
    assert kept_by_drawing(row, SamplingParams(top_p=0.9), backend, 3000) <= allowed


@backends
def test_temperature_zero_takes_the_lowest_of_the_largest(backend):
    z = torch.tensor([[1.0, 5, 5, 2], [5.0, 5, 1, 5], [-torch.inf, 3, 3, 1]]).repeat(4, 1)
    temperature = torch.tensor([0.0] * 6 + [1.0] * 6)
    params = SamplingParams(temperature=temperature, top_p=torch.linspace(0.1, 1, 12))
    assert tokens(z, params, seed=seeds(12), backend=backend)[:6].tolist() == [1, 0, 1, 1, 0, 1]


# ---- bad rows --------------------------------------------------------------------------------------


@backends
def test_a_bad_row_has_a_status_and_its_neighbours_nothing_of_it(backend):
    z = logits(6, 300)
    z[2, 299] = torch.inf
    clean = tokens(z[[0, 3, 5]], seed=seeds(6)[[0, 3, 5]], backend=backend)
    z[1, 7] = torch.nan
    z[4] = -torch.inf
    for params in (None, SamplingParams(top_k=5, top_p=0.9), SamplingParams(temperature=0)):
        made = sample(z, params, seed=seeds(6), position=0, return_logprobs=True, backend=backend)
        assert made.status.tolist() == [0, 1, 3, 0, 2, 0]
        assert (made.tokens[[1, 2, 4]] == -1).all()
        assert made.logprob[[1, 2, 4]].isnan().all()
        assert made.logprob[[0, 3, 5]].isfinite().all()
        assert ((made.tokens[[0, 3, 5]] >= 0) & (made.tokens[[0, 3, 5]] < 300)).all()
    assert torch.equal(tokens(z, seed=seeds(6), backend=backend)[[0, 3, 5]], clean)


@backends
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
def test_logits_of_any_size_give_tokens(backend, scale):
    z = logits(20, 400) * scale
    z[:, ::3] = -torch.inf
    for params in (SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=3, min_p=0.1)):
        found = tokens(z, params, seed=seeds(20), backend=backend)
        assert ((found >= 0) & (found < 400) & (found % 3 != 0)).all()


@backends
@pytest.mark.parametrize("V", [32_000, 262_144])
def test_ten_thousand_draws_from_a_large_vocabulary(backend, V):
    if backend == "reference":
        pytest.skip("writes (N, V) tensors in float64")
    found = sample(logits(1, V)[0].expand(10_000, -1), seed=seeds(10_000), backend=backend)
    assert (found.status == 0).all()
    assert ((found.tokens >= 0) & (found.tokens < V)).all()
    assert len(set(found.tokens.tolist())) > 1000


@backends
@pytest.mark.parametrize("temperature", [1e-42, 1e-30, 1e-6, 1e6, 1e30])
def test_temperatures_of_any_size_give_tokens(backend, temperature):
    z = logits(30, 200)
    found = tokens(z, SamplingParams(temperature=temperature), seed=seeds(30), backend=backend)
    assert ((found >= 0) & (found < 200)).all()
    if temperature < 1e-5:
        assert torch.equal(found, z.argmax(-1))


@backends
def test_an_offset_of_all_logits_changes_nothing(backend):
    z = (logits(40, 300) * 64).round() / 64  # so that the sum with 4096 is exact
    assert torch.equal(
        tokens(z, seed=seeds(40), backend=backend), tokens(z + 4096, seed=seeds(40), backend=backend)
    )


# ---- penalties, biases, terms ----------------------------------------------------------------------


def penalized(
    z: Tensor, prompt: Tensor, history: Tensor, repetition: float, presence: float, frequency: float
) -> Tensor:
    z = z.double().clone()
    for n in range(len(z)):
        generated = [int(i) for i in history[n] if i >= 0]
        for i in set(generated) | {int(i) for i in prompt[n] if i >= 0}:
            z[n, i] = z[n, i] / repetition if z[n, i] > 0 else z[n, i] * repetition
        for i in set(generated):
            z[n, i] -= presence + frequency * generated.count(i)
    return z


@backends
def test_penalties(backend):
    N, V = 30, 50
    z = logits(N, V)
    history = torch.randint(-1, V, (N, 12), generator=generator(1))
    prompt = torch.randint(-1, V, (N, 9), generator=generator(2))
    params = SamplingParams(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3)
    noise = gumbel(random_bits(seeds(N), torch.zeros(N, dtype=torch.int64), V))
    for before, wanted in (
        (prompt, penalized(z, prompt, history, 1.4, 0.5, 0.3)),
        (None, penalized(z, prompt[:, :0], history, 1.4, 0.5, 0.3)),
    ):
        made = tokens(z, params, seed=seeds(N), history=history, prompt=before, backend=backend)
        assert torch.equal(made, (wanted + noise).argmax(-1))


@backends
def test_padding_on_either_side_is_no_history(backend):
    z = logits(3, 40)
    params = SamplingParams(repetition_penalty=3.0, frequency_penalty=2.0)
    ids = torch.tensor([[5, 5, 9], [1, 2, 3], [30, 31, 30]])
    plain = tokens(z, params, seed=seeds(3), history=ids, backend=backend)
    pad = torch.full((3, 4), -1)
    for padded in (torch.cat([pad, ids], 1), torch.cat([ids, pad], 1), torch.cat([ids, pad + 5000], 1)):
        assert torch.equal(tokens(z, params, seed=seeds(3), history=padded, backend=backend), plain)


@backends
def test_a_bias_comes_before_penalties_and_may_forbid(backend):
    z = torch.zeros(200, 6)
    params = SamplingParams(logit_bias={2: -math.inf, 4: -math.inf, 1: 20.0})
    assert set(tokens(z, params, seed=seeds(200), backend=backend).tolist()) == {1}
    # Biased to 20, divided by 100: no longer the one.
    params = SamplingParams(logit_bias={1: 20.0}, repetition_penalty=100.0)
    found = tokens(z, params, seed=seeds(200), history=torch.ones(200, 1, dtype=torch.int64), backend=backend)
    assert len(set(found.tolist())) == 6


@backends
def test_terms_of_every_kind_and_scales_of_rows(backend):
    N, V = 24, 310
    g = generator(9)
    hidden, weight, bias = (
        torch.randn(N, 9, generator=g),
        torch.randn(V, 9, generator=g),
        torch.randn(V, generator=g),
    )
    other, scale = logits(N, V, 3), torch.linspace(-1, 2, N)
    ids, values = torch.randint(0, V, (N, 3), generator=g), 4 * torch.randn(N, 3, generator=g)
    product = hidden @ weight.T + bias
    z = other * scale[:, None] + 2 * torch.tanh(product / 2) + 0.5 * product
    z = z.scatter_add(1, ids, values)
    terms = [
        Logits(other, scale=scale),
        Head(hidden, weight, bias, softcap=2.0),
        Head(hidden, weight, bias, scale=0.5),
        Sparse(ids, values),
    ]
    made = sample(terms, seed=seeds(N), position=1, return_logprobs=True, top_logprobs=4, backend=backend)
    assert torch.equal(made.tokens, tokens(z, seed=seeds(N), position=1, backend=backend))
    exact = z.double().log_softmax(-1)
    picked = exact.gather(1, made.tokens[:, None])[:, 0]
    torch.testing.assert_close(made.logprob.double(), picked, rtol=0, atol=2e-5)
    torch.testing.assert_close(made.processed_logprob.double(), picked, rtol=0, atol=2e-5)
    torch.testing.assert_close(made.top_logprobs.double(), exact.topk(4).values, rtol=0, atol=2e-5)
    assert torch.equal(made.top_ids, exact.topk(4).indices)
    alone = (scale[:, None] * other).double().log_softmax(-1).gather(1, made.tokens[:, None])[:, 0]
    torch.testing.assert_close(made.term_logprobs[0].double(), alone, rtol=0, atol=2e-5)


@backends
def test_logprobs_of_half_precision_terms_keep_a_scale_per_row(backend):
    """The scale is not rounded to the term's dtype, and neither are the scaled logits."""
    z, scale = logits(16, 120, 3, torch.bfloat16), torch.linspace(0.31, 1.77, 16)
    made = sample([Logits(z, scale=scale)], seed=seeds(16), position=0, return_logprobs=True, backend=backend)
    exact = (z.double() * scale.double()[:, None]).log_softmax(-1)
    picked = exact.gather(1, made.tokens[:, None])[:, 0]
    torch.testing.assert_close(made.logprob.double(), picked, rtol=0, atol=2e-5)
    torch.testing.assert_close(made.term_logprobs[0].double(), picked, rtol=0, atol=2e-5)


@backends
def test_raw_and_processed_logprobs_are_different_things(backend):
    z = logits(16, 120)
    params = SamplingParams(temperature=0.7, top_k=6, top_p=0.9)
    made = sample(z, params, seed=seeds(16), position=0, return_logprobs=True, backend=backend)
    for n in range(16):
        token = int(made.tokens[n])
        assert made.logprob[n].item() == pytest.approx(z[n].double().log_softmax(0)[token].item(), abs=1e-5)
        wanted = expected_probabilities(z[n], params)[token].log().item()
        assert made.processed_logprob[n].item() == pytest.approx(wanted, abs=1e-5)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sliced_and_half_precision_logits(backend, dtype):
    whole = logits(20, 340, 5, dtype)
    z = whole[:, :310]
    assert torch.equal(
        tokens(z, seed=seeds(20), backend=backend), tokens(z.float(), seed=seeds(20), backend=backend)
    )
    # The ids beyond what the terms share are never drawn.
    whole[:, 310:] = 100
    found = sample([whole, z], seed=seeds(20), position=0, vocab_size=310, backend=backend).tokens
    assert (found < 310).all()


@backends
def test_inputs_are_not_written_to(backend):
    z = logits(4, 100)
    before = z.clone()
    tokens(z, SamplingParams(top_k=3, logit_bias={1: 3.0}), seed=seeds(4), backend=backend)
    assert torch.equal(z, before)


@backends
def test_empty_batches_and_other_shapes(backend):
    assert sample(logits(0, 9), seed=seeds(0), position=0, backend=backend).tokens.shape == (0,)
    one = sample(logits(1, 9)[0], seed=3, position=0, backend=backend)
    assert one.tokens.shape == ()
    assert sample(
        logits(6, 9).view(2, 3, 9), seed=seeds(6).view(2, 3), position=0, backend=backend
    ).tokens.shape == (2, 3)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 3, 40, 300])
def test_the_largest_come_by_falling_logit_and_rising_id(backend, count, dtype):
    z = (4 * torch.randn(20, 300, generator=generator(count))).round().to(dtype)  # many ties
    z[3, :290], z[4] = -torch.inf, 0.0
    made = sample(z, SamplingParams(temperature=0), seed=seeds(20), top_logprobs=count, backend=backend)
    wanted = z.float().sort(dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(made.top_ids, wanted)
    assert torch.equal(made.top_ids[:, 0], made.tokens)
    exact = z.double().log_softmax(-1).gather(-1, wanted)
    torch.testing.assert_close(made.top_logprobs.double(), exact, rtol=0, atol=2e-6)


@backends
def test_the_largest_logit_comes_first_where_log_probabilities_are_rounded_alike(backend):
    z = torch.zeros(1, 300)
    z[0, 7], z[0, 200] = 2.0**-25, 2.0**-24  # less apart than float32 can tell near -log 300
    made = sample(z, SamplingParams(temperature=0), seed=3, top_logprobs=3, backend=backend)
    assert made.top_logprobs[0, 0] == made.top_logprobs[0, 1]
    assert made.top_ids.tolist() == [[200, 7, 0]]
    assert made.tokens.tolist() == [200]


@backends
def test_a_lazy_negation_is_drawn_from_as_what_it_says(backend: str) -> None:
    """Its memory holds the numbers before they are negated."""
    z = torch.randn(4, 37, dtype=torch.complex64, generator=generator(0)).to(device_of(backend))
    given = {"seed": torch.arange(4, device=z.device), "position": 0, "backend": backend}
    drawn = auxkern.sample([z.conj().imag], **given)
    assert torch.equal(drawn.tokens, auxkern.sample([-z.imag], **given).tokens)


@backends
@pytest.mark.parametrize("given", ["temperature", "logit_bias", "scale"])
def test_lazily_negated_options_are_what_they_say(backend: str, given: str) -> None:
    device, V = device_of(backend), 37
    z = torch.randn(1, V, generator=generator(0)).to(device)
    ids, bias = torch.arange(V, device=device)[None], torch.randn(1, V, generator=generator(1)).to(device)
    number = torch.tensor([2.5], device=device)

    def drawn(negated: Any) -> Tensor | None:
        params = {
            "temperature": SamplingParams(temperature=negated(-number)),
            "logit_bias": SamplingParams(logit_bias=Sparse(ids, negated(bias))),
            "scale": None,
        }[given]
        term = Logits(z, negated(-number) if given == "scale" else 1.0)
        options = {"seed": 3, "position": 0, "return_logprobs": True, "backend": backend}
        return auxkern.sample([term], params, **options).processed_logprob

    torch.testing.assert_close(drawn(torch._neg_view), drawn(torch.neg), rtol=0, atol=0)
