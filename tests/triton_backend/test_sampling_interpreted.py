"""Runs ``test_sampling_interpreter.py`` in a process in which Triton's interpreter is switched on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton")


def _run(which: str, at_least: int, report: Path, timeout: int) -> None:
    tests = Path(__file__).with_name("test_sampling_interpreter.py")
    command = [sys.executable, "-m", "pytest", "-q", "-m", which, str(tests), f"--junitxml={report}"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    assert int(suite.attrib["tests"]) >= at_least
    assert int(suite.attrib["skipped"]) == 0


def test_sampling_kernels_are_right_in_the_interpreter(tmp_path):
    _run("interpreter and not slow", 50, tmp_path / "report.xml", 600)


@pytest.mark.slow
def test_a_thousand_requests_in_the_interpreter(tmp_path):
    _run("interpreter and slow", 1, tmp_path / "report.xml", 1800)
