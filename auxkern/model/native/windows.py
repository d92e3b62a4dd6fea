"""What a cache says of its memory, so that layers write new columns where they stay."""

from __future__ import annotations

from abc import ABC, abstractmethod

from auxkern.core.decoder import Windows


class WindowedCache(ABC):
    """A cache whose layers can be written in place, without ``update``."""

    @abstractmethod
    def windows(self, B: int, T: int) -> Windows | None:
        """Where T new columns of B sequences go; None where ``update`` must be called."""
