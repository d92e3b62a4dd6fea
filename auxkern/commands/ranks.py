"""The processes that torchrun, or accelerate launch, started a command in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
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
        group: process group of all of them while they are ``joined``; None for a process alone.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    group: Any = None

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

    def check_alone(self, work: str) -> None:
        """For work that processes do not share.

        Raises:
            ValueError: several were started.
        """
        if self.count > 1:
            raise ValueError(f"{self.count} processes were started, but {work} is for one; start one")

    @contextmanager
    def joined(self, backend: str) -> Iterator[Launched]:
        """The same with a process group, which is closed at the end; a process alone as it is.

        Args:
            backend: "gloo" or "nccl".
        """
        if self.count == 1:
            yield self
            return
        dist.init_process_group(backend, timeout=_PATIENCE)
        try:
            yield replace(self, group=dist.group.WORLD)
        finally:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until all of them are here."""
        if self.group is not None:
            dist.barrier(self.group)

    @contextmanager
    def first_speaks(self) -> Iterator[None]:
        """Only the first process prints; errors are everyone's."""
        if self.rank == 0:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
