"""NumPy's numbers where Python's go, and what 0 means as a scale and as a normalizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Logits
from auxkern.ops.dense import dense_logits
from tests.support.cases import available_backends, device_of, generator

N, V, D = 3, 5, 4
backends = pytest.mark.parametrize("backend", available_backends())
Y = torch.tensor([0, 2, 1])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


OPTIONS: dict[str, tuple[Any, Any]] = {
    "label_smoothing": (np.float32(0.25), 0.25),
    "z_loss": (np.array(0.5), 0.5),
    "ignore_index": (np.int64(2), 2),
    "chunk_rows": (np.array(2), 2),
    "normalizer": (np.float16(4), 4),
    "vocab_size": (np.int32(4), 4),
    "shift": (np.bool_(True), True),
}


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(("name", "given"), OPTIONS.items(), ids=OPTIONS)
def test_options_take_numpys_numbers(name, given, heads):
    terms = Head(normal(N, D), normal(V, D, seed=1)) if heads else normal(N, V)
    numpys, pythons = (auxkern.cross_entropy(terms, Y, **{name: value}) for value in given)
    assert torch.equal(numpys, pythons)
    if name != "normalizer":
        module = auxkern.nn.CrossEntropyLoss(**{name: given[0]})
        assert torch.equal(module(terms, Y), pythons)


@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.float64(0.5), np.array(0.5)], ids=lambda x: type(x).__name__
)
def test_terms_take_numpys_numbers(number):
    for made in (
        Logits(normal(N, V), number, number),
        Head(normal(N, D), normal(V, D), None, number, number),
    ):
        assert (type(made.scale), made.scale, type(made.softcap), made.softcap) == (float, 0.5, float, 0.5)
    assert Logits(normal(N, V), np.int64(2)).scale == 2.0


def test_a_vocabulary_is_numpys_number():
    assert dense_logits(normal(N, V), vocab_size=np.int64(4)).shape == (N, 4)
    drawn = auxkern.sample(normal(N, V), seed=torch.arange(N), position=0, vocab_size=np.array(4))
    assert bool((drawn.tokens < 4).all())


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "chunk_rows", "normalizer", "vocab_size"])
@pytest.mark.parametrize("wrong", [np.array([1.0]), np.complex64(1), np.bool_(True), np.str_("1")], ids=repr)
def test_what_is_no_number_stays_an_error(name, wrong):
    with pytest.raises(TypeError, match=f"{name} must be"):
        auxkern.cross_entropy(normal(N, V), Y, **{name: wrong})


# --- zeros ----------------------------------------------------------------------------------------


def masked() -> Tensor:
    """-inf once in the first row, and everywhere in the second."""
    z = normal(N, V, seed=2)
    z[0, 3] = z[1] = -torch.inf
    return z


@backends
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("kind", ["logits", "bias", "weight"])
def test_zero_times_an_infinite_logit_is_nan(kind, stats, backend):
    """As in torch, in the rows that have one; a capped logit is finite."""
    device = device_of(backend)
    bias, weight = torch.zeros(V), normal(V, D, seed=3)
    bias[3] = -torch.inf
    weight[3] = torch.inf
    scaled, rows = {
        "logits": (Logits(masked().to(device), 0.0), [True, True, False]),
        "bias": (
            Head(normal(N, D).to(device), weight[[0, 1, 2, 4, 0]].to(device), bias.to(device), 0.0),
            [True] * 3,
        ),
        "weight": (Head(normal(N, D).to(device), weight.to(device), None, 0.0), [True] * 3),
    }[kind]
    terms = [normal(N, V, seed=4).to(device), scaled]
    loss = auxkern.cross_entropy(terms, Y.to(device), reduction="none", return_stats=stats, backend=backend)
    assert (loss[0] if stats else loss).isnan().tolist() == rows
    drawn = auxkern.sample(terms, seed=torch.arange(N, device=device), position=0, backend=backend)
    assert (drawn.status == 1).tolist() == rows


@backends
def test_a_capped_term_of_scale_zero_takes_no_part(backend):
    device = device_of(backend)
    terms = [normal(N, V, seed=4).to(device), Logits(masked().to(device), 0.0, softcap=3.0)]
    alone, both = (auxkern.cross_entropy(t, Y.to(device), backend=backend) for t in (terms[:1], terms))
    torch.testing.assert_close(both, alone, rtol=1e-6, atol=1e-6)


@backends
@pytest.mark.parametrize(
    "zero", [torch.tensor(0.0), torch.tensor(0), torch.tensor(0, dtype=torch.int32)], ids=str
)
def test_a_normalizer_tensor_of_zero_divides(zero, backend):
    x = normal(N, V).to(device_of(backend)).requires_grad_()
    y = Y.to(x.device)
    loss = auxkern.cross_entropy(x, y, normalizer=zero, backend=backend)
    assert loss.isinf()
    nothing = auxkern.cross_entropy(x, torch.full_like(y, -100), normalizer=zero, backend=backend)
    assert nothing == 0
    nothing.backward()
    assert bool((x.grad == 0).all())


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0)], ids=repr)
def test_a_normalizer_number_of_zero_is_an_error(zero):
    with pytest.raises(ValueError, match=r"normalizer is 0(\.0)?; it must be positive and finite"):
        auxkern.cross_entropy(normal(N, V), Y, normalizer=zero)
