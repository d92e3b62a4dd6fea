"""Expanded, overlapping, transposed and empty inputs: what a contiguous copy gives.

Every layout of one input is tried beside three layouts of each other one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Logits, Sparse
from auxkern.ops.attention import attention
from auxkern.ops.dense import dense_logits
from auxkern.ops.linear import linear
from tests.support.cases import available_backends, device_of, generator

N, V, D, K = 6, 40, 16, 3
backends = pytest.mark.parametrize("backend", available_backends())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def layouts(*shape: int, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a shape in memory of every kind."""
    x = normal(*shape, seed=seed).to(device)
    memory = normal(2 * x.numel() + sum(shape), seed=seed + 1).to(device)
    found = {
        "one row": x[:1].expand(shape),
        "all overlap": memory.as_strided(shape, (1,) * len(shape)),
        "reversed": x.flip(0),
        "every other": normal(*(2 * n for n in shape), seed=seed).to(device)[
            (slice(None, None, 2),) * len(shape)
        ],
    }
    if len(shape) > 1:
        found["one number"] = x[..., :1][:1].expand(shape)
        found["one column"] = x[..., :1].expand(shape)
        found["transposed"] = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        found["rows overlap"] = memory.as_strided(shape, (*range(2, len(shape) + 1), 1))
        found["offset"] = normal(*shape[:-1], shape[-1] + 3, seed=seed).to(device)[..., 1:-2]
    return found


def beside(*each: dict[str, Tensor]) -> Iterator[tuple[Tensor, ...]]:
    listed = [list(layouts.values()) for layouts in each]
    for shift, n in itertools.product(range(3), range(max(map(len, listed)))):
        yield tuple(tensors[(n + shift * j) % len(tensors)] for j, tensors in enumerate(listed))


def run(terms: Any, leaves: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    target = torch.tensor([3, 39, -100, 0, 3, 17], device=leaves[0].device)
    loss = auxkern.cross_entropy(terms, target, backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@backends
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}], ids=str)
def test_heads(backend, options):
    device = device_of(backend)
    names = ("hidden", "weight", "bias")
    shapes = ((N, D), (V, D), (V,))
    each = [layouts(*shape, device=device, seed=i) for i, shape in enumerate(shapes)]
    for given in beside(*each):
        strided = [x.detach().requires_grad_() for x in given]
        copied = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in given]
        results = [
            run(Head(**dict(zip(names, x, strict=True))), x, backend, **options) for x in (strided, copied)
        ]
        assert_alike(*results)


@backends
def test_logits_and_sparse_values(backend):
    device = device_of(backend)
    ids = torch.randint(V, (N, K), generator=generator(5)).to(device)
    head = Head(normal(N, D, seed=6).to(device), normal(V, D, seed=7).to(device))
    for x, values in beside(layouts(N, V, device=device), layouts(N, K, device=device)):
        for made in (
            lambda x, _: [Logits(x, softcap=3.0)],
            lambda x, v: [Logits(x), Sparse(ids, v)],
            lambda x, v: [Logits(x), head, Sparse(ids, v)],
        ):
            strided = [t.detach().requires_grad_() for t in (x, values)]
            copied = [t.detach().contiguous().clone().requires_grad_() for t in (x, values)]
            taken = 1 if len(made(*copied)) == 1 else 2
            assert_alike(*(run(made(*t), t[:taken], backend) for t in (strided, copied)))


@backends
def test_draws_and_dense_logits(backend):
    device = device_of(backend)
    asked = {"seed": torch.arange(N, device=device), "position": 0, "backend": backend}
    shapes = ((N, D), (V, D), (V,))
    each = [layouts(*shape, device=device, seed=i) for i, shape in enumerate(shapes)]
    for given in beside(*each):
        copied = Head(*(x.contiguous() for x in given))
        tokens = auxkern.sample(Head(*given), **asked).tokens
        assert torch.equal(tokens, auxkern.sample(copied, **asked).tokens)
        torch.testing.assert_close(dense_logits(Head(*given)), dense_logits(copied), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear(dtype):
    for x, weight, bias in beside(layouts(2, 3, D), layouts(7, D, seed=1), layouts(7, seed=2)):
        narrow = weight.to(dtype) if weight.dtype != dtype else weight
        exact = x.double() @ narrow.double().T + bias.double()
        torch.testing.assert_close(linear(x, narrow, bias).double(), exact, rtol=1e-5, atol=1e-5)


def test_attention():
    B, H, G, T, P = 2, 4, 2, 3, 5
    mask = torch.rand(B, 1, T, P, generator=generator(8)) > 0.4
    mask[..., 0] = True
    masks = [
        mask,
        mask[:1].expand(mask.shape),
        mask.transpose(2, 3).contiguous().transpose(2, 3),
        mask[:, :, :1],
    ]
    each = [layouts(B, h, p, D, seed=i) for i, (h, p) in enumerate(((H, T), (G, P), (G, P)))]
    for number, (query, key, value) in enumerate(beside(*each)):
        seen = masks[number % len(masks)]
        copied = attention(*(x.contiguous() for x in (query, key, value)), seen.contiguous(), scale=0.25)
        torch.testing.assert_close(
            attention(query, key, value, seen, scale=0.25), copied, rtol=1e-5, atol=1e-6
        )


@backends
def test_heads_without_width_and_terms_without_rows(backend):
    device = device_of(backend)
    bias = normal(V).to(device)
    narrow = Head(torch.empty(N, 0, device=device), torch.empty(V, 0, device=device), bias)
    asked = {"seed": torch.arange(N, device=device), "position": 0, "backend": backend}
    assert torch.equal(
        auxkern.sample(narrow, **asked).tokens, auxkern.sample(bias.expand(N, V), **asked).tokens
    )
    target = torch.arange(N, device=device)
    torch.testing.assert_close(
        auxkern.cross_entropy(narrow, target, backend=backend),
        torch.nn.functional.cross_entropy(bias.expand(N, V), target),
    )
    ids, none = torch.empty(0, K, dtype=torch.long, device=device), torch.empty(0, device=device)
    rows = [torch.empty(0, V, device=device), Sparse(ids, none.expand(K, 0).T)]
    assert auxkern.sample(rows, seed=target[:0], position=0, backend=backend).tokens.shape == (0,)
    assert auxkern.cross_entropy(rows, target[:0], backend=backend) == 0
