"""What an engine counts of its work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class EngineStats:
    """What an engine has done.

    Attributes:
        steps: steps that ran a model.
        prefill_tokens: tokens of prompts and conditions that were read, without padding.
        new_tokens: tokens of texts that were drawn.
        seconds: time by what it went to: "models", "sampling", "rest". On a GPU kernels run on after
            the call that started them, and the time is counted where the result is waited for:
            "sampling".
    """

    steps: int = 0
    prefill_tokens: int = 0
    new_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"models": 0.0, "sampling": 0.0, "rest": 0.0})

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of the block to a part; what blocks in it count counts there alone."""
        began, counted = time.perf_counter(), sum(self.seconds.values())
        yield
        counted = sum(self.seconds.values()) - counted
        self.seconds[part] += time.perf_counter() - began - counted
