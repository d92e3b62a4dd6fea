"""Operators under autocast give what they give outside, to the last bit: their inside does not see it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Logits, Sparse
from auxkern.nn import FrozenLinear
from auxkern.ops.attention import attention
from auxkern.ops.dense import dense_logits
from auxkern.ops.torch_ops import apart_from_autocast
from tests.support.cases import available_backends, device_of, generator, random_target
from tests.support.instruction_sets import substituted

N, V, D, K = 12, 131, 32, 3
H, B, F32 = torch.float16, torch.bfloat16, torch.float32

LOWER = pytest.mark.parametrize("lower", [B, H], ids=str)


def autocast(device: str, lower: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if lower is None else torch.autocast(device, dtype=lower)


def numbers(device: str, dtype: torch.dtype = F32) -> Callable[..., Tensor]:
    g = generator(3)
    return lambda *shape: torch.randn(*shape, generator=g).to(device, dtype).requires_grad_()


def logits(device: str, dtype: torch.dtype) -> list[Any]:
    x = numbers(device, dtype)
    return [x(N, V), Logits(numbers(device)(N, V), 0.3, softcap=2.0)]


def heads(device: str, dtype: torch.dtype) -> list[Any]:
    x, y = numbers(device, dtype), numbers(device)
    return [Head(x(N, D), x(V, D)), Head(y(N, D), y(V, D), y(V), scale=0.7)]


def pointed(device: str, dtype: torch.dtype) -> list[Any]:
    ids = torch.randint(V, (N, K), generator=generator(4)).to(device)
    return [*heads(device, dtype), Sparse(ids, numbers(device)(N, K))]


def capped(device: str, dtype: torch.dtype) -> list[Any]:
    x = numbers(device, dtype)
    return [Head(x(N, D), x(V, D), softcap=3.0), *logits(device, dtype)]


SUMS = {f.__name__: f for f in (logits, heads, pointed, capped)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-3, "return_stats": True},
    "per row": {"reduction": "none"},
}


def leaves(terms: list[Any]) -> list[Tensor]:
    tensors = [t for x in terms for t in ([x] if isinstance(x, Tensor) else x.tensors.values())]
    return [t for t in tensors if t.requires_grad]


def losses_and_gradients(terms: list[Any], lower: torch.dtype | None, backend: str, **options: Any) -> Any:
    device = leaves(terms)[0].device.type
    y = random_target(N, V=V, device=device, ignored=0.2)
    incoming = torch.linspace(0.5, 2, N, device=device)
    with autocast(device, lower):
        out = auxkern.cross_entropy(terms, y, backend=backend, **options)
        loss, stats = out if options.get("return_stats") else (out, ())
        gradients = torch.autograd.grad(loss, leaves(terms), incoming if loss.dim() else None)
    return [loss.detach(), *stats, *gradients]


def assert_same(under: list[Tensor], outside: list[Tensor]) -> None:
    for a, b in zip(under, outside, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@LOWER
@pytest.mark.parametrize("dtype", [F32, H, B], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("made", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("backend", available_backends())
def test_loss_and_gradients(backend, made, options, dtype, lower):
    terms = made(device_of(backend), dtype)
    outside = losses_and_gradients(terms, None, backend, **options)
    assert_same(losses_and_gradients(terms, lower, backend, **options), outside)


@LOWER
@pytest.mark.parametrize("made", [heads, pointed, capped])
def test_loss_by_a_librarys_products(made, lower, monkeypatch):
    """Plain code leaves products to the library, as a GPU does where no tiles are taken."""
    substituted("generic", monkeypatch)
    terms = made("cpu", H)
    assert_same(losses_and_gradients(terms, lower, "cpu"), losses_and_gradients(terms, None, "cpu"))


@LOWER
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("made", [heads, pointed, capped])
def test_draws(made, backend, lower):
    terms = [x.detach() if isinstance(x, Tensor) else x for x in made("cpu", F32)]
    asked: dict[str, Any] = {"return_logprobs": True, "top_logprobs": 4, "backend": backend}
    asked |= {"seed": torch.arange(N), "position": 0}
    outside = auxkern.sample(terms, **asked)
    with autocast("cpu", lower):
        under = auxkern.sample(terms, **asked)
    assert_same(list(vars(under).values()), list(vars(outside).values()))


@LOWER
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("made", [heads, capped])
def test_dense_logits(made, trained, lower):
    terms = made("cpu", F32)

    def run(lower: torch.dtype | None) -> list[Tensor]:
        with torch.set_grad_enabled(trained), autocast("cpu", lower):
            z = dense_logits(terms)
            return [z.detach(), *(torch.autograd.grad(z.sin().sum(), leaves(terms)) if trained else ())]

    assert_same(run(lower), run(None))


@LOWER
@pytest.mark.parametrize("isa", ["best", "generic"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [F32, H], ids=str)
def test_linear(dtype, trained, isa, lower, monkeypatch):
    substituted(isa, monkeypatch)
    x, layer = numbers("cpu")(2, N, D), FrozenLinear(D, 7)
    layer.weight.data = layer.weight.data.to(dtype)

    def run(lower: torch.dtype | None) -> list[Tensor]:
        with torch.set_grad_enabled(trained), autocast("cpu", lower):
            y = layer(x)
            inputs = [x, layer.weight, layer.bias]
            return [y.detach(), *(torch.autograd.grad(y.sin().sum(), inputs) if trained else ())]

    assert_same(run(lower), run(None))


@LOWER
@pytest.mark.parametrize("isa", ["best", "generic"])
def test_attention(isa, lower, monkeypatch):
    substituted(isa, monkeypatch)
    x = torch.randn(3, 2, 4, 5, 16, generator=generator(5))
    outside = attention(*x, scale=0.25)
    with autocast("cpu", lower):
        under = attention(*x, scale=0.25)
    assert_same([under], [outside])


def test_the_operators_of_compiled_code_see_no_autocast():
    """A graph calls the operators themselves, under the autocast of its caller."""
    hidden, weight = (t.detach() for t in leaves(heads("cpu", F32))[:2])
    with autocast("cpu", B):
        under = torch.ops.auxkern.linear(hidden, weight, None, "reference")
    assert_same([under], [hidden @ weight.T])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_is_off_inside_and_what_it_was_afterwards(device, monkeypatch):
    """CUDA's switch is there without a device; only the tensors that it would act on are not."""
    seen = []
    function = apart_from_autocast(lambda x: seen.append(torch.is_autocast_enabled(device)))
    x = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr("auxkern.ops.torch_ops._first_tensor", lambda _: x)
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)
    try:
        function(x)
        assert torch.is_autocast_enabled(device)
    finally:
        torch.set_autocast_enabled(device, before)
    assert seen == [False]
