"""Sparse terms beside heads, in the kernels that make tiles of logits, interpreted and compiled."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from auxkern import Head, Sparse
from auxkern.core.loss import NO_TARGET, Loss, RowSlopes, RowSums
from auxkern.core.sums import Sum
from auxkern.core.terms import like
from tests.support.cases import IGNORE
from tests.support.heads import D32 as F
from tests.support.heads import B, H, check_rows, close, exact, heads, rows_of, targets
from tests.support.machines import INTERPRETED

pytest.importorskip("triton")

from auxkern.backends.triton.heads import HeadsSum
from auxkern.backends.triton.heads_loss import launches as heads_loss
from auxkern.ops.torch_ops import Gradients

pytestmark = [
    pytest.mark.usefixtures("machine", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN slice) encountered:RuntimeWarning"),
]

HALF = H if INTERPRETED else B  # the interpreter multiplies the bits of bfloat16 matrices
N, V = 9, 131  # a tile and three ids of the next, or two tiles and three
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-3}


def pointer(K: int, y: Tensor, *, dtype: torch.dtype = F, seed: int = 1) -> Sparse:
    """Entries over few ids, so that some are equal; the target, the last id and ids outside among them."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (len(y), K), generator=source)
    ids[:, 1::3] = ids[:, :1] if K > 1 else 0
    for place, chosen in ((0, y.clamp(min=0)), (2, V - 1), (3, -5), (4, V), (5, 2**31)):
        if place < K:
            ids[::2, place] = chosen[::2] if isinstance(chosen, Tensor) else chosen
    return Sparse(ids, torch.randn(len(y), K, generator=source).to(dtype))


def case(name: str, K: int = 7, **settings: Any) -> tuple[list[Head | Sparse], Tensor]:
    """Terms and targets of a sum in ``SUMS``."""
    y = targets(N, V)
    settings = {**SUMS[name], **settings}
    dtypes = settings.pop("dtypes")
    given = heads(N, V, (48, 16)[: len(dtypes)], dtypes, **settings)
    return [*given, pointer(K, y)], y


SUMS: dict[str, dict[str, Any]] = {
    "16 bits + fp32": {"dtypes": (HALF, F), "biases": (0, 1)},
    "16 bits": {"dtypes": (HALF,)},
    "fp32 x 16 bits, capped": {"dtypes": ((F, HALF), F), "softcaps": (3.0, None), "scales": (0.7, -1.0)},
}


@pytest.mark.parametrize("options", [{}, EVERYTHING, {**EVERYTHING, "stats": True}], ids=["", "all", "stats"])
@pytest.mark.parametrize("name", SUMS)
def test_losses_and_gradients(machine, name, options):
    terms, y = case(name)
    sum, loss = Sum.of(terms, V, chunk_rows=4), Loss(**options)
    assert machine.backend.route(sum, loss).name == "tiles"
    check_rows(machine.backend, sum, y, loss, torch.linspace(-1, 2, N))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("K", [0, 1, 40, 133])
def test_any_number_of_entries(machine, K, recompute, monkeypatch):
    monkeypatch.setattr(heads_loss, "one_write", lambda *_: not recompute)
    terms, y = case("16 bits + fp32", K)
    check_rows(machine.backend, Sum.of(terms, V), y, Loss(stats=K != 40), torch.ones(N))


def test_several_terms_of_any_dtype_and_place(machine):
    (head, aux, first), y = case("16 bits + fp32", 5)
    narrow = Sparse(first.ids.clamp(0, 100).to(torch.int8)[:, :3], first.values[:, 2:].half())
    turned = Sparse(first.ids.T.contiguous().T, first.values.T.contiguous().T)
    for terms in ([first, head, narrow, aux], [head, narrow], [turned, head]):
        check_rows(machine.backend, Sum.of(terms, V), y, Loss(stats=True), torch.ones(N))


@pytest.mark.parametrize("lost", [-math.inf, torch.finfo(F).min])
def test_an_id_may_be_taken_away(machine, lost):
    """As in a draw's logit bias: no NaN arises where it stands, nor in its gradient."""
    (head, aux, entries), y = case("16 bits + fp32", 4)
    values = entries.values.clone()
    # No target and no id outside of the vocabulary among them.
    ids = (y.clamp(min=0)[:, None] + torch.tensor([1, 5, 5, 90])) % V
    values[:, 1], values[::2, 3] = lost, lost
    sum = Sum.of([head, aux, Sparse(ids, values)], V)
    rows, gradients = rows_of(machine.backend, sum, y, Loss(), torch.ones(N))
    expected, right, *_ = exact(sum.terms, y, torch.ones(N), reduction="none")
    close(rows.nll, expected, 1e-6)
    for gradient, exact_gradient in zip(gradients, right, strict=True):
        # An infinite value has no gradient in the formula's own way of adding it.
        close(gradient, exact_gradient.nan_to_num(0.0), 3 * 2.0**-8)


