"""What goes wrong at the first try: one line that names it and the way out, status 2, nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import auxkern
from auxkern import cli
from auxkern.model import AuxTunedConfig
from tests.support.tiny import save_tiny_pair

LINES = [{"condition": f"w{i}", "text": f"w{i} w{i + 1} w{i + 2}"} for i in range(6)]
TRAIN = "train --base base --train-file data.jsonl --validation-file data.jsonl --output out/new --steps 1"
LAST = "--pair architecture=last-layers --pair last_layers=1"
GENERATE = "generate pair --condition w1"
INPUT = "generate pair --input requests.jsonl --max-length 32"
EVALUATE = "evaluate pair --file data.jsonl"
# Commands, and what their one line says.
WRONG = {
    "train": "the setting 'output' is missing",
    "train --output o": "pass --base, or write it into the YAML file",
    f"{TRAIN} --config none.yaml": "argument --config: none.yaml does not exist; name a file",
    f"{TRAIN} --config folder": "argument --config: folder is a folder; name a file",
    f"{TRAIN} --config unknown.yaml": "no setting 'learning_rte'; did you mean 'learning_rate'?",
    f"{TRAIN} --train-file none.jsonl": "train_file: none.jsonl does not exist; name a file",
    f"{TRAIN} --validation-file folder": "validation_file: folder is a folder; name a file",
    f"{TRAIN} --train-file bad.jsonl": "bad.jsonl, line 2 is not JSON: Expecting property name enclosed in "
    'double quotes at character 2; write an object such as {"condition"',
    f"{TRAIN} --learning-rat 1": "unrecognized arguments: --learning-rat; did you mean --learning-rate?",
    f"{TRAIN} --batch-size -3": "batch_size must be 1 or more, got -3",
    f"{TRAIN} {LAST} --output data.jsonl/x": "data.jsonl is not a folder; name another",
    f"{TRAIN} {LAST} --output base": "output base holds a model (config.json) already",
    f"{TRAIN} {LAST} --output pair --resume": "would write over; name another folder",
    f"{TRAIN} {LAST} --output run": "output run holds a run with checkpoint-3 already; resume it",
    f"{GENERATE} --number -1": "argument --number: -1 is not a whole number of at least 1",
    f"{GENERATE} --number many": "argument --number: many is not a whole number of at least 1",
    f"{GENERATE} --top-p 2": "top_p is 2.0; it must lie in [0.0, 1.0]",
    f"{GENERATE} --bath-size 2": "unrecognized arguments: --bath-size; did you mean --batch-size?",
    f"{TRAIN} {LAST} --base ./none": "the base './none' cannot be loaded: there is no folder ./none",
    f"{GENERATE} --base folder": "the base 'folder' cannot be loaded",
    f"{GENERATE} --base a/b/c": "the base 'a/b/c' cannot be loaded: there is no folder a/b/c; if it has",
    f"{GENERATE} --json folder": "argument --json: folder is a folder; give a file name",
    f"{GENERATE} --json sealed/x": "sealed; name another folder",
    "generate pair --input none.jsonl --output o": "--input none.jsonl does not exist; name a file with a re",
    "generate pair --input requests.jsonl --output o": "positions for 64 tokens; lower it (--max-length)",
    f"{INPUT} --output none/o": "none does not exist; make it first",
    f"{INPUT} --output sealed/o": "nothing can be written to",
    f"{INPUT} --output data.jsonl": "hold lines but data.jsonl.run.json is missing",
    f"{INPUT} --output o --mixture none.yaml": "argument --mixture: none.yaml does not exist",
    f"{INPUT} --output o --mixture unknown.yaml": "the field 'learning_rte'; known are models",
    "evaluate pair --file none.jsonl": "argument --file: none.jsonl does not exist; name a file, or - for",
    "evaluate pair --file folder": "argument --file: folder is a folder",
    "evaluate pair --file bad.jsonl": "bad.jsonl, line 2 is not JSON",
    f"{EVALUATE} --json sealed/x.json": "nothing can be written to",
    f"{EVALUATE} --examples 0": "argument --examples: 0 is not a whole number of at least 1",
    f"{EVALUATE} --samples 2 --unigram none.jsonl": "argument --unigram: none.jsonl does not exist",
    "bench --quik": "unrecognized arguments: --quik; did you mean --quick?",
    "bench --n -1": "argument --n: -1 is not a whole number of at least 1",
    "bench --json folder": "argument --json: folder is a folder; give a file name",
    "bench --json sealed/x.json": "nothing can be written to",
    "bench --op generate --batch 0": "argument --batch: 0 is not a whole number of at least 1",
    "inspect --kernel none": "--kernel none: choose from forward_kernel",
    "inspect --jobs 0": "argument --jobs: 0 is not a whole number of at least 1",
    "inspect --json folder": "argument --json: folder is a folder; give a file name",
    "env --verbose": "unrecognized arguments: --verbose",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a pair, data, and what is none of them."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_pair(place)
    for name in ("folder", "sealed", "run/checkpoint-3"):
        (place / name).mkdir(parents=True)
    lines = [json.dumps(line) + "\n" for line in LINES]
    (place / "data.jsonl").write_text("".join(lines))
    (place / "bad.jsonl").write_text("".join([lines[0], "{condition\n", *lines[1:]]))
    (place / "requests.jsonl").write_text('{"condition": "w1"}\n')
    (place / "unknown.yaml").write_text("learning_rte: 1\n")
    return place


def refusal(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The only line that a command says when it ends with status 2."""
    try:
        status = cli.main(command.split())
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    said = capsys.readouterr()
    assert (status, said.out) == (2, ""), said
    (line,) = said.err.splitlines()
    return line


