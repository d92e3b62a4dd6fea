"""Training that processes share: the run is the same on one, two and four of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from auxkern.model import AuxTunedForCausalLM, shard_auxiliary, shard_base, use_native_kernels
from auxkern.model.native import native_refusal
from auxkern.training.checkpoint import checkpoint_steps
from auxkern.training.ranks import Ranks
from tests.support import training_ranks
from tests.support.batches import ragged_batch
from tests.support.launching import run_ranks
from tests.support.tiny import tiny_lm
from tests.support.training_ranks import new_pair, run

TIMES = ("seconds", "tokens_per_second", "seconds_left", "measured")
# Gradients are summed in another order, and AdamW divides by roots of tiny squares.
ROUNDING = 2e-4


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which 2 or 4 processes made all runs."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    run(folder / "ended by ranks", "ended by ranks", steps=6)
    run_ranks(training_ranks.rank_result, folder, world, 300)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one process made the same runs."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("uneven", "unlabelled", "counts", "worse"):
        run(folder / name, name)
    # Twice the batch, once.
    run(folder / "fifty", "fifty", batch_size=4, gradient_accumulation=1)
    return folder


def found(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("*.pt"))
    return [torch.load(path, weights_only=False) for path in paths]


def log(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def check_same_run(one: Path, other: Path) -> None:
    """Weights and optimizer after the last step, and every line of the log."""
    steps = checkpoint_steps(one)
    assert steps[-1] == checkpoint_steps(other)[-1]
    for file in ("model.safetensors", "optimizer.safetensors"):
        expected, given = (load_file(folder / f"checkpoint-{steps[-1]}" / file) for folder in (one, other))
        assert given.keys() == expected.keys()
        for name, tensor in expected.items():
            assert given[name].shape == tensor.shape
            torch.testing.assert_close(given[name], tensor, rtol=0, atol=ROUNDING)
    for ours, theirs in zip(log(one), log(other), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)


def test_uneven_ranks_make_the_steps_of_one_process(shared: Path, alone: Path) -> None:
    check_same_run(alone / "uneven", shared / "uneven")


def test_fifty_steps_are_those_of_one_process_with_all_of_the_batch(shared: Path, alone: Path) -> None:
    check_same_run(alone / "fifty", shared / "fifty")


def test_a_rank_with_five_times_the_labels_weighs_five_times_as_much(shared: Path, alone: Path) -> None:
    check_same_run(alone / "counts", shared / "counts")
    tokens = [line["tokens"] for line in log(shared / "counts") if "tokens" in line]
    assert tokens == [64 + 320, 2 * (64 + 320), 3 * (64 + 320), 4 * (64 + 320)]


def test_a_rank_without_labels_adds_nothing(shared: Path, alone: Path) -> None:
    check_same_run(alone / "unlabelled", shared / "unlabelled")


def test_sharded_base_and_auxiliary_make_the_same_run_and_the_same_checkpoints(
    shared: Path, alone: Path
) -> None:
    check_same_run(alone / "uneven", shared / "sharded")
    world = len(found(shared))
    whole = new_pair("sharded").lm
    outside = sum(p.numel() for p in whole.get_input_embeddings().parameters())
    outside += sum(p.numel() for p in whole.get_output_embeddings().parameters())
    for rank in found(shared):
        assert len(rank["fingerprints"]) == 1
        held, total = rank["base"]
        # Each tensor is padded to a multiple of the ranks at most.
        assert held <= outside + (total - outside) / world * 1.2


def test_a_run_goes_on_in_another_number_of_processes(shared: Path, alone: Path) -> None:
    check_same_run(alone / "uneven", shared / "ended by ranks")
    if checkpoint_steps(shared / "begun by ranks")[-1] == 6:
        run(shared / "begun by ranks", "begun by ranks", steps=12, resume=True)
    check_same_run(alone / "uneven", shared / "begun by ranks")


def test_a_signal_to_one_rank_stops_all_and_nothing_is_lost(shared: Path, alone: Path) -> None:
    assert [rank["stopped"] for rank in found(shared)] == [(3, "checkpoint-3")] * len(found(shared))
    check_same_run(alone / "uneven", shared / "stopped")
    lines = [json.loads(line) for line in (shared / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [line["measured"] for line in lines if line.get("evaluation")] == [{"rank": 0}] * 5


def test_ranks_that_learn_nothing_end_together_with_what_they_began_with(shared: Path, alone: Path) -> None:
    before = {name: tensor for name, tensor in new_pair("worse").state_dict().items()}
    for folder in (alone / "worse", shared / "worse"):
        assert [line["step"] for line in log(folder) if line.get("evaluation")] == [0, 3, 6]
        assert checkpoint_steps(folder) == [0, 3, 6]
        published = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensor, before[name]) for name, tensor in published.items())


def test_what_ranks_saved_loads_on_one_device(shared: Path) -> None:
    lm = tiny_lm()
    pairs = [
        AuxTunedForCausalLM.from_pretrained(shared / name, lm=lm).eval() for name in ("uneven", "sharded")
    ]
    batch = ragged_batch()
    one, other = (pair(**batch).loss for pair in pairs)
    assert one.item() == pytest.approx(other.item(), rel=1e-4)


@pytest.mark.parametrize("how", ["wrapped", "accelerate"])
def test_in_wrappers_that_average_gradients_are_those_of_the_batch(shared: Path, how: str) -> None:
    model = new_pair("fifty")
    model(**ragged_batch()).loss.backward()
    for rank in found(shared):
        assert rank[how]["of the base"] == []
        for name, parameter in model.named_parameters():
            gradient = rank[how]["gradients"][name]
            if parameter.grad is None:
                assert gradient is None or not gradient.any()
            else:
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_wrappers_leave_the_base_alone(shared: Path) -> None:
    names = [name for name, _ in new_pair("fifty").named_parameters()]
    for rank in found(shared):
        assert rank["wrapped"]["synchronised"] == [f"module.{name}" for name in names]
        assert rank["accelerate"]["sharded"] == names
        assert rank["accelerate"]["sharded base"] == []
    saved = AuxTunedForCausalLM.from_pretrained(shared / "accelerate", lm=tiny_lm())
    for name, parameter in new_pair("fifty").named_parameters():
        torch.testing.assert_close(saved.get_parameter(name), parameter, rtol=0, atol=0)


def test_a_process_alone_needs_no_group() -> None:
    ranks = Ranks(None, torch.device("cpu"))
    assert ranks.mine("abc") == [(0, "a", True), (1, "b", True), (2, "c", True)]
    assert ranks.total(1.5, 2) == [1.5, 2]


def test_something_else_than_a_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"process_group must be .* got int"):
        run(tmp_path, "uneven", process_group=2)


def test_what_cannot_be_sharded_is_refused() -> None:
    class Mesh:
        ndim, mesh_dim_names = 2, ("dp", "tp")

    mesh: Any = Mesh()
    with pytest.raises(ValueError, match=r"mesh has 2 dimensions .*mesh\['dp'\]"):
        shard_base(tiny_lm(), mesh)
    with pytest.raises(ValueError, match="mesh has 2 dimensions"):
        shard_auxiliary(new_pair("sharded"), mesh)
    mesh.ndim = 1
    if native_refusal() is None:
        with pytest.raises(ValueError, match="load it with native=False"):
            shard_base(use_native_kernels(tiny_lm()), mesh)


def test_where_the_first_process_fails_all_end(shared: Path) -> None:
    """The others would wait for it for ever."""
    (used, full), *others = [rank["failed"] for rank in found(shared)]
    assert "another process writes to" in used
    assert "the log cannot be written to" in full
    assert "checkpoint-3 is whole" in full
    assert all("the first process of this run has failed" in said for rank in others for said in rank)
    assert all(len(rank) == 2 for rank in others)
