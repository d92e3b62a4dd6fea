"""Which examples a step of a training run takes."""

from __future__ import annotations

import torch

from auxkern.core.seeds import mixed_seed
from auxkern.training.settings import LoopSettings


class DataOrder:
    """Which examples a step takes, a function of the seed, the epoch and the step alone.

    Epochs follow each other without a gap, so a batch may reach into the next one and all batches
    have one size.

    Args:
        count: number of examples.
        settings: batch_size, gradient_accumulation, seed and shuffle.
    """

    def __init__(self, count: int, settings: LoopSettings) -> None:
        self._count, self._settings = count, settings
        self._epoch, self._order = -1, list(range(count))

    def of_step(self, step: int) -> list[list[int]]:
        """Indices of the step's examples, a list per batch; steps count from 0."""
        size, batches = self._settings.batch_size, self._settings.gradient_accumulation
        first = step * size * batches
        indices = [self._at(position) for position in range(first, first + size * batches)]
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self._count)
        if self._settings.shuffle and epoch != self._epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self._settings.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(self._count, generator=generator).tolist()
        return self._order[place]
