"""What a base reads before every text, and the prompt that tells it the condition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from auxkern.evaluation.perplexity import evaluate_nll, plain_nll
from auxkern.generation import Engine, Member, Request
from auxkern.model import AuxTunedForCausalLM, TextFormat, use_native_kernels
from auxkern.model.inputs import PairInputs
from auxkern.model.prefix import BasePrefix, base_behind
from auxkern.model.text import IGNORED, Example
from auxkern.ops.dense import dense_logits
from auxkern.ops.sampling_params import SamplingParams
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import encode
from auxkern.training.lm_states import LMStates, cache_lm_states
from tests.support.tiny import DECODER, tiny_pair, word_lm, word_tokenizer

TEMPLATE = "{condition} w90"
EXAMPLES = [Example("w3 w4", "w9 w3 w4 w10"), Example("w5", "w5 w11", prompt="w12")]
CONDITIONS, PROMPTS = ["w7", "w8 w9", "w20 w21 w22", "w7"], ["", "w30 w31", "", "w32"]
KINDS: dict[str, dict[str, Any]] = {
    "decoder": {"auxiliary_config": DECODER, "pointer": True, "pointer_size": 8, "lm_layers": [1]},
    "last layers": {"architecture": "last-layers", "last_layers": 2, "lora_rank": 4, "pointer": True},
}


def text_format(template: str | None = TEMPLATE) -> TextFormat:
    return TextFormat(word_tokenizer(), base_prompt=template)


def told_pair(kind: str, *, native: bool = False) -> AuxTunedForCausalLM:
    """A pair with weights that are nowhere zero, on a base that is told conditions behind two examples."""
    if kind == "last layers":
        pytest.importorskip("peft")
    prefix = text_format().base_prefix(EXAMPLES)
    lm = use_native_kernels(word_lm()) if native else word_lm()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AuxTunedForCausalLM.from_lm(lm, base_prompt=TEMPLATE, base_prefix_ids=prefix, **KINDS[kind])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                loud = ".pointer.follow." in name or ".pointer.end." in name
                parameter.add_(torch.randn_like(parameter) * (0.02 if loud else 0.1))
    model.eval()
    return model.use_native_kernels() if native else model


# ------------------------------------------------------------------------------------------ the ids


def test_a_sequence_begins_with_what_the_base_is_told() -> None:
    text = text_format()
    (item,) = text.examples([Example("w3 w4", "w9 w3", prompt="w40")])
    ids = text.tokenizer("w3 w4 w90 w40 w9 w3", add_special_tokens=False)["input_ids"]
    assert item["input_ids"] == [*ids, text.end_id]
    assert item["labels"] == [*[IGNORED] * 4, *ids[4:], text.end_id]
    assert item["told"] == 3
    inputs = text.prompts(["w3 w4", "w5"], ["w40", ""])
    assert inputs["input_ids"].tolist() == [ids[:4], [text.pad_id, text.pad_id, ids[0] + 2, ids[2]]]
    assert inputs["told"].tolist() == [3, 2]
    plain = text.plain.prompts(["w3"])
    assert plain["input_ids"].tolist() == [[text.start_id]]
    assert "told" not in plain


def test_examples_stand_in_the_prefix_as_they_would_be_written() -> None:
    text = text_format()
    words = text.tokenizer("w3 w4 w90 w9 w3 w4 w10 w5 w90 w12 w5 w11", add_special_tokens=False)["input_ids"]
    assert text.base_prefix() == [text.start_id]
    assert text.base_prefix(EXAMPLES) == [text.start_id, *words]  # this tokenizer has no line ends
    with pytest.raises(ValueError, match="there is no base_prompt to write examples with"):
        text.plain.base_prefix(EXAMPLES)


@pytest.mark.parametrize("template", ["no field", "{condition} {other}", "{condition!r}"])
def test_a_base_prompt_of_other_fields_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"base_prompt is .*write \{condition\}"):
        text_format(template)


def test_a_base_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'\{condition\}' has no tokens for the condition ''"):
        text_format("{condition}").prompts([""])


# ------------------------------------------------------------------------------------ what is computed


def by_hand(model: Any, row: list[int]) -> Tensor:
    """(T, V) logits of the base over a row behind the prefix, in one pass of the language model."""
    prefix = model.config.base_prefix_ids
    return model.lm(torch.tensor([[*prefix, *row]])).logits[0, len(prefix) :]


@pytest.mark.parametrize("native", [False, True])
def test_the_base_reads_its_prefix_before_every_text(native: bool) -> None:
    model = told_pair("decoder", native=native)
    batch = AuxCollator(0)(text_format().examples([Example("w7", "w8 w9 w7"), Example("w5 w6", "w6")]))
    with torch.no_grad():
        ours = model(batch["input_ids"], batch["attention_mask"], aux_scale=0.0).logits
        for row, ids, mask in zip(ours, batch["input_ids"], batch["attention_mask"], strict=True):
            real = ids[mask != 0].tolist()
            torch.testing.assert_close(row[mask != 0], by_hand(model, real), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_steps_is_the_text_at_once(kind: str) -> None:
    model, inputs = told_pair(kind), text_format().prompts(CONDITIONS, PROMPTS)
    names = ("input_ids", "attention_mask", "condition_ids", "condition_mask", "told")
    ids, mask, *rest = (inputs[name] for name in names)
    new = torch.randint(3, 90, (len(ids), 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole_mask = torch.cat([mask, torch.ones_like(new)], 1)
        whole = model.terms(PairInputs(torch.cat([ids, new], 1), whole_mask, *rest), keep=3)
        cache = model.terms(PairInputs(ids, mask, *rest), use_cache=True).cache
        assert cache is not None
        assert cache.get_seq_length() == ids.shape[1]
        for t in range(3):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            step = model.terms(
                PairInputs(new[:, t : t + 1], mask, *rest), cache=cache, use_cache=True, keep=1
            )
            cache = step.cache
            expected, ours = (
                dense_logits(terms.terms, vocab_size=model.config.vocab_size) for terms in (whole, step)
            )
            torch.testing.assert_close(ours[:, 0], expected[:, t], rtol=1e-4, atol=1e-4)


def test_what_tells_the_base_is_not_text_of_the_condition() -> None:
    model, text = told_pair("decoder"), text_format()
    pointer = model.auxiliary.pointer

    def share(condition: str, prompt: str, told: bool = True) -> float:
        inputs = text.prompts([condition], [prompt])
        names = ("input_ids", "attention_mask", "condition_ids", "condition_mask", "told")
        batch = PairInputs(*(inputs[name] for name in (names if told else names[:4])))
        states = torch.zeros(1, batch.input_ids.shape[1], 2, 32)
        coverage = pointer.coverage(batch.for_auxiliary(states, torch.zeros(1, 32)), None)
        return float(coverage.share[0, -1, 0])

    assert share("w7", "") == 0
    assert share("w7", "", told=False) == 1
    assert share("w7", "w7") == 1
    # One that began in what is told begins anew in the text.
    assert share("w90 w40", "w40") == 0.5


def test_states_behind_a_prefix_are_those_of_the_pass(tmp_path: Path) -> None:
    model, text = told_pair("decoder"), text_format()
    encoded = encode([Example("w7", "w8 w9 w7"), Example("w5 w6", "w6"), Example("w7", "w8 w9 w7")], text)
    prefix = model.base_prefix
    base = model.lm_fingerprint
    states = cache_lm_states(
        model.lm, encoded, tmp_path, layers=[1], dtype="float32", base_fingerprint=base, prefix=prefix
    )
    kept = AuxCollator(0)([states.dataset(encoded)[i] for i in range(3)])
    live = AuxCollator(0)([encoded[i] for i in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(model(**kept).loss, model(**live).loss, rtol=1e-5, atol=0)
    row = encoded[1]["input_ids"]
    nll = torch.nn.functional.cross_entropy(by_hand(model, row)[:-1], torch.tensor(row[1:]), reduction="none")
    torch.testing.assert_close(states.lm_nll(1)[:-1], nll, rtol=1e-4, atol=1e-4)
    assert prefix.fingerprint(base) != base
    LMStates.open(tmp_path, encoded, prefix.fingerprint(base), [1])
    with pytest.raises(ValueError, match="base"):
        LMStates.open(tmp_path, encoded, base, [1])


def test_an_auxiliary_of_another_prefix_is_not_loaded(tmp_path: Path) -> None:
    model = told_pair("decoder")
    tiny_pair("own head", model.lm).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on a base with base_prompt=None, but this model's has"):
        model.load_auxiliary("plain", tmp_path)


def test_a_saved_pair_has_its_prefix(tmp_path: Path) -> None:
    model = told_pair("decoder")
    model.save_pretrained(tmp_path)
    loaded = AuxTunedForCausalLM.from_pretrained(tmp_path, lm=model.lm)
    assert loaded.base_prefix.ids == model.base_prefix.ids
    assert TextFormat.of(loaded.config, word_tokenizer()).base_prompt == TEMPLATE


# -------------------------------------------------------------------------------------------- texts


def generated(model: Any, conditions: list[str], prompts: list[str], **options: Any) -> list[str]:
    text = text_format()
    inputs = text.prompts(conditions, prompts)
    ids = model.generate(
        **inputs,
        seeds=range(len(conditions)),
        do_sample=True,
        top_k=0,
        max_new_tokens=8,
        eos_token_id=text.end_id,
        pad_token_id=text.pad_id,
        **options,
    )[:, inputs["input_ids"].shape[1] :].tolist()
    return [text.decode(row[: row.index(text.end_id)] if text.end_id in row else row) for row in ids]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_writes_what_generate_writes(kind: str, native: bool) -> None:
    model, text = told_pair(kind, native=native), text_format()
    auxiliaries: list[str | None] = ["default", None, "default", "default"]
    expected = generated(model, CONDITIONS, PROMPTS, auxiliary=auxiliaries, repetition_penalty=1.5)
    requests = [
        Request(
            i,
            condition,
            prompt,
            SamplingParams(repetition_penalty=1.5),
            seed=i,
            max_new_tokens=8,
            auxiliary=auxiliary,
        )
        for i, (condition, prompt, auxiliary) in enumerate(zip(CONDITIONS, PROMPTS, auxiliaries, strict=True))
    ]
    for slots in (1, 3, 8):
        completions = Engine(model, text, slots=slots, max_length=24).generate(requests)
        assert [one.text.strip() for one in completions] == expected, slots


def test_a_penalty_does_not_count_what_tells_the_base() -> None:
    model = told_pair("decoder")
    # The word that the base prompt ends with would be ruled out by such a penalty.
    text = text_format()
    inputs = text.prompts(["w7"])
    inputs.pop("told")
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 1,
        "pad_token_id": 0,
        "repetition_penalty": 1e9,
    }
    greedy = model.generate(**text.prompts(["w7"]), **options)[0, -1]
    bias = {int(inputs["input_ids"][0, -1]): 50.0}
    with_told = model.generate(
        **text.prompts(["w7"]), **options, sequence_bias={(token,): b for token, b in bias.items()}
    )[0, -1]
    assert int(with_told) in bias
    assert int(greedy) not in bias


def test_members_beside_a_base_that_is_told() -> None:
    model, text = told_pair("decoder"), text_format()
    engine = Engine(model, text, slots=4, max_length=24)
    pair = Request("pair", "w7", "w30", seed=1, max_new_tokens=6)
    members = (Member(prompt="w30"), Member("default", condition="w7"))
    plain = Request("plain", members=(Member(prompt="w30"),), seed=1, max_new_tokens=6)
    same, alone, of_pair = engine.generate(
        [Request("members", members=members, seed=1, max_new_tokens=6), plain, pair]
    )
    assert same.text == of_pair.text
    lm_alone = Engine(tiny_pair("own head", model.lm), text.plain, slots=1, max_length=24)
    (expected,) = lm_alone.generate([Request("lm", "", "w30", seed=1, max_new_tokens=6, auxiliary=None)])
    assert alone.text == expected.text
    two = (Member(), Member("default", condition="w7"), Member("default", condition="w8"))
    (refused,) = engine.generate([Request("two", members=two, max_new_tokens=2)])
    assert "give auxiliaries of one text one condition" in str(refused.error)


def test_an_engine_refuses_a_format_of_another_base() -> None:
    with pytest.raises(ValueError, match=r"text_format has None; take TextFormat\.of"):
        Engine(told_pair("decoder"), text_format().plain, slots=1, max_length=24)


# ------------------------------------------------------------------------------------------- scored


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_scored_with_what_it_is_told_and_without(kind: str) -> None:
    model, text = told_pair(kind), text_format()
    examples = [Example("w7", "w8 w9 w7"), Example("w5 w6", "w6"), Example("w3", "w4 w5", prompt="w9")]
    encoded = encode(examples, text)
    report = evaluate_nll(model, encoded)
    with torch.no_grad():
        told, plain = [], []
        for item, bare in zip(encoded, encode(examples, text.plain), strict=True):
            for made, one, before in ((told, item, model.config.base_prefix_ids), (plain, bare, [])):
                ids, labels = torch.tensor([[*before, *one["input_ids"]]]), torch.tensor(one["labels"])
                logits = model.lm(ids).logits[0, len(before) :]
                made.append(F.cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] != IGNORED])
        pair = model(**AuxCollator(0)([encoded[i] for i in range(3)])).loss
    assert report.lm_nll == pytest.approx(float(torch.cat(told).mean()), rel=1e-5)
    assert report.pair_nll == pytest.approx(float(pair), rel=1e-5)
    bare_nll = plain_nll(model, encode(examples, text.plain), batch_tokens=6)
    assert bare_nll == pytest.approx(float(torch.cat(plain).mean()), rel=1e-5)
    assert abs(bare_nll - report.lm_nll) > 0.01


def test_a_short_text_beside_a_long_one_has_room_for_its_tokens() -> None:
    """Padding within a batch of newcomers takes no columns of a slot."""
    model, text = told_pair("last layers"), text_format()
    long, short = "w3 " * 12, ""
    requests = [
        Request("long", "w7", long, seed=1, max_new_tokens=2, ignore_eos=True),
        Request("short", "w8", short, seed=2, max_new_tokens=14, ignore_eos=True),
    ]
    both = Engine(model, text, slots=2, max_length=17).generate(requests)
    alone = [Engine(model, text, slots=1, max_length=17).generate([one])[0] for one in requests]
    assert [one.error for one in both] == [None, None]
    assert [one.text for one in both] == [one.text for one in alone]


def test_padding_on_either_side_changes_nothing_behind_a_prefix() -> None:
    lm = use_native_kernels(word_lm(hidden_size=64))
    before = BasePrefix(lm, [1, 7, 9, 12, 30]).states()
    rows = {
        "alone": ([[11, 45]], [[1, 1]]),
        "right": ([[11, 45, 0, 0], [3, 4, 5, 6]], [[1, 1, 0, 0], [1] * 4]),
        "left": ([[0, 0, 11, 45], [3, 4, 5, 6]], [[0, 0, 1, 1], [1] * 4]),
    }
    read = {}
    with torch.no_grad():
        for name, (ids, mask) in rows.items():
            read[name] = base_behind(before, lm, torch.tensor(ids), torch.tensor(mask), layers=[1])
    for name, (_, mask) in rows.items():
        made, real = read[name], torch.tensor(mask[0]) != 0
        torch.testing.assert_close(made.states[0, real], read["alone"].states[0], rtol=0, atol=0)
        assert made.mask is not None
        columns = int(made.mask[0].sum())
        assert columns == 7
        assert made.mask[0, -columns:].all()
        keys = made.cache.layers[2].keys[0, :, -columns:]
        torch.testing.assert_close(keys, read["alone"].cache.layers[2].keys[0], rtol=0, atol=0)
