"""What tells a call from one that looks like it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from auxkern import Head, Logits, Sparse
from auxkern.core.repeats import are_plain, facts_of, is_eager

z, hidden, weight, bias = torch.zeros(2, 7), torch.zeros(2, 3), torch.zeros(7, 3), torch.zeros(7)
ids, values = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4)
SUMS = {
    "a tensor": [z],
    "logits, scaled": [Logits(z, 0.5)],
    "logits, scaled by row": [Logits(z, torch.ones(2))],
    "logits, capped": [Logits(z, softcap=5.0)],
    "a head": [Head(hidden, weight)],
    "a head, scaled": [Head(hidden, weight, scale=0.5)],
    "a head with a bias": [Head(hidden, weight, bias)],
    "logits and a pointer": [z, Sparse(ids, values)],
    "two tensors": [z, z],
    "four tensors": [z, z, z, z],
}


def test_sums_of_other_terms_have_other_facts():
    stated = [facts_of(terms) for terms in SUMS.values()]
    assert len({one.facts for one in stated}) == len(SUMS)


def test_sums_of_other_tensors_have_the_same_facts():
    one, other = facts_of([Head(hidden, weight), z]), facts_of([Head(hidden + 1, weight + 1), z + 1])
    assert one.facts == other.facts


def test_every_tensor_is_stated_in_order():
    scale = torch.ones(2)
    stated = facts_of([Head(hidden, weight, bias, scale), Sparse(ids, values), z])
    assert [x.data_ptr() for x in stated.tensors] == [
        x.data_ptr() for x in (hidden, weight, bias, ids, values, z)
    ]
    assert stated.scales[0] is scale


@pytest.mark.parametrize("terms", ["z", 5, [], [z, None], [[z]]], ids=str)
def test_of_no_terms_nothing_is_stated(terms):
    assert facts_of(terms) is None


class Named(Tensor):
    pass


NOT_PLAIN = {
    "a negation that is to be done": lambda: torch._neg_view(z),
    "a subclass": lambda: z.as_subclass(Named),
    "no memory of the device": lambda: z.to("meta"),
    "no strides": lambda: z.to_sparse(),
    "a number": lambda: 3,
}


@pytest.mark.parametrize("other", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_a_kernel_could_not_read_is_not_plain(other):
    assert are_plain([z, torch.nn.Parameter(z)])
    assert not are_plain([z, other()])


def test_a_call_that_is_followed_is_not_eager():
    assert is_eager()
    with TorchDispatchMode():
        assert not is_eager()
    with forward_ad.dual_level():
        assert not is_eager()
    with torch.profiler.profile():
        assert not is_eager()
    seen = []
    torch.func.grad(lambda x: seen.append(is_eager()) or x.sum())(z)
    torch.compile(lambda x: seen.append(is_eager()) or x, backend="eager")(z)
    assert seen == [False, False]
