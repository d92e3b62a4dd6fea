"""The processes that torchrun, or accelerate launch, started a command in."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Ranks wait for each other while one reads a corpus; torchrun ends them all where one dies.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Launched:
    """This process among those that were started together; the only one without a launcher.

    Attributes:
        rank, count: its number, and how many there are.
        local_rank: its number on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Launched:
        """As the launcher's variables RANK, WORLD_SIZE and LOCAL_RANK say."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if any(name not in os.environ for name in names):
            return cls()
        return cls(*(int(os.environ[name]) for name in names))

    def device(self, device: str | None) -> str | None:
        """This process's own GPU where "cuda" or nothing was asked for and there are several processes."""
        wants_gpu = device == "cuda" or (device is None and torch.cuda.is_available())
        return f"cuda:{self.local_rank}" if self.count > 1 and wants_gpu else device

    @contextmanager
    def group(self, backend: str) -> Iterator[Any]:
        """A process group of all of them; None for a process alone.

        Args:
            backend: "gloo" or "nccl".
        """
        if self.count == 1:
            yield None
            return
        dist.init_process_group(backend, timeout=_PATIENCE)
        try:
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()

    @contextmanager
    def first_speaks(self) -> Iterator[None]:
        """Only the first process prints; errors are everyone's."""
        if self.rank == 0:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield


def wait(group: Any) -> None:
    """Until all processes of the group are here."""
    if group is not None:
        sys.stdout.flush()
        dist.barrier(group)
