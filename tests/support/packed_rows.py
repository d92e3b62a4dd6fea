"""What holds for the rows of any product with a packed weight."""

from __future__ import annotations

import torch
from torch import Tensor

from auxkern.core.packed import PackedWeight
from auxkern.ops.packed import packed_linear
from tests.support.cases import generator


def assert_rows_stand_alone(packed: PackedWeight, bias: Tensor) -> None:
    """A row's product has the same bits in batches of any size and order, with one thread and with two.

    The caller restores torch's number of threads.
    """
    x = torch.randn(197, packed.K, generator=generator(1))
    torch.set_num_threads(2)
    together = packed_linear(x, packed, bias)
    for some in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 29, 100):
        torch.set_num_threads(1 + some % 2)
        apart = torch.cat([packed_linear(part, packed, bias) for part in x.split(some)])
        assert torch.equal(apart, together)
    order = torch.randperm(197, generator=generator(5))
    assert torch.equal(packed_linear(x[order], packed, bias), together[order])
