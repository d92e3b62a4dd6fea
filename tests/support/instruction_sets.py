"""The CPU backend at one instruction set, in the place of the one that this machine would choose."""

from __future__ import annotations

from typing import Any

import pytest

from auxkern.ops import registry

try:
    from auxkern.backends.cpu import ISAS, Cpu
except OSError as error:  # as on a GPU machine, where nothing was built; elsewhere another test fails
    pytest.skip(str(error), allow_module_level=True)

EACH = [isa for isa in ISAS if isa != "best"]


def substituted(isa: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Cpu:
    """The backend that "cpu" means from now on; skips the test where it cannot run."""
    try:
        backend = Cpu(isa, **options)
    except ValueError as missing:
        pytest.skip(str(missing))
    chosen = registry._import
    monkeypatch.setattr(registry, "_import", lambda name: backend if name == "cpu" else chosen(name))
    return backend
