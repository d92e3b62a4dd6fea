"""A small module in the place of a pair, for tests of the training loop; as a process it trains and dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from auxkern.training.checkpoint import checkpoint_steps
from auxkern.training.collator import AuxCollator
from auxkern.training.loop import TrainResult, train
from auxkern.training.progress import Progress
from auxkern.training.settings import LoopSettings
from tests.support.launching import environment

V, D = 23, 8
TIMES = ("seconds", "tokens_per_second", "seconds_left")
SETTINGS: dict[str, Any] = {
    "steps": 11,
    "batch_size": 3,
    "gradient_accumulation": 2,
    "learning_rate": 0.05,
    "warmup_steps": 2,
    "log_every": 2,
    "eval_every": 4,
    "save_every": 3,
    "seed": 5,
}


class StandIn(nn.Module):
    """Next token from the last one; dropout, so that it shows which random numbers were drawn."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(D, V)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor, **_: Any
    ) -> CausalLMOutput:
        z = self.head(self.dropout(self.embedding(input_ids)))[:, :-1]
        nll = F.cross_entropy(z.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return CausalLMOutput(loss=nll / num_items_in_batch)

    def save_pretrained(self, folder: Path) -> None:
        save_file(self.state_dict(), Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text("{}")


class DyingStandIn(StandIn):
    """Killed in the middle of its 9th step, or of its third saving."""

    def __init__(self, point: str) -> None:
        super().__init__()
        self.point, self.forwards, self.savings = point, 0, 0

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutput:
        self.forwards += self.training
        if self.point == "step" and self.forwards == 2 * 8 + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(*args, **kwargs)

    def save_pretrained(self, folder: Path) -> None:
        super().save_pretrained(folder)
        self.savings += 1
        if self.point == "save" and self.savings == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def examples(count: int = 10, seed: int = 0, step: int = 1) -> list[dict[str, list[int]]]:
    """Sequences of 3 to 9 ids that count upwards by ``step``; a prompt of 0 to 2 tokens is not learned."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length, first, prompt = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((3, 10), (0, V), (0, 3))
        )
        ids = [(first + step * i) % V for i in range(length)]
        made.append(
            {
                "input_ids": ids,
                "labels": [-100] * (1 + prompt) + ids[1 + prompt :],
                "condition_ids": ids[:1],
            }
        )
    return made


def run(
    output: Path, model: nn.Module | None = None, progress: Progress | None = None, **changes: Any
) -> TrainResult:
    """Trains a stand-in on ``examples()``."""
    return train(
        StandIn() if model is None else model,
        examples(),
        LoopSettings(output=str(output), **{**SETTINGS, **changes}),
        collate=AuxCollator(0),
        validation=examples(5, seed=1),
        progress=progress,
    )


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class At(Progress):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def advance(self, done: int) -> None:
        if done == self.step:
            self.action()


def bits(output: Path) -> dict[str, bytes]:
    """Bytes of the weights and the optimizer's state after the last step, and of the best weights."""
    last = output / f"checkpoint-{checkpoint_steps(output)[-1]}"
    paths = (last / "model.safetensors", last / "optimizer.safetensors", output / "model.safetensors")
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def log(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def run_in_a_process(output: Path, point: str) -> subprocess.CompletedProcess[str]:
    """``run`` in a process that kills itself (SIGKILL) at a point.

    "step" is in the middle of a step, "save" while a checkpoint is half-written; at "never" it goes on.
    """
    command = [sys.executable, "-m", __name__, str(output), point]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


if __name__ == "__main__":
    run(Path(sys.argv[1]), DyingStandIn(sys.argv[2]), resume=True)
