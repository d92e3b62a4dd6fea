"""Native kernels where the last element lies beyond 2**31: what a compact copy gives, to the bit.

The system only promises the memory; a few pages of it are written.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head
from auxkern.ops.attention import attention
from tests.support.cases import DTYPES, generator
from tests.support.instruction_sets import EACH, substituted


@pytest.fixture(params=EACH)
def kernels(request, monkeypatch):
    """Every instruction set in turn."""
    return substituted(request.param, monkeypatch, own_products=True)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def spread(x: Tensor, dim: int) -> Tensor:
    """The same numbers, with 2**31 elements from the first to the last along ``dim``."""
    step = -(-(2**31) // (x.shape[dim] - 1))
    compact = x.movedim(dim, 0)
    strides = [step, *torch.empty(compact.shape[1:]).stride()]
    last = sum((size - 1) * stride for size, stride in zip(compact.shape, strides, strict=True))
    far = torch.empty(last + 1, dtype=x.dtype).as_strided(compact.shape, strides)
    for i in range(x.shape[dim]):
        far[i] = compact[i]
    return far.movedim(0, dim)


def loss_and_gradients(terms: Any, tensors: list[Tensor]) -> list[Tensor]:
    target = torch.tensor([4, 0, 2])
    for t in tensors:
        t.requires_grad_()
    loss = auxkern.cross_entropy(terms, target, backend="cpu")
    return [loss, *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_logits(kernels, dim, dtype):
    x, beside = normal(3, 5, dtype=dtype), normal(3, 5, seed=1)
    far = spread(x, dim)
    found, want = (loss_and_gradients([t, beside], [t]) for t in (far, x))
    assert all(map(torch.equal, found, want))
    drawn = auxkern.sample([far, beside], seed=torch.arange(3), position=0, backend="cpu")
    assert torch.equal(drawn.tokens, auxkern.sample([x, beside], seed=torch.arange(3), position=0).tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("which", "dim"), [("hidden", 0), ("weight", 0), ("weight", 1), ("bias", 0)])
def test_heads(kernels, which, dim, dtype):
    t = {"hidden": normal(3, 16, seed=1), "weight": normal(5, 16, dtype=dtype), "bias": normal(5, seed=2)}
    far = {**t, which: spread(t[which], dim)}
    found, want = (loss_and_gradients(Head(**given), list(given.values())) for given in (far, t))
    if dim == 0:
        assert all(map(torch.equal, found, want))
    else:  # a weight that the library multiplies
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-5)


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("dim", range(3))
def test_attention(kernels, i, dim):
    given = [normal(2, 2, 3, 16, seed=seed) for seed in range(3)]
    far = [spread(x, dim) if j == i else x for j, x in enumerate(given)]
    assert torch.equal(
        attention(*far, scale=0.25, backend="cpu"), attention(*given, scale=0.25, backend="cpu")
    )
