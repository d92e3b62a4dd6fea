"""Decoder layers as one native step: each family's model, and when a layer's own forward goes on."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
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
from auxkern.model.native import NativeLayer, compute_of, explain

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


# Of the largest logit, after a dozen products in a row: operands keep 8 bits, or 7 beside the largest of 64.
NARROW = {"bfloat16": 0.03, "int8": 0.06}


@pytest.mark.parametrize("compute", NARROW)
@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "phi", "gpt2"])
def test_narrow_arithmetic_says_about_the_same(family, compute):
    plain, model = model_of(FAMILIES[family]), use_native_kernels(model_of(FAMILIES[family]), compute)
    assert f"3 decoder layers run as one native step each, in {compute}" in explain(model)
    ids, mask = padded_on_the_left()
    real = mask != 0
    expected, found = called(plain, ids, mask).logits[real], called(model, ids, mask).logits[real]
    assert 0 < (found - expected).abs().max() <= NARROW[compute] * expected.abs().max()
    row = mask[1] != 0
    alone = called(model, ids[1:2, row], mask[1:2, row]).logits
    assert torch.equal(alone[0], called(model, ids, mask).logits[1, row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_weights_are_multiplied_as_they_are(dtype):
    wide, narrow = pair_of(FAMILIES["qwen2"])[0].to(dtype).float(), model_of(FAMILIES["qwen2"]).to(dtype)
    ids, mask = padded_on_the_left()
    found = called(use_native_kernels(narrow), ids, mask).logits[mask != 0]
    assert_close(found, called(wide, ids, mask).logits[mask != 0])
    steps = [layer.native_step for layer in native_layers(narrow)]
    weights = sum(p.numel() for layer in wide.model.layers for p in layer.parameters() if p.dim() == 2)
    # Outputs stand in whole panels of 16.
    assert 2 * weights <= sum(step.nbytes for step in steps) < 2.2 * weights


def test_gradients_go_through_the_layers_own_forward(monkeypatch):
    plain, model = pair_of(FAMILIES["llama"])
    steps = Steps(model, monkeypatch)
    vectors = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(1))
    gradients = []
    for one in (plain, model):
        leaf = vectors.clone().requires_grad_()
        one(inputs_embeds=leaf).logits.square().mean().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6 * gradients[0].abs().max().item())
    # The first layer is given a leaf that asks for one, the others what it made of it.
    assert steps.taken == [False] * 3


def own_forward_goes_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    steps = Steps(model, monkeypatch)
    called(model, *padded_on_the_left())
    return not any(steps.taken)


def test_what_the_step_does_not_do_the_layers_own_forward_does(monkeypatch):
    _, model = pair_of(FAMILIES["llama"])
    assert not own_forward_goes_on(model, monkeypatch)
    assert own_forward_goes_on(model.train(), monkeypatch)
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert own_forward_goes_on(model, monkeypatch)
    hooks = [layer.mlp.down_proj.register_forward_hook(lambda *_: None) for layer in model.model.layers]
    assert own_forward_goes_on(model, monkeypatch)
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation("eager")
    assert own_forward_goes_on(model, monkeypatch)


def test_options_and_tensors_of_another_kind_go_to_the_layers_own_forward():
    _, model = pair_of(FAMILIES["llama"])
    layer, x = model.model.layers[0], torch.randn(2, 3, D)
    angles = tuple(torch.randn(2, 3, 32) for _ in range(2))
    step = layer.native_step
    with torch.no_grad():
        assert step.run(layer, x, (), {"position_embeddings": angles}) is not None
        assert step.run(layer, x, (), {}) is None
        assert step.run(layer, x.double(), (), {"position_embeddings": angles}) is None
        assert step.run(layer, x, (), {"position_embeddings": angles, "cu_seq_lens_q": x}) is None
        assert step.run(layer, x, (), {"position_embeddings": angles, "output_attentions": True}) is None
        additive = torch.zeros(2, 1, 3, 3)
        assert step.run(layer, x, (), {"position_embeddings": angles, "attention_mask": additive}) is None
        of_heads = torch.ones(2, 4, 3, 3, dtype=torch.bool)
        assert step.run(layer, x, (), {"position_embeddings": angles, "attention_mask": of_heads}) is None


def test_weights_that_were_trained_are_packed_again():
    plain, model = pair_of(FAMILIES["llama"])
    ids, mask = padded_on_the_left()
    for one in (plain, model):
        called(one, ids, mask)
        one.requires_grad_(True).train()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
        one(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        optimizer.step()
        one.requires_grad_(False).eval()
    found, expected = called(model, ids, mask).logits, called(plain, ids, mask).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    state = model_of(FAMILIES["llama"]).state_dict()
    for one in (plain, model):
        one.load_state_dict(state)
    assert_close(called(model, ids, mask).logits[mask != 0], called(plain, ids, mask).logits[mask != 0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_weights_of_its_own(copied, monkeypatch):
    _, model = pair_of(FAMILIES["qwen3"])
    ids, mask = padded_on_the_left()
    expected = called(model, ids, mask).logits
    other = copied(model)
    steps = Steps(other, monkeypatch)
    assert torch.equal(called(other, ids, mask).logits, expected)
    assert steps.taken == [True] * 3
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.zero_()
    assert not torch.equal(called(other, ids, mask).logits, expected)
    assert torch.equal(called(model, ids, mask).logits, expected)


def test_a_child_that_is_replaced_is_used(monkeypatch):
    plain, model = pair_of(FAMILIES["llama"])
    for one in (plain, model):
        one.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    ids, mask = padded_on_the_left()
    steps = Steps(model, monkeypatch)
    assert_close(called(model, ids, mask).logits[mask != 0], called(plain, ids, mask).logits[mask != 0])
    assert steps.taken == [True, False, True]
    assert "its activation Tanh has no native kernel" in explain(model)


def stays(config: Any) -> str:
    model = use_native_kernels(model_of(config))
    assert not native_layers(model)
    return explain(model)


def test_layers_that_stay_say_why():
    small = {**SIZES, "num_hidden_layers": 1}
    assert "attention has a soft cap" in stays(Gemma2Config(**SIZES))
    assert "heads have a width of 8, which is no multiple of 16" in stays(
        LlamaConfig(**{**small, "head_dim": 8})
    )
    assert "its activation QuickGELUActivation has no native kernel" in stays(
        LlamaConfig(**small, hidden_act="quick_gelu")
    )
    # What no description names shows in the comparison.
    scaled = stays(
        GraniteConfig(**{name: n for name, n in small.items() if name != "head_dim"}, residual_multiplier=0.7)
    )
    assert "its native step differs from it by" in scaled
    assert "has no structure that is known" in stays(
        GPTNeoXConfig(
            vocab_size=V, hidden_size=D, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4
        )
    )
    assert "its attention is 'eager'" in explain(
        use_native_kernels(
            AutoModelForCausalLM.from_config(LlamaConfig(**small), attn_implementation="eager").eval()
        )
    )


def test_explain_counts_layers_and_memory():
    _, model = pair_of(FAMILIES["llama"])
    model.model.layers[2].native_step.refusal = "it was changed"
    text = explain(model)
    assert "2 decoder layers run as one native step each, in float32; packed weights take" in text
    assert "1 as they were, model.layers.2: NativeLlamaDecoderLayer: it was changed" in text
    assert (
        explain(torch.nn.Linear(2, 2)) == "no decoder layers run as one native step; see use_native_kernels"
    )


def test_an_unknown_arithmetic_is_refused():
    with pytest.raises(ValueError, match="compute is 'int4'; choose one of 'float32', 'bfloat16', 'int8'"):
        use_native_kernels(model_of(FAMILIES["llama"]), "int4")


def test_weights_that_int8_cannot_keep_leave_a_layer_as_it_was():
    model = model_of(FAMILIES["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    use_native_kernels(model, "int8")
    assert len(native_layers(model)) == 2
    assert "model.layers.1: LlamaDecoderLayer" in explain(model)


def test_the_arithmetic_can_be_changed():
    plain, model = pair_of(FAMILIES["llama"])
    ids, mask = padded_on_the_left()
    exact = called(model, ids, mask).logits
    assert compute_of(model) == "float32"
    use_native_kernels(model, "int8")
    assert "3 decoder layers run as one native step each, in int8" in explain(model)
    assert not torch.equal(called(model, ids, mask).logits, exact)
    use_native_kernels(model, "float32")
    assert torch.equal(called(model, ids, mask).logits, exact)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_explain_counts_linear_layers_that_were_packed():
    _, model = pair_of(FAMILIES["llama"])
    called(model, *padded_on_the_left())
    bytes_of_head = 4 * 7 * 16 * D  # 97 ids in panels of 16
    assert (
        f"1 linear layers beside them have a packed weight; it takes {bytes_of_head / 1e6:.1f} MB"
        in explain(model)
    )


def test_a_layer_refuses_a_cache_of_other_heads():
    _, model = pair_of(FAMILIES["llama"])
    layer, x = model.model.layers[0], torch.randn(2, 1, D)
    cache = DynamicCache()
    cache.update(torch.randn(2, 3, 4, 32), torch.randn(2, 3, 4, 32), 0)
    options = {"position_embeddings": tuple(torch.randn(2, 1, 32) for _ in range(2)), CACHE_NAME: cache}
    with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer(x, **options)
    with torch.no_grad(), pytest.raises(RuntimeError, match="must match the size of tensor b"):
        layer(torch.randn(2, 1, D + 1), position_embeddings=options["position_embeddings"])
