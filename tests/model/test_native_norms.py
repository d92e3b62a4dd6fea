"""The norm behind a model's layers as a native call: torch's numbers, and none where it is trained."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from auxkern.model.native import native_refusal, use_native_kernels
from auxkern.model.native.norms import NativeNorm
from auxkern.model.native.packed_layers import cpu_backend
from tests.model.test_native_layers import FAMILIES, model_of

pytestmark = pytest.mark.skipif(native_refusal() is not None, reason=str(native_refusal()))


def last_norm(family):
    model = use_native_kernels(model_of(FAMILIES[family])).base_model
    return next(getattr(model, name) for name in ("norm", "final_layernorm", "ln_f") if hasattr(model, name))


def called(norm, x):
    """What it makes, and whether the native kernel made it."""
    with cpu_backend().timed_calls() as seconds:
        return norm(x), "auxkern_norm_forward" in seconds


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi", "olmo2", "gemma3"])
def test_it_is_exchanged_and_makes_what_it_made(family):
    norm = last_norm(family)
    assert isinstance(norm, NativeNorm)
    own = type(norm).__bases__[1]
    width = norm.weight.shape[0]
    with torch.no_grad():
        norm.weight.add_(0.1 * torch.randn(width))
        x = 3 * torch.randn(2, 5, width)
        y, by_kernel = called(norm, x)
        expected = own.forward(norm, x)
    assert by_kernel
    # Both round a few operations of float32.
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)


def test_olmo_has_a_norm_without_weight_which_stays():
    assert not isinstance(last_norm("olmo"), NativeNorm)


def test_weights_that_change_are_read_anew_and_copies_are_their_own():
    norm = last_norm("llama")
    x = torch.randn(3, norm.weight.shape[0])
    with torch.no_grad():
        before, _ = called(norm, x)
        for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            other.weight.mul_(2)
            doubled, by_kernel = called(other, x)
            assert by_kernel
            assert torch.equal(doubled, 2 * before)
        assert torch.equal(called(norm, x)[0], before)


def test_torch_makes_it_where_something_is_trained_or_wanted_otherwise():
    norm = last_norm("llama").requires_grad_()
    x = torch.randn(3, norm.weight.shape[0])
    y, by_kernel = called(norm, x)
    assert not by_kernel
    y.sum().backward()
    assert norm.weight.grad is not None
    with torch.no_grad():
        assert called(norm, x)[1]
        assert called(norm, x[:, ::1].T.contiguous().T)[1]
        assert not called(norm, x.double())[1]
        with torch.autocast("cpu"):
            assert not called(norm, x)[1]
        norm.requires_grad_(False)
    assert called(norm, x)[1]
    assert not called(norm, x.clone().requires_grad_())[1]
