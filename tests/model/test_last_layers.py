"""An auxiliary of the base's last layers: what it adds, what is trained and saved, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from auxkern.generation import Engine, Member, Request
from auxkern.model import AuxTunedForCausalLM, TextFormat, use_native_kernels
from auxkern.model.fingerprints import fingerprint
from auxkern.model.text import Example
from tests.support.batches import ragged_batch
from tests.support.tiny import tiny_lm, word_lm, word_tokenizer

pytest.importorskip("peft")

PREFIX = [1, 7, 30, 8, 12]
TOLD: dict[str, Any] = {"base_prompt": "{condition} :", "base_prefix_ids": PREFIX}


def last_layers(lm: Any = None, *, trained: bool = True, **fields: Any) -> AuxTunedForCausalLM:
    settings: dict[str, Any] = {"architecture": "last-layers", "last_layers": 2, "lora_rank": 4, **fields}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AuxTunedForCausalLM.from_lm(lm or tiny_lm(), **settings)
        if trained:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def matrices_of(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA's A and B by the name of the layer that they stand beside."""
    return {
        name.replace("-", "."): (pair["A"]["default"].weight, pair["B"]["default"].weight)
        for name, pair in model.auxiliary.adapters.items()
    }


def changed(lm: Any, model: Any) -> Any:
    """A language model with the matrices added to its own weights, as the formula has it: W + 2 B A."""
    lm = copy.deepcopy(lm)
    first = lm.config.num_hidden_layers - model.config.last_layers
    with torch.no_grad():
        for name, (a, b) in matrices_of(model).items():
            _, layer, rest = name.split(".", 2)
            lm.get_submodule(f"model.layers.{int(layer) + first}.{rest}").weight += 2 * b @ a
    return lm


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("fields", [{}, {"lora_rank": 0}, TOLD], ids=["LoRA", "whole", "prefix"])
def test_an_untrained_one_adds_nothing(fields: dict[str, Any], native: bool) -> None:
    lm = use_native_kernels(tiny_lm()) if native else tiny_lm()
    model, batch = last_layers(lm, trained=False, **fields), ragged_batch()
    with torch.no_grad():
        whole, alone = (model(**batch, aux_scale=scale).loss for scale in (1.0, 0.0))
    # The layers' products in another order.
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=0)


