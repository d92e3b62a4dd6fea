"""Seeds and choices that depend on nothing but a number and a name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

_Item = TypeVar("_Item")
DATA_SEED = 0  # of splits and draws of data: runs with other seeds compare on the same data


def mixed_seed(seed: int, purpose: str, number: int = 0) -> int:
    """A seed in [0, 2**63) for one purpose, as good as independent of those for all others."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def drawn(items: Sequence[_Item], limit: int | None) -> list[_Item]:
    """At most ``limit`` of them, drawn at random but always the same, in their old order."""
    if limit is None or limit >= len(items):
        return list(items)
    order = sorted(range(len(items)), key=lambda index: mixed_seed(DATA_SEED, "draw", index))
    return [items[index] for index in sorted(order[:limit])]
