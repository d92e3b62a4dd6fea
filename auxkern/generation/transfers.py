"""Numbers that go between host and device while neither waits for the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(
    numbers: Sequence[Any] | Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers of the host as a tensor on a device.

    On a GPU they go from pinned memory, behind what its stream is at; the memory is not used again before.

    Args:
        numbers: nested lists of them, or a tensor on the CPU.
    """
    tensor = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def send(numbers: Tensor, place: Tensor) -> None:
    """The same into a tensor that is there.

    Args:
        numbers: on the CPU, shaped like ``place``.
        place: contiguous, on the device.
    """
    place.copy_(numbers.pin_memory() if place.device.type == "cuda" else numbers, non_blocking=True)


class HostCopy:
    """What a tensor on the device holds once the stream comes to this place, to be read later.

    Args:
        tensor: contiguous; it may be changed by what follows on the stream.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        on_gpu = tensor.device.type == "cuda"
        self._numbers = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self._numbers.copy_(tensor, non_blocking=True)
        if on_gpu:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list[Any]:
        """Its numbers; waits until the device has come by."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[Any] = self._numbers.tolist()
        return numbers
