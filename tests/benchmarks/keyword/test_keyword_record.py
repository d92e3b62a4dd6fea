"""A whole keyword study on a tiny base: its record, its page and its command."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from auxkern.training.progress import Progress
from benchmarks.keyword import __main__ as command
from benchmarks.keyword.jobs import (
    REFERENCES,
    chosen_rate,
    do_job,
    facts_of,
    stages,
    trial_job,
)
from benchmarks.keyword.page import PAGE, page
from benchmarks.keyword.plot import plot_data, plot_training
from benchmarks.keyword.presets import (
    DECODER,
    DEEP,
    HEADLINE,
    METHODS,
    PAPER,
    TUNED_LORA,
    Preset,
)
from benchmarks.keyword.record import KIND, nll_of, state_shares, study_record
from benchmarks.keyword.runs import Workplace
from benchmarks.keyword.scoring import NARROW, PLAIN
from benchmarks.studies import read_facts, write_facts

pytest.importorskip("peft")

TRAINED = [method for method in METHODS if method.trained]
PICTURES = {"training": "a.png", "data": "b.png"}


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
