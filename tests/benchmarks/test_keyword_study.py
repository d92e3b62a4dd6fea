"""The keyword study on a tiny base: what it trains, how it counts, and that it goes on where it stopped."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from auxkern.model import AuxTunedForCausalLM
from auxkern.model.text import Example
from auxkern.training.collator import AuxCollator
from auxkern.training.loop import TrainingInterrupted
from auxkern.training.progress import Progress
from benchmarks.keyword.__main__ import main as study_main
from benchmarks.keyword.data import written_alike
from benchmarks.keyword.flops import token_cost
from benchmarks.keyword.jobs import REFERENCES, STATES, do_job, facts_of, study_jobs, tuning_jobs
from benchmarks.keyword.models import FineTunedLM, new_fine_tuned, new_pair, trainable, uniform_lm
from benchmarks.keyword.page import PAGE, page
from benchmarks.keyword.presets import BY_NAME, METHODS, PRESETS, Preset
from benchmarks.keyword.record import comparisons, study_record
from benchmarks.keyword.runs import Workplace, train_method
from benchmarks.keyword.tuning import chosen
from benchmarks.studies import run_all
from tests.support.tiny import DECODER, WORDS, word_lm, word_tokenizer

TRAINED = [method for method in METHODS if method.trained]
PAIRS = [method for method in TRAINED if method.kind in ("pair", "from scratch")]


@pytest.fixture(scope="session")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    """Sentences of four words, one of them the keyword, for a base of three layers."""
    folder = tmp_path_factory.mktemp("study")
    word_lm().save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
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
    pair = {**PRESETS["cpu"].pair, "auxiliary_config": DECODER, "lm_layers": [1, 3]}
    return dataclasses.replace(
        PRESETS["cpu"],
        base=str(folder / "base"),
        task_source=f"jsonl:{folder / 'texts.jsonl'}?condition=condition",
        steps=4,
        sentences=8,
        micro_batch=4,
        training=40,
        validation=10,
        samples=5,
        measures=2,
        scores=4,
        lm_steps=4,
        max_new_tokens=6,
        pair=pair,
        lora_rank=2,
    )


@pytest.fixture
def place(preset: Preset, tmp_path: Path) -> Workplace:
    return Workplace.open(preset, tmp_path / "study")


def model_of(preset: Preset, name: str) -> Any:
    method = BY_NAME[name]
    lm = word_lm()
    return new_pair(preset, method, lm, 0) if method in PAIRS else new_fine_tuned(preset, method, lm, 0)


def test_presets_say_what_can_be_run() -> None:
    for preset in PRESETS.values():
        assert set(preset.rates) == {method.tuned_as for method in TRAINED}
    with pytest.raises(ValueError, match="micro_batch is 7"):
        dataclasses.replace(PRESETS["cpu"], micro_batch=7)
    with pytest.raises(ValueError, match="scores is 7"):
        dataclasses.replace(PRESETS["cpu"], scores=7)
    with pytest.raises(ValueError, match="lm_steps is 50"):
        dataclasses.replace(PRESETS["cpu"], lm_steps=50)


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


def test_a_study_trains_on_sentences_that_hold_their_keyword(place: Workplace) -> None:
    data = place.data
    assert all(written_alike(example) for example in [*data.training, *data.validation])


def test_a_base_that_knows_nothing_leaves_the_auxiliary_alone() -> None:
    lm = uniform_lm(word_lm())
    logits = lm(input_ids=torch.tensor([[0, 5, 9]])).logits
    assert not logits.any()
    assert logits.shape[-1] == word_lm().config.vocab_size


def test_a_fine_tuned_lm_has_the_loss_of_transformers(preset: Preset) -> None:
    for name in ("full", "lora"):
        model = model_of(preset, name).eval()  # training rounds to bfloat16
        ids = torch.tensor([[0, 5, 9, 7, 1], [0, 6, 1, 2, 2]])
        mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, 1] = -100
        count = torch.tensor(int((labels[:, 1:] != -100).sum()))
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
        expected = model.causal_lm(input_ids=ids, attention_mask=mask, labels=labels).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_lora_trains_its_matrices_and_nothing_else(preset: Preset) -> None:
    model = model_of(preset, "lora")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    assert trainable(model_of(preset, "full")) == sum(p.numel() for p in word_lm().parameters())


@pytest.mark.parametrize("name", [method.name for method in TRAINED])
def test_flops_are_those_that_torch_counts(preset: Preset, name: str) -> None:
    model = model_of(preset, name)
    cost = token_cost(model, BY_NAME[name])
    T, K, V = 12, 2, 97
    ids = torch.randint(4, V, (1, T))
    one, condition = torch.ones_like(ids), ids[:, :K]
    if isinstance(model, FineTunedLM):
        with FlopCounterMode(display=False) as counter:
            lm = model.causal_lm
            hidden = lm.base_model(input_ids=ids, attention_mask=one).last_hidden_state
            lm.get_output_embeddings()(hidden).sum().backward()
        expected = cost.of(T, 0, T)
    else:
        with FlopCounterMode(display=False) as counter:
            z = _plain_logits(model, ids, condition)
            z.sum().backward()
        expected = cost.of(T + K, T, T)
    # Attention's products of queries and keys are left out: here at 14 tokens and widths of 16 to 32.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.25)


def _plain_logits(model: AuxTunedForCausalLM, ids: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    from auxkern.model.base import run_base
    from auxkern.model.inputs import PairInputs

    with torch.no_grad():
        states = run_base(model.lm, ids, layers=model.config.lm_layers).states
    batch = PairInputs(ids, None, condition, None)
    scores = model.lm_scores(states[:, :, 0], None, condition)
    output = model.auxiliary(
        batch.for_auxiliary(states, model.lm.get_input_embeddings().weight, scores, None, False)
    )
    weight = model.lm.get_output_embeddings().weight
    if model.config.head == "shared":
        return (states[:, :, 0] + model.head(output.hidden)) @ weight.T
    return states[:, :, 0] @ weight.T + output.hidden @ model.head.weight.T


@pytest.mark.parametrize("name", ["auxiliary", "scratch", "lora"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(place: Workplace, tmp_path: Path, name: str) -> None:
    method = BY_NAME[name]

    class Stop(Progress):
        def advance(self, done: int) -> None:
            if done == 2:
                os.kill(os.getpid(), signal.SIGINT)

    whole = train_method(place, method, 1, 1e-3, tmp_path / "whole", Progress())
    with pytest.raises(TrainingInterrupted):
        train_method(place, method, 1, 1e-3, tmp_path / "parts", Stop())
    parts = train_method(place, method, 1, 1e-3, tmp_path / "parts", Progress())
    for facts in (whole, parts):
        facts.pop("seconds")
    assert parts == whole
    measured = [one for one in whole["evaluations"] if "texts" in one]
    assert [one["step"] for one in measured] == [2, 4]
    assert all(len(one["contains"]) == 5 for one in measured)


def test_all_methods_take_the_same_sentences_in_the_same_order(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.keyword import runs

    seen: dict[str, list[list[str]]] = {}

    def recorded(name: str) -> Callable[..., Any]:
        collate = AuxCollator(2)

        def call(items: list[Any]) -> Any:
            # The text's words and the end; a fine-tuned LM has the keyword before them.
            seen.setdefault(name, []).extend([str([x for x in item["labels"] if x >= 0]) for item in items])
            return collate(items)

        return call

    for name in ("auxiliary", "scratch", "full"):
        monkeypatch.setattr(runs, "AuxCollator", lambda pad, name=name: recorded(name))
        train_method(place, BY_NAME[name], 0, 1e-3, tmp_path / name, Progress(), trial=True)
        monkeypatch.undo()
    # One step; what is collated after it is the validation side.
    sentences = {name: found[:8] for name, found in seen.items()}
    assert sentences["auxiliary"] == sentences["scratch"] == sentences["full"]
    assert len(set(sentences["full"])) == 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the whole study that ``finished`` makes."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture(scope="module")
def finished(preset: Preset, folder: Path) -> dict[str, Any]:
    """A whole study, as its command writes it."""
    place = Workplace.open(preset, folder)
    tuning = place.output / "tuning.json"
    for job in tuning_jobs(preset):
        do_job(place, job, tuning, Progress())
    tuning.write_text(json.dumps(chosen(preset, place.output)))
    for job in (STATES, *study_jobs()):
        do_job(place, job, tuning, Progress())
    return {
        "kind": "keyword study",
        "command": "python -m benchmarks.keyword",
        "date": "2026-01-01",
        "machine": {"device": "a machine"},
        "seconds of this command": 100,
        **study_record(preset, place.output, json.loads(tuning.read_text())),
    }


def test_a_study_says_of_each_method_what_its_runs_found(finished: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in finished["methods"]}
    assert list(rows) == [*(method.name for method in METHODS), "references"]
    for method in METHODS:
        row = rows[method.name]
        steps = [point["step"] for point in row["points"]]
        assert steps == ([2, 4] if method.trained else [0])
        assert len(row["points"][-1]["accuracy_of_seeds"]) == method.seeds
        low, high = row["points"][-1]["accuracy_interval"]
        assert 0 <= low <= row["points"][-1]["accuracy"] <= high <= 1
    assert rows["references"]["points"][0]["accuracy"] == 1
    assert set(rows["auxiliary"]["nll"]) == {"1", "2", "3", "4"}
    assert set(rows["full"]["nll"]) == {"2", "4"}
    assert [one["aux_scale"] for one in rows["auxiliary"]["scales"]] == [0.75, 1, 1.25, 1.5]
    reads = {name: row["flops"]["lm_forward"] > 0 for name, row in rows.items() if row.get("flops")}
    assert reads == {method.name: method.kind == "pair" for method in TRAINED}


def test_the_page_shows_the_records_numbers_and_no_others(finished: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps(finished))
    assert PAGE.main([str(file), "--page", str(tmp_path / "docs" / "study.md")]) == 0
    text = (tmp_path / "docs" / "study.md").read_text()
    for row in finished["methods"]:
        assert row["label"] in text
        assert f"{row['points'][-1]['slor']:.2f} [" in text
    for name in ("steps", "flops", "scales"):
        assert f"(../study_{name}.png)" in text
        assert (tmp_path / f"study_{name}.png").stat().st_size > 10_000
    assert all(len(set(map(len, table))) == 1 for table in _tables(text))


def test_the_page_says_what_does_not_speak_for_auxiliary_tuning(finished: dict[str, Any]) -> None:
    def text_of(scratch: float, full_nll: float, ratio: float) -> str:
        record = copy.deepcopy(finished)
        rows = {row["name"]: row for row in record["methods"]}
        rows["auxiliary"]["points"][0]["accuracy"] = 0.5
        rows["scratch"]["points"][0]["accuracy"] = scratch
        for name, nll in (("auxiliary", 4.0), ("full", full_nll), ("lora", 9.0)):
            rows[name]["nll"] = dict.fromkeys(rows[name]["nll"], nll)
        record["comparisons"]["reached"] |= {
            "step": 1,
            "flops": {"states are made": 1e12},
            "ratios": {"states are made": ratio},
            "flops_from_scratch": 1e12,
        }
        return page(record, {"steps": "a", "flops": "b", "scales": "c"}, "command")

    said = (
        "From scratch has the keyword in its texts as early: accuracy 0.600",
        "has a lower nll than auxiliary tuning",
        "Where states are made, from scratch's nll costs 0.40 times",
    )
    for index, text in enumerate((text_of(0.6, 5.0, 0.2), text_of(0.4, 3.5, 0.2), text_of(0.4, 5.0, 0.4))):
        assert [part in text for part in said] == [index == i for i in range(3)]


def test_runs_that_are_missing_are_left_out_and_named(
    finished: dict[str, Any], preset: Preset, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "part")
    for name in ("full-0", "scratch-1", "auxiliary-2"):
        shutil.rmtree(tmp_path / "part" / "runs" / name)
    with pytest.raises(FileNotFoundError, match="auxiliary-2"):
        study_record(preset, tmp_path / "part", finished["tuning"])
    part = {**finished, **study_record(preset, tmp_path / "part", finished["tuning"], partial=True)}
    rows = {row["name"]: row for row in part["methods"]}
    assert "full" not in rows
    assert (rows["auxiliary"]["seeds"], rows["scratch"]["seeds"]) == ([0, 1], [0, 2])
    text = page(part, {"steps": "a", "flops": "b", "scales": "c"}, "command")
    named = "auxiliary tuning (seed 2), same architecture from scratch (seed 1), fine-tuning the LM (seed 0)"
    assert f"left out: {named}." in text


def _tables(text: str) -> list[list[list[str]]]:
    """Cells of every table; a bar in a text is escaped."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [
        [line.replace("\\|", "").split("|") for line in block] for block in blocks if block[0].startswith("|")
    ]


