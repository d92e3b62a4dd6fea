"""The arithmetic and the tables of ``python -m benchmarks.scaling``; its measuring is not run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from auxkern.bench.report import between_markers
from benchmarks import scaling
from benchmarks.scaling import Link, all_reduce_seconds, step_seconds

LINK = Link("a link", bandwidth=1000.0, latency=0.25)
MEASURED = {
    "batch_size": 64,
    "batch_seconds": 2.0,
    "update_seconds": 0.5,
    "gradient_bytes": 4000,
    "base_bytes": 10_000_000,
    "new_tokens_per_second": 123.4,
    "step_batches": 8,
    "step_seconds": {"1": 16.0, "2": 10.0},
}


def test_a_ring_sends_shares() -> None:
    # Two messages of half the bytes, then six of a quarter.
    assert all_reduce_seconds(LINK, 4000, 2) == pytest.approx(2 * (0.25 + 2.0))
    assert all_reduce_seconds(LINK, 4000, 4) == pytest.approx(6 * (0.25 + 1.0))
    assert all_reduce_seconds(LINK, 4000, 1) == 0


def test_a_step_takes_its_longest_share() -> None:
    assert step_seconds(MEASURED, 64, 1, LINK) == 128.5
    assert step_seconds(MEASURED, 64, 3, None) == 22 * 2 + 0.5
    small = 3 * 4 * (0.25 + 8 / 3 / 1000)
    assert step_seconds(MEASURED, 64, 3, LINK) == pytest.approx(44.5 + 4 * (0.25 + 4 / 3) + small)
    assert step_seconds(MEASURED, 1, 8, None) == 2.5


def test_the_page_shows_what_was_measured_and_computed() -> None:
    computed = [
        {"link": link.name, "ranks": ranks, "step_seconds": 100 / ranks}
        for link in scaling.LINKS
        for ranks in scaling.RANKS
    ]
    machine = {"processor": "some processor", "torch": "9.9"}
    record = {"command": "the command", "date": "2020-01-02T03:04:05", "machine": machine}
    text = scaling.page_part({**record, "measured": MEASURED, "computed": computed})
    for part in (
        "`the command`, 2020-01-02, some processor, torch 9.9",
        "| a batch of 64 sentences, base, forward and backward | 2.00 s |",
        "10.00 s: 1.60 times as fast",
        "without a link's time: 1.94",  # 16.5 / 8.5
        "| InfiniBand, 400 Gbit/s | 2.0 | 4.0 | 8.0 | 16.0 | 32.0 |",
    ):
        assert part in text
    assert text.index("**Measured**") < text.index("**Computed, not measured**")


def test_the_page_has_a_place_for_it() -> None:
    page = Path(scaling.__file__).parent.parent / "docs" / "scaling.md"
    assert "\nTHE TABLES\n" in between_markers(page.read_text(encoding="utf-8"), "scaling", "THE TABLES")
