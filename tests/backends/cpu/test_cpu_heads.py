"""The native kernels of output heads: segments, tiles, references and every instruction set.

The expectation is the dense float64 sum through ``F.cross_entropy`` and autograd.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from auxkern import Head, Sparse
from auxkern.backends.cpu import Cpu
from auxkern.backends.cpu.segments import IDS
from auxkern.core.loss import Loss
from auxkern.core.sums import Sum
from tests.support.cases import generator
from tests.support.instruction_sets import EACH, substituted

H, B, S = torch.float16, torch.bfloat16, torch.float32
# float32 sums of D products and V exponentials in another order than float64's; of the largest entry.
FLOAT32 = 4e-6


@pytest.fixture(params=EACH)
def kernels(request, monkeypatch):
    """Every instruction set in turn."""
    return substituted(request.param, monkeypatch, own_products=True)


def leaf(*shape: int, seed: int, dtype: torch.dtype = S, std: float = 1.0) -> Tensor:
    return (std * torch.randn(shape, generator=generator(seed))).to(dtype).requires_grad_()


def dense(terms: list[Any], V: int) -> Tensor:
    """(N, V) float64."""
    N = terms[0].hidden.shape[0]
    z = torch.zeros(N, V, dtype=torch.float64)
    for term in terms:
        if isinstance(term, Sparse):
            z = z.scatter_add(1, term.ids, term.values.double())
            continue
        product = term.hidden.double() @ term.weight[:V].double().T
        bias = 0 if term.bias is None else term.bias[:V].double()
        z = z + term.scale * (product + bias)
    return z


def leaves(terms: list[Any]) -> list[Tensor]:
    found = [t for term in terms for t in term.tensors.values() if t.requires_grad]
    return list(dict.fromkeys(found))


def check(terms: list[Any], y: Tensor, V: int, weight: Tensor | None = None, **options: Any) -> None:
    """Loss and every gradient against the dense sum; equal within float32, or the leaf's own dtype."""
    z = dense(terms, V)
    row = F.cross_entropy(z, y, reduction="none")
    w = torch.ones_like(row) if weight is None else weight.double()
    expected = (row * w).sum() / (w * (y >= 0)).sum()
    wanted = torch.autograd.grad(expected, leaves(terms))
    loss = auxkern.cross_entropy(terms, y, token_weight=weight, backend="cpu", **options)
    made = torch.autograd.grad(loss, leaves(terms))
    # A logit is rounded to float32, and what it is rounded by multiplies its exponential.
    float32 = max(FLOAT32, 2**-23 * z[z.isfinite()].abs().max().item())
    assert abs(loss.item() - expected.item()) <= float32 * max(1.0, abs(expected.item()))
    for d, exact, x in zip(made, wanted, leaves(terms), strict=True):
        assert d.dtype == x.dtype
        assert d.shape == x.shape
        tolerance = max(float32, torch.finfo(x.dtype).eps)  # one rounding to the leaf's dtype
        error = (d.double() - exact.double()).abs().max()
        assert error <= tolerance * max(exact.abs().max().item(), 1e-12)


def two_heads(N: int, V: int, D: int, D_aux: int, dtype: torch.dtype = S, aux: torch.dtype = S) -> list[Head]:
    lm = Head(leaf(N, D, seed=1, dtype=dtype).detach(), leaf(V, D, seed=2, dtype=dtype, std=0.3).detach())
    return [lm, Head(leaf(N, D_aux, seed=3, dtype=aux), leaf(V, D_aux, seed=4, dtype=aux, std=0.3))]


def ids(N: int, V: int, seed: int = 5) -> Tensor:
    return torch.randint(0, V, (N,), generator=generator(seed))


@pytest.mark.parametrize("V", [1, 5, 127, 129, IDS - 1, IDS, IDS + 1, 2 * IDS + 257])
def test_every_end_of_a_segment_and_of_a_tile(kernels, V):
    y = ids(37, V)
    y[0], y[1], y[2] = V - 1, 0, min(V - 1, IDS)
    check(two_heads(37, V, 9, 5), y, V)


@pytest.mark.parametrize("N", [1, 15, 16, 17, 63, 64, 65, 131])
def test_every_number_of_rows(kernels, N):
    check(two_heads(N, 301, 8, 6), ids(N, 301), 301)


@pytest.mark.parametrize("D", [1, 2, 15, 16, 17, 63, 65, 600])
def test_every_width(kernels, D):
    check(two_heads(19, 301, 7, D), ids(19, 301), 301)
    check(two_heads(19, 301, D, 7), ids(19, 301), 301)


@pytest.mark.parametrize(("lm", "aux"), [(H, S), (B, S), (S, H), (H, H), (B, B), (H, B)])
def test_every_dtype(kernels, lm, aux):
    check(two_heads(21, IDS + 70, 33, 20, lm, aux), ids(21, IDS + 70), IDS + 70)


def test_hidden_states_and_weight_may_differ_in_dtype(kernels):
    check([Head(leaf(21, 33, seed=1), leaf(301, 33, seed=2, dtype=H, std=0.3))], ids(21, 301), 301)


