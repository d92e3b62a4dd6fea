"""The keyword study on a tiny base: what it trains, how it counts, and that it goes on where it stopped."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
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
from benchmarks.keyword import __main__ as command
from benchmarks.keyword.data import written_alike
from benchmarks.keyword.flops import run_cost, token_cost
from benchmarks.keyword.jobs import (
    REFERENCES,
    chosen_rate,
    do_job,
    facts_of,
    run_job,
    stages,
    trial_job,
)
from benchmarks.keyword.measuring import nll_parts, nll_parts_of_lm
from benchmarks.keyword.models import FineTunedLM, silent_pair, trainable
from benchmarks.keyword.page import PAGE, page
from benchmarks.keyword.plot import plot_data, plot_training
from benchmarks.keyword.presets import (
    ALL_LAYERS,
    BY_NAME,
    DECODER,
    DEEP,
    HEADLINE,
    LAST_LAYERS,
    METHODS,
    PAPER,
    PRESETS,
    TUNED_LORA,
    TUNED_WHOLE,
    Preset,
    decoder_pair,
)
from benchmarks.keyword.record import KIND, nll_of, state_shares, study_record
from benchmarks.keyword.runs import Workplace, set_up, train_run
from benchmarks.keyword.scoring import NARROW, PLAIN
from benchmarks.studies import read_facts, write_facts
from tests.support.tiny import WORDS, word_lm, word_tokenizer

pytest.importorskip("peft")

TRAINED = [method for method in METHODS if method.trained]
PICTURES = {"training": "a.png", "data": "b.png"}


@pytest.fixture(scope="session")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    """The tiny preset on sentences of four words, one of them the keyword, for a base of three layers."""
    folder = tmp_path_factory.mktemp("study")
    tokenizer = word_tokenizer((*WORDS, ":"))
    word_lm(vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    draw = random.Random(0)
    records = []
    for keyword in WORDS:
        for _ in range(4):
            words = [*draw.sample(WORDS, 3), keyword]
            draw.shuffle(words)
            records.append({"condition": keyword, "text": " ".join(words)})
        shouted = [word for word in words if word != keyword]
        records.append({"condition": keyword, "text": " ".join([keyword.upper(), *shouted])})
    (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    layers = {"architecture": "last-layers", "lora_rank": 2, "pointer": True}
    return dataclasses.replace(
        PRESETS["tiny"],
        base=str(folder / "base"),
        task_source=f"jsonl:{folder / 'texts.jsonl'}?condition=condition",
        pairs={
            LAST_LAYERS: {**layers, "last_layers": 2},
            ALL_LAYERS: {**layers, "last_layers": 3},
            DECODER: decoder_pair(16, 2, 2, lm_layers=(1, 3)),
        },
        lora_rank=2,
    )


@pytest.fixture
def place(preset: Preset, tmp_path: Path) -> Workplace:
    return Workplace.open(preset, tmp_path / "study")


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


# ------------------------------------------------------------------------------------- a whole study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the whole study that ``finished`` makes."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture(scope="module")
def finished(preset: Preset, folder: Path) -> dict[str, Any]:
    """A whole study, as its command writes it."""
    place = Workplace.open(preset, folder)
    for some, _ in stages(preset):
        for job in some:
            do_job(place, job, Progress())
    return {
        "kind": KIND,
        "command": "python -m benchmarks.keyword",
        "date": "2026-01-01",
        "machine": {"device": "a machine"},
        "seconds of this command": 100,
        **study_record(preset, place.output),
        "others": [],
    }


def test_a_study_says_of_each_method_what_its_runs_found(finished: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in finished["rows"]}
    assert list(rows) == [method.name for method in METHODS]
    for method in METHODS:
        points = rows[method.name]["points"]
        sizes = [point.get("size") for point in points]
        assert sizes == ([None] if not method.trained else [24] if method.pair == DECODER else [8, 24])
        for point in points:
            assert set(point["samples"]) == ({PLAIN} if point.get("size") == 8 else {PLAIN, NARROW})
            sample = point["samples"][PLAIN]
            low, high = sample["accuracy_interval"]
            assert 0 <= low <= sample["accuracy"] <= high <= 1
            low, high = point["nll_interval"]
            assert low <= point["nll"] <= high
            assert len(point["nll_of_seeds"]) == 1
    tried = rows[HEADLINE]["tried"]
    assert set(tried) == {"0.002", "0.004"}
    assert f"{rows[HEADLINE]['learning_rate']:g}" == min(tried, key=tried.__getitem__)
    best = {point["size"]: min(nll for _, nll in point["curve"]) for point in rows[HEADLINE]["points"]}
    assert best[24] == min(tried.values())  # the best trial is that size's run
    assert finished["references"][PLAIN]["accuracy"] == 1
    flops = {name: row["points"][-1]["flops"] for name, row in rows.items() if "trainable" in row}
    assert all((flops[one.name]["states"] > 0) == (one.kind == "pair") for one in TRAINED)
    # Behind the prompt three pairs read the states of all sentences, each at two rates.
    assert flops[HEADLINE]["shared"] == flops[DECODER]["shared"] == flops[DEEP]["shared"]
    assert flops[HEADLINE]["states"] / 7 < flops[HEADLINE]["shared"] < flops[HEADLINE]["states"] / 6
    assert flops[PAPER]["shared"] == pytest.approx(flops[PAPER]["states"] / 2)


def test_states_are_shared_among_those_that_read_them(preset: Preset) -> None:
    preset = dataclasses.replace(preset, seeds=2)
    flops = {8: 800, 24: 2_400}
    runs = {
        method.name: {
            size: [{"state_flops": flops[size]}] * 2
            for size in preset.sizes
            if preset.steps_of(method.name, size)
        }
        for method in TRAINED
    }
    shares = state_shares(preset, runs)
    # Of all 24: two seeds and another rate, of three auxiliaries; two read the first 8 with two seeds more.
    assert shares[HEADLINE, 8] == shares[DEEP, 8] == 800 / 13
    assert shares[HEADLINE, 24] == shares[DECODER, 24] == 800 / 13 + 1_600 / 9
    assert shares[PAPER, 24] == 2_400 / 3
    assert (TUNED_LORA, 24) not in shares


def test_differences_are_of_the_same_sentences() -> None:
    first = [{"parts": [[20.0, 10], [8.0, 2]]}, {"parts": [[22.0, 10], [10.0, 2]]}]
    second = [{"parts": [[10.0, 10], [7.0, 2]]}]
    assert nll_of(first).mean == pytest.approx((21 + 9) / 12)
    difference = nll_of(first, second)
    assert difference.mean == pytest.approx((11 + 2) / 12)
    assert difference.low >= 1
    assert difference.high <= 1.1 + 1e-9


def test_the_page_shows_the_records_numbers_and_others_beside(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    file, other = tmp_path / "study.json", tmp_path / "novels.json"
    file.write_text(json.dumps(finished))
    novels = copy.deepcopy(finished)
    novels["preset"]["task_source"] = "austen"
    novels["command"] = "python -m benchmarks.keyword --preset austen"
    other.write_text(json.dumps(novels))
    files = [str(file), str(other)]
    assert PAGE.main([*files, "--page", str(tmp_path / "docs" / "study.md")]) == 0
    text = (tmp_path / "docs" / "study.md").read_text()
    for row in finished["rows"]:
        point = row["points"][-1]
        assert row["label"] in text
        assert f"{point['nll']:.3f} [" in text
        assert f"{point['samples'][PLAIN]['slor']:.2f} [" in text
    assert "## On sentences of Jane Austen's novels" in text
    assert "    python -m benchmarks.keyword --preset austen\n" in text
    for name in PICTURES:
        assert f"(../study_{name}.png)" in text
        assert (tmp_path / f"study_{name}.png").stat().st_size > 10_000
    assert all(len(set(map(len, table))) == 1 for table in _tables(text))
    assert all(len(line) < 5_000 for line in text.splitlines())


def _tables(text: str) -> list[list[list[str]]]:
    """Cells of every table; a bar in a text is escaped."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [
        [line.replace("\\|", "").split("|") for line in block] for block in blocks if block[0].startswith("|")
    ]


