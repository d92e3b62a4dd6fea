"""GPUs as plans see them, without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from auxkern.backends.triton import Triton
from auxkern.backends.triton.cases import H100
from auxkern.backends.triton.gpu import Gpu


def with_multiprocessors(number: int) -> Gpu:
    """An H100 but for their number."""
    return replace(H100, multiprocessors=number)


def seen_as(monkeypatch: pytest.MonkeyPatch, backend: Triton, **changes: Any) -> None:
    """Changes what the plans of a backend know of the device."""
    gpu = replace(backend.gpu(torch.device("cpu")), **changes)
    monkeypatch.setattr(backend, "gpu", lambda device: gpu)


def choosing(monkeypatch: pytest.MonkeyPatch, backend: Triton, **choices: Any) -> None:
    """Changes how its kernels are launched."""
    configs = replace(backend.gpu(torch.device("cpu")).configs, **choices)
    seen_as(monkeypatch, backend, configs=configs)