def test_when_from_scratchs_nll_is_reached(finished: dict[str, Any]) -> None:
    def run(nll: list[float], flops: dict[str, int]) -> dict[str, Any]:
        points = [{"step": 10 * (i + 1), "nll": value} for i, value in enumerate(nll)]
        for point in points[1::2]:
            point |= {"texts": ["a", "b"], "contains": [1, 0], "slor": [1.0, 2.0]}
        return {"evaluations": points, "flops": flops}

    ours = run([6.0, 5.0, 4.0, 3.0], {"trained": 400, "lm_forward": 800, "lm_states": 500})
    theirs = run([9.0, 8.0, 7.0, 5.5], {"trained": 1000, "lm_forward": 0, "lm_states": 0})
    found = comparisons({"auxiliary": [ours, ours], "scratch": [theirs]}, ["x", "y"])
    reached = found["reached"]
    assert (reached["nll"], reached["step"], reached["steps"]) == (5.5, 20, 40)
    assert list(reached["flops"].values()) == [200 + 400, 200 + 500, 200]
    assert list(reached["ratios"].values()) == [0.6, 0.7, 0.2]
    assert found["accuracy_difference"] == 0
    never = run([9.0, 8.0, 7.0, 6.0], ours["flops"])
    assert comparisons({"auxiliary": [never], "scratch": [theirs]}, ["x", "y"])["reached"]["step"] is None


