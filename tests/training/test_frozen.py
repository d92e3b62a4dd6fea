"""Training on top of frozen auxiliaries: the sum's loss and gradients, what stays as it is, refusals."""

from __future__ import annotations

import copy
import json
import os
import signal
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from auxkern.model import AuxTunedForCausalLM
from auxkern.model.frozen import auxiliary_fingerprint
from auxkern.model.text import Example, TextFormat
from auxkern.training.checkpoint import checkpoint_steps
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import encode, read_jsonl, write_jsonl
from auxkern.training.frozen import hold_frozen
from auxkern.training.loop import TrainingInterrupted, fingerprint_of, train
from auxkern.training.settings import LoopSettings, TrainSettings
from tests.support.on_top import (
    POINTER,
    SETTINGS,
    WEIGHTS,
    batch_of,
    examples,
    on_top,
    save_auxiliaries,
)
from tests.support.stand_in import At, bits
from tests.support.tiny import PAD, PAIRS, tiny_lm, tiny_pair, word_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the auxiliaries that are held frozen."""
    return save_auxiliaries(tmp_path)


def in_float64(model: AuxTunedForCausalLM) -> AuxTunedForCausalLM:
    """A copy of a pair, of its base and of what else is loaded."""
    exact = copy.deepcopy(model)
    for module in (exact.lm, exact, *(exact._named(name) for name in exact.auxiliary_names)):
        module.double()
    return exact


def plain_nll(exact: AuxTunedForCausalLM, encoded: Any, weights: Mapping[str, float]) -> Tensor:
    """Mean nll of the sum as its formula says it: sequence by sequence, member by member, without padding."""
    nll, count = torch.zeros((), dtype=torch.float64), 0
    for item in (encoded[i] for i in range(len(encoded))):
        ids = torch.tensor([item["input_ids"]])
        lm = exact.lm(input_ids=ids).logits[0]
        z = lm
        for name, weight in weights.items():
            of_member = item if name == "default" else item["frozen"][name]
            condition = torch.tensor([of_member["condition_ids"]], dtype=torch.int64)
            pair = exact._named(name)(input_ids=ids, condition_ids=condition, aux_scale=1.0).logits[0]
            z = z + weight * (pair - lm)
        labels = torch.tensor(item["labels"][1:])
        nll = nll + F.cross_entropy(z[:-1], labels, reduction="sum")
        count += int((labels != -100).sum())
    return nll / count


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def frozen_values(model: AuxTunedForCausalLM) -> dict[str, Tensor]:
    held = {f"{n} {k}": v.clone() for n in WEIGHTS for k, v in model._named(n).state_dict().items()}
    return held | {f"lm {k}": v.clone() for k, v in model.lm.state_dict().items()}


# ------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("kind", PAIRS)
def test_loss_and_gradients_are_those_of_the_sum_in_float64(saved: Path, kind: str) -> None:
    model, encoded_of = on_top(saved, kind)
    encoded, exact = encoded_of(examples()), in_float64(model)
    loss = model(**batch_of(encoded)).loss
    loss.backward()
    expected = plain_nll(exact, encoded, {"default": 1.0, **WEIGHTS})
    expected.backward()
    # Logits of tens in float32.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for (name, parameter), twin in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (parameter.grad is None) == (twin.grad is None), name
        if parameter.grad is not None:
            largest = float(twin.grad.abs().max())
            torch.testing.assert_close(parameter.grad.double(), twin.grad, rtol=1e-3, atol=1e-4 * largest)
    for name in WEIGHTS:
        assert all(parameter.grad is None for parameter in model._named(name).parameters())


@pytest.mark.parametrize("kind", PAIRS)
def test_before_the_first_step_the_loss_is_that_of_base_and_frozen(saved: Path, kind: str) -> None:
    model, encoded_of = on_top(saved, kind, trained=False)
    encoded = encoded_of(examples())
    with torch.no_grad():
        expected = plain_nll(in_float64(model), encoded, WEIGHTS)
        scored = model(**batch_of(encoded))
    torch.testing.assert_close(scored.loss.double(), expected, rtol=1e-5, atol=0)
    # The logits beside the loss are of the same sum.
    shifted = (scored.logits[:, :-1].flatten(0, 1), batch_of(encoded)["labels"][:, 1:].flatten())
    torch.testing.assert_close(F.cross_entropy(*shifted), scored.loss, rtol=1e-6, atol=0)


def run(saved: Path, output: Path, *, changes: Mapping[str, Any] = SETTINGS, **options: Any) -> Any:
    """A run on top of all KINDS; the model, its validation examples and the result."""
    model, encoded_of = on_top(saved, POINTER)
    validation = encoded_of(examples(5, seed=1))
    settings = LoopSettings(output=str(output), **{**SETTINGS, **changes})
    collate = AuxCollator(PAD)
    training = encoded_of(examples())
    result = train(model, training, settings, collate=collate, validation=validation, **options)
    return model, validation, result


def test_a_run_trains_its_own_auxiliary_alone_and_evaluates_the_sum(saved: Path, tmp_path: Path) -> None:
    before = frozen_values(on_top(saved, POINTER)[0])
    start = {name: value.clone() for name, value in tiny_pair(POINTER, tiny_lm()).state_dict().items()}
    model, validation, result = run(saved, tmp_path / "out")
    for name, value in frozen_values(model).items():
        assert torch.equal(value, before[name]), name
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = plain_nll(in_float64(model), validation, {"default": 1.0, **WEIGHTS})
        alone = plain_nll(in_float64(model), validation, {})
    assert result.state.nll == pytest.approx(expected.item(), rel=1e-5)
    assert result.state.lm_nll == pytest.approx(alone.item(), rel=1e-5)


def test_a_stopped_run_goes_on_to_the_same_bits(saved: Path, tmp_path: Path) -> None:
    run(saved, tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        run(saved, tmp_path / "stopped", progress=At(2, interrupt))
    assert checkpoint_steps(tmp_path / "stopped")[-1] == 2
    run(saved, tmp_path / "stopped", changes={"resume": True})
    assert bits(tmp_path / "stopped") == bits(tmp_path / "whole")


def test_a_run_is_not_resumed_on_top_of_others(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        run(saved, tmp_path / "out", progress=At(2, interrupt))
    other = AuxTunedForCausalLM.from_pretrained(saved / "own", lm=tiny_lm())
    with torch.no_grad():
        other.head.weight.mul_(1.5)
    other.save_pretrained(saved / "own")
    with pytest.raises(ValueError, match=r"is of another model: on_top_of.own is .*fingerprint"):
        run(saved, tmp_path / "out", changes={"resume": True})


# --------------------------------------------------------------------------------- what is written


def test_the_checkpoint_is_one_auxiliary_that_says_what_it_was_trained_on(
    saved: Path, tmp_path: Path
) -> None:
    model, _, result = run(saved, tmp_path / "out")
    with pytest.warns(UserWarning, match=r"in a sum with other auxiliaries, .* t5 \(.*t5, weight -0.4\)"):
        opened = AuxTunedForCausalLM.from_pretrained(result.output, lm=tiny_lm())
    assert opened.auxiliary_names == ["default"]
    held = opened.config.on_top_of
    assert {name: one["weight"] for name, one in held.items()} == WEIGHTS
    assert held["keyword"]["fingerprint"] == auxiliary_fingerprint(model._named("keyword"))
    assert set(opened.state_dict()) == set(tiny_pair(POINTER).state_dict())
    assert "own (" in (result.output / "README.md").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AuxTunedForCausalLM.from_pretrained(saved / "own", lm=tiny_lm())


def test_an_auxiliary_has_one_name_wherever_it_and_its_base_lie(saved: Path) -> None:
    names = {name: auxiliary_fingerprint(on_top(saved)[0]._named(name)) for name in WEIGHTS}
    assert len(set(names.values())) == 3
    config = json.loads((saved / "own" / "config.json").read_text())
    (saved / "own" / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": "moved"}))
    (saved / "own").rename(saved / "elsewhere")
    moved = AuxTunedForCausalLM.from_pretrained(saved / "elsewhere", lm=tiny_lm())
    assert auxiliary_fingerprint(moved) == names["own"]


def test_conditions_of_several_auxiliaries_in_a_file(tmp_path: Path) -> None:
    some = [Example("w1", "w2"), Example("w1", "w2", "w3", {"keyword": "w4", "t5": ""})]
    write_jsonl(tmp_path / "a.jsonl", some)
    assert read_jsonl(tmp_path / "a.jsonl") == some
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0]) == {"condition": "w1", "text": "w2"}
    (tmp_path / "b.jsonl").write_text('{"condition": "w1", "text": "w2", "conditions": {"keyword": 4}}\n')
    with pytest.raises(ValueError, match=r"b.jsonl, line 1: conditions\['keyword'\] must be a str, got int"):
        read_jsonl(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text('{"condition": "w1", "text": "w2", "conditions": "w3"}\n')
    with pytest.raises(ValueError, match="line 1: conditions must be a mapping from names"):
        read_jsonl(tmp_path / "b.jsonl")


def test_conditions_of_frozen_auxiliaries_name_the_data(saved: Path) -> None:
    encoded_of = on_top(saved)[1]
    some = examples(2)
    other = [some[0], Example(some[1].condition, some[1].text, conditions={**some[1].conditions, "t5": "w3"})]
    assert fingerprint_of(encoded_of(some)) != fingerprint_of(encoded_of(other))
    assert encoded_of(some)[1] == encoded_of([some[1]])[0]


# -------------------------------------------------------------------------------------- refusals


def test_an_auxiliary_of_another_base_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="was made for a base with fingerprint"):
        on_top(saved, lm=tiny_lm(seed=1))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}:nan", "frozen 'own' has the weight nan; give a finite number"),
        ("{}:-inf", "frozen 'own' has the weight -inf"),
        (":0.5", "':0.5', which names no folder"),
    ],
)
def test_bad_sources_are_refused(saved: Path, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hold_frozen(
            tiny_pair("own head"), {"own": source.format(saved / "own")}, TextFormat(word_tokenizer())
        )


def test_settings_refuse_what_a_run_would_write_over() -> None:
    data = {"base": "b", "train_file": "t", "validation_file": "v"}
    for path in ("out/a", "out/a/checkpoint-5:0.5", "./out/../out/a"):
        with pytest.raises(ValueError, match=r"frozen 'k' is .*, where this run writes to"):
            TrainSettings(output="out/a", frozen={"k": path}, **data)
    with pytest.raises(ValueError, match="'default' is the one that is trained"):
        TrainSettings(output="out/a", frozen={"default": "out/b"}, **data)
    with pytest.raises(TypeError, match="frozen 'k' must be PATH or PATH:WEIGHT, got 3"):
        TrainSettings(output="out/a", frozen={"k": 3}, **data)
    with pytest.raises(ValueError, match=r"pair holds 'on_top_of', .* use frozen"):
        TrainSettings(output="out/a", pair={"on_top_of": {}}, **data)


def test_texts_that_begin_otherwise_are_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="frozen 'own' was trained with text_prefix '', but here it is ' '"):
        hold_frozen(
            tiny_pair("own head"), {"own": str(saved / "own")}, TextFormat(word_tokenizer(), text_prefix=" ")
        )


def test_more_heads_than_a_sum_takes_are_refused(saved: Path) -> None:
    five = {str(i): str(saved / "own") for i in range(5)}
    with pytest.raises(ValueError, match="frozen are 5 auxiliaries with output embeddings of their own"):
        hold_frozen(tiny_pair(POINTER), five, TextFormat(word_tokenizer()))


def test_examples_without_what_frozen_auxiliaries_need_are_refused(saved: Path, tmp_path: Path) -> None:
    model, encoded_of = on_top(saved)
    some = examples(3)
    lacking = {name: condition for name, condition in some[1].conditions.items() if name != "t5"}
    with pytest.raises(ValueError, match="example 1: there is no condition for 't5', which is held frozen"):
        encoded_of([some[0], Example("w1", "w2", conditions=lacking)])
    settings = LoopSettings(output=str(tmp_path / "out"), **SETTINGS)
    empty = encoded_of([Example("w1", "w2", conditions={**lacking, "t5": ""})])
    with pytest.raises(ValueError, match="training example 0: t5, held frozen: the condition is empty"):
        train(model, empty, settings, collate=AuxCollator(PAD))
    plain = encode(some, TextFormat(word_tokenizer()))
    with pytest.raises(
        ValueError, match=r"training example 0: it has conditions for \[\], but .* held frozen"
    ):
        train(model, plain, settings, collate=AuxCollator(PAD))
    with pytest.raises(ValueError, match=r"example 0: it has conditions for .*, but .* held frozen are \[\]"):
        train(tiny_pair("own head"), encoded_of(some), settings, collate=AuxCollator(PAD))
