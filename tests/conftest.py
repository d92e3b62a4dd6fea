"""Fixtures of every test folder."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The same examples on every machine and in every run; a slow machine is not a failure.
settings.register_profile("auxkern", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("auxkern")


# Files whose set-up or whose tests take long. At the front of the list they end early, on one worker: at its
# end the others would wait, and make the same set-up again for the tests that they take over.
_FIRST = (
    "test_training_ranks",
    "test_interpreted",
    "test_trainer_ranks",
    "test_traffic",
    "test_vocabulary_parallel",
    "test_keyword_study",
    "test_keyword_record",
    "test_launched",
    "test_generate_ranks",
    "test_train_command",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in _FIRST)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """SIGINT does what it does in a terminal, here and in child processes.

    A shell starts background jobs, a CI's among them, with SIGINT ignored, and programs that respect
    that cannot be interrupted.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that ``torch.empty`` hands out holds NaN (integers: the largest one).

    So an output that a kernel forgot to write is seen. PyTorch does the filling, as a part of
    its deterministic mode.
    """
    filling = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filling


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test change torch's number of threads; it is put back."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
