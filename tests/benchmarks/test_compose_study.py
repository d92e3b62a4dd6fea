"""The study of composed auxiliaries on a tiny base: what it trains and writes, and that it goes on."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from auxkern.generation.members import Member
from auxkern.model.text import Example
from auxkern.training.loop import TrainingInterrupted
from auxkern.training.progress import Progress
from benchmarks.compose import __main__ as command
from benchmarks.compose import jobs, record
from benchmarks.compose.jobs import STATES, do_job, facts_of, row_folder, training_jobs, writing_jobs
from benchmarks.compose.page import PAGE, page
from benchmarks.compose.presets import PRESETS, REFERENCES, ROWS, Preset, guidance_row
from benchmarks.compose.record import KIND, study_record, wilson
from benchmarks.compose.training import examples_for
from benchmarks.compose.writing import Writer, members_of
from benchmarks.keyword.runs import Workplace
from benchmarks.studies import FACTS, read_facts, write_facts
from tests.support.tiny import WORDS, word_lm, word_tokenizer

ALL = [row.name for row in (*PRESETS["tiny"].rows, REFERENCES)]


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    """The tiny preset on a base of three layers, and sentences of three to five words with their keyword."""
    folder = tmp_path_factory.mktemp("study")
    numbers = ("word", "words,", *map(str, range(10)))
    words = (*WORDS, *(f"{word}," for word in WORDS), *numbers)
    tokenizer = word_tokenizer(words)
    word_lm(vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    draw = random.Random(0)
    lines = []
    for keyword in WORDS:
        for others in (2, 3, 4):
            text = [*draw.sample(WORDS, others), keyword]
            draw.shuffle(text)
            lines.append(json.dumps({"condition": keyword, "text": " ".join(text)}))
    (folder / "texts.jsonl").write_text("\n".join(lines))
    tiny = PRESETS["tiny"]
    keyword = dataclasses.replace(
        tiny.keyword,
        base=str(folder / "base"),
        task_source=f"jsonl:{folder / 'texts.jsonl'}?condition=condition",
    )
    # At the preset's rate four steps change no text, and at larger ones they make things worse.
    return dataclasses.replace(tiny, keyword=keyword, seeds=2, learning_rate=0.03)


def open_place(preset: Preset, output: Path) -> Workplace:
    return Workplace.open(preset.keyword, output)


@pytest.fixture(scope="module")
def output(preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a whole study."""
    place = open_place(preset, tmp_path_factory.mktemp("whole"))
    for job in (STATES, *training_jobs(preset), *writing_jobs(preset)):
        do_job(preset, place, job, Progress())
    return place.output


@pytest.fixture(scope="module")
def finished(preset: Preset, output: Path) -> dict[str, Any]:
    """Its record, as the command writes it."""
    return {
        "kind": KIND,
        "command": "python -m benchmarks.compose",
        "date": "2026-01-01",
        "machine": {"device": "a machine"},
        "seconds of this command": 100,
        **study_record(preset, output),
    }


def test_a_row_is_the_mixture_that_its_label_says() -> None:
    example = Example("glacier", "the glacier is here")
    base, keyword, length = Member(), "glacier", "4 words"
    told = Member("keyword", condition=keyword, weight=1.0)
    expected = {
        "composed": (base, told, Member("length", condition=length, weight=1.0)),
        "shared-once": (
            base,
            told,
            Member("length", condition=length, weight=1.0),
            Member("keyword", condition="", weight=-1.0),
        ),
        "one": (base, Member("both", condition="glacier, 4 words", weight=1.0)),
        "keyword": (base, told),
        "length": (base, Member("length", condition=length, weight=1.0)),
        "base": (base,),
    }
    assert {row.name: members_of(row, example) for row in ROWS} == expected
    # 2 (LM + keyword) - (LM + nothing): the LM counts once.
    assert members_of(guidance_row(2.0), example) == (
        base,
        Member("keyword", condition=keyword, weight=2.0),
        Member("keyword", condition="", weight=-1.0),
    )


