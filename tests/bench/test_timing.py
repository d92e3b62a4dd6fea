"""Clocks, turns, and what is kept of them."""

from __future__ import annotations

import pytest

from auxkern.bench.timing import Call, Effort, WallClock, measure_in_turns, summary


class ToldClock:
    """Takes a call's own word for its time."""

    def seconds(self, call):
        return call.run()


def test_calls_take_turns_and_faster_ones_run_more_often():
    log = []

    def call(name, seconds):
        return Call(run=lambda: (log.append(name), seconds)[1], before=lambda: None)

    calls = [call("slow", 0.3), call("fast", 0.1)]
    slow, fast = measure_in_turns(calls, ToldClock(), Effort(0, 4, 9))
    assert (slow.repeats, fast.repeats) == (4, 4)
    assert log[:2] == ["slow", "fast"]  # the warm-up
    # A fast call's first in a row is not counted.
    rounds = [log[2:][i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(r) == ["fast"] * 4 + ["slow"] for r in rounds)


@pytest.mark.parametrize(("seconds", "runs"), [(0.05, 1), (0.01, 2), (0.004, 5), (1e-5, 100), (0.0, 100)])
def test_a_short_call_runs_until_its_turn_is_long(seconds, runs):
    log = []
    call = Call(run=lambda: (log.append(None), seconds)[1], before=lambda: None)
    measure_in_turns([call], ToldClock(), Effort(0, 3, 3))
    assert len(log) == 1 + 3 * (runs + (runs > 1))


def test_what_is_kept_of_a_turn_is_its_median():
    # The warm-up, then turns of one run that is not counted and three that are.
    times = iter([0.007, 9.0, 1.0, 99.0, 2.0, 9.0, 6.0, 4.0, 0.0, 9.0, 10.0, 20.0, 0.0])
    call = Call(run=lambda: next(times), before=lambda: None)
    (timing,) = measure_in_turns([call], ToldClock(), Effort(0, 3, 3))
    assert (timing.minimum, timing.median, timing.maximum) == (2.0, 4.0, 10.0)


def test_wall_clock_leaves_preparation_out():
    order = []
    seconds = WallClock().seconds(
        Call(run=lambda: order.append("run"), before=lambda: order.append("before"))
    )
    assert order == ["before", "run"]
    assert seconds >= 0


def test_summary_and_noise():
    quiet = summary([1.0, 1.01, 1.02, 1.03, 1.04])
    assert (quiet.median, quiet.minimum, quiet.maximum, quiet.repeats) == (1.02, 1.0, 1.04, 5)
    assert quiet.spread == pytest.approx(0.01)
    assert not quiet.noisy
    assert summary([1.0, 1.0, 1.5, 2.0]).noisy
    assert summary([0.01234]).milliseconds() == ("12.3", "0.0")
    assert summary([1.234, 1.234]).milliseconds() == ("1234", "0")
