"""Memory that stays, in large pages."""

from __future__ import annotations

import pytest
import torch

from auxkern.core.memory import LargePages


def test_tensors_lie_one_behind_the_other_and_keep_their_numbers():
    memory = LargePages()
    values = [
        torch.arange(n, dtype=dtype)
        for n, dtype in ((7, torch.float32), (130, torch.uint8), (3, torch.int64))
    ]
    copies = [memory.copy(one) for one in values]
    assert all(torch.equal(copy, one) for copy, one in zip(copies, values, strict=True))
    addresses = [one.data_ptr() for one in copies]
    assert [address - addresses[0] for address in addresses] == [0, 64, 64 + 192]
    assert addresses[0] % (2 << 20) == 0


def test_fresh_memory_is_zero_and_more_than_a_block_fits():
    memory = LargePages()
    first = memory.zeros((3, 5), torch.float16)
    large = memory.zeros((70 << 20,), torch.uint8)
    assert first.shape == (3, 5)
    assert not first.any()
    assert not large.any()
    large.fill_(1)
    assert not first.any()


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_nothing_takes_none(shape):
    assert LargePages().zeros(shape, torch.float32).shape == shape


def test_memory_goes_with_its_last_tensor():
    memory = LargePages()
    kept = memory.copy(torch.ones(5))
    del memory
    assert torch.equal(kept, torch.ones(5))
