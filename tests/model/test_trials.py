"""Bases and auxiliaries that break what a pair relies on are refused when the pair is made."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaForCausalLM,
)

from auxkern.model import AuxiliaryOutput, AuxTunedForCausalLM
from auxkern.model.refusals import check_auxiliary, check_base
from auxkern.model.trials import Reading, Trial, trial_ids
from auxkern.model.twins import WINDOW, tiny_copy
from tests.support.batches import prompts, ragged_batch
from tests.support.tiny import DECODER, PAIRS, V, tiny_lm, tiny_pair

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MAMBA2 = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 4, "chunk_size": 8}
FALCON_H1 = {
    **SMALL,
    "num_key_value_heads": 2,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 4,
    "mamba_chunk_size": 8,
}
# A window shorter than the texts, states and convolutions, positions that are told by columns.
STATEFUL = {
    "mistral": {**SMALL, "num_key_value_heads": 2, "sliding_window": 4},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "mamba2": {"hidden_size": 16, "num_hidden_layers": 1, **MAMBA2},
    "falcon_h1": FALCON_H1,
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "modernbert-decoder": SMALL,
    "opt": {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 2},
}


def base(kind, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=V, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


class Shifted:
    """Reads cumulative sums: causal, padding-proof, exact with a cache, unless told otherwise."""

    def __init__(self, fault=None):
        self.fault = fault

    def __call__(self, ids, mask, cache, use_cache):
        real = mask[:, -ids.shape[1] :]
        new = (ids * (real if self.fault != "padding" else 1)).float()
        past = 0.0 if cache is None or self.fault == "cache" else cache
        values = new.cumsum(1) + past
        total = values[:, -1:]
        if self.fault == "future":
            values = values + new.sum(1, keepdim=True)
        return Reading(values[:, :, None], total if use_cache else None)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (None, None),
        ("future", "later tokens"),
        ("padding", "padding before a text"),
        ("cache", "with a cache"),
    ],
)
def test_a_trial_finds_each_flaw(fault, said):
    flaw = Trial(Shifted(fault), trial_ids(V), 1e-3).flaw()
    assert flaw is None if said is None else said in flaw


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("bert", SMALL, "BertLMHeadModel .*'bert'.* later tokens"),
        ("roberta", {**SMALL, "is_decoder": True}, "RobertaForCausalLM .*positions are 0, 1, 2"),
        ("rwkv", {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}, "'rwkv'"),
    ],
)
def test_a_base_that_is_no_causal_lm_for_a_pair_is_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        AuxTunedForCausalLM.from_lm(base(kind, **settings), auxiliary_config=DECODER, lm_term="logits")


def test_attention_that_was_opened_in_one_instance_is_seen():
    lm = tiny_lm()
    for layer in lm.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .* later tokens"):
        AuxTunedForCausalLM.from_lm(lm, auxiliary_config=DECODER)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_bidirectional_auxiliary_is_refused(kind):
    with pytest.raises(ValueError, match=f"'{kind}' .* cannot be an auxiliary: later tokens"):
        AuxTunedForCausalLM.from_lm(tiny_lm(), auxiliary_config={"model_type": kind, **SMALL})


@pytest.mark.parametrize("kind", STATEFUL)
def test_padding_of_a_condition_moves_nothing(kind):
    model = AuxTunedForCausalLM.from_lm(tiny_lm(), auxiliary_config={"model_type": kind, **STATEFUL[kind]})
    nn.init.normal_(model.eval().head.weight)
    ids = ragged_batch()["input_ids"][:1]
    condition = torch.tensor([[5, 8, 0, 0, 0, 0, 0]])
    alone = model(ids, condition_ids=condition[:, :2]).logits
    padded = model(ids, condition_ids=condition, condition_mask=(condition != 0).long()).logits
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_stateful_auxiliary_writes_the_same_with_and_without_a_cache(kind):
    model = AuxTunedForCausalLM.from_lm(tiny_lm(), auxiliary_config={"model_type": kind, **STATEFUL[kind]})
    nn.init.normal_(model.eval().head.weight)
    texts = [
        model.generate(**prompts(), do_sample=False, max_new_tokens=8, eos_token_id=None, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_h1"])
def test_a_base_that_keeps_a_state_generates(kind):
    lm = base(kind, **STATEFUL[kind])
    model = AuxTunedForCausalLM.from_lm(lm, auxiliary_config=DECODER).eval()
    ids = torch.tensor([[1, 5, 9, 11, 7]])
    wanted = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **wanted), lm.generate(ids, **wanted, use_cache=False))


def test_a_twin_has_each_type_of_layer_and_short_windows():
    lm = base(
        "gemma3_text",
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=512,
    )
    config = tiny_copy(lm).config
    assert set(config.layer_types) == set(lm.config.layer_types)
    assert config.sliding_window == WINDOW
    assert lm.config.sliding_window == 512


def test_a_trial_changes_neither_random_numbers_nor_modes():
    lm, module = tiny_lm(), Leaky(False)
    module.dropout.eval()
    config = AuxTunedForCausalLM.from_lm(lm, auxiliary_config=DECODER).config
    before = torch.get_rng_state()
    check_base(lm, config)
    check_auxiliary(config)
    check_auxiliary(config, module)
    assert torch.equal(torch.get_rng_state(), before)
    assert module.norm.training
    assert not module.dropout.training


class Leaky(nn.Module):
    """A custom auxiliary whose zero gate hides what the mean over the whole text would leak."""

    hidden_size = 8

    def __init__(self, leaks):
        super().__init__()
        self.embedding = nn.Embedding(V, 8)
        self.gate = nn.Parameter(torch.zeros(8))
        self.norm, self.dropout = nn.LayerNorm(8), nn.Dropout(0.5)
        self.leaks = leaks

    def forward(self, inputs):
        vectors = self.dropout(self.embedding(inputs.input_ids))
        if self.leaks:
            vectors = vectors + self.gate * vectors.mean(1, keepdim=True)
        return AuxiliaryOutput(self.norm(vectors))


def test_a_custom_module_that_would_leak_once_it_is_trained_is_refused():
    with pytest.raises(ValueError, match="Leaky cannot be an auxiliary: later tokens"):
        AuxTunedForCausalLM.from_lm(tiny_lm(), Leaky(True))
    AuxTunedForCausalLM.from_lm(tiny_lm(), Leaky(False))


@pytest.mark.parametrize("kind", PAIRS)
def test_a_saved_pair_is_tried_when_it_is_loaded(kind, tmp_path):
    tiny_pair(kind).save_pretrained(tmp_path)
    lm = tiny_lm()
    for layer in lm.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="later tokens"):
        AuxTunedForCausalLM.from_pretrained(tmp_path, lm=lm)


def test_what_hides_the_base_is_named():
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(tiny_lm(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"PeftModelForCausalLM .*get_base_model\(\)"):
        AuxTunedForCausalLM.from_lm(lora, auxiliary_config=DECODER)
    AuxTunedForCausalLM.from_lm(lora.get_base_model(), auxiliary_config=DECODER)
    with pytest.raises(TypeError, match="Linear; it must be a causal language model of transformers"):
        AuxTunedForCausalLM.from_lm(nn.Linear(2, 2), auxiliary_config=DECODER)


def test_a_base_without_its_class_of_logits_is_refused():
    lm = tiny_lm()
    with pytest.raises(ValueError, match=r"LlamaModel .* no transformer and output embedding of its own"):
        AuxTunedForCausalLM.from_lm(lm.model, auxiliary_config=DECODER)
    assert isinstance(lm, LlamaForCausalLM)


def test_hidden_states_of_another_shape_are_named():
    lm = base(
        "opt",
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        do_layer_norm_before=False,
    )
    with pytest.raises(
        ValueError, match=r"lm_layers names 1, but hidden state 1 of OPTForCausalLM has shape"
    ):
        AuxTunedForCausalLM.from_lm(lm, auxiliary_config=DECODER, lm_layers=[1])
    model = AuxTunedForCausalLM.from_lm(lm, auxiliary_config=DECODER, head="shared").eval()
    ids = ragged_batch()["input_ids"]
    torch.testing.assert_close(model(ids).logits, lm(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_language_model_inside_another_is_named():
    text = {"vocab_size": V, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "word_embed_proj_dim": 16, "model_type": "opt"}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        text_config=text,
        vision_config={**small, "image_size": 4, "patch_size": 2},
        qformer_config={**small, "encoder_hidden_size": 16},
    )
    lm = Blip2ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"'blip-2'.* pass the language model in it, model\.language_model"):
        AuxTunedForCausalLM.from_lm(lm, auxiliary_config=DECODER)
    AuxTunedForCausalLM.from_lm(lm.language_model, auxiliary_config=DECODER)
