"""Random calls over 2 and 4 processes, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import rank_fuzz
from tests.support.launching import run_ranks


def found(folder: Path, world: int, first: int, last: int) -> list[str]:
    """What the ranks say was wrong with the calls of these numbers."""
    (folder / "calls").write_text(f"{first} {last}")
    return [line for lines in run_ranks(rank_fuzz.rank_result, folder, world, seconds=3600) for line in lines]


@pytest.mark.parametrize("world", [2, 4])
def test_random_calls_over_ranks_equal_the_formulas(world: int, tmp_path: Path) -> None:
    assert found(tmp_path, world, 0, 150) == []


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ten_thousand_random_calls_over_ranks_equal_the_formulas(world: int, tmp_path: Path) -> None:
    assert found(tmp_path, world, 0, 10_000) == []
