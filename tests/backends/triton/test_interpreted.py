"""Runs the tests of the kernels in processes in which Triton's interpreter is switched on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton")


def run(name: str, which: str, at_least: int, report: Path, timeout: int) -> None:
    """The tests of a file that a marker expression chooses pass, and are as many as there should be."""
    tests = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-m", which, str(tests), f"--junitxml={report}"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    assert int(suite.attrib["tests"]) >= at_least
    assert int(suite.attrib["skipped"]) == 0


@pytest.mark.parametrize(
    ("name", "at_least"),
    [("test_interpreter.py", 80), ("test_linear_interpreter.py", 60), ("test_sampling_interpreter.py", 50)],
)
def test_kernels_are_right_in_the_interpreter(name, at_least, tmp_path):
    run(name, "interpreter and not slow", at_least, tmp_path / "report.xml", 600)


@pytest.mark.slow
def test_a_thousand_requests_in_the_interpreter(tmp_path):
    run("test_sampling_interpreter.py", "interpreter and slow", 1, tmp_path / "report.xml", 1800)
