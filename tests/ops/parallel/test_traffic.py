"""What processes hand to each other is what docs/scaling.md says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import traffic_ranks
from tests.support.launching import run_ranks
from tests.support.traffic_ranks import D_AUX, N, V

WORLD = 2
FLOAT32, NUMBER = 4, 8  # bytes; single numbers are exchanged in float64
AGREEMENT = ("allgather", 3 * NUMBER)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first of two processes found; the other found the same."""
    folder = tmp_path_factory.mktemp("traffic")
    first, other = run_ranks(traffic_ranks.rank_result, folder, WORLD)
    assert first == other
    return dict(first)


def test_a_cut_loss_exchanges_statistics_and_gradients_of_hidden_states(found: dict[str, Any]) -> None:
    # What the ranks agree on, three numbers a row; nothing for the LM's hidden states without a gradient.
    sums = ("allgather", 3 * NUMBER * N)
    assert found["loss"] == [AGREEMENT, sums, ("allreduce", FLOAT32 * N * D_AUX)]


def test_a_cut_draw_exchanges_a_few_numbers_a_row_and_filters_need_all_logits(found: dict[str, Any]) -> None:
    assert found["draw"] == [AGREEMENT, ("allgather", 2 * FLOAT32 * N), ("allgather", 2 * NUMBER * N)]
    assert found["filtered draw"] == [AGREEMENT, ("allgather", FLOAT32 * N * V // WORLD)]


def large(calls: list[tuple[str, int]], kind: str) -> list[int]:
    return [size for name, size in calls if name == kind and size > NUMBER]


@pytest.mark.parametrize(("name", "steps"), [("three steps", 3), ("five steps", 5), ("more batches", 3)])
def test_gradients_of_copies_are_summed_once_a_step(found: dict[str, Any], name: str, steps: int) -> None:
    run = found[name]
    # Behind the gradients stands which parameters have one.
    whole = FLOAT32 * (run["P"] + run["tensors"])
    assert large(run["calls"], "allreduce") == [whole] * steps
    assert not large(run["calls"], "allgather")


def test_the_rest_of_a_step_is_single_numbers(found: dict[str, Any]) -> None:
    three, five = (found[f"{name} steps"]["calls"].count(("allreduce", NUMBER)) for name in ("three", "five"))
    # Labels, losses and the wish to stop; the LM's own loss for a line of the log, which each step has here,
    # and whether it could be written.
    assert five - three == 2 * 5


def test_copies_begin_with_one_broadcast_of_the_auxiliary(found: dict[str, Any]) -> None:
    run = found["three steps"]
    assert sum(size for name, size in run["calls"] if name == "broadcast") == FLOAT32 * run["P"]


def test_a_sharded_base_is_gathered_layer_by_layer_in_every_forward_pass(found: dict[str, Any]) -> None:
    run = found["sharded base"]
    gathered = large(run["calls"], "allgather")
    assert run["forward passes of the base"] > 0
    assert sum(gathered) == run["forward passes of the base"] * FLOAT32 * run["layers"] // WORLD
    assert not large(run["calls"], "reduce_scatter")
    assert large(run["calls"], "allreduce") == large(found["three steps"]["calls"], "allreduce")


def test_a_sharded_auxiliary_is_gathered_twice_and_summed_in_every_batch(found: dict[str, Any]) -> None:
    run = found["sharded auxiliary"]
    batches = 3 * 4 // WORLD
    gathered, summed = large(run["calls"], "allgather"), large(run["calls"], "reduce_scatter")
    assert (len(gathered), len(summed)) == (2 * batches, batches)
    # Each parameter is filled up to a multiple of the ranks.
    assert sum(summed) == pytest.approx(batches * FLOAT32 * run["P"], rel=0.02)
    assert sum(gathered) * WORLD == sum(summed) * 2
    assert not large(run["calls"], "allreduce")
