"""Properties that hold for any shapes, strides, dtypes, options and numbers of terms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import auxkern
from tests.support.cases import (
    DTYPES,
    IGNORE,
    available_backends,
    check,
    device_of,
    generator,
    ours,
    random_logits,
)

pytestmark = pytest.mark.usefixtures("module_wide_poison")
backends = pytest.mark.parametrize("backend", available_backends())

# Small sizes fail fastest; the large ones straddle the kernels' tiles.
VOCABULARIES = st.one_of(st.integers(1, 70), st.sampled_from([127, 129, 511, 1023, 1024, 1025, 2049]))
SEEDS = st.integers(0, 2**20)


@pytest.fixture(scope="module")
def module_wide_poison() -> Any:
    """``poisoned_memory`` for the whole module: hypothesis runs many examples in one test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], V: int, dtype: torch.dtype, device: str) -> Tensor:
    """(*shape, V) logits in some layout that can be read without a copy."""
    seed, spread = draw(SEEDS), draw(st.sampled_from([0.1, 3.0, 20.0]))
    left, right = draw(st.integers(0, 3)), draw(st.integers(0, 9))
    kind = draw(st.sampled_from(["plain", "vocabulary first", "reversed", "one row", "padded rows"]))

    def logits(*sizes: int) -> Tensor:
        return random_logits(*sizes, dtype=dtype, device=device, spread=spread, seed=seed)

    if kind == "vocabulary first" and shape:
        return logits(V, *shape).permute(*range(1, len(shape) + 1), 0)
    if kind == "reversed" and len(shape) == 2:
        return logits(shape[1], shape[0], left + V + right).transpose(0, 1)[..., left : left + V]
    if kind == "one row":
        return logits(left + V + right)[left : left + V].expand(*shape, V)
    if kind == "padded rows" and shape:
        return logits(*shape[:-1], shape[-1] + left, V + right)[..., : shape[-1], :V]
    return logits(*shape, left + V + right)[..., left : left + V]


@st.composite
def problems(draw: st.DrawFn, device: str) -> tuple[list[auxkern.Logits], Tensor, dict[str, Any]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    V = draw(VOCABULARIES)
    count = draw(st.integers(1, 8))
    padding = [draw(st.sampled_from([0, 0, 0, 1, 7])) for _ in range(count)]
    terms = []
    for i in range(count):
        dtype = draw(st.sampled_from(DTYPES))
        values = draw(layouts(shape, V + padding[i], dtype, device))
        scale = draw(st.sampled_from([1.0, 1.0, -1.0, 0.25, 3.0, 0.0]))
        softcap = draw(st.sampled_from([None, None, 0.5, 30.0]))
        terms.append(auxkern.Logits(values, scale, softcap))

    source = generator(draw(SEEDS))
    ignore_index = draw(st.sampled_from([IGNORE, 0, V]))
    target = torch.randint(V, shape, generator=source)
    target = target.masked_fill(
        torch.rand(shape, generator=source) < draw(st.sampled_from([0.0, 0.3, 1.0])), ignore_index
    )
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.9])),
        "z_loss": draw(st.sampled_from([0.0, 1e-3])),
        "shift": bool(shape) and draw(st.booleans()),
        "return_stats": draw(st.booleans()),
    }
    if any(padding):
        options["vocab_size"] = V
    if draw(st.booleans()):
        options["token_weight"] = torch.rand(shape, generator=source).to(device)
    if options["reduction"] == "none":
        options["grad_output"] = torch.randn(shape, generator=source).to(device)
    elif draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([1, 2.5, 4096]))
    options["wanted"] = draw(st.lists(st.integers(0, count - 1), unique=True))
    return terms, target.to(device), options


@backends
@given(data=st.data())
def test_any_problem_meets_the_contract(backend: str, data: st.DataObject) -> None:
    terms, target, options = data.draw(problems(device_of(backend)))
    check(terms, target, backend, **options)


