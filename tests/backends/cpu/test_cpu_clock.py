"""The clock around native calls."""

import time

import pytest
import torch

from auxkern.backends.cpu import Cpu
from auxkern.bench.clocks import SECONDS, forward_counts


@pytest.fixture
def native():
    try:
        return Cpu(own_products=True)
    except OSError as error:
        pytest.skip(str(error))


def product(native, M):
    x, weight, y = torch.ones(M, 64), torch.ones(48, 64), torch.full((M, 48), torch.nan)
    native.linear(x, weight, None, y, False)
    return y


def test_calls_are_counted_by_their_kernel_while_the_block_runs(native):
    with native.timed_calls() as seconds:
        assert seconds == {}
        began = time.perf_counter()
        y = product(native, 300)
        whole = time.perf_counter() - began
        assert [*seconds] == ["auxkern_linear_forward"]
        first = seconds["auxkern_linear_forward"]
        assert 0 < first < whole
        product(native, 300)
        assert seconds["auxkern_linear_forward"] > first
        counted = dict(seconds)
    product(native, 300)
    assert seconds == counted
    assert (y == 64).all()


def test_refusals_of_kernels_come_through_and_end_the_block(native):
    with pytest.raises(RuntimeError, match="the native kernel refused"), native.timed_calls():
        native.linear(torch.ones(1, 0), torch.ones(2, 0), None, torch.zeros(1, 2), False)
    with native.timed_calls() as seconds:
        product(native, 1)
    assert seconds


def test_blocks_do_not_nest(native):
    with native.timed_calls(), pytest.raises(RuntimeError, match="timed already"), native.timed_calls():
        pass


def test_counters_gain_during_forward_passes_alone():
    counter = {"calls": 0.0}

    class Layer(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.02)
            counter["calls"] += 1
            return x

    first, second = Layer(), Layer()
    with forward_counts({"first": (first, first), "second": (second, second)}, lambda: counter) as gained:
        counter["calls"] += 10
        first(torch.zeros(1))
        time.sleep(0.05)
        first(torch.zeros(1))
        second(torch.zeros(1))
    first(torch.zeros(1))
    assert gained["first"]["calls"] == 2
    assert gained["second"]["calls"] == 1
    assert gained["first"][SECONDS] >= 0.04
    assert 0.02 <= gained["second"][SECONDS] < gained["first"][SECONDS]
