"""An output with errors in it: they are skipped, or taken out at once and asked again."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from auxkern.generation.completion import Completion
from auxkern.generation.request import Request
from auxkern.generation.stream import BadLine, CompletionWriter
from tests.support.limits import limited_files


def completion(request: Request, sample: int = 0) -> Completion:
    return Completion(request.id, sample, f"text of {request.prompt!r} €\n", (1, 2), "end", 1, seed=3)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_any_number_of_samples_takes_no_memory(tmp_path: Path) -> None:
    request = Request("a", samples=10**15)
    with CompletionWriter(tmp_path / "out", run={}) as writer:
        writer.write(completion(request, 1000))
    with CompletionWriter(tmp_path / "out", run={}) as writer:
        some = [next(parts)[1] for parts in [writer.pending([request])] for _ in range(3)]
    numbers = [number for part in some for number in part]
    assert len(numbers) >= 3000 - 1
    assert numbers == [number for number in range(numbers[-1] + 1) if number != 1000]


def failed(request: Request, sample: int = 0) -> Completion:
    return Completion.failed(request, sample, "no room")


def begun_with_errors(folder: Path) -> list[Request]:
    """An output of five texts, two of them errors, and one bad line; the requests."""
    requests = [Request("a", samples=3), Request(1), Request("€")]
    with CompletionWriter(folder / "out", folder / "errors", run={"seed": 1}) as writer:
        for one in (completion(requests[0]), failed(requests[0], 2), completion(requests[0], 1)):
            writer.write(one)
        writer.write(failed(requests[1]))
        writer.write(completion(requests[2]))
        writer.report(BadLine(7, "bad"))
    return requests


def test_what_failed_is_skipped_as_what_is_done(tmp_path: Path) -> None:
    requests = begun_with_errors(tmp_path)
    before = (tmp_path / "out").read_bytes()
    with CompletionWriter(tmp_path / "out", tmp_path / "errors", run={"seed": 1}) as writer:
        assert (writer.done, writer.failed) == (5, 2)
        assert list(writer.pending(requests)) == []
    assert (tmp_path / "out").read_bytes() == before


def test_errors_are_taken_out_and_asked_again(tmp_path: Path) -> None:
    requests = begun_with_errors(tmp_path)
    kept = [one for one in (tmp_path / "out").read_bytes().splitlines() if b'"error"' not in one]
    assert len(kept) == 3
    errors = (tmp_path / "errors").read_bytes()
    (tmp_path / "out").chmod(0o640)
    with CompletionWriter(
        tmp_path / "out", tmp_path / "errors", run={"seed": 1}, retry_errors=True
    ) as writer:
        assert (writer.done, writer.failed) == (3, 0)
        assert (tmp_path / "out").read_bytes().splitlines() == kept
        assert list(writer.pending(requests)) == [(requests[0], (2,)), (requests[1], (0,))]
        with pytest.raises(ValueError, match="another process writes"):  # the new file is locked, too
            CompletionWriter(tmp_path / "out", run={"seed": 1})
        writer.write(completion(requests[0], 2))
        writer.write(failed(requests[1]))
        writer.report(BadLine(7, "bad"))
    found = [(one["id"], one["sample"], one["finish_reason"]) for one in records(tmp_path / "out")]
    assert found == [("a", 0, "end"), ("a", 1, "end"), ("€", 0, "end"), ("a", 2, "end"), (1, 0, "error")]
    assert (tmp_path / "errors").read_bytes() == errors
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors", "out", "out.run.json"]


def test_an_output_behind_a_link_stays_there(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "far" / "texts")
    begun_with_errors(tmp_path)
    CompletionWriter(tmp_path / "out", run={"seed": 1}, retry_errors=True).close()
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["texts"]
    assert len(records(tmp_path / "far" / "texts")) == 3


@pytest.mark.parametrize("line", [b"\0\0\0", b'{"id": 1, "sample": 0}'])
def test_nothing_is_taken_out_of_a_damaged_output(tmp_path: Path, line: bytes) -> None:
    begun_with_errors(tmp_path)
    whole = (tmp_path / "out").read_bytes() + line + b"\n"
    (tmp_path / "out").write_bytes(whole)
    with pytest.raises(ValueError, match="line 6"):
        CompletionWriter(tmp_path / "out", run={"seed": 1}, retry_errors=True)
    with pytest.raises(ValueError, match="begun with seed 1"):
        CompletionWriter(tmp_path / "out", run={"seed": 2}, retry_errors=True)
    assert (tmp_path / "out").read_bytes() == whole


def test_without_room_for_the_copy_all_stays(tmp_path: Path) -> None:
    begun_with_errors(tmp_path)
    before = (tmp_path / "out").read_bytes()
    with limited_files(len(before) // 3), pytest.raises(OSError, match="File too large") as caught:
        CompletionWriter(tmp_path / "out", run={"seed": 1}, retry_errors=True)
    assert str(tmp_path / ".out.") in str(caught.value)
    assert (tmp_path / "out").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors", "out", "out.run.json"]


def test_without_room_for_the_first_file_it_is_named(tmp_path: Path) -> None:
    with limited_files(5), pytest.raises(OSError, match=r"out\.run\.json"):
        CompletionWriter(tmp_path / "out", run={"seed": 1})


def test_who_opened_the_file_before_the_new_one_came_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = begun_with_errors(tmp_path)
    opened = os.open

    def slowly(path: Any, *more: Any) -> int:
        file = opened(path, *more)
        if path == tmp_path / "out":  # another process retries, and ends, before this one has the lock
            monkeypatch.setattr(os, "open", opened)
            with CompletionWriter(tmp_path / "out", run={"seed": 1}, retry_errors=True) as writer:
                writer.write(completion(requests[1]))
        return file

    monkeypatch.setattr(os, "open", slowly)
    with pytest.raises(ValueError, match="another process writes"):
        CompletionWriter(tmp_path / "out", run={"seed": 1})
    assert len(records(tmp_path / "out")) == 4


# One process, which imports once, for all runs; the n-th is killed before the n-th line of stream.py.
KILLED = """
    import os, shutil, signal, sys
    from pathlib import Path
    from auxkern.generation import Completion, CompletionWriter, Request, stream

    folder = Path(sys.argv[1])
    requests = [Request("a", samples=3), Request(1), Request("€"), Request("c")]

    def run(retry):
        output, errors = folder / "out", folder / "errors"
        with CompletionWriter(output, errors, run={"seed": 1}, retry_errors=retry) as writer:
            for request, samples in writer.pending(requests):
                for sample in samples:
                    writer.write(Completion(request.id, sample, "again", (1,), "end", 1, seed=3))

    def killed_at(n):
        left = n

        def trace(frame, event, argument):
            nonlocal left
            if frame.f_code.co_filename != stream.__file__:
                return None
            left -= event == "line"
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        process = os.fork()
        if process == 0:
            sys.settrace(trace)
            run(retry=True)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL

    def state():
        return sorted((folder / "out").read_bytes().splitlines())

    begun = {path: path.read_bytes() for path in folder.iterdir()}
    n = 0
    while True:
        for path, content in begun.items():
            path.write_bytes(content)
        killed = killed_at(n)
        seen, copy = state(), (folder / ".out.retried").exists()
        if n % 2:  # it goes on without the option, and need not be asked again
            run(retry=False)
        middle = state()
        run(retry=True)
        assert not (folder / ".out.retried").exists()
        errors = [sum(b'"error"' in line for line in lines) for lines in (seen, middle)]
        print(len(seen), errors[0], int(copy), len(middle), errors[1], hash(tuple(state())))
        if not killed:
            break
        n += 1
"""


def test_killed_at_any_line_as_it_asks_again_it_loses_nothing(tmp_path: Path) -> None:
    begun_with_errors(tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    states = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    # Lines and errors in the output: all of both, none of the errors, then the new lines one by one.
    seen = [key for key, _ in itertools.groupby(state[:2] for state in states)]
    assert seen == [(5, 2), (3, 0), (4, 0), (5, 0), (6, 0)]
    assert any(copy for _, _, copy, *_ in states)
    # Without the option errors that are still there stay, and what was taken out is asked again.
    resumed = states[1::2]
    assert {state[3:5] for state in resumed if state[1]} == {(6, 2)}
    assert {state[3:5] for state in resumed if not state[1]} == {(6, 0)}
    assert len({state[5] for state in states}) == 1
    found = sorted((str(one["id"]), one["sample"], one["text"]) for one in records(tmp_path / "out"))
    assert found == [
        ("1", 0, "again"),
        ("a", 0, "text of '' €\n"),
        ("a", 1, "text of '' €\n"),
        ("a", 2, "again"),
        ("c", 0, "again"),
        ("€", 0, "text of '' €\n"),
    ]
