"""``auxkern generate``: which texts it writes, where, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from auxkern import cli
from auxkern.commands import generate
from auxkern.model import AuxTunedForCausalLM, TextFormat
from tests.support.tiny import WORDS, save_tiny_pair, word_lm, word_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pair(tmp_path_factory.mktemp("generate"), pointer=True, lm_layers=[1])


def run(folder: Path, *options: str, conditions: tuple[str, ...] = ("w3 w4",)) -> list[dict[str, Any]]:
    """The records of a run that ends well."""
    path = folder.parent / "out.jsonl"
    path.unlink(missing_ok=True)
    source = [word for condition in conditions for word in ("--condition", condition)]
    assert generate.main([str(folder), *source, "--json", str(path), *options]) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(records: list[dict[str, Any]]) -> list[str]:
    return [record["text"] for record in records]


def test_texts_do_not_depend_on_the_batch_size(folder: Path) -> None:
    conditions = ("w3 w4", "w5", "w6 w7 w8", "w3 w4")
    one, three, all_of_them = (
        run(folder, "--number", "3", "--max-new-tokens", "9", "--batch-size", size, conditions=conditions)
        for size in ("1", "3", "12")
    )
    assert one == three == all_of_them
    assert len({record["seed"] for record in one}) == 12
    # The same condition again, with seeds of its own.
    assert written(one)[:3] != written(one)[9:]


def test_the_seed_changes_every_sample(folder: Path) -> None:
    first, again, other = (
        run(folder, "--number", "5", "--max-new-tokens", "9", "--seed", seed) for seed in ("0", "0", "1")
    )
    assert first == again
    assert not set(written(first)) & set(written(other))


def test_a_sample_is_what_its_seed_draws(folder: Path) -> None:
    """The record's seed, passed to ``model.generate``, gives the record's text."""
    record = run(folder, "--number", "2", "--max-new-tokens", "9", "--prompt", "w1 w2")[1]
    model = AuxTunedForCausalLM.from_pretrained(folder).eval()
    text = TextFormat(AutoTokenizer.from_pretrained(folder.parent / "base"))
    ids = model.generate(
        **text.prompts(["w3 w4"], ["w1 w2"]),
        seeds=[record["seed"]],
        do_sample=True,
        top_k=0,
        max_new_tokens=9,
        eos_token_id=1,
        pad_token_id=2,
    )
    assert text.decode(ids[0]) == record["prompt"] + record["text"]
    assert record["text"].startswith(" w")


def test_greedy_without_the_auxiliary_is_the_base(folder: Path) -> None:
    (record,) = run(folder, "--greedy", "--aux-scale", "0", "--prompt", "w9", "--max-new-tokens", "12")
    lm = word_lm()
    ids = lm.generate(torch.tensor([[0, 4 + 9]]), do_sample=False, max_new_tokens=12)
    words = AutoTokenizer.from_pretrained(folder.parent / "base").decode(ids[0], skip_special_tokens=True)
    assert record["prompt"] + record["text"] == words
    assert record["seed"] is None
    (with_it,) = run(folder, "--greedy", "--prompt", "w9", "--max-new-tokens", "12")
    assert with_it["text"] != record["text"]


def test_beams_are_different_texts_and_the_best_comes_first(folder: Path) -> None:
    conditions = ("w3", "w5")
    records = run(folder, "--num-beams", "4", "--number", "3", "--max-new-tokens", "6", conditions=conditions)
    assert [record["condition"] for record in records] == ["w3"] * 3 + ["w5"] * 3
    assert len(set(written(records[:3]))) == 3
    (best,) = run(folder, "--num-beams", "4", "--max-new-tokens", "6", conditions=("w5",))
    assert best == records[3]


def test_filters_are_applied(folder: Path) -> None:
    (greedy,) = run(folder, "--greedy", "--max-new-tokens", "8")
    for option in (("--top-k", "1"), ("--top-p", "1e-6"), ("--min-p", "1"), ("--temperature", "1e-5")):
        (drawn,) = run(folder, *option, "--max-new-tokens", "8")
        assert drawn["text"] == greedy["text"], option


def test_repetition_is_penalised(folder: Path) -> None:
    options = ("--greedy", "--max-new-tokens", "20")
    (plain,) = run(folder, *options, conditions=("w9",))
    (varied,) = run(folder, *options, "--repetition-penalty", "1e4", conditions=("w9",))
    assert len(set(plain["text"].split())) < len(plain["text"].split())
    assert len(set(varied["text"].split())) == len(varied["text"].split())


def test_what_ended_and_what_was_cut_off_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--number", "40", "--prompt", "w7 w8", "--max-new-tokens")
    longer = run(folder, *options, "14", conditions=("w5",))
    capsys.readouterr()
    records = run(folder, *options, "12", conditions=("w5",))
    assert {record["finished"] for record in records} == {True, False}
    for record, more in zip(records, longer, strict=True):
        # What ended stays as it is with more room, what was cut off goes on.
        assert more["text"].startswith(record["text"])
        assert (more == record) if record["finished"] else (more != record)
    out = capsys.readouterr().out
    assert out.count("cut off]") == sum(not record["finished"] for record in records)
    for index, record in enumerate(records):
        assert f"[{index + 1}/40" in out
        assert f" w5\nw7 w8{record['text']}\n" in out


def test_ctrl_c_keeps_what_is_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(folder, "--number", "4", "--max-new-tokens", "5")
    calls: list[int] = []
    real = AuxTunedForCausalLM.generate

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(AuxTunedForCausalLM, "generate", interrupted)
    path = folder.parent / "stopped.jsonl"
    options = ["--number", "4", "--max-new-tokens", "5", "--batch-size", "3", "--json", str(path)]
    assert generate.main([str(folder), "--condition", "w3 w4", *options]) == 130
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected[:3]
    assert "interrupted" in capsys.readouterr().err


def test_a_base_that_moved_is_found_by_option(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(folder, "--max-new-tokens", "5")
    moved = tmp_path / "moved"
    shutil.copytree(folder, tmp_path / "pair")
    config = json.loads((tmp_path / "pair" / "config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "pair" / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder.parent / "base", moved)
    assert generate.main([str(tmp_path / "pair"), "--condition", "w1"]) == 2
    said = capsys.readouterr().err
    assert f"there is no folder {tmp_path / 'gone'}; if it has moved, pass base (--base NAME)" in said
    assert run(tmp_path / "pair", "--base", str(moved), "--max-new-tokens", "5") == expected


def test_another_base_is_refused_unless_allowed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word_lm(seed=7).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert generate.main([str(folder), "--condition", "w1", "--base", str(tmp_path)]) == 2
    assert "fingerprint" in capsys.readouterr().err
    assert len(run(folder, "--base", str(tmp_path), "--allow-other-base", "--max-new-tokens", "5")) == 1


def broken_model(kind: str, folder: Path, root: Path) -> Path:
    """A model folder with something wrong."""
    model = root / "model"
    if kind == "missing":
        return model
    if kind == "a file":
        model.write_text("")
        return model
    if kind == "unfinished":
        (model / "checkpoint-20").mkdir(parents=True)
        (model / "checkpoint-7").mkdir()
        return model
    shutil.copytree(folder.parent / "base" if kind == "no auxiliary" else folder, model)
    if kind == "damaged":
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    if kind == "no JSON":
        (model / "config.json").write_text("{")
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no folder"),
        ("a file", "there is no folder"),
        ("unfinished", "checkpoint-20"),
        ("no auxiliary", "holds a model of type 'llama'"),
        ("damaged", "are damaged"),
        ("no JSON", "config.json is not JSON"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_status_2(
    kind: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = broken_model(kind, folder, tmp_path)
    assert generate.main([str(model), "--condition", "w1"]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    assert message in err[-1]
    assert str(model) in err[-1]


def test_weights_that_are_nan_are_an_error(folder: Path, tmp_path: Path, capsys: Any) -> None:
    model = AuxTunedForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.head.weight, float("nan"))
    model.save_pretrained(tmp_path)
    assert generate.main([str(tmp_path), "--condition", "w1"]) == 2
    assert "NaN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "0"], "use --greedy"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["--aux-scale", "inf"], "inf is not finite"),
        (["--seed", "-1"], "-1 is not a whole number"),
        (["--greedy", "--top-k", "5"], "--top-k is for drawing"),
        (["--num-beams", "3", "--seed", "5"], "--seed is for drawing"),
        (["--greedy", "--number", "2"], "--greedy finds one text"),
        (["--greedy", "--num-beams", "2"], "--greedy and --num-beams"),
        (["--num-beams", "2", "--number", "3"], "lower --number"),
        (["--input", "x.jsonl"], "not allowed with"),
        (["--output", "x.jsonl"], "--output goes with --input"),
        (["--max-length", "9"], "--max-length goes with --input"),
        (["--json", "."], "is a folder"),
        (["--json", "no/such/folder/x.jsonl"], "does not exist"),
        (["--temp", "1"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_one_line_and_status_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate.main(["no model is read", "--condition", "w1", *options])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_console_command_knows_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(folder), "--condition", WORDS[5], "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("[1/1")
    assert "evaluate" in cli.COMMANDS