def test_it_is_the_language_model_with_the_matrices_in_its_weights() -> None:
    lm = tiny_lm()
    model, batch = last_layers(lm), ragged_batch()
    with torch.no_grad():
        ours = model(batch["input_ids"], batch["attention_mask"]).logits
        exact = changed(lm, model)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        plain = lm(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        half = model(batch["input_ids"], batch["attention_mask"], aux_scale=0.5).logits
    real = batch["attention_mask"] != 0
    torch.testing.assert_close(ours[real], exact[real], rtol=1e-4, atol=1e-4)
    assert (exact - plain)[real].abs().max() > 0.1
    torch.testing.assert_close(half[real], ((exact + plain) / 2)[real], rtol=1e-4, atol=1e-4)


def test_of_a_prefix_it_sees_the_bases_own_keys_and_values() -> None:
    lm = tiny_lm()
    model, batch = last_layers(lm, **TOLD), ragged_batch()
    cache = lm(torch.tensor([PREFIX]), use_cache=True)
    cache = cache.get("cache", None) or cache.past_key_values
    row = batch["input_ids"][:1, : int(batch["attention_mask"][0].sum())]
    with torch.no_grad():
        ours = model(row).logits
        exact = changed(lm, model)(row, past_key_values=copy.deepcopy(cache)).logits
        without = last_layers(lm)(row).logits
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    assert (ours - without).abs().max() > 0.1


@pytest.mark.parametrize("fields", [{}, {"lora_rank": 0}, {"pointer": True, "pointer_size": 8}, TOLD])
def test_only_its_own_is_trained_and_saved(tmp_path: Path, fields: dict[str, Any]) -> None:
    lm = tiny_lm()
    before = fingerprint(lm)
    model, batch = last_layers(lm, **fields).train(), ragged_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    assert all(parameter.grad is None for parameter in lm.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = AuxTunedForCausalLM.from_pretrained(tmp_path, lm=lm).eval()
    assert fingerprint(lm) == before
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss, rtol=0, atol=0)
    saved = load_file(tmp_path / "model.safetensors")
    own = {"adapters"} if model.config.lora_rank else {"body"}
    own |= {"pointer", "reads", "names", "tells"} if model.config.pointer else set()
    assert {name.split(".")[1] for name in saved} == own


def test_merged_layers_say_the_same_and_are_trained_again_unmerged() -> None:
    model, batch = last_layers(**TOLD), ragged_batch()
    with torch.no_grad():
        before = model(**batch).loss
        model.auxiliary.merge()
        torch.testing.assert_close(model(**batch).loss, before, rtol=1e-5, atol=0)
        assert not any("lora" in name for name, _ in model.auxiliary.transformer.named_parameters())
        model.use_native_kernels()
        torch.testing.assert_close(model(**batch).loss, before, rtol=1e-5, atol=0)
    model.train()
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_that_move_are_the_bases_still() -> None:
    model, batch = last_layers(), ragged_batch()
    model.lm.double()
    model.double()
    shared = model.auxiliary.transformer.layers[0].self_attn.q_proj.base_layer.weight
    assert shared is model.lm.model.layers[1].self_attn.q_proj.weight
    assert model(**batch).loss.isfinite()
    model.auxiliary.merge()
    merged = model.auxiliary.transformer
    model.float()
    assert model.auxiliary.transformer is not merged
    assert not any("lora" in name for name, _ in model.auxiliary.transformer.named_parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"last_layers": 4}, "last_layers is 4, but the base has 3"),
        ({"last_layers": 0}, "last_layers is 0 and architecture 'last-layers'"),
        ({"lm_layers": [2]}, r"lm_layers is \[2\], but the last 2 layers read \[1\]"),
        ({"lm_term": "logits"}, "needs lm_term=\"head\", but it is 'logits'"),
        ({"base_prompt": "{condition}:"}, "0 base_prefix_ids; give both or neither"),
        ({"base_prefix_ids": [1]}, "1 base_prefix_ids; give both or neither"),
        (
            {"base_prompt": "{word}:", "base_prefix_ids": [1]},
            "base_prompt is '{word}:': it has another field",
        ),
        ({"base_prompt": "{condition}:", "base_prefix_ids": [-1]}, "must list token ids"),
    ],
)
def test_what_contradicts_itself_or_the_base_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        last_layers(**fields)


def test_a_base_that_does_more_between_its_layers_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ValueError, match="last 2 layers of GPT2LMHeadModel on its hidden states give other"):
        last_layers(GPT2LMHeadModel(config).eval())


def test_a_base_that_caps_its_logits_is_refused() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Gemma2Config(vocab_size=97, head_dim=8, num_key_value_heads=4, **sizes)
    with pytest.raises(ValueError, match=r"caps its logits at 30\.0"):
        last_layers(Gemma2ForCausalLM(config).eval())


# ----------------------------------------------------------------------- what of the base is left out


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{}, TOLD, {"last_layers": 3}, {"last_layers": 3, **TOLD}],
    ids=["plain", "prefix", "all layers", "all layers and prefix"],
)
def test_at_weight_1_the_base_ends_where_they_begin(fields: dict[str, Any], native: bool) -> None:
    lm = use_native_kernels(tiny_lm()) if native else tiny_lm()
    model, batch = last_layers(lm, **fields), ragged_batch()
    model = model.use_native_kernels() if native else model
    ids, mask = batch["input_ids"], batch["attention_mask"]
    calls: list[str] = []
    hook = lm.model.norm.register_forward_hook(lambda *_: calls.append("norm"))

    with torch.no_grad():
        if "base_prefix_ids" in fields:
            model.base_prefix.states()
        calls.clear()
        short = model(ids, mask).logits
        assert not calls
        whole = model(ids, mask, aux_scale=torch.ones(len(ids))).logits
        assert calls
        calls.clear()
        model(ids, mask, aux_scale=0.5)
        assert calls
    real = mask != 0
    torch.testing.assert_close(short[real], whole[real], rtol=1e-4, atol=1e-4)
    hook.remove()
    left = tuple(batch[name].flip(1) for name in ("input_ids", "attention_mask"))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    texts = model.generate(*left[:1], attention_mask=left[1], **options)
    same = model.generate(*left[:1], attention_mask=left[1], aux_scale=[1.0] * len(ids), **options)
    assert texts.tolist() == same.tolist()


