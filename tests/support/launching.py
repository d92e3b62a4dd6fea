"""Processes that torchrun, accelerate or a test starts together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.ranks import LOOPBACK

ROOT = Path(__file__).parents[2]


def launch(world: int, arguments: list[str], *, accelerate: bool = False) -> subprocess.Popen[str]:
    """``torchrun --nproc-per-node WORLD ARGUMENTS``, or ``accelerate launch`` of the same."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    if accelerate:
        # Its other launchers start one process on a machine without GPUs; the script asks for the CPU.
        command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(world)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, **LOOPBACK, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(process: subprocess.Popen[str], seconds: float = 240) -> tuple[str, str]:
    """What both streams got, once all processes ended well."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return out, err


def run_ranks(script: str, folder: Path, world: int, seconds: float = 240) -> list[Any]:
    """What each of ``python SCRIPT FOLDER RANK WORLD`` saved as FOLDER/RANK.pt, once all ended well."""
    environment = {**os.environ, **LOOPBACK, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank), str(world)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=seconds)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
