"""A shard's rows and gradients: targets that are elsewhere take part in nothing."""

from __future__ import annotations

import pytest

from tests.support import shares
from tests.support.cases import available_backends, device_of


@pytest.mark.parametrize("name", shares.CASES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("backend", available_backends())
def test_a_shard_is_what_its_ids_add_up_to(backend: str, smoothing: float, name: str) -> None:
    shares.check(backend, name, device_of(backend), smoothing)