def test_a_tenth_of_the_training_sentences_has_no_condition() -> None:
    examples = [Example(f"k{i}", f"a k{i}") for i in range(1_000)]
    left_out = []
    for auxiliary in ("keyword", "length", "both"):
        told = examples_for(auxiliary, examples, 10)
        assert [one.text for one in told] == [one.text for one in examples]
        left_out.append([i for i, one in enumerate(told) if not one.condition])
    assert left_out[0] == left_out[1] == left_out[2]
    assert 70 < len(left_out[0]) < 130  # three standard deviations
    assert all(one.condition == "2 words" for one in examples_for("length", examples, 0))


def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    preset: Preset, output: Path, tmp_path: Path
) -> None:
    class Stop(Progress):
        def advance(self, done: int) -> None:
            if done == 2:
                os.kill(os.getpid(), signal.SIGINT)

    job = "train:both:1"
    place = open_place(preset, tmp_path)
    with pytest.raises(TrainingInterrupted):
        do_job(preset, place, job, Stop())
    assert not facts_of(tmp_path, job).is_file()
    do_job(preset, place, job, Progress())
    parts, whole = (read_facts(facts_of(folder, job).parent) for folder in (tmp_path, output))
    for facts in (parts, whole):
        facts.pop("seconds")
    assert parts == whole
    weights = "model.safetensors"
    assert (tmp_path / "train-both-1" / weights).read_bytes() == (
        output / "train-both-1" / weights
    ).read_bytes()


def test_rows_that_are_written_are_not_written_again(
    preset: Preset, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("keyword", "length", "both"):
        (tmp_path / f"train-{name}-0").symlink_to(output / f"train-{name}-0")
    place, written = open_place(preset, tmp_path), []

    class Killed(Writer):
        def facts(self, row):
            if len(written) == 3:
                raise SystemExit
            written.append(row.name)
            return super().facts(row)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "Writer", Killed)
        with pytest.raises(SystemExit):
            do_job(preset, place, "texts:0", Progress())
        written.append("killed")
        do_job(preset, place, "texts:0", Progress())
    assert [name for name in written if name != "killed"] == ALL
    for name in ALL:
        parts, whole = (read_facts(row_folder(folder, name, 0)) for folder in (tmp_path, output))
        assert parts["texts"] == whole["texts"]
        assert parts["slor"] == whole["slor"]


def test_every_condition_is_asked_once_in_every_row(preset: Preset, output: Path) -> None:
    asked = {
        name: [c for seed in (0, 1) for c in read_facts(row_folder(output, name, seed))["conditions"]]
        for name in ALL
    }
    assert len(set(asked["base"])) == preset.keyword.samples
    assert all(conditions == asked["base"] for conditions in asked.values())


def test_every_row_writes_with_its_own_mixture(output: Path) -> None:
    texts = {name: str(read_facts(row_folder(output, name, 0))["texts"]) for name in ALL}
    assert len(set(texts.values())) == len(ALL)


def test_the_record_counts_what_the_texts_satisfy(preset: Preset, output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "study")
    contains, words = ([1, 1, 0], [0, 1, 1]), ([3, 4, 3], [3, 3, 5])
    for row, holds in (("composed", contains), ("one", ([0, 0, 0], [0, 0, 0]))):
        for seed in (0, 1):
            folder = row_folder(tmp_path / "study", row, seed)
            facts = {"contains": holds[seed], "words": words[seed], "words_asked": [3, 3, 3]}
            if row == "composed":
                facts["texts"] = ["a" * 25, f"b {'a' * 26} c", "a " * 26]
            write_facts(folder, {**read_facts(folder), **facts})
    study = study_record(preset, tmp_path / "study")
    rows = {row["name"]: row for row in study["rows"]}
    assert list(rows) == ALL
    composed = rows["composed"]
    assert [composed[name] * 6 for name in record.SHARES] == [2, 4, 4, 5]
    assert composed["both_interval"] == list(wilson(2, 6))
    assert composed["run-on"] * 6 == 2
    assert composed["keyword_of_seeds"] == [2 / 3, 2 / 3]
    assert composed["words"] == 21 / 6
    assert all(rows["references"][name] == 1 for name in record.SHARES)
    (beside_one,) = [
        one for one in study["comparisons"] if (one["first"], one["second"]) == ("composed", "one")
    ]
    assert (beside_one["both"], beside_one["length"]) == (pytest.approx(1 / 3), 0)
    assert beside_one["keyword_interval"][0] > 0
    assert [one["scale"] for one in study["guidance"]] == [2.0]


