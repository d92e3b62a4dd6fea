"""The Hugging Face Trainer under torchrun and accelerate launch, beside the Trainer in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from auxkern.model import AuxTunedForCausalLM
from tests.support import trainer_ranks
from tests.support.launching import launch, outputs
from tests.support.tiny import tiny_lm


@pytest.mark.parametrize(
    ("accelerate", "modes"),
    [
        # Who launches and what is sharded have nothing to do with each other.
        pytest.param(False, [], id="torchrun, copies", marks=pytest.mark.slow),
        pytest.param(True, [], id="accelerate, copies"),
        pytest.param(False, ["shard-base"], id="torchrun, sharded base"),
        pytest.param(True, ["shard-base"], id="accelerate, sharded base", marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_the_steps_of_one(tmp_path: Path, accelerate: bool, modes: list[str]) -> None:
    arguments = ["-m", trainer_ranks.__name__, str(tmp_path / "two"), *modes]
    process = launch(2, arguments, accelerate=accelerate)
    alone = trainer_ranks.trained(tmp_path / "one", accumulation=6)
    outputs(process)
    found = torch.load(tmp_path / "two" / "found.pt", weights_only=False)
    assert found["world"] == 2
    assert found["wrapped"] == "DistributedDataParallel"
    assert not found["base has gradients"]
    # What the Trainer logs is rounded.
    assert found["losses"] == pytest.approx(trainer_ranks.losses(alone), rel=1e-3)
    pair = AuxTunedForCausalLM.from_pretrained(tmp_path / "two" / "saved", lm=tiny_lm())
    expected = dict(alone.model.named_parameters())
    for name, parameter in pair.named_parameters():
        # Sums in another order; AdamW divides by roots of tiny squares.
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=2e-4)
