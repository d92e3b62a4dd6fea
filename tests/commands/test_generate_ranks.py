"""``auxkern generate`` in several processes: they share the input, and its output is that of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from auxkern.commands import evaluate, generate
from auxkern.generation import Completion, CompletionWriter
from tests.support.launching import launch, outputs
from tests.support.request_files import ordered, request_options, write_requests
from tests.support.tiny import save_tiny_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pair(tmp_path_factory.mktemp("pair"), pointer=True)


def generate_in(world: int, options: list[str]) -> subprocess.Popen[str]:
    """``torchrun -m auxkern generate``."""
    return launch(world, ["-m", "auxkern", "generate", *options])


def process_of_rank(launcher: int, rank: int) -> int | None:
    """The process that a launcher started as a rank."""
    threads = Path(f"/proc/{launcher}/task").glob("*/children")
    for child in [child for thread in threads for child in thread.read_text().split()]:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return int(child)
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_lost_ranks_work_is_done_again(folder: Path, tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in.jsonl", 80)
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert generate.main(request_options(folder, source, whole)) == 0

    part = tmp_path / "torn.jsonl.part-1"
    launcher = generate_in(2, request_options(folder, source, torn))
    while launcher.poll() is None and not (part.is_file() and part.stat().st_size > 3000):
        time.sleep(0.002)
    lost = process_of_rank(launcher.pid, 1)
    assert lost is not None, launcher.communicate()[1]
    os.kill(lost, signal.SIGKILL)
    launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    kept = len(part.read_bytes().splitlines())
    assert kept > 0
    assert len(torn.read_bytes().splitlines()) + kept < 96, "it was not killed in the middle"

    out, _ = outputs(generate_in(2, request_options(folder, source, torn)))
    assert out.count("torn.jsonl") == 1, "only the first process says what was done"
    assert ordered(torn) == ordered(whole)
    assert len(ordered(whole)) == 96
    assert sorted(path.name for path in tmp_path.glob("torn*")) == [
        "torn.jsonl",
        "torn.jsonl.errors.jsonl",
        "torn.jsonl.run.json",
    ]


def test_one_process_goes_on_for_several(folder: Path, tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in.jsonl", 20)
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert generate.main(request_options(folder, source, whole)) == 0
    lines = whole.read_text().splitlines(keepends=True)
    for name, some in (
        ("torn.jsonl", lines[:5]),
        ("torn.jsonl.part-1", lines[3:9]),
        ("torn.jsonl.part-12", lines[9:11]),
    ):
        (tmp_path / name).write_text("".join(some))
        (tmp_path / f"{name}.run.json").write_bytes((tmp_path / "whole.jsonl.run.json").read_bytes())
    (tmp_path / "torn.jsonl.part-1").open("a").write('{"id": "r1", "sam')  # it was killed there
    (tmp_path / "torn.jsonl.part-of-mine").write_text("not ours")
    assert generate.main(request_options(folder, source, torn)) == 0
    assert ordered(torn) == ordered(whole)
    left = sorted(path.name for path in tmp_path.glob("torn.jsonl.part*"))
    assert left == ["torn.jsonl.part-of-mine"]


def test_several_processes_are_for_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert generate.main([str(folder), "--condition", "w1"]) == 2
    assert "2 processes were started, but --condition, unlike --input, is for one" in capsys.readouterr().err
    assert evaluate.main([str(folder), "--task", "wordnet-keywords"]) == 2
    assert "2 processes were started, but auxkern evaluate is for one" in capsys.readouterr().err


def _completion(id: str, error: str | None = None) -> Completion:
    if error is not None:
        return Completion(id, 0, "", (), "error", 0, error=error)
    return Completion(id, 0, "x", (5,), "end", 1, seed=1)


@pytest.mark.parametrize("errors", [True, False])
def test_a_writer_takes_over_what_another_wrote(tmp_path: Path, errors: bool) -> None:
    run = {"seed": 1}
    with CompletionWriter(tmp_path / "part", run=run) as part:
        for one in (_completion("a"), _completion("b"), _completion("c", "too long")):
            part.write(one)
    with CompletionWriter(tmp_path / "out", run=run) as writer:
        writer.write(_completion("a"))
    with CompletionWriter(tmp_path / "out", run=run) as writer:
        assert writer.absorb(tmp_path / "part", errors=errors) == (1 + errors, errors)
    ids = [json.loads(line)["id"] for line in (tmp_path / "out").read_text().splitlines()]
    assert ids == ["a", "b", "c"][: 2 + errors]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.run.json"]


def test_a_writer_leaves_another_runs_lines_alone(tmp_path: Path) -> None:
    with CompletionWriter(tmp_path / "part", run={"seed": 1}) as part:
        part.write(_completion("a"))
    with (
        CompletionWriter(tmp_path / "out", run={"seed": 2}) as writer,
        pytest.raises(ValueError, match="was begun with seed 1"),
    ):
        writer.absorb(tmp_path / "part")
    assert (tmp_path / "part").is_file()
    assert not (tmp_path / "out").read_bytes()


def test_a_writer_knows_what_is_done_beside_it(tmp_path: Path) -> None:
    from auxkern.generation import Request

    run = {"seed": 1}
    with CompletionWriter(tmp_path / "out", run=run) as writer:
        writer.write(_completion("a"))
        with (tmp_path / "out").open("a") as other:
            other.write('{"id": "b", "sampl')  # being written
        with CompletionWriter(tmp_path / "part", run=run, besides=tmp_path / "out") as part:
            assert [request.id for request, _ in part.pending([Request("a"), Request("b")])] == ["b"]
