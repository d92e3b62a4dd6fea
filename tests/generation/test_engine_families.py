"""Families of bases in the engine: the texts of ``model.generate``, or a refusal when it is made."""

import random

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from auxkern.generation import Engine, Request
from auxkern.model import AuxTunedForCausalLM, TextFormat
from tests.support.tiny import DECODER, byte_tokenizer, tiny_pair

TOKENIZER = byte_tokenizer()
TEXT = TextFormat(TOKENIZER)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
TWO_KINDS = {**SIZES, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Windows of 5 are in the midst of every text, windows of 4096 are nowhere.
SERVED = {
    "Mistral, window 5": ("Mistral", {**SIZES, "sliding_window": 5}),
    "Mistral, window 4096": ("Mistral", {**SIZES, "sliding_window": 4096}),
    "Phi3": ("Phi3", {**SIZES, "sliding_window": 5}),
    "Gemma2": ("Gemma2", {**TWO_KINDS, "sliding_window": 5}),
    "Gemma3": ("Gemma3", {**TWO_KINDS, "sliding_window": 5}),
    "GptOss": ("GptOss", {**TWO_KINDS, **EXPERTS, "sliding_window": 5}),
    "Qwen2, one window": ("Qwen2", {**TWO_KINDS, "use_sliding_window": True, "sliding_window": 5}),
    "Starcoder2": ("Starcoder2", {**SIZES, "sliding_window": 5}),
    "GPT2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}),
    "GPTNeo": (
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
            "window_size": 5,
            "initializer_range": 0.2,
        },
    ),
    "OPT": (
        "OPT",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "init_std": 0.2,
        },
    ),
    "BLOOM": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
}
REFUSED = {
    "Bart": (
        {
            "d_model": 32,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
            "is_decoder": True,
            "is_encoder_decoder": False,
            "max_position_embeddings": 128,
            "init_std": 0.5,
        },
        "columns",
    ),
    "FalconH1": (
        {
            **SIZES,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 4,
            "mamba_chunk_size": 8,
        },
        "hybrid",
    ),
    "Qwen3Next": (
        {
            **SIZES,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "linear_attention",
    ),
    "Phi3": (
        {
            **SIZES,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 32,
            },
        },
        "longrope",
    ),
}


def _base(family, settings):
    names = [f"{family}TextConfig", f"{family}Config"]
    config = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    ids = {f"{name}_token_id": getattr(TOKENIZER, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config(vocab_size=len(TOKENIZER), **ids, **settings))
        for parameter in lm.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)  # gpt-oss leaves its experts as they are
    return lm.eval()


def _pair(family, settings):
    return tiny_pair("own head", _base(family, settings))


@pytest.mark.parametrize("name", SERVED)
def test_a_served_family_writes_what_generate_writes(name):
    model = _pair(*SERVED[name])
    chosen = random.Random(1)
    requests = [
        Request(
            i,
            "ab"[: 1 + i % 2],
            "".join(chosen.choices("abcd ", k=1 + 5 * (i % 3))),
            seed=i,
            max_new_tokens=12,
            ignore_eos=True,
        )
        for i in range(5)
    ]
    for request, done in zip(
        requests, Engine(model, TEXT, slots=3, max_length=48).generate(requests), strict=True
    ):
        batch = TEXT.prompts([request.condition], [request.prompt])
        ids = model.generate(
            **batch, do_sample=True, top_k=0, seeds=[request.seed], max_new_tokens=12, eos_token_id=None
        )
        assert list(done.token_ids) == ids[0, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", REFUSED)
def test_another_family_is_refused_when_the_engine_is_made(family):
    settings, reason = REFUSED[family]
    # The pair may refuse it before the engine does, by the name of the family.
    with pytest.raises(ValueError, match=f"{reason}|{family}"):
        Engine(_pair(family, settings), TEXT, slots=2, max_length=48)


def test_recorded_steps_are_refused_where_a_window_ends_within_them():
    model = _pair(*SERVED["Mistral, window 5"])
    with pytest.raises(ValueError, match="graphs cannot be recorded: the base has a sliding window of 5"):
        Engine(model, TEXT, slots=2, max_length=48, graphs=True)


@pytest.mark.parametrize("window", [4, 4096])
def test_an_auxiliary_with_a_window_is_taken_while_the_window_is_wider_than_a_slot(window):
    config = {**DECODER, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": window}
    lm = _base("Llama", SIZES)
    if window == 4:
        with pytest.raises(ValueError, match="window"):
            Engine(AuxTunedForCausalLM.from_lm(lm, auxiliary_config=config), TEXT, slots=2, max_length=48)
        return
    engine = Engine(tiny_pair("own head", lm, auxiliary_config=config), TEXT, slots=2, max_length=48)
    assert engine.generate([Request(0, "ab", "cd", max_new_tokens=6, ignore_eos=True)])[0].new_tokens == 6