@backends
@given(V=VOCABULARIES, N=st.integers(1, 6), seed=SEEDS, offset=st.sampled_from([-3e4, -1.0, 1e-3, 8.0, 3e4]))
def test_a_term_that_is_constant_over_the_vocabulary_changes_nothing(
    backend: str, V: int, N: int, seed: int, offset: float
) -> None:
    device = device_of(backend)
    z = random_logits(N, V, device=device, seed=seed)
    y = torch.randint(V, (N,), generator=generator(seed)).to(device)
    plain = ours([z], y, backend)
    moved = ours([z, torch.full((N, 1), offset, device=device).expand(N, V)], y, backend)
    rounding = 2.0**-23 * abs(offset)
    torch.testing.assert_close(moved.loss, plain.loss, rtol=1e-5, atol=1e-5 + 4 * rounding)
    torch.testing.assert_close(
        moved.gradients[0], plain.gradients[0], rtol=1e-4 + 4 * rounding, atol=1e-6 + rounding
    )


@backends
@given(V=VOCABULARIES, N=st.integers(1, 6), seed=SEEDS, label_smoothing=st.sampled_from([0.0, 0.1, 1.0]))
def test_a_row_of_gradients_sums_to_zero(
    backend: str, V: int, N: int, seed: int, label_smoothing: float
) -> None:
    """A softmax does not see a constant, so its gradient has no constant part."""
    device = device_of(backend)
    z = random_logits(N, V, device=device, seed=seed)
    y = torch.randint(V, (N,), generator=generator(seed)).to(device)
    options = {"reduction": "sum", "label_smoothing": label_smoothing}
    (gradient,) = ours([z], y, backend, **options).gradients
    assert float(gradient.double().sum(-1).abs().max()) < 1e-5


