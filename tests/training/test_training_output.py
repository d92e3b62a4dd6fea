"""The folder of a run: one process at a time, and a whole checkpoint whatever becomes of the disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from auxkern.training.checkpoint import check_output, checkpoint_steps
from tests.support.limits import limited_files
from tests.support.stand_in import At, bits, log, run, run_in_a_process


def whole_again(output: Path, uninterrupted: Path) -> None:
    run(output, resume=True)
    assert bits(output) == bits(uninterrupted)
    assert log(output) == log(uninterrupted)
    assert not list(output.glob(".*"))


@pytest.fixture
def uninterrupted(tmp_path: Path) -> Path:
    run(tmp_path / "uninterrupted")
    return tmp_path / "uninterrupted"


# ------------------------------------------------------------------------------ two runs, one folder


@pytest.mark.parametrize(
    ("resume", "message"),
    [(False, "holds a run with checkpoint-0 already"), (True, "another process writes to .*; wait for it")],
)
def test_a_second_run_in_the_same_folder_is_refused(resume: bool, message: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    refused = []

    def second() -> None:
        with pytest.raises(ValueError, match=message):
            run(output, resume=resume)
        refused.append((output / "log.jsonl").read_bytes())

    run(output, progress=At(2, second))
    assert len(refused) == 1
    assert (output / "log.jsonl").read_bytes().startswith(refused[0])


def test_the_lock_goes_with_a_process_that_is_killed(tmp_path: Path, uninterrupted: Path) -> None:
    output = tmp_path / "killed"
    done = run_in_a_process(output, "step")
    assert done.returncode == -signal.SIGKILL
    whole_again(output, uninterrupted)


def test_another_process_is_refused_too(tmp_path: Path) -> None:
    output = tmp_path / "out"
    said = []

    def second() -> None:
        said.append(run_in_a_process(output, "never").stderr)

    run(output, progress=At(2, second))
    assert "ValueError: another process writes to" in said[0]


def test_a_refused_run_lets_the_lock_go(tmp_path: Path, uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match="other settings"):
        run(uninterrupted, resume=True, seed=9)
    run(uninterrupted, resume=True)


# ------------------------------------------------------------------------------------ disk and folder


@pytest.mark.parametrize("at", ["weights", "log"])
def test_a_full_disk_is_one_sentence_and_a_whole_checkpoint(
    at: str, tmp_path: Path, uninterrupted: Path
) -> None:
    output = tmp_path / "out"
    # Room for lines of the log but not for weights, or for neither.
    limit = limited_files(1000 if at == "weights" else 300)
    what = "checkpoint-6" if at == "weights" else "the log"
    with (
        pytest.raises(
            OSError, match=rf"{what} cannot be written to .*File too large.*checkpoint-4 is whole"
        ) as caught,
        _entered_after(5, limit) as progress,
    ):
        run(output, progress=progress)
    assert caught.value.errno == errno.EFBIG
    assert checkpoint_steps(output)[-1] == 4
    whole_again(output, uninterrupted)


@contextmanager
def _entered_after(step: int, limit: object) -> Iterator[At]:
    entered: list[Callable[[], object]] = []

    def enter() -> None:
        limit.__enter__()  # type: ignore[attr-defined]
        entered.append(lambda: limit.__exit__(None, None, None))  # type: ignore[attr-defined]

    try:
        yield At(step, enter)
    finally:
        for leave in entered:
            leave()


def test_a_full_disk_at_the_very_end_leaves_the_last_checkpoint(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("auxkern.training.checkpoint.shutil.copyfile", full)
        with pytest.raises(OSError, match=r"the model cannot be written.*No space left.*checkpoint-11 is"):
            run(output)
    whole_again(output, uninterrupted)


def test_a_folder_that_is_lost_gets_a_whole_checkpoint_and_the_run_ends(
    tmp_path: Path, uninterrupted: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(
        OSError, match=r"the folder was removed; this checkpoint is in a new one.*-6 is whole"
    ):
        run(output, progress=At(5, lambda: shutil.rmtree(output)))
    run(output, resume=True)
    assert bits(output) == bits(uninterrupted)


def test_a_folder_that_another_run_has_taken_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def replaced() -> None:
        output.rename(tmp_path / "moved")
        run(output)

    with pytest.raises(OSError, match="another run has taken the folder's place"):
        run(output, progress=At(5, replaced))
    assert checkpoint_steps(tmp_path / "moved")[-1] == 4
    assert checkpoint_steps(output)[-1] == 11


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_an_output_that_can_be_no_folder_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output is .*file is not a folder; name another"):
        run(tmp_path / place)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(ValueError, match="nothing can be written to"):
        check_output(tmp_path / "out", resume=False)
