"""What is counted while models run forward."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

SECONDS = "seconds"


@contextmanager
def forward_counts(
    modules: Mapping[str, nn.Module], read: Callable[[], Mapping[str, float]] = dict
) -> Iterator[dict[str, dict[str, float]]]:
    """What counters gain during the forward passes of modules, none of which is inside another.

    Args:
        modules: by a name of the caller's.
        read: the counters, which only grow; an absent one is 0.

    Yields:
        By the module's name: "seconds", and what each counter gained.
    """
    gained: dict[str, dict[str, float]] = {name: {SECONDS: 0.0} for name in modules}

    def count(*_: Any, name: str, sign: int) -> None:
        for counter, now in {SECONDS: time.perf_counter(), **read()}.items():
            gained[name][counter] = gained[name].get(counter, 0.0) + sign * now

    handles = list[Any]()
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(partial(count, name=name, sign=-1)))
        handles.append(module.register_forward_hook(partial(count, name=name, sign=1)))
    try:
        yield gained
    finally:
        for handle in handles:
            handle.remove()
