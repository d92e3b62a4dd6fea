"""generate: two caches, seeds, searches, several auxiliaries on one base."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor

from tests.support.batches import one_of, prompts
from tests.support.tiny import DECODER, EOS, PAD, PAIRS, tiny_lm, tiny_pair, with_two_more

NEW = 10


def _generate(model, batch, **options):
    settings = {"max_new_tokens": NEW, "min_new_tokens": None, "do_sample": True, "top_k": 0, **options}
    return model.generate(**batch, **settings)


def _new(batch, ids):
    return ids[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9, "temperature": 0.7}, {"repetition_penalty": 1.5}, {"do_sample": False}]
)
def test_a_ragged_batch_gives_each_sequence_what_it_gives_alone(kind, options):
    model, batch = tiny_pair(kind), prompts()
    together = _new(batch, _generate(model, batch, seeds=range(40, 44), **options))
    lengths = []
    for row in range(4):
        single = one_of(batch, row)
        alone = _new(single, _generate(model, single, seeds=[40 + row], **options))[0]
        lengths.append(len(alone))
        assert torch.equal(together[row, : len(alone)], alone)
        assert torch.all(together[row, len(alone) :] == PAD)
    assert max(lengths) > 1


def test_seeds_decide_and_the_order_does_not():
    model, batch = tiny_pair("shared head, features, pointer"), prompts()
    seeds = torch.tensor([11, 22, 33, 44])
    first = _new(batch, _generate(model, batch, seeds=seeds))
    assert torch.equal(first, _new(batch, _generate(model, batch, seeds=seeds)))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {name: value[order] for name, value in batch.items()}
    assert torch.equal(_new(batch, _generate(model, shuffled, seeds=seeds[order])), first[order])
    assert not torch.equal(first, _new(batch, _generate(model, batch, seeds=seeds + 1)))
    with pytest.raises(ValueError, match="seeds has 3 entries but 4"):
        _generate(model, batch, seeds=[1, 2, 3])


def test_without_seeds_torchs_global_generator_decides():
    model, batch = tiny_pair("own head"), prompts()
    torch.manual_seed(3)
    first = _generate(model, batch)
    torch.manual_seed(3)
    assert torch.equal(first, _generate(model, batch))
    assert not torch.equal(first, _generate(model, batch))


def test_equal_prompts_draw_different_texts():
    model, batch = tiny_pair("own head"), one_of(prompts(), 0)
    texts = _generate(model, batch, num_return_sequences=6)
    assert len({tuple(row.tolist()) for row in texts}) > 1
    seeded = _generate(model, batch, num_return_sequences=3, seeds=[1, 2, 1])
    assert torch.equal(seeded[0], seeded[2])
    assert not torch.equal(seeded[0], seeded[1])


@pytest.mark.parametrize("kind", PAIRS)
def test_greedy_is_transformers_own_on_the_summed_logits(kind):
    model, batch = tiny_pair(kind), prompts()
    ours = _generate(model, batch, do_sample=False)
    theirs = _generate(model, batch, do_sample=False, return_dict_in_generate=True).sequences
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["shared head, features, pointer", "encoder-decoder"])
def test_beam_search_with_caches_is_beam_search_without(kind):
    model, batch = tiny_pair(kind), prompts()
    with_cache = _generate(model, batch, do_sample=False, num_beams=3)
    without = _generate(model, batch, do_sample=False, num_beams=3, use_cache=False)
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache, _generate(model, batch, do_sample=False)), "three beams found no more"
    with pytest.raises(ValueError, match="seeds"):
        _generate(model, batch, do_sample=False, num_beams=3, seeds=range(4))


def test_steps_with_a_cache_are_the_steps_without():
    model, batch = tiny_pair("encoder-decoder"), prompts()
    with_cache = _generate(model, batch, seeds=range(4))
    assert torch.equal(with_cache, _generate(model, batch, seeds=range(4), use_cache=False))


def test_a_processor_of_the_users_is_honoured():
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([7]), 0.0)

    model, batch = tiny_pair("own head"), prompts()
    drawn = _new(batch, _generate(model, batch, logits_processor=[Only()]))
    assert torch.all(drawn == 7)
    longer = _generate(model, batch, min_new_tokens=NEW)
    assert not torch.any(_new(batch, longer) == EOS)
    with pytest.raises(ValueError, match="MinNewTokens"):
        _generate(model, batch, min_new_tokens=NEW, seeds=range(4))


def test_finished_sequences_are_padded_and_the_loop_stops():
    model, batch = tiny_pair("own head"), prompts()
    ids = _new(
        batch, _generate(model, batch, max_new_tokens=200, seeds=range(4), eos_token_id=list(range(2, 40)))
    )
    assert ids.shape[1] < 200
    for row in ids:
        end = int(((row >= 2) & (row < 40)).nonzero()[0])
        assert torch.all(row[end + 1 :] == PAD)


def test_a_generation_config_is_read():
    model, batch = tiny_pair("own head"), prompts()
    config = GenerationConfig(do_sample=True, top_k=1, max_new_tokens=NEW, eos_token_id=EOS, pad_token_id=PAD)
    assert torch.equal(
        model.generate(**batch, generation_config=config), _generate(model, batch, do_sample=False)
    )


def test_the_mixing_weight():
    model, batch = tiny_pair("shared head, features, pointer"), prompts()
    alone = _generate(model, batch, auxiliary=None, do_sample=False)
    assert torch.equal(alone, _generate(model, batch, aux_scale=0.0, do_sample=False))
    lm = model.lm.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=False,
        max_new_tokens=NEW,
    )
    assert torch.equal(alone, lm)
    mixed = _generate(model, batch, aux_scale=[0.0, 1.0, 0.0, 2.0], seeds=range(4))
    for row, scale in enumerate([0.0, 1.0, 0.0, 2.0]):
        single = one_of(batch, row)
        expected = _new(single, _generate(model, single, aux_scale=scale, seeds=[row]))[0]
        assert torch.equal(_new(batch, mixed)[row, : len(expected)], expected)
    with pytest.raises(ValueError, match="aux_scale has shape"):
        _generate(model, batch, aux_scale=[1.0, 2.0])


@pytest.fixture
def three(tmp_path):
    return with_two_more(tiny_lm(), tmp_path)


@pytest.mark.parametrize("options", [{"seeds": range(4)}, {"do_sample": False}])
def test_each_sequence_has_its_own_auxiliary(three, options):
    batch = prompts()
    names = ["t5", "default", None, "own"]
    mixed = _new(batch, _generate(three, batch, auxiliary=names, **options))
    for row, name in enumerate(names):
        single = one_of(batch, row)
        alone = {**options, "seeds": [row]} if "seeds" in options else options
        expected = _new(single, _generate(three, single, auxiliary=name, **alone))[0]
        assert torch.equal(mixed[row, : len(expected)], expected)


def test_beams_keep_their_auxiliary(three):
    batch, names = prompts(), ["t5", "default", None, "own"]
    mixed = _new(batch, _generate(three, batch, auxiliary=names, do_sample=False, num_beams=3))
    for row, name in enumerate(names):
        single = one_of(batch, row)
        expected = _new(single, _generate(three, single, auxiliary=name, do_sample=False, num_beams=3))[0]
        assert torch.equal(mixed[row, : len(expected)], expected)


def test_auxiliaries_are_kept_apart(three, tmp_path):
    assert three.auxiliary_names == ["default", "t5", "own"]
    assert set(three.state_dict()) == set(tiny_pair("shared head, features, pointer").state_dict())
    with pytest.raises(ValueError, match="'t5' already"):
        three.load_auxiliary("t5", tmp_path / "t5")
    with pytest.raises(ValueError, match=r"no auxiliary 'nobody'"):
        _generate(three, prompts(), auxiliary="nobody")
    with pytest.raises(ValueError, match="2 names but there are 4"):
        _generate(three, prompts(), auxiliary=["t5", "own"])
    tiny_pair("own head", tiny_lm(seed=7)).save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match="fingerprint"):
        three.load_auxiliary("foreign", tmp_path / "foreign")


def test_broken_weights_are_an_error_not_a_text():
    model = tiny_pair("own head")
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"sequences \[0, 1, 2, 3\] are NaN"):
        _generate(model, prompts(), seeds=range(4))


def test_generate_refuses_what_it_does_not_know():
    model, batch = tiny_pair("own head"), prompts()
    with pytest.raises(ValueError, match="conditon_ids"):
        _generate(model, batch, conditon_ids=batch["condition_ids"])
    with pytest.raises(ValueError, match="needs input_ids"):
        model.generate(condition_ids=batch["condition_ids"])


def test_other_decoders_count_positions_over_the_padding():
    for config in (
        {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
        {**DECODER, "model_type": "qwen2", "num_key_value_heads": 2},
        {
            "model_type": "opt",
            "hidden_size": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 16,
        },
    ):
        model, batch = tiny_pair("own head", auxiliary_config=config), prompts()
        together = _new(batch, _generate(model, batch, seeds=range(4)))
        for row in range(4):
            single = one_of(batch, row)
            alone = _new(single, _generate(model, single, seeds=[row]))[0]
            assert torch.equal(together[row, : len(alone)], alone), config["model_type"]
