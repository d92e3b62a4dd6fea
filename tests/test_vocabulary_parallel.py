"""Losses and gradients with a vocabulary cut over 2 and 4 processes, beside one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

WORLDS = (2, 4)


@pytest.fixture(scope="module", params=WORLDS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(ranks.__file__))]
    processes = [
        subprocess.Popen([*command, str(folder), str(rank), str(world)], stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def test_a_shard_knows_its_ids(found: list[dict[str, Any]]) -> None:
    sizes = ranks.sizes(len(found))
    firsts = [sum(sizes[:rank]) for rank in range(len(found))]
    expected = [(first, size, ranks.V) for first, size in zip(firsts, sizes, strict=True)]
    assert [one["shard"] for one in found] == expected


def _tolerance(dtype: torch.dtype, exact: torch.Tensor) -> float:
    # Sums over ranks are in another order. In float32 that is a few roundings of the largest element.
    return (1e-12 if dtype == torch.float64 else 4e-6) * max(
        1e-30, exact.abs().nan_to_num(posinf=0).max().item()
    )


@pytest.mark.parametrize("name", list(ranks.CASES))
def test_loss_statistics_and_gradients_are_those_of_one_process(
    found: list[dict[str, Any]], name: str
) -> None:
    terms, target, options = ranks.CASES[name]()
    expected = ranks.result(terms, target, options)
    dtype = expected["loss"].dtype
    for rank, one in enumerate(found):
        ours = one["cases"][name]
        first, size, _ = one["shard"]
        torch.testing.assert_close(
            ours["loss"], expected["loss"], rtol=0, atol=_tolerance(dtype, expected["loss"])
        )
        if expected["stats"] is not None:
            for key, value in expected["stats"].items():
                torch.testing.assert_close(
                    ours["stats"][key], value, rtol=0, atol=_tolerance(dtype, value.double()), msg=key
                )
        for index, gradients in enumerate(expected["gradients"]):
            for key, value in gradients.items():
                exact = value
                if key == "values" and not isinstance(terms[index], ranks.Sparse):
                    exact = value[..., first : first + size]
                elif key in ("weight", "bias"):
                    exact = value[first : first + size]
                torch.testing.assert_close(
                    ours["gradients"][index][key],
                    exact,
                    rtol=0,
                    atol=_tolerance(dtype, value),
                    msg=lambda text, key=key, rank=rank: f"rank {rank}, {key}: {text}",
                )


@pytest.mark.parametrize("name", list(ranks.CASES))
def test_all_ranks_have_the_same_bits(found: list[dict[str, Any]], name: str) -> None:
    losses = [one["cases"][name]["loss"] for one in found]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    for key in ("hidden", "values"):
        for index, gradients in enumerate(found[0]["cases"][name]["gradients"]):
            whole = [one["cases"][name]["gradients"][index].get(key) for one in found]
            if whole[0] is not None and (key == "hidden" or whole[0].shape[-1] == 3):
                assert all(torch.equal(d, whole[0]) for d in whole)
            del gradients