@pytest.mark.parametrize("value", [-40.0, 40.0])
def test_a_sure_target_becomes_impossible_and_back(machine, value):
    """Its logit is never taken out of a sum that it dominates."""
    hidden = torch.full((3, 16), 1.0)
    weight = torch.zeros(V, 16)
    weight[77] = 0.5 if value < 0 else -0.5
    y = torch.tensor([77, 77, 5])
    terms = [Head(hidden, weight), Sparse(torch.full((3, 1), 77), torch.full((3, 1), value))]
    rows, gradients = rows_of(machine.backend, Sum.of(terms, V), y, Loss(), torch.ones(3))
    z = 8.0 * math.copysign(1.0, -value) + value
    rest = math.log(V - 1)
    # nll = log(1 + (V - 1) exp(-z)), and its slope is that minus 1, neither by a difference.
    nll, slope = math.log1p(math.exp(rest - z)), -1 / (1 + math.exp(z - rest))
    torch.testing.assert_close(rows.nll[:2].double(), torch.full((2,), nll).double(), rtol=1e-6, atol=0)
    d = gradients[-1][:2, 0].double()
    torch.testing.assert_close(d, torch.full((2,), slope).double(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", ["16 bits + fp32", "fp32 x 16 bits, capped"])
def test_only_the_pointer_wants_a_gradient(machine, name, monkeypatch):
    """Nothing of V columns is written for it."""
    terms, y = case(name)
    buffers = []
    buffer = HeadsSum.buffer
    monkeypatch.setattr(HeadsSum, "buffer", lambda *a: buffers.append(a) or buffer(*a))
    wanted: list[dict[str, Tensor]] = [{} for _ in terms[:-1]] + [{"values": torch.full((N, 7), math.nan)}]
    sum = Sum.of(terms, V, 4)
    machine.backend.losses(sum, y, Loss(), torch.ones(N), wanted)
    *_, right = exact(terms, y, torch.ones(N), reduction="none")[1]
    close(wanted[-1]["values"], right, 2e-6)
    assert buffers == []


def _cut(term: Head | Sparse, size: int) -> Head | Sparse:
    """A term's first ids."""
    if isinstance(term, Sparse):
        return term
    return like(term, weight=term.weight[:size], bias=None if term.bias is None else term.bias[:size])


@pytest.mark.parametrize("only", [False, True])
def test_a_shard_of_the_vocabulary(machine, only):
    """Gradients where all ids' sums are known: those of this shard's entries, 0 at the others'."""
    terms, y = case("16 bits + fp32")
    _, right, z, _ = exact(terms, y, torch.ones(N), reduction="none")
    counts, size = y != IGNORE, 100
    top, chosen = z.amax(-1), z.gather(1, y.clamp(min=0)[:, None])[:, 0]
    log_sum = (z - top[:, None]).logsumexp(-1)
    sums = RowSums(*(x.float() for x in (top + log_sum - chosen, top, log_sum)))
    slopes = RowSlopes(torch.ones(N), sums, counts, Loss(), V)
    sum = Sum.of([_cut(term, size) for term in terms], size)
    values = len(sum.tensors) - 1
    result = Gradients(sum, sum.tensors, [values] if only else [0, values], float32=True)
    machine.backend.gradients(sum, torch.where(y < size, y, NO_TARGET), slopes, result.wanted)
    inside = (terms[-1].ids >= 0) & (terms[-1].ids < size)
    close(result.flat[values], torch.where(inside, right[-1], 0.0), 2e-6)


@pytest.mark.nan
def test_bad_rows_spoil_nothing_but_themselves(machine):
    terms, y = case("16 bits + fp32")
    terms[1].hidden[[2, 4]] = math.nan
    y[[2, 4]] = torch.tensor([5, 7])
    weight = torch.where(torch.arange(N) == 4, 0.0, 1.0)  # as good as ignored
    rows, gradients = rows_of(machine.backend, Sum.of(terms, V), y, Loss(), weight)
    assert rows.nll.isnan().tolist() == [n in (2, 4) for n in range(N)]
    inside = (terms[-1].ids >= 0) & (terms[-1].ids < V)
    bad = (torch.arange(N) == 2)[:, None] & inside & (terms[-1].ids != 5)
    assert torch.equal(gradients[-1].isnan() & (terms[-1].ids != 5), bad)
    assert bool((gradients[-1][4] == 0).all())


def test_runs_are_bitwise_equal(machine):
    terms, y = case("16 bits + fp32", 40)
    first, again = (rows_of(machine.backend, Sum.of(terms, V), y, Loss(), torch.ones(N)) for _ in range(2))
    assert torch.equal(first[0].nll, again[0].nll)
    assert all(map(torch.equal, first[1], again[1]))
