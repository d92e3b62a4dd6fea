"""Models in auxkern's CPU kernels: the same model, and rows that do not feel their neighbours."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, Qwen2Config

from auxkern.backends import choice
from auxkern.model import fingerprint, load_base, use_native_kernels
from auxkern.model.native import kernels
from auxkern.nn import FrozenEmbedding, FrozenLinear
from auxkern.ops.attention import attention
from tests.support.batches import ragged_batch
from tests.support.tiny import D_LM, PAIRS, V, tiny_lm, tiny_pair

SMALL = {
    "vocab_size": V,
    "hidden_size": D_LM,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
}
LMS = {
    "llama": lambda: tiny_lm(num_attention_heads=2, tie_word_embeddings=True),
    "llama, narrow heads": tiny_lm,  # attention stays torch's
    "qwen2, biases": lambda: _lm(Qwen2Config(**{**SMALL, "tie_word_embeddings": False})),
    "gemma, scaled embedding": lambda: _lm(GemmaConfig(**SMALL)),
    "gpt2, no linear layers": lambda: _lm(GPT2Config(vocab_size=V, n_embd=D_LM, n_layer=2, n_head=2)),
}


def _lm(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def padded_on_the_left():
    ids = torch.randint(3, V, (5, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row in range(5):
        mask[row, : 2 * row] = 0
    return ids, mask


def logits(lm, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        return lm(input_ids=ids, attention_mask=mask, position_ids=positions).logits


@pytest.mark.parametrize("kind", LMS)
def test_it_is_the_same_model(kind):
    lm, (ids, mask) = LMS[kind](), padded_on_the_left()
    before, names, state = logits(lm, ids, mask), fingerprint(lm), list(lm.state_dict())
    assert use_native_kernels(lm) is lm
    after = logits(lm, ids, mask)
    real = mask != 0
    torch.testing.assert_close(after[real], before[real], rtol=0, atol=2e-5 * before.abs().max().item())
    assert fingerprint(lm) == names
    assert list(lm.state_dict()) == state
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == (
        lm.config.tie_word_embeddings
    )


def test_the_kernels_are_used_where_a_layer_is_no_native_step(monkeypatch):
    lm, called = LMS["llama"](), []
    monkeypatch.setattr(kernels, "attention", lambda *a, **k: called.append(1) or attention(*a, **k))
    use_native_kernels(lm)
    for layer in lm.base_model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    called.clear()  # of the comparison with native steps
    logits(lm, *padded_on_the_left())
    assert len(called) == lm.config.num_hidden_layers
    kinds = [type(m) for m in lm.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))]
    assert set(kinds) == {FrozenLinear, FrozenEmbedding}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LMS)
def test_narrow_weights_are_those_weights_in_float32(kind, dtype):
    ids, mask = padded_on_the_left()
    wide, narrow = LMS[kind]().to(dtype).float(), use_native_kernels(LMS[kind]().to(dtype))
    found, expected = logits(narrow, ids, mask), logits(wide, ids, mask)
    assert found.dtype == torch.float32
    real = mask != 0
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=2e-5 * expected.abs().max().item())
    for layer in narrow.modules():
        for name, tensor in layer.named_parameters(recurse=False):
            if name != "weight" or not isinstance(layer, (FrozenLinear, FrozenEmbedding)):
                assert tensor.dtype == torch.float32, (type(layer), name)
    assert any(tensor.dtype == dtype for tensor in narrow.parameters())


@pytest.mark.parametrize("kind", ["llama", "qwen2, biases"])
def test_neighbours_and_padding_do_not_matter_to_the_last_bit(kind, threads):
    lm, (ids, mask) = use_native_kernels(LMS[kind]()), padded_on_the_left()
    torch.set_num_threads(2)
    together = logits(lm, ids, mask)
    torch.set_num_threads(1)
    for row in range(5):
        text = mask[row] != 0
        alone = logits(lm, ids[row : row + 1, text], mask[row : row + 1, text])
        assert torch.equal(alone[0], together[row, text])


def test_generation_goes_on_from_its_cache():
    lm, (ids, mask) = use_native_kernels(LMS["llama"]()), padded_on_the_left()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = lm.generate(input_ids=ids, attention_mask=mask, **options)
    for row in range(5):
        alone = lm.generate(input_ids=ids[row : row + 1, mask[row] != 0], **options)
        assert torch.equal(alone[0, -12:], together[row, -12:])


def test_gradients_still_flow():
    """Of vectors that are put before a text, say; through torch's own functions."""
    plain, lm = LMS["llama"](), use_native_kernels(LMS["llama"]())
    vectors = torch.randn(2, 6, D_LM, generator=torch.Generator().manual_seed(1))
    found = []
    for model in (plain, lm):
        model.requires_grad_(False)
        leaf = vectors.clone().requires_grad_()
        model(inputs_embeds=leaf).logits.square().mean().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6 * found[0].abs().max().item())


@pytest.mark.parametrize("kind", PAIRS)
def test_a_pair_as_a_whole(kind):
    model, batch = tiny_pair(kind), ragged_batch()
    batch.pop("labels")
    with torch.no_grad():
        before = model(**batch).logits
        assert model.use_native_kernels() is model
        after = model(**batch).logits
    real = batch["attention_mask"] != 0
    torch.testing.assert_close(after[real], before[real], rtol=0, atol=2e-5 * before.abs().max().item())


@pytest.mark.parametrize("kind", PAIRS)
def test_a_pair_is_trained_as_before(kind):
    plain, ours = tiny_pair(kind), tiny_pair(kind).use_native_kernels()
    losses = []
    for model in (plain, ours):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = model(**ragged_batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_base_is_loaded_with_them(tmp_path):
    LMS["llama"]().half().save_pretrained(tmp_path)
    lm = load_base(str(tmp_path))
    layer = lm.base_model.layers[0]
    assert isinstance(layer.mlp.up_proj, FrozenLinear)
    assert layer.mlp.up_proj.weight.dtype == torch.float16
    assert layer.input_layernorm.weight.dtype == torch.float32
    assert lm.config._attn_implementation == "auxkern"
    plain = load_base(str(tmp_path), native=False)
    assert type(plain.base_model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert fingerprint(lm) == fingerprint(plain)
    ids, mask = padded_on_the_left()
    torch.testing.assert_close(
        logits(lm, ids, mask)[mask != 0], logits(plain, ids, mask)[mask != 0], rtol=0, atol=1e-4
    )
    wide = load_base(str(tmp_path), dtype=torch.float32)
    assert wide.base_model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    eager = load_base(str(tmp_path), attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


def test_without_kernels_a_base_is_loaded_as_it_is(tmp_path, monkeypatch):
    LMS["llama"]().half().save_pretrained(tmp_path)
    chosen = choice._import
    monkeypatch.setattr(
        choice, "_import", lambda name: "OSError: it is not there" if name == "cpu" else chosen(name)
    )
    choice._explained.cache_clear()
    try:
        assert type(load_base(str(tmp_path)).base_model.layers[0].mlp.up_proj) is torch.nn.Linear
        with pytest.raises(RuntimeError, match="no native kernels for AVX2 or AVX-512 here; leave the model"):
            load_base(str(tmp_path), native=True)
    finally:
        monkeypatch.undo()
        choice._explained.cache_clear()
