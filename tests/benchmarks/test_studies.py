"""What all studies share: jobs that are processes of their own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.studies import run_all


def test_failing_jobs_do_not_keep_the_others_from_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command_of(name: str) -> list[str]:
        return [sys.executable, "-c", f"print({name!r}); raise SystemExit({int(name == 'b')})"]

    assert not run_all(["a", "b", "c:0"], command_of, jobs=2, logs=tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.log": "a\n",
        "b.log": "b\n",
        "c-0.log": "c:0\n",
    }
    assert "b: status 1" in capsys.readouterr().out
    assert run_all(["a"], command_of, jobs=2, logs=tmp_path)


def test_ctrl_c_lets_every_job_save(tmp_path: Path) -> None:
    script = (
        "import signal, time, pathlib\n"
        "def save(*_):\n    time.sleep(0.3); pathlib.Path(r'{0}.saved').touch(); raise SystemExit(130)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path(r'{0}.ready').touch()\ntime.sleep(60)\n"
    )

    def command_of(name: str) -> list[str]:
        return [sys.executable, "-c", script.format(tmp_path / name)]

    def interrupt() -> None:
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_all(["a", "b", "c"], command_of, jobs=2, logs=tmp_path / "logs")
    assert sorted(path.name for path in tmp_path.glob("*.saved")) == ["a.saved", "b.saved"]
