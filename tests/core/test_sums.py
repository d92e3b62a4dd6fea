"""A sum of terms as one value: its rows, its parts, and the plain values that torch's operators take."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from auxkern import Head, Logits, Sparse
from auxkern.core.sums import Layout, Rows, Sum, layout_of, row_dtype, tensors_of
from tests.support.cases import generator

B, T, V, D, K = 3, 4, 11, 5, 2
N = B * T


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def every_kind(dtype: torch.dtype = torch.float32) -> list[Logits | Head | Sparse]:
    """One term of each kind and two heads, of (B, T) rows; of the logits no two dimensions are enough."""
    return [
        Logits(normal(B, T + 2, V, seed=1, dtype=dtype)[:, 1:-1], 0.5, 3.0),
        Head(normal(B, T, D, seed=2), normal(V, D, seed=3), scale=-2.0),
        Head(normal(T, B, D, seed=4).transpose(0, 1), normal(V + 3, D, seed=5), normal(V + 3, seed=6)),
        Sparse(torch.arange(N * K).view(B, T, K) % V, normal(B, T, K, seed=7)),
    ]


def dense(terms: Sequence[Logits | Head | Sparse], rows: int) -> Tensor:
    """(rows, V) float64 by the formula."""
    z = torch.zeros(rows, V, dtype=torch.float64)
    for term in terms:
        if isinstance(term, Sparse):
            z = z.scatter_add(1, term.ids.flatten(0, -2), term.values.double().flatten(0, -2))
            continue
        if isinstance(term, Logits):
            x = term.values.double()[..., :V]
        else:
            bias = 0.0 if term.bias is None else term.bias.double()
            x = (term.hidden.double() @ term.weight.double().T + bias)[..., :V]
        scale = term.scale.reshape(rows, 1).double() if isinstance(term.scale, Tensor) else term.scale
        x = x.reshape(rows, V)
        z = z + scale * (x if term.softcap is None else term.softcap * torch.tanh(x / term.softcap))
    return z


def assert_close(z: Tensor, expected: Tensor) -> None:
    """But for the order of float64 products."""
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)


def assert_same_terms(
    ones: Sequence[Logits | Head | Sparse], others: Sequence[Logits | Head | Sparse]
) -> None:
    """Equal to the bit."""
    for one, other in zip(ones, others, strict=True):
        assert type(one) is type(other)
        assert getattr(one, "scale", None) == getattr(other, "scale", None)
        assert getattr(one, "softcap", None) == getattr(other, "softcap", None)
        assert one.tensors.keys() == other.tensors.keys()
        assert all(map(torch.equal, one.tensors.values(), other.tensors.values()))


def test_a_sum_has_the_terms_as_rows():
    terms = every_kind()
    made = Sum.of(terms, V)
    assert (made.N, made.V, made.dtype, made.device.type) == (N, V, torch.float32, "cpu")
    assert [tuple(t.shape) for t in made.tensors] == [
        *[(B, T, V), (N, D), (V, D), (N, D), (V + 3, D), (V + 3,)],
        *[(N, K), (N, K)],
    ]
    assert made.terms[0].values.data_ptr() == terms[0].values.data_ptr()  # read where they lie
    assert_close(dense(made.terms, N), dense(terms, N))
    assert (made.logits, made.heads, made.sparse) == (
        [made.terms[0]],
        list(made.terms[1:3]),
        [made.terms[3]],
    )
    assert not made.is_logits
    assert Sum.of(terms[:1], V).is_logits


def test_scales_of_rows_get_the_dtype_of_the_sum():
    scale = torch.linspace(-1, 2, N, dtype=torch.float64).view(B, T)
    terms = [Logits(normal(B, T, V, seed=1, dtype=torch.float16), scale)]
    for beside, dtype in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        given = [*terms, Head(normal(B, T, D, seed=2, dtype=beside), normal(V, D, seed=3, dtype=beside))]
        made = Sum.of(given, V)
        assert made.dtype == row_dtype(tensors_of(given)) == dtype
        assert torch.equal(made.terms[0].scale, scale.flatten().to(dtype))


def test_logits_that_are_no_rows_without_a_copy_are_refused_by_their_place():
    values = normal(2, 3, 4, V, seed=1).transpose(0, 2)
    with pytest.raises(ValueError, match=r"terms\[1\]\.values of shape .* pass values\.contiguous\(\)"):
        Sum.of([Logits(values.contiguous()), Logits(values)], V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [slice(0, N), slice(2, 7), slice(5, 5), torch.tensor([9, 0, 4])], ids=str)
def test_some_rows_of_a_sum(rows: Rows, dtype: torch.dtype):
    scale = torch.linspace(-1, 2, N).view(B, T)
    terms = [*every_kind(dtype), Head(normal(B, T, D, seed=8), normal(V, D, seed=9), None, scale)]
    whole = Sum.of(terms, V)
    some = whole.rows(rows)
    expected = dense(terms, N)[rows]
    assert len(expected) == some.N
    assert_close(dense(some.terms, len(expected)), expected)
    assert some.chunk_rows == whole.chunk_rows
    for a, b in zip(some.rows(slice(0, 1)).terms, whole.rows(rows).rows(slice(0, 1)).terms, strict=True):
        assert all(map(torch.equal, a.tensors.values(), b.tensors.values()))


def test_each_term_alone():
    terms = every_kind()
    alone = list(Sum.of(terms, V).alone())
    assert [one.V for one in alone] == [V] * len(terms)
    for one, term in zip(alone, terms, strict=True):
        assert one.dtype == torch.float32
        assert_close(dense(one.terms, N), dense([term], N))


def test_each_term_alone_is_float64_where_the_sum_is():
    terms = every_kind(torch.float64)
    for one, term in zip(Sum.of(terms, V).alone(), terms, strict=True):
        assert one.dtype == torch.float64
        assert all(t.dtype == torch.float64 for t in one.tensors if t.is_floating_point())
        assert_close(dense(one.terms, N), dense([term], N))


def test_entries_of_sparse_terms_lie_side_by_side():
    first = Sparse(torch.arange(N * K, dtype=torch.int32).view(B, T, K) % V, normal(B, T, K, seed=1).half())
    second = Sparse(torch.full((B, T, 1), V - 1), normal(B, T, 1, seed=2))
    ids, values = Sum.of([first, *every_kind()[:3], second], V).entries()
    assert (ids.dtype, values.dtype) == (torch.int64, torch.float32)
    assert torch.equal(ids, torch.cat([first.ids, second.ids], 2).long().view(N, K + 1))
    assert torch.equal(values, torch.cat([first.values.float(), second.values], 2).view(N, K + 1))


def test_without_sparse_terms_there_are_no_entries():
    ids, values = Sum.of(every_kind(torch.float64)[:3], V).entries()
    assert (ids.shape, ids.dtype) == ((N, 0), torch.int64)
    assert (values.shape, values.dtype) == ((N, 0), torch.float64)


def test_places_name_every_tensor():
    made = Sum.of(every_kind(), V)
    named = list(made.places())
    assert named == [
        (0, "values"),
        *[(1, "hidden"), (1, "weight")],
        *[(2, "hidden"), (2, "weight"), (2, "bias")],
        *[(3, "ids"), (3, "values")],
    ]
    assert all(
        made.terms[index].tensors[name] is x for (index, name), x in zip(named, made.tensors, strict=True)
    )


def test_a_layout_and_the_tensors_are_the_sum_again():
    terms = every_kind()
    layout, tensors = layout_of(terms), tensors_of(terms)
    assert layout.scales == (0.5, -2.0, 1.0, 1.0)
    assert layout.softcaps == (3.0, 0.0, 0.0, 0.0)
    again = layout.sum(tensors, V, chunk_rows=7)
    assert (again.V, again.chunk_rows) == (V, 7)
    assert_same_terms(again.terms, Sum.of(terms, V).terms)
    # Terms that are rows already have the same layout, which makes them again.
    assert layout_of(again.terms) == layout
    assert_same_terms(layout.sum(again.tensors, V).terms, again.terms)


def test_a_layout_is_plain_values():
    """What an operator takes: it can be compared, hashed and taken apart."""
    layout = layout_of(every_kind())
    assert layout == Layout(*map(tuple, map(list, layout)))
    assert hash(layout) == hash(layout_of(every_kind(torch.float16)))
    assert all(type(x) in (int, float) for field in layout for x in field)


def test_the_vocabulary_is_that_of_the_first_term_that_has_all_ids():
    logits, head, biased, sparse = every_kind()
    for terms, ids in (
        ([logits, biased], V),
        ([biased, logits], V + 3),
        ([sparse, head, biased], V),
        ([sparse, sparse, biased], V + 3),
    ):
        assert Layout.vocabulary(tensors_of(terms), layout_of(terms).kinds) == ids
    with pytest.raises(ValueError, match="terms are all Sparse"):
        Layout.vocabulary(tensors_of([sparse]), layout_of([sparse]).kinds)
