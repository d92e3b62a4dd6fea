"""``auxkern generate --input --output``: killed at any moment it goes on, and loses nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_pair import save_tiny_pair

from auxkern.commands import generate

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pair(tmp_path_factory.mktemp("pair"), pointer=True)


def _write(path: Path, count: int) -> Path:
    chosen = random.Random(0)
    lines = []
    for number in range(count):
        record: dict[str, Any] = {
            "id": f"r{number}",
            "condition": f"w{chosen.randint(0, 92)}",
            "max_new_tokens": chosen.randint(1, 24),
        }
        if number % 5 == 0:
            record |= {"prompt": "w1 w2", "top_k": 7, "samples": 2}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    return path


def _options(folder: Path, source: Path, output: Path, *more: str) -> list[str]:
    shape = ["--max-length", "40", "--batch-size", "4"]
    return [str(folder), "--input", str(source), "--output", str(output), "--seed", "3", *shape, *more]


def _sorted(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return sorted(lines, key=lambda line: (json.loads(line)["id"], json.loads(line)["sample"]))


def _start(options: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "auxkern.commands.generate", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _killed_and_resumed(
    folder: Path, tmp_path: Path, count: int, kills: int, number: signal.Signals
) -> tuple[Path, Path]:
    """Outputs of a run that was left alone, and of one that was killed so many times."""
    source = _write(tmp_path / "in.jsonl", count)
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert generate.main(_options(folder, source, whole)) == 0
    chosen, total = random.Random(1), whole.stat().st_size
    for kill in range(kills):
        process = _start(_options(folder, source, torn))
        # Somewhere in this share of the output.
        wanted = total * (kill + chosen.random()) / (kills + 1)
        while process.poll() is None and not (torn.exists() and torn.stat().st_size >= wanted):
            time.sleep(0.002)
        process.send_signal(number)
        process.wait()
    assert torn.stat().st_size < total, "it was never killed in the middle"
    assert generate.main(_options(folder, source, torn)) == 0
    return whole, torn


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again_it_writes_what_it_would_have(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole, torn = _killed_and_resumed(folder, tmp_path, 150, 3, number)
    assert _sorted(torn) == _sorted(whole)
    assert len(_sorted(whole)) == 150 + 30


@pytest.mark.slow
def test_two_thousand_requests_killed_ten_times(folder: Path, tmp_path: Path) -> None:
    whole, torn = _killed_and_resumed(folder, tmp_path, 2000, 10, signal.SIGKILL)
    assert _sorted(torn) == _sorted(whole)
    assert len(_sorted(whole)) == 2000 + 400


def test_texts_are_those_of_the_seed_and_the_id_alone(folder: Path, tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", 20)
    lines = source.read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[::-1][:15]))
    outputs = []
    for name, more in (("in", []), ("other", ["--batch-size", "7"])):
        output = tmp_path / f"{name}.out"
        assert generate.main(_options(folder, tmp_path / f"{name}.jsonl", output, *more)) == 0
        outputs.append({(r["id"], r["sample"]): r for r in map(json.loads, output.read_text().splitlines())})
    assert len(outputs[1]) >= 15
    assert all(outputs[0][key] == record for key, record in outputs[1].items())


def test_bad_lines_are_named_and_the_rest_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"condition": "w1", "max_new_tokens": 3}\n'
        "{broken\n"
        '{"condition": "w1", "promt": "w2"}\n'
        '{"condition": "w1", "prompt": "' + "w2 " * 60 + '"}\n'
        '{"condition": "w1", "auxiliary": "nobody"}\n'
        '{"condition": "", "prompt": "", "max_new_tokens": 3}\n'
    )
    assert generate.main(_options(folder, source, output)) == 1
    records = {r["id"]: r for r in map(json.loads, output.read_text().splitlines())}
    assert sorted(records) == [1, 4, 5, 6]
    assert records[1]["new_tokens"] >= 1
    assert "shorten the prompt" in records[4]["error"]
    assert "no auxiliary 'nobody'" in records[5]["error"]
    assert records[6]["finish_reason"] != "error"
    bad = [json.loads(line) for line in (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()]
    assert [one["line"] for one in bad] == [2, 3]
    assert "did you mean" in bad[1]["error"] or "promt" in bad[1]["error"]
    assert "2 lines of" in capsys.readouterr().err
    # Started again it has nothing to do, and says the same of the lines.
    before = output.read_bytes()
    generate.main(_options(folder, source, output))
    assert output.read_bytes() == before
    assert len((tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()) == 2


def test_a_bad_line_ends_the_run_where_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"condition": "w1", "max_new_tokens": 2}\n{broken\n')
    assert generate.main(_options(folder, source, tmp_path / "out.jsonl", "--stop-on-error")) == 2
    assert f"{source}, line 2" in capsys.readouterr().err


def test_an_output_of_another_run_is_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = _write(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    assert generate.main(_options(folder, source, output)) == 0
    before = output.read_bytes()
    changes: list[Callable[[], list[str]]] = [
        lambda: [*_options(folder, source, output), "--temperature", "0.5"],
        lambda: _options(folder, _write(tmp_path / "in.jsonl", 4), output),
    ]
    for change in changes:
        assert generate.main(change()) == 2
        assert "out.jsonl" in capsys.readouterr().err
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "no.jsonl", "--output", "x"], "is no file"),
        (["--input", "setup.py"], "--input needs --output"),
        (["--input", "setup.py", "--output", "x", "--num-beams", "2"], "--num-beams goes with --condition"),
        (["--input", "setup.py", "--output", "x", "--json", "y"], "--json goes with --condition"),
        (["--input", "setup.py", "--output", "x", "--prompt", "y"], "--prompt goes with --condition"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate.main(["no model is read", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
