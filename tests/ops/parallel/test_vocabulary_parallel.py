"""Losses and gradients with a vocabulary cut over 2 and 4 processes, beside one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import auxkern
from auxkern import Head, VocabularyShard
from tests.support import ranks
from tests.support.launching import LOOPBACK, group_of, run_ranks

WORLDS = (2, 4)


@pytest.fixture(scope="module", params=WORLDS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    return run_ranks(ranks.rank_result, folder, world)


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


@pytest.mark.parametrize("name", ranks.DRAWS)
def test_every_rank_draws_the_token_of_one_process(found: list[dict[str, Any]], name: str) -> None:
    terms, options = ranks.draw_case(name)
    expected = ranks.drawn(terms, options)
    for one in found:
        ours = one["draws"][name]
        assert torch.equal(ours["tokens"], expected["tokens"])
        assert torch.equal(ours["status"], expected["status"])
        for key in ("logprob", "processed_logprob", "term_logprobs", "top_logprobs", "top_ids"):
            assert (ours[key] is None) == (expected[key] is None), key
            if expected[key] is not None:
                torch.testing.assert_close(
                    ours[key], expected[key], rtol=0, atol=1e-11, equal_nan=True, msg=key
                )
    assert expected["tokens"].unique().numel() > 5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A group of one process: this one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LOOPBACK.items():
            patch.setenv(name, value)
        with group_of(tmp_path_factory.mktemp("alone"), 0, 1) as group:
            yield group


def _head() -> Head:
    return Head(torch.randn(3, 4), torch.randn(7, 4))


def test_dtensors_cut_over_the_vocabulary_tell_their_group(alone: Any) -> None:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    head, target = _head(), torch.tensor([0, 6, 2])
    weight = distribute_tensor(head.weight, mesh, [Shard(0)]).requires_grad_()
    hidden = distribute_tensor(head.hidden, mesh, [Replicate()])
    expected = auxkern.cross_entropy([head], target)
    for given in (head.hidden, hidden):
        loss = auxkern.cross_entropy([Head(given, weight)], target)
        torch.testing.assert_close(loss, expected)
    loss.backward()
    assert weight.grad.placements == (Shard(0),)
    logits = distribute_tensor(head.hidden @ head.weight.T, mesh, [Shard(1)])
    torch.testing.assert_close(auxkern.cross_entropy([logits], target), expected)
    ours = auxkern.sample([logits], seed=torch.arange(3), position=0)
    theirs = auxkern.sample([head], seed=torch.arange(3), position=0)
    assert torch.equal(ours.tokens, theirs.tokens)


def test_dtensors_that_are_placed_in_another_way_are_refused(alone: Any) -> None:
    mesh = init_device_mesh("cpu", (1,))
    head, target = _head(), torch.tensor([0, 6, 2])
    for name, tensor, placement, remedy in (
        ("weight", head.weight, Shard(1), r"Shard\(0\) in one dimension"),
        ("weight", head.weight, Replicate(), r"Shard\(0\) in one dimension"),
        ("hidden", head.hidden, Shard(0), r"Replicate\(\)"),
    ):
        tensors = {**head.tensors, name: distribute_tensor(tensor, mesh, [placement])}
        with pytest.raises(ValueError, match=rf"terms\[0\].{name} is a DTensor .*{remedy}"):
            auxkern.cross_entropy([Head(**tensors)], target, process_group=alone)


def test_what_does_not_fit_a_group_is_refused(alone: Any) -> None:
    head, target = _head(), torch.tensor([0, 6, 2])
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup"):
        auxkern.cross_entropy([head], target, process_group="tp")
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match=r"DeviceMesh of 2 dimensions .* pass one of them"):
        auxkern.cross_entropy([head], target, process_group=mesh)
    with pytest.raises(ValueError, match=r"VocabularyShard of 5 ids, but this rank's terms have 7"):
        auxkern.cross_entropy([head], target, process_group=VocabularyShard(alone, 0, (5,)))
    with pytest.raises(ValueError, match=r"this rank's terms have \[7, 9\] ids"):
        auxkern.cross_entropy([head, torch.randn(3, 9)], target, process_group=alone)
    with pytest.raises(ValueError, match=r"target\[1\] \(flattened\) is 7, outside \[0, 7\)"):
        auxkern.cross_entropy([head], torch.tensor([0, 7, 2]), process_group=alone)
    with pytest.raises(ValueError, match=r"vocab_size is 8, but the ranks have 7 ids"):
        auxkern.cross_entropy([head], target, process_group=alone, vocab_size=8)
    mesh = init_device_mesh("cpu", (1,))
    torch.testing.assert_close(
        auxkern.cross_entropy([head], target, process_group=mesh), auxkern.cross_entropy([head], target)
    )
