"""Every option of transformers' generate: honoured, or refused by its name."""

import pytest
import torch
from transformers import CompileConfig, GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.support.batches import one_of, prompts
from tests.support.tiny import tiny_pair

NEW = 8


class Doubled(TopKLogitsWarper):
    """Of a known kind, with a meaning of its own."""

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)


def _new(model, batch, **options):
    ids = model.generate(**batch, **{"max_new_tokens": NEW, "do_sample": False, **options})
    return ids[:, batch["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def model():
    return tiny_pair("shared head, features, pointer")


@pytest.fixture(scope="module")
def greedy(model):
    return _new(model, prompts())


@pytest.mark.parametrize(
    "processor",
    [TopKLogitsWarper(1), TemperatureLogitsWarper(1e-4), TopPLogitsWarper(1e-6), MinPLogitsWarper(1.0)],
)
def test_a_users_filter_filters(model, greedy, processor):
    drawn = _new(model, prompts(), do_sample=True, top_k=0, logits_processor=LogitsProcessorList([processor]))
    assert torch.equal(drawn, greedy)


@pytest.mark.parametrize(
    "processor",
    [RepetitionPenaltyLogitsProcessor(50.0), SequenceBiasLogitsProcessor([[[7], 1e4]]), Doubled(5)],
)
def test_a_users_processor_changes_a_greedy_text(model, greedy, processor):
    assert not torch.equal(_new(model, prompts(), logits_processor=[processor]), greedy)


def test_a_users_processor_takes_the_place_of_the_configs(model, greedy):
    own = [TopKLogitsWarper(1)]
    assert torch.equal(_new(model, prompts(), do_sample=True, top_k=50, logits_processor=own), greedy)


def test_seeds_beside_a_users_processor_are_refused(model):
    with pytest.raises(ValueError, match="TopKLogitsWarper"):
        _new(model, prompts(), do_sample=True, seeds=range(4), logits_processor=[TopKLogitsWarper(3)])


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words_ids": [[{}]]},
        {"suppress_tokens": [{}]},
        {"begin_suppress_tokens": [{}]},
        {"sequence_bias": [[[{}], -1e4]]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_forbidden_token_does_not_come(model, greedy, options):
    (name, shape), batch = next(iter(options.items())), one_of(prompts(), 0)
    first = int(greedy[0, 0])

    def filled(value):
        return [filled(one) for one in value] if isinstance(value, list) else first if value == {} else value

    assert int(_new(model, batch, **{name: filled(shape)})[0, 0]) != first


def test_a_bias_of_several_tokens_is_transformers_own(model, greedy):
    batch, (first, second) = one_of(prompts(), 0), greedy[0, :2].tolist()
    biased = _new(model, batch, sequence_bias=[[[first, second], -1e4]])[0].tolist()
    assert biased[0] == first
    assert biased[1] != second


@pytest.mark.parametrize(
    "options", [{"min_length": 9}, {"min_new_tokens": 5}, {"typical_p": 0.9}, {"top_h": 0.5}]
)
def test_an_option_that_changes_nothing_here_is_no_obstacle(model, options):
    batch = prompts()
    plain = _new(model, batch, eos_token_id=None)
    assert torch.equal(_new(model, batch, eos_token_id=None, **options), plain)


@pytest.mark.parametrize(
    ("name", "value", "more"),
    [
        ("prompt_lookup_num_tokens", 3, {}),
        ("penalty_alpha", 0.6, {"top_k": 4}),
        ("dola_layers", "high", {}),
        ("num_beam_groups", 2, {"num_beams": 4, "diversity_penalty": 0.5}),
        ("force_words_ids", [[5]], {"num_beams": 2}),
        ("output_attentions", True, {}),
        ("cache_implementation", "static", {}),
        ("cache_implementation", "paged", {}),
        ("prefill_chunk_size", 2, {}),
        ("token_healing", True, {}),
        ("return_dict", True, {}),
        ("labels", torch.zeros(4, 4), {}),
        ("position_ids", torch.zeros(4, 4), {}),
        ("logits_to_keep", 1, {}),
        ("aux_scales", 1.0, {}),
    ],
)
def test_what_a_pair_cannot_do_is_refused_by_its_name(model, name, value, more):
    with pytest.raises(ValueError, match=name):
        _new(model, prompts(), **{name: value, **more})


def test_a_config_is_read_for_what_is_refused(model):
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        model.generate(**prompts(), generation_config=GenerationConfig(prompt_lookup_num_tokens=3))


def test_an_assistant_is_refused(model):
    with pytest.raises(ValueError, match="assistant_model"):
        _new(model, prompts(), assistant_model=model.lm)


def test_a_cache_is_refused(model):
    with pytest.raises(ValueError, match="starts anew"):
        _new(model, prompts(), past_key_values=object())


def test_continuous_batching_of_transformers_is_refused(model):
    with pytest.raises(ValueError, match="Engine"):
        model.generate_batch(inputs=[[1, 5, 6]])


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.5},
        {"no_repeat_ngram_size": 1},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True},
        {"compile_config": CompileConfig()},
        {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6]},
        {"exponential_decay_length_penalty": (2, 1.1)},
        {"renormalize_logits": True, "use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_transformers_does_itself_ends_in_a_text(model, options):
    result = model.generate(**prompts(), max_new_tokens=NEW, do_sample=False, **options)
    ids = getattr(result, "sequences", result)
    assert ids.shape[1] > prompts()["input_ids"].shape[1]


@pytest.mark.parametrize("ends", [0, [0, 5], list(range(97))])
def test_any_end_token_ends(model, ends):
    batch = one_of(prompts(), 0)
    ids = _new(model, batch, do_sample=True, top_k=0, seeds=[3], max_new_tokens=60, eos_token_id=ends)[0]
    known = torch.tensor(ends).reshape(-1)
    assert not torch.isin(ids[:-1], known).any()
    assert bool(torch.isin(ids[-1], known)) or len(ids) == 60


@pytest.mark.parametrize(
    "ids", [torch.zeros(1, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), [[1, 2]]]
)
def test_prompts_without_a_token_are_refused(model, ids):
    with pytest.raises(ValueError, match="needs input_ids"):
        model.generate(ids)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_a_text_beyond_learned_positions_is_refused(options):
    learned = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model, batch = tiny_pair("own head", auxiliary_config=learned), prompts()
    assert _new(model, batch, max_new_tokens=7, eos_token_id=None, **options).shape == (4, 7)
    with pytest.raises(ValueError, match="take 17 positions, but auxiliary 'default' has 16"):
        _new(model, batch, max_new_tokens=8, **options)
    assert _new(model, batch, max_new_tokens=8, auxiliary=None, eos_token_id=None, **options).shape == (4, 8)


def test_prompts_that_are_padded_on_the_right_are_refused(model):
    batch = {name: value.flip(1) if name != "condition_ids" else value for name, value in prompts().items()}
    with pytest.raises(ValueError, match="on the left"):
        _new(model, batch)


@pytest.mark.parametrize("draws", [{"do_sample": False}, {"do_sample": True, "top_k": 1}, {"num_beams": 2}])
def test_the_bases_hidden_states_are_returned(model, draws):
    batch = {name: rows[:2] for name, rows in prompts().items()}
    options = {**draws, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(**batch, output_hidden_states=True, return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, model.generate(**batch, **options))
    first = found.hidden_states[0]
    inputs = {name: rows for name, rows in batch.items() if name in ("input_ids", "attention_mask")}
    rows = draws.get("num_beams", 1)
    expected = model.lm(**inputs, output_hidden_states=True).hidden_states
    assert len(found.hidden_states) == 3
    assert len(first) == len(expected)
    seen = inputs["attention_mask"].bool()
    for ours, theirs in zip(first, expected, strict=True):
        torch.testing.assert_close(ours[::rows][seen], theirs[seen])
