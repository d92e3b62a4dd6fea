"""Runs the tests of the kernels in processes in which Triton's interpreter is switched on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton")


FILES = {
    "test_interpreter.py": 80,  # and how many tests each has at the least
    "test_linear_interpreter.py": 60,
    "test_sampling_interpreter.py": 50,
}


def run(names: Iterable[str], which: str, report: Path, timeout: int, maximum: str = "propagates") -> int:
    """How many tests of files a marker expression chooses; all of them pass, and none is skipped.

    Args:
        maximum: what ``tl.maximum`` does with NaN; see ``conftest.py``.
    """
    tests = [str(Path(__file__).with_name(name)) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-m", f"interpreter and {which}", *tests]
    done = subprocess.run(
        [*command, f"--junitxml={report}", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "AUXKERN_TEST_MAXIMUM": maximum, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    assert int(suite.attrib["skipped"]) == 0
    return int(suite.attrib["tests"])


@pytest.mark.parametrize("name", FILES)
def test_kernels_are_right_in_the_interpreter(name, tmp_path):
    assert run([name], "not slow", tmp_path / "report.xml", 600) >= FILES[name]


# A GPU's maximum drops NaN. A kernel that leaves it to a maximum to pass a bad number on is right
# under the interpreter's, and loses the number there.
def test_bad_numbers_survive_a_maximum_that_drops_nan(tmp_path):
    assert run(FILES, "nan and not slow", tmp_path / "report.xml", 600, "drops") >= 35


@pytest.mark.slow
def test_kernels_are_right_with_a_maximum_that_drops_nan(tmp_path):
    count = run(FILES, "not nan and not slow", tmp_path / "report.xml", 1800, "drops")
    assert count >= sum(FILES.values()) - 50


@pytest.mark.slow
def test_a_thousand_requests_in_the_interpreter(tmp_path):
    assert run(["test_sampling_interpreter.py"], "slow", tmp_path / "report.xml", 1800) >= 1