def test_a_job_that_is_done_is_not_done_again(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    do_job(place, REFERENCES, Path("nowhere"), Progress())
    before = facts_of(place.output, REFERENCES).stat().st_mtime_ns
    do_job(place, REFERENCES, Path("nowhere"), Progress())
    assert facts_of(place.output, REFERENCES).stat().st_mtime_ns == before


def test_failing_jobs_do_not_keep_the_others_from_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command_of(name: str) -> list[str]:
        return [sys.executable, "-c", f"print({name!r}); raise SystemExit({int(name == 'b')})"]

    assert not run_all(["a", "b", "c:0"], command_of, jobs=2, logs=tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.log": "a\n",
        "b.log": "b\n",
        "c-0.log": "c:0\n",
    }
    assert "b: status 1" in capsys.readouterr().out
    assert run_all(["a"], command_of, jobs=2, logs=tmp_path)


def test_ctrl_c_lets_every_job_save(tmp_path: Path) -> None:
    script = (
        "import signal, time, pathlib\n"
        "def save(*_):\n    time.sleep(0.3); pathlib.Path(r'{0}.saved').touch(); raise SystemExit(130)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path(r'{0}.ready').touch()\ntime.sleep(60)\n"
    )

    def command_of(name: str) -> list[str]:
        return [sys.executable, "-c", script.format(tmp_path / name)]

    def interrupt() -> None:
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_all(["a", "b", "c"], command_of, jobs=2, logs=tmp_path / "logs")
    assert sorted(path.name for path in tmp_path.glob("*.saved")) == ["a.saved", "b.saved"]


def test_a_study_without_its_tuning_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "tuning.json")
    assert study_main(["--output", str(tmp_path), "--tuning", missing]) == 2
    assert f"{missing} is missing; --tune writes it" in capsys.readouterr().err