@pytest.mark.parametrize("command", WRONG)
def test_a_mistake_is_one_line_and_changes_nothing(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    access = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "sealed" and access(path, mode))
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert WRONG[command] in refusal(command, capsys)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_a_folder_for_states_that_is_none_is_refused_before_they_are_computed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    command = f"{TRAIN} {LAST} --cache-states --states-folder data.jsonl/x"
    assert cli.main(command.split()) == 2
    said = capsys.readouterr().err
    assert f"states_folder is data.jsonl/x, but nothing can be written to {place}/data.jsonl; name" in said
    assert not (place / "out").exists()


# ------------------------------------------------------------------------------------- no auxiliary yet


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "there is no folder nowhere; name the one that auxkern train wrote, or a Hub name"),
        ("folder/nowhere", "there is no folder folder/nowhere"),
        ("data.jsonl", "there is no folder data.jsonl"),
        ("folder", "folder holds no config.json, so no model"),
        ("base", "base holds a model of type 'llama', not an auxiliary"),
        ("out/keywords", "there is no folder out/keywords, and the Hub has none for us: it is out of reach"),
    ],
)
def test_who_has_no_auxiliary_is_told_how_to_train_one(
    model: str, message: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("it is out of reach.")

    monkeypatch.setattr(AuxTunedConfig, "from_pretrained", unreachable)
    monkeypatch.chdir(place)
    recipe = Path(auxkern.__file__).parent / "recipes" / "wordnet_keywords.yaml"
    assert recipe.is_file()
    for command in (f"generate {model} --condition w1", f"evaluate {model} --file data.jsonl"):
        said = refusal(command, capsys)
        assert message in said
        assert f"; to train one: auxkern train --config {recipe} (" in said
        assert "auxkern train --base NAME --train-file TRAIN.jsonl --validation-file HELD_OUT.jsonl" in said


# --------------------------------------------------------------------------------------- the program


def test_the_version_is_printed_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"auxkern {auxkern.__version__}\n"


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert all(f"\n  {name} " in said.err for name in cli.COMMANDS)


def test_a_misspelt_option_of_the_program_is_answered_with_a_near_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--verson"]) == 2
    assert "there is no command '--verson'; did you mean --version?" in capsys.readouterr().err