@pytest.mark.parametrize(
    ("successes", "count", "ends"),
    # Newcombe 1998, table I, method 3.
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (0.8389, 1.0)),
    ],
)
def test_wilsons_interval(successes: int, count: int, ends: tuple[float, float]) -> None:
    assert wilson(successes, count) == pytest.approx(ends, abs=5e-5)  # as published


def test_the_command_does_a_job_and_writes_the_record_when_all_are_done(
    preset: Preset, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PRESETS", {"cpu": preset})
    assert command.main(["--output", str(tmp_path), "--run", STATES]) == 0
    assert facts_of(tmp_path, STATES).is_file()
    file = tmp_path / "study.json"
    assert command.main(["--output", str(output), "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert (written["kind"], [row["name"] for row in written["rows"]]) == (KIND, ALL)
    assert f"--json {file}" in written["command"]


def test_a_study_that_is_not_complete_has_no_record(preset: Preset, output: Path, tmp_path: Path) -> None:
    for folder in output.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / "texts-1").unlink()
    with pytest.raises(FileNotFoundError, match=f"texts-1.*{FACTS}"):
        study_record(preset, tmp_path)


def test_the_page_shows_the_records_numbers(finished: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "compose.json"
    file.write_text(json.dumps(finished))
    assert PAGE.main([str(file), "--page", str(tmp_path / "docs" / "compose.md")]) == 0
    text = (tmp_path / "docs" / "compose.md").read_text()
    for row in finished["rows"]:
        assert f"{row['slor']:.2f} [" in text
        assert row["label"] in text
    for name in ("rows", "guidance"):
        assert f"(../compose_{name}.png)" in text
        assert (tmp_path / f"compose_{name}.png").stat().st_size > 10_000


def test_the_page_says_what_the_intervals_say(finished: dict[str, Any]) -> None:
    def text_of(first: str, second: str, name: str, ends: tuple[float, float]) -> str:
        changed = copy.deepcopy(finished)
        for one in (*changed["comparisons"], *changed["guidance"]):
            if (one["first"], one["second"]) == (first, second):
                one[f"{name}_interval"] = list(ends)
        return page(changed, {"rows": "a", "guidance": "b"}, "command")

    apart = ("composed", "one", "both")
    assert "trained apart, satisfies both conditions more often" in text_of(*apart, (0.01, 0.2))
    assert "does not differ, as far as these texts tell" in text_of(*apart, (-0.01, 0.2))
    assert "trained on both conditions satisfies them more often" in text_of(*apart, (-0.2, -0.01))
    lost = text_of("composed", "length", "length", (-0.2, -0.1))
    assert "of the plain sum have the number of words less often than with its auxiliary alone." in lost
    once = ("shared-once", "one", "both")
    assert "satisfy both conditions as often, as far as these texts tell, as the one" in text_of(
        *once, (-0.1, 0.1)
    )
    assert "satisfy both conditions more often than the one" in text_of(*once, (0.1, 0.2))
    guided = ("guidance-2", "keyword", "keyword")
    assert "At 2 the share of texts with their keyword is above" in text_of(*guided, (0.1, 0.2))
    assert "At 2 the share of texts with their keyword cannot be told" in text_of(*guided, (-0.1, 0.2))
    run_on = ("guidance-2", "keyword", "run-on")
    assert "At 2 more texts fall apart," in text_of(*run_on, (0.1, 0.2))
    assert "more texts fall apart" not in text_of(*run_on, (-0.1, 0.2))
