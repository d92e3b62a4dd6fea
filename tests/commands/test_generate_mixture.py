"""``auxkern generate --mixture``: models beside the pair, and lines of members."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from auxkern.commands import generate
from auxkern.commands.mixture import MixtureFile
from auxkern.generation.members import Member
from auxkern.model import load_base
from tests.support.killing import killed_sizes
from tests.support.tiny import (
    DECODER,
    KIND,
    save_tiny_pair,
    tiny_lm_for,
    tiny_pair,
    word_lm,
    word_tokenizer,
)

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


KILLED = """
    import contextlib, sys
    import transformers.models.llama.modeling_llama
    from auxkern.commands import generate, generate_file

    def run(folder, order):
        files = {"--mixture": folder.parent / "mixture.yaml", "--input": folder.parent / "lines.jsonl"}
        words = [str(folder.parent / "pair"), "--output", str(folder / "out"), "--max-length", "40"]
        for flag, path in files.items():
            words += [flag, str(path)]
        with contextlib.redirect_stdout(sys.stderr):
            assert generate.main([*words, "--batch-size", "8", "--seed", "3"]) == 1  # some lines are errors
"""


def mixed_lines(count: int) -> list[dict[str, Any]]:
    """Pairs, the LM alone, guidance, two auxiliaries, contrast, experts and plausibility; a few errors."""
    chosen, lines = random.Random(0), []

    def text() -> str:
        return " ".join(f"w{chosen.randrange(93)}" for _ in range(chosen.randrange(1, 9)))

    for number in range(count):
        line: dict[str, Any] = {"id": f"r{number}", "max_new_tokens": chosen.randint(1, 16), "prompt": text()}
        line |= {"logprobs": chosen.random() < 0.3, "samples": chosen.choice([1, 1, 1, 2])}
        two = [{"model": name, "condition": text()} for name in ("default", "second")]
        kinds: list[dict[str, Any]] = [
            {"condition": text()},
            {"auxiliary": None},
            {"guidance": {"negative_prompt": text(), "scale": 1.7}},
            {"members": [{"model": "base"}, *two]},
            {"contrast": {"amateur": "small", "alpha": 0.2}},
            {"experts": {"expert": "small", "anti_expert": "tiny", "alpha": 0.5}},
            {"members": [{"model": "small", "weight": 0.5}, {"prompt": text()}], "plausibility": 0.05},
            {},  # the file's own members
        ]
        line |= kinds[number % len(kinds)]
        if chosen.random() < 0.02:
            line |= {"members": [{"model": "base"}, {"model": "nobody"}]}
            line = {name: value for name, value in line.items() if name in ("id", "members")}
        lines.append(line)
    return lines


@pytest.mark.parametrize(
    ("count", "kills"), [(80, 3), pytest.param(2000, 10, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_killed_mixtures_are_those_of_an_uninterrupted_run(tmp_path, count, kills):
    """To the byte, log-probabilities included: heads and auxiliaries of a width that the kernels take."""
    words, one_head = word_tokenizer(), {**DECODER, "num_attention_heads": 1}
    for seed, name in enumerate(("base", "small", "tiny")):
        lm = tiny_lm_for(words, seed=seed, num_attention_heads=2, num_hidden_layers=3 - seed)
        lm.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    for kind, name in ((KIND, "pair"), ("own head", "second")):
        base = str(tmp_path / "base")
        pair = tiny_pair(kind, load_base(base), auxiliary_config=one_head, base_model_name_or_path=base)
        pair.save_pretrained(tmp_path / name)
    own = "members: [{model: base}, {model: small, weight: 0.25}]\n"
    names = "models: {small: small, tiny: tiny}\nauxiliaries: {second: second}\n"
    (tmp_path / "mixture.yaml").write_text(names + own)
    lines = mixed_lines(count)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = [tmp_path / "once", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    assert len(killed_sizes(KILLED, *folders, kills=kills, seconds=1200)) > kills / 2
    once, killed = (sorted((folder / "out").read_bytes().splitlines()) for folder in folders)
    assert len(once) == sum(line.get("samples", 1) for line in lines)
    assert sum(b'"error"' in line for line in once) == sum("nobody" in str(line) for line in lines)
    assert sum(b'"members"' in line for line in once) > count / 8
    assert killed == once


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("members: [{model: base}, {model: smal}]", "yaml: there is no model 'smal' .* base, default, or"),
        ("members: [{model: default}]", "yaml: members are default, without the base"),
        ("members: [{model: base, weight: 0}]", "yaml: every member's weight is 0"),
        ("members: [{model: base, weight: .nan}]", "yaml: the weight of member 'base' is nan"),
        ("members: [{model: base}]\nplausibility: a", "yaml: plausibility must be a number, got str"),
        ("plausibility: 0.1", "yaml: plausibility is 0.1, but there are no members"),
        ("models: {far: broken}", r"model 'far' \(.*broken\) cannot be a member"),
        ("auxiliaries: {far: broken}", r"yaml: auxiliary 'far' \(broken\)"),
    ],
)
def test_a_file_that_no_line_could_use_is_refused_at_start(folder, capsys, content, words):
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "mixture.yaml").write_text(content)
    status = generate.main(arguments(folder, "texts.jsonl"))
    assert status == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (folder / "texts.jsonl").exists()


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