def test_a_reference_that_rises_in_a_segment_and_between_segments(kernels):
    V, N = 3 * IDS, 20
    heads = two_heads(N, V, 9, 5)
    # From tile to tile the logits rise by 25, twice past what a reference bears, and fall again.
    ramp = 25.0 * (torch.arange(V) // 128).float()
    ramp[2 * IDS :] = -50
    biased = Head(leaf(N, 4, seed=6), leaf(V, 4, seed=7, std=0.3), ramp.requires_grad_())
    check([*heads, biased], ids(N, V), V)


def test_tiles_and_segments_of_minus_infinity(kernels):
    V, N = 2 * IDS + 10, 20
    mask = torch.zeros(V)
    mask[:140] = mask[IDS : 2 * IDS] = -torch.inf
    y = ids(N, V)
    y[(mask == -torch.inf)[y]] = 150
    biased = Head(leaf(N, 4, seed=6), leaf(V, 4, seed=7, std=0.3), mask)
    check([*two_heads(N, V, 9, 5), biased], y, V)


def test_a_row_that_does_not_count_may_hold_nan(kernels):
    terms = two_heads(20, IDS + 5, 9, 5)
    y = ids(20, IDS + 5)
    weight = torch.ones(20)
    weight[3] = 0
    clean = torch.autograd.grad(
        auxkern.cross_entropy(terms, y, token_weight=weight, backend="cpu"), leaves(terms)
    )
    with torch.no_grad():
        y[7] = -100
        for head in terms:
            head.hidden[3] = head.hidden[7] = torch.nan
    made = auxkern.cross_entropy(terms, y, token_weight=weight, reduction="sum", backend="cpu")
    d_hidden, d_weight = torch.autograd.grad(made, leaves(terms))
    assert d_weight.isfinite().all()
    assert d_hidden.isfinite().all()
    assert (d_hidden[3] == 0).all()
    assert (d_hidden[7] == 0).all()
    assert clean[0][3].eq(0).all()
    assert d_hidden[5].ne(0).any()


def test_nan_in_a_row_that_counts_is_not_hidden(kernels):
    terms = two_heads(20, 301, 9, 5)
    with torch.no_grad():
        terms[0].hidden[3] = torch.nan
    assert auxkern.cross_entropy(terms, ids(20, 301), backend="cpu").isnan()


def test_sparse_values_at_targets_at_equal_ids_and_in_several_segments(kernels):
    V, N, K = 2 * IDS + 9, 18, 6
    y = ids(N, V)
    at = torch.randint(0, V, (N, K), generator=generator(8))
    at[:, 0] = y
    at[:, 1] = at[:, 2]
    at[4] = y[4]
    sparse = Sparse(at, leaf(N, K, seed=9, std=3.0))
    other = Sparse(at[:, :2], leaf(N, 2, seed=10))
    check([*two_heads(N, V, 9, 5), sparse, other], y, V)


def test_a_pointer_takes_a_token_from_certain_to_impossible(kernels):
    V, N = 301, 12
    heads = two_heads(N, V, 9, 5)
    best = dense(heads, V).argmax(1)
    at = torch.stack([best, ids(N, V, 11)], 1)
    for value in (30.0, -200.0):
        values = torch.full((N, 2), value)
        values[:, 1] = 1
        check([*heads, Sparse(at, values.requires_grad_())], ids(N, V), V)


def test_chunks_add_up(kernels):
    terms, y = two_heads(75, IDS + 5, 9, 5), ids(75, IDS + 5)
    for rows in (1, 16, 33, 75):
        check(terms, y, IDS + 5, chunk_rows=rows)


def test_the_number_of_threads_changes_no_bit(kernels):
    terms, y = two_heads(40, 3 * IDS, 33, 21), ids(40, 3 * IDS)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss = auxkern.cross_entropy(terms, y, backend="cpu")
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves(terms))])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_a_scaled_loss_is_not_computed_again(kernels, monkeypatch):
    terms, y = two_heads(20, 301, 9, 5, H, H), ids(20, 301)
    exact = torch.autograd.grad(F.cross_entropy(dense(terms, 301), y) * 1024, leaves(terms))
    calls = []
    forward = Cpu._forward
    monkeypatch.setattr(Cpu, "_forward", lambda *a: calls.append(1) or forward(*a))
    made = torch.autograd.grad(auxkern.cross_entropy(terms, y, backend="cpu") * 1024, leaves(terms))
    assert calls == [1]
    for d, want in zip(made, exact, strict=True):
        assert (d.double() - want.double()).abs().max() <= 2**-10 * want.abs().max()


def test_plain_code_leaves_products_to_the_library_unless_told(monkeypatch):
    heads = Sum.of(two_heads(3, 5, 9, 5), 5)
    assert Cpu("generic").route(heads, Loss()).name != "segments"
    assert Cpu("generic", own_products=True).route(heads, Loss()).name == "segments"
