"""What tests of kernels run on, and how Triton's interpreter behaves in a process that has it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.machines import INTERPRETED, INTERPRETER, PROCESSORS, machines

# "drops": of a number and NaN the maximum is the number, as for PTX's and AMD's max.
MAXIMUM = os.environ.get("AUXKERN_TEST_MAXIMUM", "propagates")


@pytest.fixture(scope="session", autouse=True)
def language_replaced_once_a_launch() -> Iterator[None]:
    """Kernels' calls of one another find the language as their launch has replaced it.

    The interpreter replaces the 200 functions of ``tl`` again at every such call, which is more than
    half of its time and changes nothing.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    def replace_once(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return replace(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_computed_in_vain() -> Iterator[None]:
    """The interpreter skips two things that no test sees, and that take two fifths of its time.

    It adds, subtracts and multiplies integers a second time in 64 bits, for an assertion that it makes in
    debugging alone; and it writes its table of NumPy's dtypes anew for every value.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    of_scalar = functools.cache(interpreter._get_np_dtype)

    def dtype_of(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return of_scalar(tl.uint64 if isinstance(element, tl.pointer_type) else element)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        patch.setattr(interpreter, "_get_np_dtype", dtype_of)
        yield


@pytest.fixture(scope="session", autouse=True)
def maximum_of_the_hardware() -> Iterator[None]:
    """With ``AUXKERN_TEST_MAXIMUM=drops``, ``tl.maximum`` and ``tl.minimum`` drop a NaN, as GPUs do.

    The interpreter's are NumPy's, which keep it; a kernel that counts on that is right there and wrong
    on a GPU. Its reductions, ``tl.max`` and ``tl.min``, drop NaN already.
    """
    if MAXIMUM not in ("propagates", "drops"):
        raise ValueError(f"AUXKERN_TEST_MAXIMUM={MAXIMUM!r}: must be 'propagates' or 'drops'")
    if not INTERPRETED or MAXIMUM == "propagates":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    with pytest.MonkeyPatch.context() as patch:
        for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
            patch.setattr(
                InterpreterBuilder, name, lambda self, a, b, function=function: self.binary_op(a, b, function)
            )
        yield


@pytest.fixture(scope="session")
def codes() -> dict[str, Any]:
    """Translated kernels, by their PTX."""
    return {}


@pytest.fixture(params=machines())
def machine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, codes: dict[str, Any]
) -> Iterator[Any]:
    """What ``backend="triton"`` is on CPU tensors; compiled code must leave nothing to report."""
    from auxkern.backends.triton import BACKEND
    from tests.support.executed import BENIGN, Machine, executed, held_as_on_a_gpu
    from tests.support.ptx.report import Report
    from tests.support.ptx.runner import Executor

    if request.param == INTERPRETER:
        held_as_on_a_gpu(monkeypatch)
        yield Machine(BACKEND, compiled=False)
        return
    executor = Executor(request.param, report=Report(BENIGN), codes=codes)
    with executed(executor, monkeypatch, PROCESSORS[request.param]) as machine:
        yield machine
    assert not executor.report.faults, str(executor.report)
