"""The keyword study on a tiny base: what it trains, how it counts, and that it goes on where it stopped."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from auxkern.model import AuxTunedForCausalLM, load_base
from auxkern.model.base import run_base
from auxkern.model.caches import AuxiliaryRows
from auxkern.model.inputs import BaseSide, PairInputs
from auxkern.model.pair_terms import DEFAULT
from auxkern.model.text import Example
from auxkern.training.checkpoint import checkpoint_steps
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import encode
from auxkern.training.loop import TrainingInterrupted
from auxkern.training.progress import Progress
from benchmarks.keyword.data import written_alike
from benchmarks.keyword.flops import run_cost, token_cost
from benchmarks.keyword.jobs import (
    do_job,
    facts_of,
    run_job,
)
from benchmarks.keyword.measuring import nll_parts, nll_parts_of_lm
from benchmarks.keyword.models import FineTunedLM, silent_pair, trainable
from benchmarks.keyword.presets import (
    BY_NAME,
    DECODER,
    DEEP,
    HEADLINE,
    METHODS,
    PAPER,
    PRESETS,
    TUNED_LORA,
    TUNED_WHOLE,
    Preset,
)
from benchmarks.keyword.runs import Workplace, set_up, train_run
from benchmarks.keyword.scoring import NARROW, PLAIN
from benchmarks.studies import read_facts

pytest.importorskip("peft")

TRAINED = [method for method in METHODS if method.trained]


def setup_of(place: Workplace, name: str) -> Any:
    return set_up(place, BY_NAME[name], place.preset.size, 0)


# ------------------------------------------------------------------------------------ presets and data


def test_presets_say_what_can_be_run() -> None:
    for preset in PRESETS.values():
        counts = {len(rates) for rates in preset.rates.values()}
        assert len(counts) == 1  # equal effort
    cpu = PRESETS["cpu"]
    for fields, message in (
        ({"micro_batch": 7}, "micro_batch is 7"),
        ({"tried_at": 200}, "tried_at=200"),
        ({"sizes": (100, 1_000, 1_000)}, "they must rise"),
        ({"steps": {**cpu.steps, HEADLINE: (12, 24)}}, r"steps of 'auxiliary' are \(12, 24\)"),
        ({"steps": {**cpu.steps, HEADLINE: (0, 0, 0)}}, "one above 0"),
        ({"steps": {**cpu.steps, HEADLINE: (12, 0, 100)}}, "none at tried_at=1000"),
        ({"rates": {HEADLINE: (1e-3,)}}, "rates are of"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(cpu, **fields)


@pytest.mark.parametrize(
    ("keyword", "text", "alike"),
    [
        ("figure", "the figure, as shown", True),
        ("figure", "figure", True),
        ("figure", "can be seen from Figure 2", False),
        ("score", "a `score' was counted", False),
        ("tier", "a three-tier wedding cake", False),
        ("three-tier", "a three-tier wedding cake", True),
        ("house", "two houses", False),
        ("c.", "a c. of b", True),
    ],
)
def test_sentences_that_write_the_keyword_in_another_way_are_left_out(
    keyword: str, text: str, alike: bool
) -> None:
    assert written_alike(Example(keyword, text)) == alike


def test_sides_share_no_keyword_and_the_prompt_no_sentence(place: Workplace) -> None:
    data = place.data
    sides = [data.training, data.validation, data.test]
    assert all(written_alike(one) for side in (*sides, data.shots) for one in side)
    keywords = [{one.condition for one in side} for side in sides]
    assert not (keywords[0] & keywords[1])
    assert not (keywords[0] & keywords[2])
    assert not (keywords[1] & keywords[2])
    assert len(data.shots) == 2
    assert not set(data.shots) & set(data.training)
    small, whole = data.some(8), data.some(24)
    assert set(small) < set(whole) == set(range(24))


def test_a_preset_that_wants_more_than_there_is_is_refused(preset: Preset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 1000002 training, but there are"):
        Workplace.open(dataclasses.replace(preset, sizes=(8, 1_000_000), tried_at=1_000_000), tmp_path)


# ------------------------------------------------------------------------------------------- the models


def by_hand(model: FineTunedLM, ids: list[int], labels: list[int]) -> torch.Tensor:
    """Summed nll of one row behind the prompt, in one pass of the language model over both."""
    whole = torch.tensor([[*model.prefix, *ids]])
    own = torch.tensor([[*[-100] * len(model.prefix), *labels]])
    logits = model.causal_lm(input_ids=whole).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits[0], own[0, 1:], reduction="sum")


@pytest.mark.parametrize("name", [TUNED_LORA, TUNED_WHOLE])
def test_a_fine_tuned_lm_reads_the_prompt_once_and_learns_from_it(place: Workplace, name: str) -> None:
    model, text_format, sides = setup_of(place, name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    examples = [sides["training"].examples[i] for i in range(24)]  # more than are read at a time
    batch = AuxCollator(text_format.pad_id)(examples)
    model.eval()  # training rounds to bfloat16
    ours = model(**batch, num_items_in_batch=torch.tensor(1)).loss
    ours.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    exact = torch.stack([by_hand(model, one["input_ids"], one["labels"]) for one in examples]).sum()
    exact.backward()
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=0)
    for ours_of, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours_of, parameter.grad, rtol=1e-3, atol=1e-4)


def test_a_prompt_is_read_anew_after_each_step(place: Workplace) -> None:
    model, text_format, sides = setup_of(place, TUNED_WHOLE)
    batch = AuxCollator(text_format.pad_id)([sides["training"].examples[0]])
    one = torch.tensor(1)
    model.eval()
    with torch.no_grad():
        before = model(**batch, num_items_in_batch=one).loss
        model.train()
        for parameter in model.parameters():
            parameter.mul_(1.1)
        model.eval()
        after = model(**batch, num_items_in_batch=one).loss
        exact = by_hand(model, *(sides["training"].examples[0][name] for name in ("input_ids", "labels")))
    torch.testing.assert_close(after, exact, rtol=1e-5, atol=0)
    assert abs(after - before) > 1e-3


def test_lora_trains_its_matrices_and_nothing_else(place: Workplace) -> None:
    model = setup_of(place, TUNED_LORA).model
    names = list(model.state_dict())
    assert names
    assert all("lora_" in name for name in names)
    whole = setup_of(place, TUNED_WHOLE).model
    assert trainable(whole) == sum(p.numel() for p in whole.causal_lm.parameters())


def test_merged_weights_write_what_was_trained(place: Workplace) -> None:
    model, text_format, sides = setup_of(place, TUNED_LORA)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    collate, device = AuxCollator(text_format.pad_id), torch.device("cpu")
    before = nll_parts(model, sides["test"].examples, collate, device)
    pair = silent_pair(model.merged(), place.prefix(True))
    after = nll_parts(pair, sides["test"].examples, collate, device)
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=1e-4, atol=0)


def test_the_nll_of_a_part_is_that_of_its_sentences(place: Workplace) -> None:
    _, text_format, sides = setup_of(place, HEADLINE)
    examples, states = encode(place.data.test, text_format), sides["test"].lm_nll
    pair = silent_pair(place.lm, place.prefix(True))
    parts = nll_parts(pair, examples, AuxCollator(text_format.pad_id), torch.device("cpu"))
    assert [count for _, count in parts] == [50, 10]  # four words and the end, of 12 sentences
    torch.testing.assert_close(
        torch.tensor(nll_parts_of_lm(examples, states)), torch.tensor(parts), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("name", [method.name for method in TRAINED])
def test_flops_are_those_that_torch_counts(place: Workplace, name: str) -> None:
    place.lm = load_base(place.preset.base, native=False)  # torch sees nothing of native kernels
    model, _, sides = setup_of(place, name)
    cost = token_cost(model)
    T, K, V = 12, 2, model.causal_lm.config.vocab_size if isinstance(model, FineTunedLM) else 98
    ids = torch.randint(4, V, (1, T))
    one, condition = torch.ones_like(ids), ids[:, :K]
    if isinstance(model, FineTunedLM):
        with FlopCounterMode(display=False) as counter:
            hidden = model.causal_lm.base_model(input_ids=ids, attention_mask=one).last_hidden_state
            model.causal_lm.get_output_embeddings()(hidden).sum().backward()
        assert cost.shown == len(model.prefix)
        assert not cost.state
    else:
        with FlopCounterMode(display=False) as counter:
            _plain_sum(model, ids, condition).backward()
        assert cost.state
        assert not cost.shown
    expected = cost.read * T + cost.condition * K + cost.label * T + cost.state * T
    # Attention's products of queries and keys are left out: here at 14 tokens and widths of 16 to 32.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.25)
    examples = sides["training"].examples
    run, count = run_cost(cost, examples, 8, 5), len(examples)
    read = sum(len(examples[i]["input_ids"]) - 1 for i in range(count))
    words = sum(len(examples[i]["condition_ids"]) for i in range(count))
    step = (cost.read * read + cost.condition * words + cost.label * 5 * count) * 8 / count
    assert run.step == pytest.approx(step + cost.read * cost.shown)
    assert run.states == cost.state * (read + 5)


def _plain_sum(model: AuxTunedForCausalLM, ids: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """Of all logits, and of all that the pointer adds to them."""
    layers = model.config.lm_layers
    with torch.no_grad():
        states = run_base(model.lm, ids, layers=layers).states
    side = BaseSide(states, layers, None, None)
    part = AuxiliaryRows(DEFAULT, None, None)
    output = model.auxiliary_output(part, PairInputs(ids, None, condition, None), side, use_cache=False)
    added = output.hidden if model.head is None else model.head(output.hidden)
    z = (states[:, :, 0] + added) @ model.lm.get_output_embeddings().weight.T
    return z.sum() + output.pointer.sum() + output.end.sum()


# ---------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("name", [HEADLINE, PAPER, TUNED_LORA])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(preset: Preset, tmp_path: Path, name: str) -> None:
    job = run_job(name, preset.size, 0)
    preset = dataclasses.replace(preset, rates={one: (1e-3,) for one in preset.rates})  # nothing is tried

    class Stop(Progress):
        def advance(self, done: int) -> None:
            if done == 2:
                os.kill(os.getpid(), signal.SIGINT)

    whole, parts = (Workplace.open(preset, tmp_path / one) for one in ("whole", "parts"))
    do_job(whole, job, Progress())
    do_job(parts, "states", Progress())
    with pytest.raises(TrainingInterrupted):
        do_job(parts, job, Stop())
    assert not facts_of(parts.output, job).is_file()
    do_job(parts, job, Progress())
    facts = [read_facts(facts_of(one.output, job).parent) for one in (whole, parts)]
    for one in facts:
        one.pop("seconds")
    assert facts[0] == facts[1]
    assert not checkpoint_steps(facts_of(whole.output, job).parent)
    assert [step for step, _ in facts[0]["curve"] if step] == [2, 4]
    assert set(facts[0]["samples"]) == {PLAIN, NARROW}


def test_all_methods_take_the_same_sentences_in_the_same_order(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.keyword import runs

    seen: dict[str, list[str]] = {}
    groups: dict[str, list[int]] = {}

    def recorded(name: str) -> Callable[..., Any]:
        collate = AuxCollator(2)

        def call(items: list[Any]) -> Any:
            seen.setdefault(name, []).extend([str([x for x in item["labels"] if x >= 0]) for item in items])
            groups.setdefault(name, []).append(len(items))
            return collate(items)

        return call

    for name in (HEADLINE, PAPER, TUNED_WHOLE):
        monkeypatch.setattr(runs, "AuxCollator", lambda pad, name=name: recorded(name))
        train_run(place, BY_NAME[name], 24, 0, 1e-3, tmp_path / name, Progress())
        monkeypatch.undo()

    def first_step(name: str) -> list[str]:
        # Before it, what is collated is the validation side where the untrained model is scored too.
        training = {
            str([*place.text_format(False).example("", one.text)["input_ids"][1:]])
            for one in place.data.training
        }
        return [one for one in seen[name] if one in training][:8]

    assert first_step(HEADLINE) == first_step(PAPER) == first_step(TUNED_WHOLE)
    assert len(set(first_step(HEADLINE))) == 8
    assert 8 in groups[TUNED_WHOLE]
    assert max(groups[HEADLINE]) == 4


def test_smaller_sets_are_parts_of_the_whole_one_with_its_states(place: Workplace) -> None:
    for name in (HEADLINE, TUNED_LORA):
        small, whole = (set_up(place, BY_NAME[name], size, 0).sides["training"] for size in (8, 24))
        assert len(small.examples) == 8
        assert len(whole.examples) == 24
        for place_of, index in enumerate(place.data.some(8)):
            item, same = small.examples[place_of], whole.examples[index]
            assert item["input_ids"] == same["input_ids"]
            if small.lm_nll is not None and whole.lm_nll is not None:
                assert torch.equal(item["lm_states"], same["lm_states"])
                assert torch.equal(small.lm_nll(place_of), whole.lm_nll(index))


def test_a_pair_reads_the_states_of_its_own_layers(place: Workplace) -> None:
    assert place.layers(True) == [0, 1, 3]
    assert place.layers(False) == [1, 3]
    last = set_up(place, BY_NAME[HEADLINE], 24, 0).sides["test"].examples[0]
    small = set_up(place, BY_NAME[DECODER], 24, 0).sides["test"].examples[0]
    assert last["lm_states"].shape[1] == 2
    assert small["lm_states"].shape[1] == 3
    assert torch.equal(last["lm_states"], small["lm_states"][:, :2])
    whole = set_up(place, BY_NAME[DEEP], 24, 0).sides["test"].examples[0]
    embedded = place.lm.get_input_embeddings()(torch.tensor(whole["input_ids"]))
    assert torch.equal(whole["lm_states"][:, 0], last["lm_states"][:, 0])
    assert torch.equal(whole["lm_states"][:, 1].float(), embedded.half().float())
