"""Runs the tests of Triton's launcher in a process that has a driver without a GPU."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton")

from tests.support.driver import recording
from tests.support.launching import run_tests

pytestmark = pytest.mark.skipif(
    recording.compiler() is None, reason="there is no C compiler, neither gcc nor clang"
)


def run(which: str, at_least: int, folder: Path) -> ElementTree.Element:
    # A GPU of this machine would be asked through the same library.
    return run_tests(
        [Path(__file__).with_name("test_launcher.py")],
        which,
        at_least,
        folder / "report.xml",
        seconds=600,
        CUDA_VISIBLE_DEVICES="",
        **{recording.VARIABLE: str(recording.library(folder))},
    )


def test_tritons_launcher_gets_what_we_mean(tmp_path, record_property):
    suite = run("launcher and not slow", 40, tmp_path)
    for measured in suite.iter("property"):
        name, value = measured.attrib["name"], measured.attrib["value"]
        record_property(name, value)
        print(f"{name}: {value}")


@pytest.mark.slow
def test_every_layout_on_two_gpus(tmp_path):
    run("launcher and slow", 28, tmp_path)
