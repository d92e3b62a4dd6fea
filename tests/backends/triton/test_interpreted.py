"""Runs the tests of the kernels in processes in which Triton's interpreter is switched on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.launching import run_tests

pytest.importorskip("triton")

FILES = {
    "test_logits_kernels.py": 80,  # and how many tests each has at the least
    "test_one_pass.py": 16,
    "test_heads_kernels.py": 60,
    "test_mixed_heads.py": 30,
    "test_draw_kernels.py": 45,
    "test_filter_kernels.py": 20,
    "test_draw_splits.py": 9,
}


def run(
    names: Iterable[str], which: str, at_least: int, report: Path, seconds: float, maximum: str = "propagates"
) -> None:
    """The tests of files that a marker expression chooses.

    Args:
        maximum: what ``tl.maximum`` does with NaN; see ``conftest.py``.
    """
    run_tests(
        [Path(__file__).with_name(name) for name in names],
        f"interpreter and {which}",
        at_least,
        report,
        seconds=seconds,
        TRITON_INTERPRET="1",
        AUXKERN_TEST_MAXIMUM=maximum,
    )


# Left to the slow tests: the compiled code of the same kernels is executed in the quick ones.
SLOW = ("test_filter_kernels.py", "test_mixed_heads.py", "test_draw_splits.py")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FILES]
)
def test_kernels_are_right_in_the_interpreter(name, tmp_path):
    run([name], "not slow", FILES[name], tmp_path / "report.xml", 600)


# A GPU's maximum drops NaN. A kernel that leaves it to a maximum to pass a bad number on is right
# under the interpreter's, and loses the number there.
def test_bad_numbers_survive_a_maximum_that_drops_nan(tmp_path):
    run(FILES, "nan and not slow", 35, tmp_path / "report.xml", 600, "drops")


@pytest.mark.slow
def test_kernels_are_right_with_a_maximum_that_drops_nan(tmp_path):
    run(FILES, "not nan and not slow", sum(FILES.values()) - 50, tmp_path / "report.xml", 1800, "drops")


@pytest.mark.slow
def test_a_thousand_requests_in_the_interpreter(tmp_path):
    run(["test_draw_kernels.py"], "slow", 1, tmp_path / "report.xml", 1800)