def test_the_page_claims_what_the_record_shows_and_nothing_else(finished: dict[str, Any]) -> None:
    def text_of(nll: float, share: float, accuracy: float, few: float) -> str:
        changed = copy.deepcopy(finished)
        near = {"difference": nll, "interval": [nll - 0.01, nll + 0.01]}
        changed["comparisons"] = {
            "lora": {
                "nll": near,
                "accuracy": {"difference": accuracy, "interval": [accuracy - 0.1, accuracy + 0.1]},
                "flops": {"shared": share, "apart": share - 0.1, "all": share + 0.3},
            },
            "full": {
                HEADLINE: [{"size": 6_400, "difference": 0.5, "interval": [0.4, 0.6]}],
                DEEP: [{"size": 1_000, "difference": few, "interval": [few - 0.1, few + 0.1]}],
            },
        }
        return page(changed, PICTURES, "command")

    good = text_of(0.05, 0.5, 0.2, -0.2)
    assert "does not hold" not in good
    assert good.count("| holds |") == 5
    assert "+0.050 [0.040, 0.060] | holds" in good
    assert "6,400 sentences, 2 layers, nll below" not in good
    assert "takes 0.80 of LoRA's FLOPs" in good
    for values, said in (
        ((0.09, 0.5, 0.2, -0.2), "within 0.08 of LoRA's best"),
        ((0.05, 0.51, 0.2, -0.2), "with its share of the LM's states"),
        ((0.05, 0.5, -0.01, -0.2), "accuracy not below LoRA's"),
        ((0.05, 0.5, 0.2, 0.2), "1,000 sentences, 3 layers, nll below fine-tuning's"),
    ):
        (missed,) = [line for line in text_of(*values).splitlines() if "**does not hold**" in line]
        assert said in missed
    assert "The bar lies within the interval" not in good
    assert "The bar lies within the interval" in text_of(0.05, 0.5, 0.05, -0.2)


