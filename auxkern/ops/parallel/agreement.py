"""Checks that all ranks of a process group make, so that none waits for one that has refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Value = TypeVar("_Value")
# What all ranks must have alike, by the names that a message gives.
Facts: TypeAlias = Mapping[str, object]
# Of a rank: its facts, and type and message of what it refuses.
_Report: TypeAlias = tuple[Facts, tuple[str, str] | None]
_ERRORS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}


def agreed(
    group: ProcessGroup, check: Callable[[], tuple[_Value, Facts, int]]
) -> tuple[_Value, tuple[int, ...]]:
    """What a check returns, once it has passed on every rank and its facts are equal on all.

    Ranks exchange three numbers; what differs is looked for only if something does. Reading the numbers
    waits for the device where the group has no backend for CPU tensors.

    Args:
        group: the process group; every rank of it calls this.
        check: returns a value, what all ranks must have alike, and a number of this rank's own.

    Returns:
        The check's value here, and every rank's number.

    Raises:
        TypeError, ValueError, RuntimeError: the check raises here or on another rank.
        ValueError: a fact differs between ranks.
    """
    passed: tuple[_Value, Facts, int] | None = None
    error: Exception | None = None
    try:
        passed = check()
    except Exception as raised:
        error = raised
    _, facts, number = passed or (None, {}, 0)
    digest = int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=7).digest(), "little")
    everyone = _gathered_numbers(group, [int(passed is None), digest, number])
    if passed is not None and all(row[:2] == [0, digest] for row in everyone):
        return passed[0], tuple(row[2] for row in everyone)
    report: _Report = (facts, None if error is None else (type(error).__name__, str(error)))
    reports = [report] * dist.get_world_size(group)
    dist.all_gather_object(reports, report, group=group)
    if error is not None:
        raise error
    raise _disagreement(facts, reports)


def _gathered_numbers(group: ProcessGroup, numbers: list[int]) -> list[list[int]]:
    """The numbers of each rank."""
    # On the CPU if the group can, which stops no device.
    there = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    mine = torch.tensor(numbers, dtype=torch.int64, device=there)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    everyone: list[list[int]] = torch.stack(parts).tolist()
    return everyone


def _disagreement(facts: Facts, reports: Sequence[_Report]) -> Exception:
    """The error for a check that passed here, but not on all ranks or not with equal facts."""
    for rank, (_, refusal) in enumerate(reports):
        if refusal is not None:
            kind, message = refusal
            return _ERRORS.get(kind, RuntimeError)(f"rank {rank} of the process group refuses: {message}")
    for rank, (theirs, _) in enumerate(reports):
        for name in sorted(facts.keys() | theirs.keys()):
            if theirs.get(name) != facts.get(name):
                return ValueError(
                    f"{name} differs between ranks: {_shown(facts.get(name))} on this one, "
                    f"{_shown(theirs.get(name))} on rank {rank} of the process group. Ranks that share a "
                    "vocabulary must be given the same. Ranks that have batches of their own (data "
                    "parallelism, FSDP2) do not share it: pass them whole weights, such as a module has "
                    "inside its FSDP2 forward, and no process_group"
                )
    return RuntimeError("the ranks' arguments differ in a way that their description does not show")


def _shown(fact: object) -> str:
    text = fact if isinstance(fact, str) else repr(fact)
    return text if len(text) <= 120 else f"{text[:117]}..."


def fingerprint(ids: Tensor) -> str:
    """A few words that differ between integer tensors of other shapes, values or orders."""
    flat = ids.detach().reshape(-1).long()
    weights = torch.arange(1, flat.numel() + 1, device=flat.device) * 0x9E3779B97F4A7C1
    checksum = int(((flat ^ (flat >> 17)) * weights).sum()) & (2**64 - 1)
    return f"integers of shape {tuple(ids.shape)} with the checksum {checksum:016x}"
