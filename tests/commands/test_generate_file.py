"""``auxkern generate --input --output``: killed at any moment it goes on, and loses nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auxkern.commands import generate
from auxkern.generation import Completion, Engine
from tests.support.launching import ROOT, started
from tests.support.limits import limited_files
from tests.support.request_files import ordered, request_options, write_requests
from tests.support.tiny import save_tiny_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pair(tmp_path_factory.mktemp("pair"), pointer=True)


def _generate(options: list[str]) -> None:
    torch.set_num_threads(1)
    raise SystemExit(generate.main(options))


def _killed_and_resumed(
    folder: Path, tmp_path: Path, count: int, kills: int, number: signal.Signals
) -> tuple[Path, Path]:
    """Outputs of a run that was left alone, and of one that was killed so many times."""
    source = write_requests(tmp_path / "in.jsonl", count)
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert generate.main(request_options(folder, source, whole)) == 0
    chosen, total = random.Random(1), whole.stat().st_size
    for kill in range(kills):
        process = started(_generate, request_options(folder, source, torn))
        # Somewhere in this share of the output.
        wanted = total * (kill + chosen.random()) / (kills + 1)
        while process.is_alive() and not (torn.exists() and torn.stat().st_size >= wanted):
            time.sleep(0.002)
        os.kill(process.pid, number)
        process.join()
    assert torn.stat().st_size < total, "it was never killed in the middle"
    assert generate.main(request_options(folder, source, torn)) == 0
    return whole, torn


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again_it_writes_what_it_would_have(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole, torn = _killed_and_resumed(folder, tmp_path, 80, 2, number)
    assert ordered(torn) == ordered(whole)
    assert len(ordered(whole)) == 80 + 16


def test_an_interrupted_run_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_requests(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    step, left = Engine.step, 12

    def interrupted(engine: Engine) -> list[Completion]:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    assert generate.main(request_options(folder, source, output)) == 130
    count = len(output.read_bytes().splitlines())
    assert 0 < count < 24
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{output} has {count} texts so far. Start the same command again" in last
    assert generate.main(request_options(folder, source, output)) == 0
    assert len(output.read_bytes().splitlines()) == 24


@pytest.mark.slow
def test_two_thousand_requests_killed_ten_times(folder: Path, tmp_path: Path) -> None:
    whole, torn = _killed_and_resumed(folder, tmp_path, 2000, 10, signal.SIGKILL)
    assert ordered(torn) == ordered(whole)
    assert len(ordered(whole)) == 2000 + 400


def test_texts_are_those_of_the_seed_and_the_id_alone(folder: Path, tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in.jsonl", 20)
    lines = source.read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[::-1][:15]))
    outputs = []
    for name, more in (("in", []), ("other", ["--batch-size", "7"])):
        output = tmp_path / f"{name}.out"
        assert generate.main(request_options(folder, tmp_path / f"{name}.jsonl", output, *more)) == 0
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
    assert generate.main(request_options(folder, source, output)) == 1
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
    generate.main(request_options(folder, source, output))
    assert output.read_bytes() == before
    assert len((tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()) == 2


# The line as it is, and what its error says: in the errors file where it is no request, else in its answer.
NO_REQUESTS: list[tuple[bytes, str]] = [
    (b'{"id": "bad", "prompt": "w1"', "it is not JSON"),
    (b"\x80\xff\xfe", "codec can't decode"),
    (b"null", "it is a JSON NoneType; write an object"),
    (b'{"id": ["bad"]}', "id must be a str or an int, got list"),
    (b'{"id": "g0"}', "its id 'g0' is that of line 1"),
    (b'{"prompt": null, "promt": "w1"}', "did you mean 'prompt'?"),
    (b'{"prompt": ["w1"]}', "prompt must be a str, got list"),
    (b'{"condition": {"w1": 1}}', "condition must be a str, got dict"),
    (b'{"condition": "w1 \\ud83d"}', "condition has half a character"),
    (b'{"auxiliary": 1}', "auxiliary must be a str, got int"),
    (b'{"seed": "3"}', "seed must be an int, got str"),
    (b'{"samples": 0}', "samples is 0; it must be 1 or more"),
    (b'{"max_new_tokens": -1}', "max_new_tokens is -1; it must be 1 or more"),
    (b'{"stop": ["w1", ""]}', "stop holds an empty str"),
    (b'{"temperature": -1}', "temperature is -1"),
    (b'{"temperature": "hot"}', "temperature must be a number"),
    (b'{"temperature": NaN}', "temperature is nan"),
    (b'{"temperature": 0, "top_k": -3}', "top_k is -3"),
    (b'{"top_k": 2.5}', "top_k must be an int"),
    (b'{"top_p": -0.5}', "top_p is -0.5"),
    (b'{"min_p": 1.5}', "min_p is 1.5"),
    (b'{"repetition_penalty": 0}', "repetition_penalty is 0"),
    (b'{"logit_bias": {"3": Infinity}}', "logit_bias[3] is inf"),
    (b'{"logit_bias": {"w1": 1}}', "logit_bias has the key 'w1'"),
    (b'{"aux_scale": Infinity}', "aux_scale is inf; it must be finite"),
    (b'{"aux_scale": 1' + b"0" * 400 + b"}", "a whole number has 401 digits"),
    (b'{"max_new_tokens": ' + b"9" * 4300 + b"}", "a whole number has 4300 digits"),
]
NO_ROOM = "shorten the prompt, or lower max_new_tokens"
NOT_SERVED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "w2 " * 60}, NO_ROOM),
    ({"max_new_tokens": 10**30}, NO_ROOM),
    ({"prompt": "w2 " * 20, "max_new_tokens": 20}, "the prompt has 21 tokens and max_new_tokens is 20"),
    ({"condition": "w1 " * 65}, "the condition has 65 tokens, but there is room for 64"),
    ({"auxiliary": "nobody"}, "there is no auxiliary 'nobody'; choose one of default, or null"),
    ({"logit_bias": {"97": 1}}, "logit_bias has the id 97, but there are 97 tokens"),
    ({"logit_bias": {str(10**20): 1}}, "logit_bias has the id 1000"),
    ({"logit_bias": {"3": -1e39}}, "logit_bias[3] is -1e+39, which float32 does not have"),
    ({"temperature": 1e308}, "temperature is 1e+308, which float32 does not have"),
    ({"temperature": 1e-60}, "temperature is 1e-60, which float32 does not have"),
    ({"repetition_penalty": 1e60}, "repetition_penalty is 1e+60"),
    ({"presence_penalty": -1e60}, "presence_penalty is -1e+60"),
    ({"top_p": 1e-60}, "top_p is 1e-60"),
    ({"top_k": 10**30}, "it must be below 2**63"),
    ({"aux_scale": 1e39}, "aux_scale is 1e+39"),
    ({"aux_scale": 3e38}, "the logits are NaN or infinite"),
    ({"logit_bias": {str(token): -math.inf for token in range(97)}}, "the logits are NaN or infinite"),
    # The first token is drawn, the second one is not.
    ({"logit_bias": {"5": 3e38}, "frequency_penalty": -3e38, "max_new_tokens": 9}, "the logits are NaN"),
]


def test_bad_input_of_every_kind_leaves_the_rest_as_it_was(folder: Path, tmp_path: Path) -> None:
    good = write_requests(tmp_path / "good.jsonl", 45).read_bytes().replace(b'"r', b'"g').splitlines()
    bad = [line for line, _ in NO_REQUESTS]
    bad += [json.dumps({"max_new_tokens": 3, **fields}).encode() for fields, _ in NOT_SERVED]
    lines = [line for pair in zip(good, bad + [b" "] * (len(good) - len(bad)), strict=True) for line in pair]
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(good))
    (tmp_path / "all.jsonl").write_bytes(b"\n".join(lines))
    assert generate.main(request_options(folder, tmp_path / "good.jsonl", tmp_path / "good.out")) == 0
    output = tmp_path / "all.out"
    assert generate.main(request_options(folder, tmp_path / "all.jsonl", output)) == 1

    texts = {(one["id"], one["sample"]): one for one in map(json.loads, output.read_text().splitlines())}
    alone = [json.loads(line) for line in (tmp_path / "good.out").read_text().splitlines()]
    assert len(alone) == 45 + 9
    assert [texts.pop((one["id"], one["sample"])) for one in alone] == alone
    found = [json.loads(line) for line in (tmp_path / "all.out.errors.jsonl").read_text().splitlines()]
    assert [one["line"] for one in found] == [2 * (i + 1) for i in range(len(NO_REQUESTS))]
    for one, (line, message) in zip(found, NO_REQUESTS, strict=True):
        assert message in one["error"], line
    # Without an id a request has the number of its line.
    numbers = [2 * (len(NO_REQUESTS) + i + 1) for i in range(len(NOT_SERVED))]
    assert sorted(texts) == [(number, 0) for number in numbers]
    for number, (fields, message) in zip(numbers, NOT_SERVED, strict=True):
        assert message in texts[number, 0]["error"], fields

    # Started again it skips what failed, and still says so.
    before = output.read_bytes()
    assert generate.main(request_options(folder, tmp_path / "all.jsonl", output)) == 1
    assert output.read_bytes() == before


def test_an_empty_prompt_is_the_start_token(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 1, "prompt": ""}\n{"id": 2}\n{"id": 3, "condition": "", "auxiliary": null}\n')
    assert generate.main(request_options(folder, source, tmp_path / "out", "--max-new-tokens", "3")) == 0
    texts = {one["id"]: one for one in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    assert sorted(texts) == [1, 2, 3]
    assert all(one["prompt_tokens"] == 1 and one["new_tokens"] >= 1 for one in texts.values())


def test_errors_are_asked_again_where_wanted(folder: Path, tmp_path: Path) -> None:
    """What failed in a shorter run: as if the reason was outside the request, and is gone."""
    source, output = write_requests(tmp_path / "in.jsonl", 30), tmp_path / "out.jsonl"
    source.write_text(source.read_text() + "{broken\n")
    assert generate.main(request_options(folder, source, tmp_path / "whole.jsonl")) == 1
    whole = ordered(tmp_path / "whole.jsonl")
    assert generate.main(request_options(folder, source, output)) == 1
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for one in lines[::4]:
        one |= {"error": "out of memory", "finish_reason": "error", "token_ids": [], "new_tokens": 0}
    output.write_text("".join(json.dumps(one) + "\n" for one in lines))
    torn = output.read_bytes()

    assert generate.main(request_options(folder, source, output)) == 1
    assert output.read_bytes() == torn
    assert (
        generate.main(request_options(folder, source, output, "--retry-errors")) == 1
    )  # the broken line stays one
    assert ordered(output) == whole
    assert json.loads((tmp_path / "out.jsonl.errors.jsonl").read_text())["line"] == 31


@pytest.mark.parametrize("share", [0.0, pytest.param(0.01, marks=pytest.mark.slow), 0.4, 0.99])
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    folder: Path, tmp_path: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_requests(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    assert generate.main(request_options(folder, source, tmp_path / "whole.jsonl")) == 0
    whole = ordered(tmp_path / "whole.jsonl")
    capsys.readouterr()
    room = int((tmp_path / "whole.jsonl").stat().st_size * share)
    with limited_files(room):
        assert generate.main(request_options(folder, source, output)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("auxkern generate")]
    assert len(said) == 1
    assert os.strerror(errno.EFBIG) in said[0]
    # The file that says what the run is comes first, and needs some room too.
    named = output if room > 1000 else output.with_name("out.jsonl.run.json")
    assert f"{named}: " in said[0]
    # A run that could not begin leaves no file.
    there = output.read_bytes() if output.exists() else b""
    assert there.endswith(b"\n") or not there
    assert set(there.decode().splitlines()) <= set(whole)
    assert len(there) > room * 0.7 or room < 1000
    assert generate.main(request_options(folder, source, output)) == 0
    assert ordered(output) == whole


def test_a_bad_line_ends_the_run_where_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"condition": "w1", "max_new_tokens": 2}\n{broken\n')
    assert generate.main(request_options(folder, source, tmp_path / "out.jsonl", "--stop-on-error")) == 2
    assert f"{source}, line 2" in capsys.readouterr().err


def test_an_output_of_another_run_is_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_requests(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    assert generate.main(request_options(folder, source, output)) == 0
    before = output.read_bytes()
    changes: list[Callable[[], list[str]]] = [
        lambda: [*request_options(folder, source, output), "--temperature", "0.5"],
        lambda: request_options(folder, write_requests(tmp_path / "in.jsonl", 4), output),
    ]
    for change in changes:
        assert generate.main(change()) == 2
        assert "out.jsonl" in capsys.readouterr().err
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "no.jsonl", "--output", "x"], "--input no.jsonl does not exist"),
        (["--input", "setup.py"], "--input needs --output"),
        (["--input", "setup.py", "--output", "x", "--num-beams", "2"], "--num-beams goes with --condition"),
        (["--input", "setup.py", "--output", "x", "--json", "y"], "--json goes with --condition"),
        (["--input", "setup.py", "--output", "x", "--prompt", "y"], "--prompt goes with --condition"),
        (["--condition", "w1", "--retry-errors"], "--retry-errors goes with --input"),
        (["--input", "-", "--output", "x"], "--input - is no file"),
        (["--input", "/dev/stdin", "--output", "x"], "--input /dev/stdin is no file"),
        (["--input", "", "--output", "x"], "the name is empty"),
        (["--input", "setup.py", "--output", ""], "the name is empty"),
        (["--input", "setup.py", "--output", "-"], "--output - is no plain file"),
        (["--input", "setup.py", "--output", "/dev/stdout"], "--output /dev/stdout is no plain file"),
        (["--input", "setup.py", "--output", "/dev/null"], "--output /dev/null is no plain file"),
        (["--input", "setup.py", "--output", "tests"], "--output tests is no plain file"),
        (["--input", "setup.py", "--output", "nowhere/x"], "nowhere does not exist"),
        (["--input", "setup.py", "--output", "setup.py"], "are both setup.py"),
        (["--condition", "w1", "--json", ""], "the name is empty"),
        (["--condition", "w\udce9"], "half a character"),
        (["--condition", "w1", "--prompt", "\udce9"], "half a character"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        generate.main(["no model is read", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("end", ["input", "output"])
def test_a_pipe_is_refused_and_nobody_waits(tmp_path: Path, end: str, capsys: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    source = write_requests(tmp_path / "in.jsonl", 1)
    names = {"input": source, "output": tmp_path / "out.jsonl", end: tmp_path / "pipe"}
    with pytest.raises(SystemExit):
        generate.main(["no model", "--input", str(names["input"]), "--output", str(names["output"])])
    assert f"--{end} {tmp_path / 'pipe'} is no" in capsys.readouterr().err


def test_half_a_surrogate_pair_in_a_line_is_a_bad_line(folder: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"condition": "w1"},
        {"condition": "\ud800"},
        {"id": "\udfff"},
        {"\ud800": 1},
        {"auxiliary": "\ud800"},
    ]
    source.write_text("\ufeff" + "".join(json.dumps(line) + "\n" for line in lines))
    options = ["--max-new-tokens", "2", "--max-length", "32"]
    assert generate.main([str(folder), "--input", str(source), "--output", str(output), *options]) == 1
    assert len(output.read_bytes().splitlines()) == 1
    bad = [json.loads(line) for line in (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()]
    assert [line["line"] for line in bad] == [2, 3, 4, 5]


def test_what_changed_since_a_run_is_named_alone(folder: Path, tmp_path: Path, capsys: Any) -> None:
    source, output = write_requests(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl"
    assert generate.main(request_options(folder, source, output)) == 0
    assert generate.main([*request_options(folder, source, output), "--top-p", "0.5"]) == 2
    assert "was begun with defaults.top_p 1.0, but this run has 0.5;" in capsys.readouterr().err