def test_a_view_of_a_base_follows_it() -> None:
    model, batch = last_layers(), ragged_batch()
    before = model(**batch).loss
    use_native_kernels(model.lm)
    torch.testing.assert_close(model(**batch).loss, before, rtol=1e-5, atol=0)
    with torch.no_grad():
        model.lm.model.layers[0].mlp.down_proj.weight.mul_(2)
    assert abs(float(model(**batch).loss - before)) > 1e-3


@pytest.mark.parametrize(("native", "last_of_three"), [(False, 2), (True, 2), (True, 3)])
def test_requests_of_all_kinds_do_not_depend_on_each_other(native: bool, last_of_three: int) -> None:
    text = TextFormat(word_tokenizer(), base_prompt="{condition} w90")
    prefix = text.base_prefix([Example("w3", "w4 w3")])
    lm = word_lm(hidden_size=64)  # heads that native attention takes
    model = last_layers(lm, base_prompt=text.base_prompt, base_prefix_ids=prefix, pointer=True)
    model = model.use_native_kernels() if native else model
    kinds: list[dict[str, Any]] = [
        {},
        {"auxiliary": None},
        {"aux_scale": 0.5},
        {"logprobs": True},
        {"members": (Member(), Member("default", condition="w7"), Member(prompt="w9", weight=0.5))},
    ]
    requests = []
    for i in range(15):
        fields = kinds[i % 5]
        fields = fields if "members" in fields else {"condition": f"w{i + 7}", **fields}
        requests.append(Request(f"{i}", prompt="w3 " * (i % 3), seed=i, max_new_tokens=4 + i % 3, **fields))
    alone = [Engine(model, text, slots=2, max_length=32).generate([one])[0] for one in requests]
    assert not any(one.error for one in alone)
    for slots in (3, 16):
        together = Engine(model, text, slots=slots, max_length=32).generate(requests)
        assert [one.text for one in together] == [one.text for one in alone]
        if native:
            assert [one.logprobs for one in together] == [one.logprobs for one in alone]
    # Log-probabilities need the whole base: another way to the same numbers.
    with_logprobs = Engine(model, text, slots=4, max_length=32).generate(
        [replace(requests[0], logprobs=True), replace(requests[5], logprobs=True)]
    )
    assert [one.text for one in with_logprobs] == [alone[0].text, alone[5].text]


@pytest.mark.parametrize("native", [False, True])
def test_a_pair_of_all_layers_writes_what_the_whole_base_would(native: bool) -> None:
    text = TextFormat(word_tokenizer(), base_prompt="{condition} w90")
    prefix = text.base_prefix([Example("w3", "w4 w3")])
    lm = word_lm(hidden_size=64)  # heads that native attention takes
    model = last_layers(
        use_native_kernels(lm) if native else lm,
        last_layers=3,
        base_prompt=text.base_prompt,
        base_prefix_ids=prefix,
        pointer=True,
    )
    model = model.use_native_kernels() if native else model
    request = Request("1", condition="w7", seed=1, max_new_tokens=6)
    # Log-probabilities need the whole base: another way to the same numbers.
    short, whole = (
        Engine(model, text, slots=2, max_length=32).generate([one])[0]
        for one in (request, replace(request, logprobs=True))
    )
    assert short.token_ids == whole.token_ids
    assert len(short.token_ids) > 1
