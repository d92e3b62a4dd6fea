"""The same bits on every run: whatever the threads, the neighbours in the batch, or who else calls."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import auxkern
from tests.support.cases import (
    DTYPES,
    FLOAT32_ULP,
    available_backends,
    device_of,
    ours,
    random_logits,
    random_target,
)

backends = pytest.mark.parametrize("backend", available_backends())


def run_once(backend: str) -> list[Tensor]:
    device = device_of(backend)
    terms = [random_logits(67, 5003, dtype=d, device=device, seed=i) for i, d in enumerate(DTYPES)]
    y = random_target(67, V=5003, device=device, ignored=0.2)
    result = ours(terms, y, backend, label_smoothing=0.1, z_loss=0.01, return_stats=True)
    return [result.loss, *result.gradients, *result.stats]


def assert_bitwise_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@backends
def test_two_runs_are_bitwise_equal(backend: str) -> None:
    assert_bitwise_equal(run_once(backend), run_once(backend))


@backends
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_nothing(backend: str) -> None:
    runs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(run_once(backend))
    assert_bitwise_equal(runs[0], runs[1])
    assert_bitwise_equal(runs[0], runs[2])


@backends
def test_calls_from_several_python_threads(backend: str) -> None:
    """Native kernels run without the interpreter lock; they must share no state."""
    want, results = run_once(backend), {}

    def work(name: int) -> None:
        results[name] = run_once(backend)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for name in range(4):
        assert_bitwise_equal(want, results[name])


@backends
def test_a_row_does_not_depend_on_its_batch(backend: str) -> None:
    device = device_of(backend)
    z, y = random_logits(9, 5003, device=device), random_target(9, V=5003, device=device)
    rows = auxkern.cross_entropy([z], y, reduction="none", backend=backend)
    alone = torch.cat(
        [
            auxkern.cross_entropy([z[i : i + 1]], y[i : i + 1], reduction="none", backend=backend)
            for i in range(9)
        ]
    )
    torch.testing.assert_close(rows, alone, rtol=4 * FLOAT32_ULP, atol=0)