def test_a_method_for_less_data_stands_with_the_data_alone(finished: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(finished)
    row = next(row for row in changed["rows"] if row["name"] == DEEP)
    del row["points"][-1]
    row["points"][-1]["nll"] = 1.25
    text = page(changed, PICTURES, "command")
    sections = {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
    for title in ("On the test side", "Over steps and arithmetic", "Texts"):
        assert row["label"] not in sections[title]
    (line,) = [line for line in sections["Over the amount of data"].splitlines() if row["label"] in line]
    assert line.split("|")[2].startswith(" 1.250 [")
    assert not line.split("|")[3].strip()
    for title, plot in (("training", plot_training), ("data", plot_data)):
        plot(changed, tmp_path / f"{title}.png")
        assert (tmp_path / f"{title}.png").stat().st_size > 10_000


def test_the_page_says_who_has_a_lower_nll(finished: dict[str, Any]) -> None:
    def text_of(lora: float, step: int) -> str:
        changed = copy.deepcopy(finished)
        for row in changed["rows"]:
            row["points"][-1]["nll"] = {HEADLINE: 3.0, TUNED_LORA: lora}.get(row["name"], 5.0)
            if "trainable" in row:
                row["points"][-1]["best_steps"] = [step]
        return page(changed, PICTURES, "command")

    said = "A lower nll than the auxiliary's 3.000 has: LoRA (PEFT) (2.900)."
    assert said in text_of(2.9, 2)
    assert "A lower nll" not in text_of(3.1, 2)
    late = "The validation nll was lowest at the last step"
    assert late in text_of(3.1, 4)
    assert late not in text_of(3.1, 2)


def test_a_record_needs_every_run(
    preset: Preset, folder: Path, finished: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "part"
    for path in folder.glob("jobs/*/facts.json"):
        if path.parent.name != "run-lora-24-0":
            write_facts(output / path.parent.relative_to(folder), read_facts(path.parent))
    with pytest.raises(FileNotFoundError, match="run-lora-24-0"):
        study_record(preset, output)


def test_an_old_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.json"
    file.write_text(json.dumps({"kind": "keyword study"}))
    with pytest.raises(SystemExit):
        PAGE.main([str(file)])
    assert "is no record of a keyword study, second edition" in capsys.readouterr().err


def test_rates_are_chosen_on_the_validation_side(preset: Preset, tmp_path: Path) -> None:
    for rate, nll in ((2e-3, [3.0, 2.5, 2.9]), (4e-3, [2.8, 2.6])):
        curve = [[step, value] for step, value in enumerate(nll)]
        write_facts(facts_of(tmp_path, trial_job(HEADLINE, rate)).parent, {"curve": curve})
    assert chosen_rate(preset, tmp_path, HEADLINE) == 2e-3
    single = dataclasses.replace(preset, rates={**preset.rates, HEADLINE: (7e-3,)})
    assert chosen_rate(single, tmp_path, HEADLINE) == 7e-3
    with pytest.raises(FileNotFoundError):
        chosen_rate(preset, tmp_path, TUNED_LORA)


def test_a_job_that_is_done_is_not_done_again(place: Workplace) -> None:
    do_job(place, REFERENCES, Progress())
    before = facts_of(place.output, REFERENCES).stat().st_mtime_ns
    do_job(place, REFERENCES, Progress())
    assert facts_of(place.output, REFERENCES).stat().st_mtime_ns == before


def test_the_command_does_the_jobs_that_are_left_and_writes_the_record(
    preset: Preset, folder: Path, finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run_all(waiting: Any, *_: Any, **__: Any) -> bool:
        asked.extend(waiting)
        return True

    monkeypatch.setattr(command, "PRESETS", {"cpu": dataclasses.replace(preset, name=folder.name)})
    monkeypatch.setattr("benchmarks.studies.run_all", run_all)
    path = tmp_path / "out.json"
    assert command.main(["--output", str(folder.parent), "--json", str(path)]) == 0
    assert not asked
    written = json.loads(path.read_text())
    assert written["rows"] == json.loads(json.dumps(finished["rows"]))
    assert written["command"].startswith("python -m benchmarks.keyword --output")
    (folder / "seconds").write_text("4000.4\n")  # of commands that were stopped
    monkeypatch.setattr("benchmarks.studies.run_stages", lambda *_: False)
    assert command.main(["--output", str(folder.parent), "--json", str(path)]) == 1
    monkeypatch.undo()
    assert float((folder / "seconds").read_text()) >= 4000.4
    monkeypatch.setattr(command, "PRESETS", {"cpu": dataclasses.replace(preset, name=folder.name)})
    assert command.main(["--output", str(folder.parent), "--json", str(path)]) == 0
    assert 4000 <= json.loads(path.read_text())["seconds of this command"] < 4100
