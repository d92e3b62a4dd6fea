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
    modules: Mapping[str, tuple[nn.Module, nn.Module]], read: Callable[[], Mapping[str, float]] = dict
) -> Iterator[dict[str, dict[str, float]]]:
    """What counters gain between two modules' forward passes, both included.

    Args:
        modules: the first and the last that is called, which may be the same, by a name of the caller's; no
            pair is called inside another.
        read: the counters, which only grow; an absent one is 0.

    Yields:
        By name: "seconds", and what each counter gained.
    """
    gained: dict[str, dict[str, float]] = {name: {SECONDS: 0.0} for name in modules}

    def count(*_: Any, name: str, sign: int) -> None:
        for counter, now in {SECONDS: time.perf_counter(), **read()}.items():
            gained[name][counter] = gained[name].get(counter, 0.0) + sign * now

    handles = list[Any]()
    for name, (first, last) in modules.items():
        handles.append(first.register_forward_pre_hook(partial(count, name=name, sign=-1)))
        handles.append(last.register_forward_hook(partial(count, name=name, sign=1)))
    try:
        yield gained
    finally:
        for handle in handles:
            handle.remove()
