"""What ``explain`` says of terms: the backend, the way that it goes, and why not each faster one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Logits, Sparse
from auxkern.core.loss import Loss
from auxkern.core.sums import Sum
from tests.support.cases import generator
from tests.support.instruction_sets import EACH, Cpu, substituted

N, V, D = 6, 19, 16


@pytest.fixture(params=EACH)
def cpu(request, monkeypatch) -> Cpu:
    """Every instruction set in turn."""
    return substituted(request.param, monkeypatch, own_products=True)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def head(seed: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> Head:
    hidden, weight = normal(N, D, seed=seed, dtype=dtype), normal(V, D, seed=seed + 50, dtype=dtype)
    return Head(hidden.requires_grad_(), weight.requires_grad_(), **options)


def logits(seed: int = 2) -> Logits:
    return Logits(normal(N, V, seed=seed).requires_grad_())


def sparse() -> Sparse:
    return Sparse(torch.arange(2 * N).view(N, 2) % V, normal(N, 2, seed=3).requires_grad_())


def turned() -> Head:
    """A head whose weight lies by columns."""
    return Head(normal(N, D, seed=4).requires_grad_(), normal(D, V, seed=5).T.requires_grad_())


class Case(NamedTuple):
    """Terms and options of a call, the way that it goes on a CPU, and why not by segments."""

    terms: Callable[[], list[Any]]
    options: dict[str, Any]
    route: str
    reason: str | None = None


CASES = {
    "a head": Case(lambda: [head()], {}, "segments"),
    "two heads of other dtypes": Case(
        lambda: [head(dtype=torch.float16), head(7, torch.bfloat16, bias=normal(V, seed=8), scale=0.5)],
        {},
        "segments",
    ),
    "eight heads": Case(lambda: [head(seed) for seed in range(8)], {}, "segments"),
    "heads and a pointer": Case(lambda: [sparse(), head(), head(7)], {}, "segments"),
    "fewer ids": Case(lambda: [head()], {"vocab_size": V - 2}, "segments"),
    "no smoothing, no stats": Case(
        lambda: [head()], {"label_smoothing": 0.0, "return_stats": False}, "segments"
    ),
    "stats": Case(
        lambda: [head(), head(7)],
        {"return_stats": True},
        "chunks of logits",
        "return_stats needs the logits themselves",
    ),
    "smoothing": Case(
        lambda: [head(), sparse()],
        {"label_smoothing": 0.1},
        "chunks of logits",
        "label_smoothing needs the logits themselves",
    ),
    "logits beside": Case(
        lambda: [logits(), head()], {}, "chunks of logits", "there are logits beside the heads"
    ),
    "logits and a pointer": Case(
        lambda: [logits(), sparse()], {}, "chunks of logits", "there are logits beside the heads"
    ),
    "a soft cap": Case(
        lambda: [head(), head(7, softcap=3.0)],
        {},
        "chunks of logits",
        "a soft cap needs each head's logits apart",
    ),
    "strides": Case(lambda: [head(), turned()], {}, "chunks of logits", "a weight's rows are not contiguous"),
    "logits": Case(lambda: [logits(), logits(9)], {}, "logits"),
    "logits, everything": Case(lambda: [logits()], {"return_stats": True, "label_smoothing": 0.1}, "logits"),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@cases
def test_the_way_on_a_cpu_and_why_no_faster_one(cpu: Cpu, case: Case) -> None:
    said = auxkern.explain(case.terms(), **case.options)
    assert (said.backend, said.route) == ("cpu", case.route)
    assert said.route_refusals == ({} if case.reason is None else {"segments": case.reason})


@cases
def test_the_way_that_is_said_is_the_way_taken(cpu: Cpu, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    kernels = ("auxkern_heads_forward", "auxkern_heads_backward", "auxkern_cross_entropy_forward")
    for name in kernels:
        kernel = getattr(cpu.library, name)
        monkeypatch.setattr(cpu.library, name, lambda *a, k=kernel, n=name: calls.append(n) or k(*a))
    made = auxkern.cross_entropy(case.terms(), torch.arange(N) % V, **case.options)
    loss = made[0] if case.options.get("return_stats") else made
    loss.backward()
    segments = case.route == "segments"
    assert set(calls) == ({*kernels[:2]} if segments else {kernels[2]})


@cases
def test_the_way_of_the_reference(case: Case) -> None:
    said = auxkern.explain(case.terms(), backend="reference", **case.options)
    route = "logits" if case.route == "logits" else "chunks of logits"
    assert (said.backend, said.route, said.refusals, said.route_refusals) == ("reference", route, {}, {})


def test_more_heads_than_the_kernels_take(cpu: Cpu) -> None:
    """A call takes no more terms than that; the backend alone says so as well."""
    route = cpu.route(Sum.of([head(seed) for seed in range(9)], V), Loss())
    assert route.name == "chunks of logits"
    assert route.refusals == {"segments": "there are 9 heads; kernels take 8 at most"}


def test_a_dtype_without_kernels(cpu: Cpu) -> None:
    terms = [head(dtype=torch.float64), head(7)]
    said = auxkern.explain(terms)
    assert (said.backend, said.route) == ("reference", "chunks of logits")
    assert "float64" in said.refusals["cpu"]
    route = cpu.route(Sum.of(terms, V), Loss())
    assert route.name == "chunks of logits"
    assert route.refusals == {"segments": "there are no kernels for torch.float64 and torch.float64"}


def test_a_pointer_alone_has_no_heads(cpu: Cpu) -> None:
    """As a shard's statistics ask for it; a call has a term with a logit for every id."""
    route = cpu.route(Sum.of([sparse()], V), Loss())
    assert route.name == "chunks of logits"
    assert route.refusals == {"segments": "there are no heads"}


