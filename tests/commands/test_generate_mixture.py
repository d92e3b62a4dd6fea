"""``auxkern generate --mixture``: models beside the pair, and lines of members."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from auxkern.commands import generate
from auxkern.commands.mixture import MixtureFile
from auxkern.generation.members import Member
from tests.support.tiny import save_tiny_pair, word_lm, word_tokenizer

LINES: list[dict[str, Any]] = [
    {"id": 1, "prompt": "w1 w2", "guidance": {"negative_prompt": "w9", "scale": 2}},
    {"id": 2, "members": [{"model": "base", "prompt": "w3"}, {"model": "small", "weight": -0.5}]},
    {"id": 3, "members": [{"model": "base"}, {"model": "second", "condition": "w4"}]},
    {"id": 4, "condition": "w5", "prompt": "w6"},
    {"id": 5, "prompt": "w7"},
    {"id": 6, "members": [{"model": "base"}, {"model": "nobody"}]},
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A pair, a second auxiliary of its base, a small model and a file that names them."""
    save_tiny_pair(tmp_path)
    save_tiny_pair(tmp_path / "again").rename(tmp_path / "second")
    word_lm(seed=5).save_pretrained(tmp_path / "small")
    word_tokenizer().save_pretrained(tmp_path / "small")
    text = "models: {small: small}\nauxiliaries: {second: second}\nmembers:\n- {model: base}\n"
    (tmp_path / "mixture.yaml").write_text(text + "- {model: small, weight: 0.25}\n")
    lines = "".join(json.dumps(line) + "\n" for line in LINES)
    (tmp_path / "lines.jsonl").write_text(lines)
    return tmp_path


def arguments(folder: Path, output: str) -> list[str]:
    files = {"--mixture": "mixture.yaml", "--input": "lines.jsonl", "--output": output}
    return [
        str(folder / "pair"),
        *(word for flag, name in files.items() for word in (flag, str(folder / name))),
    ]


def written(folder: Path, output: str = "texts.jsonl", *more: str) -> tuple[int, dict[int, dict[str, Any]]]:
    status = generate.main([*arguments(folder, output), "--max-new-tokens", "6", "--max-length", "32", *more])
    texts = [json.loads(line) for line in (folder / output).read_text().splitlines()]
    return status, {text["id"]: text for text in texts if "id" in text}


def test_lines_of_members_pairs_and_the_files_own_members(folder, capsys):
    status, texts = written(folder)
    assert status == 1  # line 6 has a member that is not there
    assert "no model 'nobody'" in texts[6]["error"]
    assert [texts[i].get("error") for i in range(1, 6)] == [None] * 5
    # One slot a step more or less changes nothing, and a line that says nothing is of the file's members.
    _, again = written(folder, "again.jsonl", "--batch-size", "2")
    assert {i: text["token_ids"] for i, text in again.items()} == {
        i: t["token_ids"] for i, t in texts.items()
    }
    own = {"id": 5, "prompt": "w7", "members": [{"model": "base"}, {"model": "small", "weight": 0.25}]}
    (folder / "lines.jsonl").write_text(json.dumps(own) + "\n")
    _, explicit = written(folder, "explicit.jsonl")
    assert explicit[5]["token_ids"] == texts[5]["token_ids"]


def test_another_file_is_another_run(folder, capsys):
    written(folder)
    (folder / "mixture.yaml").write_text("models: {small: small}\nauxiliaries: {second: second}\n")
    status, _ = written(folder)
    assert status == 2
    assert "choose another output" in capsys.readouterr().err


def test_a_model_of_other_tokens_is_refused_by_name(folder, capsys):
    word_tokenizer(("a", "b")).save_pretrained(folder / "small")
    status = generate.main(arguments(folder, "texts.jsonl"))
    assert status == 2
    said = capsys.readouterr().err
    assert "model 'small'" in said
    assert "another tokenizer than the base" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n", "must be a mapping"),
        ("modles: {}\n", "'modles'; known are models"),
        ("models: [a]\n", "models must be a mapping of names"),
        ("members: [{model: base, wieght: 1}]\n", "no field 'wieght'"),
        ("models: {a: b\n", "is no YAML"),
    ],
)
def test_a_bad_file_is_told(tmp_path, content, words):
    path = tmp_path / "mixture.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        MixtureFile.read(path)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text("members:\n- {model: base}\n- {model: e, weight: 5e-1}\nplausibility: 0.1\n")
    read = MixtureFile.read(path)
    assert read.members == (Member(), Member("e", weight=0.5))
    assert read.plausibility == 0.1
