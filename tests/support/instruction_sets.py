"""The CPU backend at one instruction set, in the place of the one that this machine would choose."""

from __future__ import annotations

from typing import Any

import pytest

from auxkern.backends import choice

try:
    from auxkern.backends.cpu import Cpu
    from auxkern.backends.cpu.abi import ISAS
except OSError as error:  # as on a GPU machine, where nothing was built; elsewhere another test fails
    pytest.skip(str(error), allow_module_level=True)

EACH = [isa for isa in ISAS if isa != "best"]


def substituted(isa: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Cpu:
    """The backend that "cpu" means from now on; skips the test where it cannot run."""
    try:
        backend = Cpu(isa, **options)
    except ValueError as missing:
        pytest.skip(str(missing))
    chosen = choice._import
    monkeypatch.setattr(choice, "_import", lambda name: backend if name == "cpu" else chosen(name))
    return backend
