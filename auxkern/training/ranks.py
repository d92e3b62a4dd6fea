"""The processes that share a training run, and what they exchange."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from auxkern.ops.parallel.groups import process_group_of

_Item = TypeVar("_Item")


class Ranks:
    """One of the processes that share a run; all must make it, and call each method together.

    Everything that is summed is the same on all of them afterwards, to the last bit.

    Args:
        process_group: a ``ProcessGroup`` or a ``DeviceMesh`` of one dimension; None for a run of one process.
        device: of the parameters.

    Raises:
        TypeError, ValueError: process_group is something else.
    """

    def __init__(self, process_group: Any, device: torch.device) -> None:
        self._group = None if process_group is None else process_group_of(process_group)
        self._device = device
        self.rank = 0 if self._group is None else dist.get_rank(self._group)
        self.count = 1 if self._group is None else dist.get_world_size(self._group)

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def mine(self, items: Sequence[_Item]) -> list[tuple[int, _Item, bool]]:
        """Every ``count``-th of them from ``rank`` on: place among all, item, and whether it counts.

        All ranks have the same number, so that they meet in what sharded weights exchange: one with fewer
        takes the first item once more, which does not count.
        """
        own = [(place, item, True) for place, item in enumerate(items)][self.rank :: self.count]
        if len(own) < -(-len(items) // self.count):
            own.append((0, items[0], False))
        return own

    def total(self, *values: float) -> list[float]:
        """Their sums over the ranks, in float64."""
        if self._group is None:
            return list(values)
        # A Mac's GPU has no float64.
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        sums = torch.tensor(values, dtype=dtype, device=self._device)
        dist.all_reduce(sums, group=self._group)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so on one rank at least."""
        return self.total(float(flag))[0] > 0

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """For what only the first rank does: where it fails, all raise, and none waits for it.

        Raises:
            OSError: on the others, if the first has failed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise OSError("the first process of this run has failed; its message says why")

    def same_weights(self, tensors: Iterable[Tensor]) -> None:
        """Gives all ranks the first one's parameters; sharded ones (``DTensor``) stay as they are."""
        if self._group is None:
            return
        first = dist.get_global_rank(self._group, 0)
        for tensor in tensors:
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor.detach(), first, group=self._group)

    @torch.no_grad()
    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sums gradients over the ranks; sharded ones (``DTensor``) have been summed by FSDP.

        Where no rank has a gradient there is none afterwards.
        """
        if self._group is None:
            return
        plain = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        for dtype in dict.fromkeys(parameter.dtype for parameter in plain):
            self._add([parameter for parameter in plain if parameter.dtype == dtype])

    def _add(self, parameters: list[Tensor]) -> None:
        # One exchange for all of them; behind the gradients stands who has one.
        known = [float(parameter.grad is not None) for parameter in parameters]
        parts = [
            torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
            for parameter in parameters
        ]
        flat = torch.cat([*parts, parts[0].new_tensor(known)])
        dist.all_reduce(flat, group=self._group)
        *summed, ranks = flat.split([*(part.numel() for part in parts), len(parts)])
        for parameter, gradient, count in zip(parameters, summed, ranks.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if count > 0 else None
