"""What tests of kernels run on: Triton's interpreter, or compiled code in the executor of PTX."""

from __future__ import annotations

import os
from typing import Any

import pytest

# Decided before Triton is imported; test_interpreted.py starts processes that have it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETER = "interpreter"
PROCESSORS = {80: 1, 90: 132}  # multiprocessors: rows are not split, or as often as an H100 would


def compiled(*marks: pytest.MarkDecorator) -> list[Any]:
    """The GPUs whose compiled code runs, as parameters."""
    skip = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")
    return [pytest.param(arch, marks=[pytest.mark.ptx, skip, *marks], id=f"sm_{arch}") for arch in PROCESSORS]


def one_compiled() -> list[Any]:
    """Those GPUs, of which the one that splits no rows is left to the slow tests."""
    return [*compiled(pytest.mark.slow)[:1], *compiled()[1:]]


def machines() -> list[Any]:
    """The interpreter and those GPUs, which are left to the slow tests."""
    skip = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1; test_interpreted.py sets it")
    interpreter = pytest.param(INTERPRETER, marks=[pytest.mark.interpreter, skip])
    return [interpreter, *compiled(pytest.mark.slow)]
