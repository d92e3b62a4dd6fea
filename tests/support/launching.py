"""Processes that torchrun, accelerate or a test starts together, and the way of a rank to its group."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
# A machine without a network may not know its own name.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


def environment(**more: str) -> dict[str, str]:
    """Of a process that imports this package and these tests."""
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def run_tests(
    tests: Iterable[Path], which: str, at_least: int, report: Path, *, seconds: float, **more: str
) -> ElementTree.Element:
    """The tests of files that a marker expression chooses pass in a process of their own.

    Args:
        at_least: how many they should be; none may be skipped.
        report: where pytest writes what it did, in JUnit's XML.
        more: of the process's environment.

    Returns:
        The suite in that report.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", which, *map(str, tests)]
    done = subprocess.run(
        [*command, f"--junitxml={report}", "-p", "no:cacheprovider"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    assert int(suite.attrib["tests"]) >= at_least
    assert int(suite.attrib["skipped"]) == 0
    return suite


def launch(world: int, arguments: list[str], *, accelerate: bool = False) -> subprocess.Popen[str]:
    """``torchrun --nproc-per-node WORLD ARGUMENTS``, or ``accelerate launch`` of the same."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    if accelerate:
        # Its other launchers start one process on a machine without GPUs; the script asks for the CPU.
        command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(world)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return subprocess.Popen(
        [sys.executable, "-m", *command, *arguments],
        env=environment(**LOOPBACK, OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(process: subprocess.Popen[str], seconds: float = 240) -> tuple[str, str]:
    """What both streams got, once all processes ended well."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return out, err


# What most of these processes import, which takes seconds.
_IMPORTED = ["accelerate", "torch.distributed.fsdp", "auxkern.commands.pair", "auxkern.training.loop"]


def started(function: Callable[..., Any], *arguments: Any, errors: Path | None = None) -> Any:
    """A process that calls a function of a module, and ends with 1 if that raises.

    Forked from a server that has done no more than import: a clean process without seconds of start-up.

    Args:
        errors: a file that gets its stderr.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    process = context.Process(target=_call, args=(function, arguments, dict(os.environ), errors))
    process.start()
    return process


def _call(
    function: Callable[..., Any], arguments: Sequence[Any], variables: dict[str, str], errors: Path | None
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    if errors is not None:
        with errors.open("w") as file:
            os.dup2(file.fileno(), 2)
    function(*arguments)


def run_ranks(
    part: Callable[[Path, int, int], Any], folder: Path, world: int, seconds: float = 240
) -> list[Any]:
    """What ``part(folder, rank, world)`` returned in the process of each rank, once all ended well."""
    said = [folder / f"{rank}.err" for rank in range(world)]
    processes = [started(_rank, part, folder, rank, world, errors=errors) for rank, errors in enumerate(said)]
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world, "\n".join(errors.read_text() for errors in said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@contextmanager
def group_of(folder: Path, rank: int, world: int) -> Iterator[Any]:
    """The group of processes that meet in ``folder``."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    yield dist.group.WORLD
    dist.destroy_process_group()


def _rank(part: Callable[[Path, int, int], Any], folder: Path, rank: int, world: int) -> None:
    """One of the processes of ``run_ranks``."""
    os.environ.update(LOOPBACK)
    torch.set_num_threads(1)
    with group_of(folder, rank, world):
        torch.save(part(folder, rank, world), folder / f"{rank}.pt")
