"""Forward mode, ``torch.func`` and second derivatives: right, or an error that says what to use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import available_backends, device_of, generator
from torch import Tensor
from torch.autograd import forward_ad

import auxkern
from auxkern import Head, Logits, Sparse
from auxkern.ops.attention import attention
from auxkern.ops.dense import dense_logits
from auxkern.ops.linear import linear

N, V, D, K = 5, 11, 4, 2
backends = pytest.mark.parametrize("backend", available_backends())


def tensors(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = generator(6)

    def x(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    return {
        "logits": x(N, V),
        "hidden": x(N, D),
        "weight": x(V, D),
        "bias": x(V),
        "values": x(N, K),
        "token_weight": x(N).exp(),
        "normalizer": x(()).exp(),
    }


def target(device: str) -> Tensor:
    return torch.tensor([3, 0, 10, 7, 3], device=device)


def loss_of(t: dict[str, Tensor], backend: str, **options: Any) -> Tensor:
    ids = torch.arange(N * K, device=t["logits"].device).view(N, K) % V
    terms = [
        Logits(t["logits"], 0.5),
        Head(t["hidden"], t["weight"], t["bias"], softcap=9.0),
        Sparse(ids, t["values"]),
    ]
    given = {"token_weight": t["token_weight"], "normalizer": t["normalizer"]}
    loss: Tensor = auxkern.cross_entropy(terms, target(ids.device), backend=backend, **given, **options)
    return loss


NAMES = tuple(tensors())
TRANSFORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x])),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.func.vmap(f)(x[None]).sum())(x),
    "jvp of vmap": lambda f, x: torch.func.jvp(torch.func.vmap(f), (x[None],), (x[None],)),
}


@backends
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_loss_takes_no_transforms(transform, name, backend):
    given = tensors(device_of(backend))
    with pytest.raises(RuntimeError, match=r"forward-mode.*torch\.nn\.functional\.cross_entropy"):
        transform(lambda x: loss_of({**given, name: x}, backend), given[name])


@backends
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_takes_no_dual_tensors(name, trained, backend):
    given = tensors(device_of(backend))
    given["logits"].requires_grad_(trained)
    with forward_ad.dual_level():
        dual = {**given, name: forward_ad.make_dual(given[name], torch.ones_like(given[name]))}
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            loss_of(dual, backend)


@pytest.mark.parametrize("name", ["logits", "hidden", "weight", "bias", "values"])
def test_the_error_of_the_loss_names_a_way_that_is_right(name):
    given = tensors(dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        t = {**given, name: x}
        terms = [Logits(t["logits"]), Head(t["hidden"], t["weight"], t["bias"])]
        terms.append(Sparse(torch.arange(N * K).view(N, K) % V, t["values"]))
        return F.cross_entropy(dense_logits(terms), target("cpu"))

    x = given[name]
    assert torch.autograd.gradcheck(loss, x.requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, x)
    forward, backward = torch.func.jacfwd(loss)(x), torch.func.grad(loss)(x)
    torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "logits", "values"])
def test_a_draw_takes_no_dual_tensors(name):
    given = tensors()

    def draw(x: Tensor) -> Tensor:
        t = {**given, name: x}
        terms = [Logits(t["logits"]), Head(t["hidden"], t["weight"], t["bias"])]
        terms.append(Sparse(torch.arange(N * K).view(N, K) % V, t["values"]))
        found = auxkern.sample(terms, seed=torch.arange(N), position=0, return_logprobs=True)
        return found.logprob

    with pytest.raises(RuntimeError, match=r"sample has no forward-mode"):
        torch.func.jvp(draw, (given[name],), (given[name],))


@pytest.mark.parametrize("i", [0, 1, 2])
def test_linear_has_every_derivative(i):
    g = generator(8)
    given = [torch.randn(*shape, generator=g).double() for shape in ((2, 3, 4), (6, 4), (6,))]

    def f(x: Tensor) -> Tensor:
        return linear(*given[:i], x, *given[i + 1 :]).sin()

    x = given[i].clone().requires_grad_()
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True)
    torch.testing.assert_close(torch.func.jacfwd(f)(given[i]), torch.func.jacrev(f)(given[i]))


def test_a_linear_layer_of_a_narrower_weight_has_forward_mode():
    x, weight = torch.randn(3, 8, generator=generator(9)), torch.randn(5, 8, generator=generator(10)).half()
    _, tangent = torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))
    torch.testing.assert_close(tangent, x @ weight.float().T)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_attention_refuses_derivatives(i):
    given = list(torch.randn(3, 2, 4, 5, 16, generator=generator(11)).unbind(0))
    with pytest.raises(RuntimeError, match=r"no derivatives.*scaled_dot_product_attention"):
        torch.func.jvp(
            lambda x: attention(*given[:i], x, *given[i + 1 :], scale=0.25), (given[i],), (given[i],)
        )
    given[i].requires_grad_()
    with pytest.raises(RuntimeError, match="no derivatives"):
        attention(*given, scale=0.25)
    with torch.no_grad():
        attention(*given, scale=0.25)


@pytest.mark.parametrize("made", ["logits", "heads", "linear"])
def test_transforms_in_compiled_code_are_errors_as_well(made):
    """The compiler resolves them by itself, and would take an operator's results for constants."""
    given = tensors()

    def loss(x: Tensor) -> Tensor:
        if made == "linear":
            return linear(x, given["weight"]).sum()
        terms = Head(x, given["weight"]) if made == "heads" else x
        return auxkern.cross_entropy(terms, target("cpu"))

    compiled = torch.compile(lambda x: torch.func.grad(loss)(x), backend="eager")
    with pytest.raises(RuntimeError, match="functorch transforms"):
        compiled(given["logits" if made == "logits" else "hidden"])


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
def test_an_operator_called_by_itself_has_no_derivative():
    hidden, weight = tensors()["hidden"].requires_grad_(), tensors()["weight"]
    y = torch.ops.auxkern.linear(hidden, weight, None, "")
    with pytest.raises(RuntimeError, match=r"operator auxkern::linear has no derivative"):
        y.sum().backward()