def test_plain_code_says_that_a_library_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    substituted("generic", monkeypatch)
    said = auxkern.explain([head()])
    assert (said.backend, said.route) == ("cpu", "chunks of logits")
    assert said.route_refusals == {"segments": "a library's products are faster than plain code"}


def test_it_is_printed(cpu: Cpu) -> None:
    lines = str(auxkern.explain([head(dtype=torch.float16), sparse()], label_smoothing=0.1)).splitlines()
    assert lines[0] == "cpu [float16, float16, float32]: backend 'cpu', route 'chunks of logits'"
    assert lines[1].startswith("  not 'triton': ")
    assert lines[2:] == ["  not 'segments': label_smoothing needs the logits themselves"]
    assert str(auxkern.explain("cpu")).splitlines()[0] == "cpu [float32]: backend 'cpu'"


def test_terms_may_be_given_as_to_the_loss(cpu: Cpu) -> None:
    z = normal(2, 3, V, seed=1)
    for terms in (z, Logits(z), [z, z], (Logits(z),)):
        assert auxkern.explain(terms).route == "logits"
    assert auxkern.explain(head()).route == "segments"


def test_of_a_device_no_way_is_said() -> None:
    said = auxkern.explain("cpu", torch.float32)
    assert (said.route, said.route_refusals) == (None, {})


def test_what_was_said_of_terms_is_not_said_of_their_device(cpu: Cpu) -> None:
    assert auxkern.explain([head()]).route == "segments"
    assert auxkern.explain("cpu", torch.float32, torch.float32).route is None


@pytest.mark.parametrize(
    "options",
    [{"backend": "cpu"}, {"vocab_size": 7}, {"label_smoothing": 0.1}, {"return_stats": True}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["name", "device"])
def test_options_go_with_terms(device: Any, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="pass the terms in place of a device"):
        auxkern.explain(device, torch.float32, **options)


def test_dtypes_go_with_a_device() -> None:
    with pytest.raises(TypeError, match="dtypes go with a device; terms have their own"):
        auxkern.explain([head()], torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: auxkern.explain([head()], backend="cuda"), ValueError, "'triton', 'cpu', 'reference'"),
        (
            lambda: auxkern.explain([head(dtype=torch.float64)], backend="cpu"),
            RuntimeError,
            "backend='cpu' cannot run: it has no kernels for torch.float64",
        ),
        (lambda: auxkern.explain([torch.zeros(3, V), head()]), ValueError, r"terms\[1\] has rows \(6,\) but"),
        (lambda: auxkern.explain([torch.zeros(N, V + 1), head()]), ValueError, f"pass vocab_size={V}"),
        (lambda: auxkern.explain([head()], vocab_size=V + 1), ValueError, rf"vocab_size is {V + 1} but"),
        (lambda: auxkern.explain([sparse()]), ValueError, "terms are all Sparse"),
        (lambda: auxkern.explain(7), TypeError, "terms must be a sequence"),
    ],
    ids=["backend", "dtype", "rows", "vocabulary", "vocab_size", "only sparse", "no terms"],
)
def test_a_question_that_has_no_answer(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