@backends
@given(V=VOCABULARIES, N=st.integers(1, 6), seed=SEEDS)
def test_renaming_the_ids_renames_the_gradient(backend: str, V: int, N: int, seed: int) -> None:
    device = device_of(backend)
    z = random_logits(N, V, device=device, seed=seed)
    y = torch.randint(V, (N,), generator=generator(seed)).to(device)
    order = torch.randperm(V, generator=generator(seed + 1)).to(device)
    plain = ours([z], y, backend)
    renamed = ours([z[:, order]], order.argsort()[y], backend)
    torch.testing.assert_close(renamed.loss, plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(renamed.gradients[0], plain.gradients[0][:, order], rtol=1e-5, atol=1e-7)


@backends
@given(V=VOCABULARIES, N=st.integers(1, 6), seed=SEEDS, count=st.integers(2, 8))
@example(V=1024, N=3, seed=0, count=8)
def test_equal_terms_are_one_scaled_term(backend: str, V: int, N: int, seed: int, count: int) -> None:
    device = device_of(backend)
    z = random_logits(N, V, device=device, seed=seed, spread=1)
    y = torch.randint(V, (N,), generator=generator(seed)).to(device)
    many = ours([z] * count, y, backend)
    one = ours([auxkern.Logits(z, scale=float(count))], y, backend)
    torch.testing.assert_close(many.loss, one.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(count * many.gradients[0], one.gradients[0], rtol=1e-4, atol=1e-7)


@backends
@given(V=VOCABULARIES, N=st.integers(1, 6), seed=SEEDS, keep=st.integers(1, 5))
def test_impossible_ids_are_as_good_as_absent(backend: str, V: int, N: int, seed: int, keep: int) -> None:
    """-inf for an id, a vocabulary without it: one loss, and gradient 0."""
    device = device_of(backend)
    z = random_logits(N, V, device=device, seed=seed)
    ids = torch.randperm(V, generator=generator(seed))[: min(keep, V)].sort().values.to(device)
    masked = torch.full_like(z, -math.inf)
    masked[:, ids] = z[:, ids]
    picked = torch.randint(len(ids), (N,), generator=generator(seed)).to(device)
    result = ours([masked], ids[picked], backend)
    small = ours([z[:, ids].contiguous()], picked, backend)
    torch.testing.assert_close(result.loss, small.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.gradients[0][:, ids], small.gradients[0], rtol=1e-5, atol=1e-7)
    rest = result.gradients[0].index_fill(1, ids, 0.0)
    assert not rest.any()


@st.composite
def sums(draw: st.DrawFn, device: str) -> tuple[list[Any], Tensor, dict[str, Any]]:
    """Any list of terms in float32, at least one of them not sparse; targets; options."""
    N, V = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        leaf = torch.randn(shape, generator=g).to(device)
        return leaf.requires_grad_(draw(st.booleans()))

    def term(kind: str) -> Any:
        if kind == "sparse":
            K = draw(st.integers(0, 5))
            return auxkern.Sparse(torch.randint(V, (N, K), generator=g).to(device), normal(N, K))
        scaling = {
            "scale": draw(st.sampled_from([1.0, -0.5, 2.0])),
            "softcap": draw(st.sampled_from([None, 3.0])),
        }
        wide = V + draw(st.integers(0, 3))
        if kind == "logits":
            return auxkern.Logits(normal(N, wide), **scaling)
        D = draw(st.integers(1, 30))
        bias = normal(wide) if draw(st.booleans()) else None
        return auxkern.Head(normal(N, D), normal(wide, D), bias, **scaling)

    kinds = draw(st.lists(st.sampled_from(["logits", "head", "sparse"]), max_size=3))
    terms = [
        term(kind) for kind in draw(st.permutations([*kinds, draw(st.sampled_from(["logits", "head"]))]))
    ]
    target = torch.randint(V, (N,), generator=g)
    target[torch.rand(N, generator=g) < 0.3] = -100
    options = {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "z_loss": draw(st.sampled_from([0.0, 1e-2])),
        "return_stats": draw(st.booleans()),
        "chunk_rows": draw(st.sampled_from([None, 1, 16])),
        "vocab_size": V,
    }
    return terms, target.to(device), options


def dense_sum(terms: list[Any], V: int) -> tuple[Tensor, list[Tensor]]:
    """(N, V) float64 sum and the float64 leaves that it is made from."""
    total, leaves = torch.zeros((), dtype=torch.float64), []
    for term in terms:
        t = {
            name: x.detach().cpu().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for name, x in term.tensors.items()
        }
        leaves += [x for x in t.values() if x.requires_grad]
        if isinstance(term, auxkern.Sparse):
            N = t["values"].shape[0]
            z = torch.zeros(N, V, dtype=torch.float64).scatter_add(1, t["ids"].cpu(), t["values"])
            total = total + z
            continue
        z = t["values"] if "values" in t else t["hidden"] @ t["weight"].T + t.get("bias", 0)
        z = z[:, :V]
        total = total + term.scale * (
            z if term.softcap is None else term.softcap * torch.tanh(z / term.softcap)
        )
    return total, leaves


@backends
@given(data=st.data())
def test_any_list_of_terms_equals_the_dense_sum(backend: str, data: st.DataObject) -> None:
    terms, target, options = data.draw(sums(device_of(backend)))
    z, exact_leaves = dense_sum(terms, options["vocab_size"])
    y = target.cpu()
    row = F.cross_entropy(z, y, reduction="none", label_smoothing=options["label_smoothing"])
    row = torch.where(y >= 0, row + options["z_loss"] * z.logsumexp(-1).square(), 0.0)
    exact = row.sum() / (y >= 0).sum().clamp(min=1)

    found = auxkern.cross_entropy(terms, target, backend=backend, **options)
    loss = found[0] if options["return_stats"] else found
    # float32 sums of at most 30 products, 4 terms and 200 exponentials, of logits up to about 50.
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5)
    leaves = [x for term in terms for x in term.tensors.values() if x.requires_grad]
    if not leaves:
        return
    made = torch.autograd.grad(loss, leaves)
    for d, want in zip(made, torch.autograd.grad(exact, exact_leaves), strict=True):
        assert (
            (d.cpu().double() - want).abs().max() <= 2e-5 * max(1.0, want.abs().max().item())
            if d.numel()
            else True
        )
