"""What tests expect of one version of a library and not of another."""

from __future__ import annotations

import triton


def since_triton_3_9() -> bool:
    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
