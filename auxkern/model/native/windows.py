"""What a cache says of its memory, so that a layer writes new columns where they stay."""

from __future__ import annotations

from abc import ABC, abstractmethod

from auxkern.core.decoder import Window


class WindowedLayer(ABC):
    """A layer of a cache that can be written in place, without ``update``."""

    @abstractmethod
    def window(self, B: int, T: int) -> Window | None:
        """Where T new columns of B sequences go; None where ``update`` must be called."""
