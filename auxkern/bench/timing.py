"""Clocks, and measuring several calls in turns."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from auxkern.bench.results import Timing

L2_FLUSH_BYTES = 256 * 2**20  # as in triton.testing.do_bench; larger than any GPU's L2
MAX_REPEATS = 5  # runs in a row of a call that is fast beside the others
TURN_SECONDS = 0.02  # that a short call's turn lasts: a wake-up of threads and caches is no longer seen in it
MAX_SHORT = 100  # runs in a row of a short call


@dataclass(frozen=True)
class Call:
    """One thing to time; ``before`` is what has to happen before each run, outside the timing."""

    run: Callable[[], object]
    before: Callable[[], object]


class WallClock:
    """For work that is done when the call returns: CPU tensors."""

    def seconds(self, call: Call) -> float:
        call.before()
        start = time.perf_counter()
        call.run()
        return time.perf_counter() - start


class CudaClock:
    """CUDA events around the call, after a write that evicts the inputs from the L2 cache.

    The write also keeps the device busy while Python launches the call, so that launch latency
    up to its length (about 0.1 ms) is hidden, as it is in a training step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def seconds(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call.before()
        with torch.cuda.device(self._device):
            self._flush.zero_()
            start.record()
            call.run()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


Clock = WallClock | CudaClock


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: rounds start until so many have gone by.
        min_rounds: fewest rounds.
        max_rounds: most rounds.
        attempts: how often a measurement is made, at most, until its times do not scatter.
    """

    seconds: float
    min_rounds: int
    max_rounds: int
    attempts: int = 1


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else WallClock()


def measure_in_turns(
    calls: Sequence[Call],
    clock: Clock,
    effort: Effort,
    on_round: Callable[[float], None] = lambda share: None,
) -> list[Timing]:
    """Times every call in each round, in a new order each round; one ``Timing`` per call.

    A machine that slows down for a while slows every call alike, so ratios keep their meaning where
    absolute times drift. In its turn a call that is k times faster than the slowest runs k times in a row,
    at most ``MAX_REPEATS``, and a short one for ``TURN_SECONDS``, at most ``MAX_SHORT`` times; what is kept
    of the turn is the median. Before several runs in a row there is one more that is not counted, since it
    finds the caches full of another's data and the threads asleep. The first run of each call warms up and
    is not counted. ``on_round`` is told the share of the work that is done, in [0, 1].
    """
    samples: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    # A collection in the middle of a measurement would be charged to whoever ran then (as timeit).
    gc.disable()
    try:
        warm = list(map(clock.seconds, calls))
        repeats = list(map(partial(_runs_in_a_row, slowest=max(warm)), warm))
        start = time.perf_counter()
        for done in range(effort.max_rounds):
            elapsed = time.perf_counter() - start
            if done >= effort.min_rounds and elapsed > effort.seconds:
                break
            on_round(min(1.0, max(elapsed / (effort.seconds or 1.0), done / effort.max_rounds)))
            shuffle(order)
            for index in order:
                if repeats[index] > 1:
                    clock.seconds(calls[index])
                turn = (clock.seconds(calls[index]) for _ in range(repeats[index]))
                samples[index].append(statistics.median(turn))
    finally:
        if collecting:
            gc.enable()
    return [summary(sample) for sample in samples]


def _runs_in_a_row(seconds: float, slowest: float) -> int:
    """How often a call that takes ``seconds`` runs in a turn, beside one that takes ``slowest``."""
    seconds = max(seconds, 1e-9)
    fast, short = min(MAX_REPEATS, round(slowest / seconds)), min(MAX_SHORT, round(TURN_SECONDS / seconds))
    return max(1, fast, short)


def summary(seconds: Sequence[float]) -> Timing:
    """Median, quartiles and extremes of at least one measurement."""
    q1 = q3 = seconds[0]
    if len(seconds) > 1:
        q1, _, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(statistics.median(seconds), q1, q3, min(seconds), max(seconds), len(seconds))
