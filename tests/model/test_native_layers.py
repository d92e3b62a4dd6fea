"""Decoder layers as one native step: each family's model, and when a layer's own forward goes on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from auxkern.generation.slots import SlotTable
from auxkern.model import fingerprint, use_native_kernels
from auxkern.model.caches import CACHE_NAME
from auxkern.model.native import NativeLayer, explain

V, D = 97, 64
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.15,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FOUR_HEADS = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral, window": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
    "gemma": GemmaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        sliding_window=5,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "olmo": OlmoConfig(**FOUR_HEADS, clip_qkv=0.4),
    "olmo2": Olmo2Config(**FOUR_HEADS, num_key_value_heads=2),
    "phi": PhiConfig(**{**FOUR_HEADS, "hidden_size": 128}, partial_rotary_factor=0.5),
    "phi, normed heads": PhiConfig(**FOUR_HEADS, qk_layernorm=True, hidden_act="gelu"),
    "phi3": Phi3Config(**FOUR_HEADS, num_key_value_heads=2, sliding_window=5),
    "gpt2": GPT2Config(
        vocab_size=V, n_embd=D, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}


def model_of(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms and biases that are ones and zeros would not be missed.
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                elif isinstance(config, GPT2Config):
                    parameter.mul_(5)
    return model.requires_grad_(False)


def pair_of(config: Any) -> tuple[Any, Any]:
    return model_of(config), use_native_kernels(model_of(config))


def native_layers(model: Any) -> list[NativeLayer]:
    return [module for module in model.modules() if isinstance(module, NativeLayer)]


def padded_on_the_left(rows: int = 4, width: int = 9) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, V, (rows, width), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return ids, mask


def called(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, **options)


def assert_close(found: Tensor, expected: Tensor) -> None:
    # Three layers of some hundred products each, in another order; what they say grows through the layers.
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5 * expected.abs().max().item())


class Steps:
    """Counts native steps and layers that went on as they were."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[bool] = []
        for layer in native_layers(model):
            run = layer.native_step.run
            monkeypatch.setattr(layer.native_step, "run", self._counted(run))

    def _counted(self, run: Any) -> Any:
        def counted(*args: Any) -> Any:
            y = run(*args)
            self.taken.append(y is not None)
            return y

        return counted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_says_what_it_said(family, monkeypatch):
    plain, model = pair_of(FAMILIES[family])
    assert len(native_layers(model)) == 3, explain(model)
    assert fingerprint(model) == fingerprint(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    steps = Steps(model, monkeypatch)
    ids, mask = padded_on_the_left()
    real = mask != 0
    expected = called(plain, ids, mask, output_hidden_states=True)
    found = called(model, ids, mask, output_hidden_states=True)
    assert_close(found.logits[real], expected.logits[real])
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_close(ours[real], theirs[real])
    assert steps.taken == [True] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_on_from_its_cache(family, monkeypatch):
    plain, model = pair_of(FAMILIES[family])
    steps = Steps(model, monkeypatch)
    ids, mask = padded_on_the_left(width=14)
    real = mask != 0
    expected = called(plain, ids, mask).logits
    caches = {CACHE_NAME: DynamicCache(config=model.config)}
    for begin, end in ((0, 9), (9, 10), (10, 11), (11, 14)):
        found = called(model, ids[:, begin:end], mask[:, :end], use_cache=True, **caches).logits
        assert_close(found[real[:, begin:end]], expected[:, begin:end][real[:, begin:end]])
    assert all(steps.taken)
    assert len(steps.taken) == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_padding_and_threads_do_not_matter_to_the_last_bit(family, threads):
    _, model = pair_of(FAMILIES[family])
    ids, mask = padded_on_the_left()
    torch.set_num_threads(2)
    together = called(model, ids, mask).logits
    torch.set_num_threads(1)
    for row in range(len(ids)):
        text = mask[row] != 0
        alone = called(model, ids[row : row + 1, text], mask[row : row + 1, text]).logits
        assert torch.equal(alone[0], together[row, text])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_generate(family):
    plain, model = pair_of(FAMILIES[family])
    ids, mask = padded_on_the_left()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "phi", "gpt2"])
def test_a_cache_that_is_written_in_place_says_the_same_to_the_last_bit(family):
    _, model = pair_of(FAMILIES[family])
    ids, mask = padded_on_the_left(width=12)
    cache = DynamicCache()  # without windows, as a table keeps all columns
    called(model, ids[:, :9], mask[:, :9], use_cache=True, **{CACHE_NAME: cache})
    table = SlotTable(5, 20, torch.device("cpu"))
    table.reserve(cache)
    table.join(cache, mask[:, :9])
    for end in (10, 11, 12):
        one = {"use_cache": True}
        expected = called(model, ids[:, end - 1 : end], mask[:, :end], **one, **{CACHE_NAME: cache}).logits
        found = called(model, ids[:, end - 1 : end], mask[:, :end], **one, **{CACHE_NAME: table.cache}).logits
        assert torch.equal(found, expected)
        table.advance()
    for of_slots, dynamic in zip(table.layers, cache.layers, strict=True):
        assert torch.equal(of_slots.keys[:4, :, table.begin : table.end], dynamic.keys)
        assert torch.equal(of_slots.values[:4, :, table.begin : table.end], dynamic.values)
