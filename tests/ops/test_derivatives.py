"""Forward mode, ``torch.func`` and second derivatives: right, or an error that says what to use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import auxkern
from auxkern import Head, Logits, Sparse
from auxkern.ops.attention import attention
from auxkern.ops.linear import linear
from tests.support.cases import available_backends, device_of, generator

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
    return torch.tensor([3, 0, -100, 7, 3], device=device)


def loss_of(t: dict[str, Tensor], backend: str | None, **options: Any) -> Tensor:
    ids = torch.arange(N * K, device=t["logits"].device).view(N, K) % V
    terms = [
        Logits(t["logits"], 0.5),
        Head(t["hidden"], t["weight"], t["bias"], softcap=9.0),
        Sparse(ids, t["values"]),
    ]
    given = {"token_weight": t["token_weight"], "normalizer": t["normalizer"]}
    loss: Tensor = auxkern.cross_entropy(terms, target(ids.device), backend=backend, **given, **options)
    return loss


def formula(t: dict[str, Tensor], label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """The same by torch's functions on the whole logits."""
    y, ids = target("cpu"), torch.arange(N * K).view(N, K) % V
    x = t["hidden"] @ t["weight"].T + t["bias"]
    z = 0.5 * t["logits"] + 9.0 * torch.tanh(x / 9.0)
    z = z.scatter_add(-1, ids, t["values"])
    row = F.cross_entropy(z, y, reduction="none", label_smoothing=label_smoothing)
    row = row + z_loss * torch.where(y == -100, 0.0, z.logsumexp(-1).square())
    return (row * t["token_weight"]).sum() / t["normalizer"]


NAMES = tuple(tensors())
TRANSFORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x.sin()),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x.sum())),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x.sin()])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x.sin()])),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.func.vmap(f)(x[None]).sum())(x),
    "jvp of vmap": lambda f, x: torch.func.jvp(torch.func.vmap(f), (x[None],), (x[None],)),
}


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1}], ids=["plain", "options"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_the_loss_are_right(transform, name, options):
    given = tensors(dtype=torch.float64)
    x = given[name]
    found = transform(lambda x: loss_of({**given, name: x}, None, **options), x)
    expected = transform(lambda x: formula({**given, name: x}, **options), x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_dual_tensors_in_the_loss_are_right(name, trained):
    given = tensors(dtype=torch.float64)
    given["logits"].requires_grad_(trained)

    def tangent(f: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(given[name], given[name].detach().sin())
            return forward_ad.unpack_dual(f({**given, name: dual})).tangent

    found, expected = tangent(lambda t: loss_of(t, None)), tangent(formula)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gradients_of_each_example_and_its_target():
    x, y = tensors(dtype=torch.float64)["logits"], target("cpu")
    found = torch.func.vmap(torch.func.grad(lambda z, y: auxkern.cross_entropy(z, y)))(x, y)
    expected = torch.func.vmap(torch.func.grad(lambda z, y: F.cross_entropy(z[None], y[None])))(x, y)
    counts = y != -100
    torch.testing.assert_close(found[counts], expected[counts])
    assert bool((found[~counts] == 0).all())


def test_statistics_and_reductions_under_a_transform_are_those_outside():
    given = tensors()
    ids = torch.arange(N * K).view(N, K) % V
    y = target("cpu")

    def run(x: Tensor) -> tuple[Tensor, auxkern.CrossEntropyStats]:
        terms = [
            Logits(x, 0.5),
            Head(given["hidden"], given["weight"], softcap=9.0),
            Sparse(ids, given["values"]),
        ]
        return auxkern.cross_entropy(terms, y, reduction="none", return_stats=True, label_smoothing=0.1)

    outside = run(given["logits"])
    with forward_ad.dual_level():
        inside = run(forward_ad.make_dual(given["logits"], given["logits"]))
        rows = [forward_ad.unpack_dual(x).primal for x in (inside[0], *inside[1])]
    for a, b in zip(rows, (outside[0], *outside[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_ignored_rows_are_not_read_and_wrong_targets_show():
    z, y = tensors()["logits"], torch.tensor([3, -100, V, -1, 0])
    z[1] = torch.nan
    row, slope = torch.func.jvp(lambda z: auxkern.cross_entropy(z, y, reduction="none"), (z,), (z.clone(),))
    assert row.isnan().tolist() == [False, False, True, True, False]
    assert slope.isnan().tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_named_kernel_takes_no_transforms(backend):
    given = tensors()
    with pytest.raises(RuntimeError, match=rf"backend='{backend}' takes no forward mode.*dense_logits"):
        torch.func.jvp(
            lambda x: auxkern.cross_entropy(x, target("cpu"), backend=backend),
            (given["logits"],),
            (given["logits"],),
        )


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
def test_transforms_in_compiled_code_are_right_or_errors(made):
    """The compiler resolves them by itself; results of an operator must not be constants to it."""
    given = tensors()

    def loss(x: Tensor) -> Tensor:
        if made == "linear":
            return linear(x, given["weight"]).sum()
        terms = Head(x, given["weight"]) if made == "heads" else x
        return auxkern.cross_entropy(terms, target("cpu"))

    x = given["logits" if made == "logits" else "hidden"]
    compiled = torch.compile(lambda x: torch.func.grad(loss)(x), backend="eager")
    try:
        found = compiled(x)
    except (RuntimeError, AssertionError):
        return  # in the own words of torch 2.13, and of 2.14 for a product
    torch.testing.assert_close(found, torch.func.grad(loss)(x))


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