# --- second derivatives -----------------------------------------------------------------------


@backends
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["logits", "hidden", "weight"])
@pytest.mark.parametrize("of", ["the term", "the loss weight", "token_weight", "the incoming gradient"])
def test_a_derivative_of_the_gradient_is_an_error(of, kind, fused, backend):
    """The gradient is linear in what comes in, which is lost as well; a penalty on it would train wrongly."""
    t = tensors(device_of(backend))
    x = t[kind].requires_grad_()
    terms = [Logits(x)] if kind == "logits" else [Head(t["hidden"], t["weight"])]
    scalar = torch.tensor(2.0, device=x.device, requires_grad=True)
    t["token_weight"].requires_grad_()
    reduction = "sum" if fused else "none"
    rows = auxkern.cross_entropy(
        terms, target(x.device), reduction=reduction, token_weight=t["token_weight"], backend=backend
    )
    incoming = torch.ones_like(rows, requires_grad=True)
    (gradient,) = torch.autograd.grad(rows * scalar, x, incoming, create_graph=True)
    asked = {
        "the term": x,
        "the loss weight": scalar,
        "token_weight": t["token_weight"],
        "the incoming gradient": incoming,
    }[of]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(gradient.square().sum(), asked, allow_unused=True)


@backends
def test_first_derivatives_of_what_multiplies_the_loss(backend):
    """token_weight, the normalizer and a factor outside have gradients: the rows' losses are theirs."""
    t = {name: x.double() for name, x in tensors("cpu").items()}
    names = ("token_weight", "normalizer")

    def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        return [g.double().cpu() for g in torch.autograd.grad(loss, inputs)]

    exact = [t[name].clone().requires_grad_() for name in names]
    rows = F.cross_entropy(t["logits"], target("cpu"), reduction="none")
    want = gradients((rows * exact[0]).sum() / exact[1], exact)
    ours = [t[name].float().to(device_of(backend)).requires_grad_() for name in names]
    loss = auxkern.cross_entropy(
        t["logits"].float().to(device_of(backend)), target(device_of(backend)),
        token_weight=ours[0], normalizer=ours[1], backend=backend,
    )  # fmt: skip
    for a, b in zip(gradients(loss, ours), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
