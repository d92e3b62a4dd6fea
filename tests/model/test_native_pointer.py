"""One more token of each text as one native call: torch's numbers, and only where nothing is trained."""

import copy

import pytest
import torch

from auxkern.core.coverage import Coverage
from auxkern.model import use_native_kernels
from auxkern.model.interface import AuxiliaryInputs
from auxkern.model.native import native_refusal
from auxkern.model.native.packed_layers import cpu_backend
from auxkern.model.pointer import Pointer

pytestmark = pytest.mark.skipif(native_refusal() is not None, reason=str(native_refusal()))

D = 37


def _pointers():
    """A pointer as it is and with native kernels."""
    torch.manual_seed(0)
    pointer = Pointer(D, 4)
    return pointer, use_native_kernels(copy.deepcopy(pointer))


def _inputs(ids, mask, condition, condition_mask):
    nothing = torch.zeros(0)
    return AuxiliaryInputs(ids, mask, condition, condition_mask, nothing, nothing)


def _random_inputs(B, T, K, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(most, *shape):
        return torch.randint(most, shape, generator=generator)

    # Of three tokens, so that stretches overlap; padding anywhere, a mask's numbers being more than 0 and 1.
    ids, mask = draw(3, B, T), draw(6, B, T)
    lengths = draw(K + 1, B, 1)
    holes = draw(20, B, K) > 0
    return _inputs(ids, mask, draw(3, B, K), ((torch.arange(K) < lengths) & holes).long())


def _step(inputs, t):
    ids, mask = inputs.input_ids[:, t : t + 1], inputs.attention_mask[:, : t + 1]
    return _inputs(ids, mask, inputs.condition_ids, inputs.condition_mask)


def _called(pointer, inputs, past=None):
    """The coverage, and whether it is the native kernel's."""
    with cpu_backend().timed_calls() as seconds:
        coverage = pointer.coverage(inputs, past)
    return coverage, "auxkern_coverage_step" in seconds


def _assert_same(found, expected):
    for name, one, other in zip(Coverage._fields, found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        # Bits, as 0 and -0 are equal.
        bits = [x.view(torch.int32) if x.is_floating_point() else x for x in (one, other)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize(("B", "K"), [(60, 1), (60, 2), (60, 5), (9, 64), (1, 8), (4, 0), (0, 3), (0, 0)])
def test_texts_token_by_token_are_covered_as_torch_does_it(B, K):
    plain, native = _pointers()
    inputs, past, written = _random_inputs(B, 24, K, seed=B + K), None, 0
    with torch.no_grad():
        for t in range(24):
            step = _step(inputs, t)
            expected, by_torch = _called(plain, step, past)
            found, by_kernel = _called(native, step, past)
            assert (by_torch, by_kernel) == (False, True)
            _assert_same(found, expected)
            past, written = found.stretches, written + int(found.written.sum())
    assert (written > 0) == (B > 1 and 0 < K < 64)


def test_texts_are_read_with_the_strides_that_they_have():
    plain, native = _pointers()
    wide = _random_inputs(12, 6, 8, seed=3)
    every = slice(None, None, 2)
    turned = [x.t().contiguous().t() for x in (wide.condition_ids, wide.condition_mask)]
    past = torch.randint(4, (12, 4, 4))[every, :, ::2]
    inputs = _inputs(
        wide.input_ids[every, 3:4], wide.attention_mask[every, ::3], *(x[every, ::2] for x in turned)
    )
    with torch.inference_mode():
        found, by_kernel = _called(native, inputs, past)
        _assert_same(found, plain.coverage(inputs, past))
    assert by_kernel


def test_marks_follow_weights_that_change():
    plain, native = _pointers()
    inputs = _random_inputs(5, 1, 2, seed=1)
    with torch.no_grad():
        for pointer in (plain, native):
            pointer.mark_lacking.fill_(3.0)
        _assert_same(native.coverage(inputs, None), plain.coverage(inputs, None))


def test_torch_makes_the_coverage_where_a_kernel_would_leave_something_out():
    _, native = _pointers()
    inputs = _random_inputs(5, 1, 2, seed=2)
    more = _random_inputs(5, 2, 2, seed=2)
    text, condition = (
        (inputs.input_ids, inputs.attention_mask),
        (inputs.condition_ids, inputs.condition_mask),
    )
    narrow = _inputs(*(x.int() for x in (*text, *condition)))
    one_condition = _inputs(*text, *(x[:1] for x in condition))
    coverage, by_kernel = _called(native, inputs)
    assert not by_kernel
    coverage.marks.sum().backward()
    assert native.mark_lacking.grad is not None
    with torch.no_grad():
        assert _called(native, inputs)[1]
        for other in (more, narrow, one_condition):
            coverage, by_kernel = _called(native, other)
            assert not by_kernel
            assert coverage.share.shape[0] == 5
        with torch.autocast("cpu"):
            assert not _called(native, inputs)[1]
        assert not _called(copy.deepcopy(native).double(), inputs)[1]
        mapped = torch.func.vmap(lambda ids: native.coverage(_inputs(ids, text[1], *condition), None).share)
        assert torch.equal(mapped(text[0][None])[0], native.coverage(inputs, None).share)


def _trained(B, K, *, reads_lm=True):
    """A native pointer with weights, the inputs of a step, and its hidden states."""
    torch.manual_seed(B + K)
    pointer = Pointer(D, 20, reads_lm=reads_lm)
    for parameter in pointer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = _random_inputs(B, 1, K, seed=7)
    inputs.lm_scores = 10 + 4 * torch.randn(B, 1, K) if reads_lm else None
    inputs.cache = "of the tokens before"
    return use_native_kernels(pointer), inputs, torch.randn(B, 1, D), torch.randn(B, K, D)


def _pointed(pointer, inputs, hidden, keys):
    """What it adds, and whether the native kernel made it."""
    coverage = pointer.coverage(inputs, None)
    with cpu_backend().timed_calls() as seconds:
        return pointer(hidden, keys, inputs, coverage), "auxkern_pointer_step" in seconds


@pytest.mark.parametrize("reads_lm", [True, False])
@pytest.mark.parametrize(("B", "K"), [(7, 5), (1, 1), (64, 8), (3, 0), (0, 2)])
def test_scores_of_one_token_are_their_formula(poisoned_memory, B, K, reads_lm):
    pointer, inputs, hidden, memory = _trained(B, K, reads_lm=reads_lm)
    exact = copy.deepcopy(pointer).double()
    with torch.no_grad():
        found, by_kernel = _pointed(pointer, inputs, hidden, pointer.keys(memory))
        inputs.cache = None
        by_torch, _ = _pointed(pointer, inputs, hidden, pointer.keys(memory))
        doubles = copy.copy(inputs)
        doubles.lm_scores = None if inputs.lm_scores is None else inputs.lm_scores.double()
        expected, _ = _pointed(exact, doubles, hidden.double(), exact.keys(memory.double()))
    assert by_kernel
    assert torch.equal(found.hidden, by_torch.hidden)
    for one, theirs, of in zip(found[1:], by_torch[1:], expected[1:], strict=True):
        assert (one.dtype, one.shape) == (theirs.dtype, theirs.shape)
        # As exact as torch's float32, or a few units of the last place where that is lucky.
        allowed = (theirs - of).abs().sum() + 8 * 2**-24 * of.abs().sum()
        assert (one - of).abs().sum() <= allowed


def test_scores_of_a_text_are_the_same_in_any_batch_and_with_any_strides():
    pointer, inputs, hidden, memory = _trained(9, 6)
    with torch.no_grad():
        keys = pointer.keys(memory)
        wide = torch.full((9, 8, 2 * keys.shape[2]), torch.nan)
        wide[:, 1:7, ::2] = keys
        together, by_kernel = _pointed(pointer, inputs, hidden, keys)
        for view in (wide[:, 1:7, ::2], keys.transpose(0, 1).contiguous().transpose(0, 1)):
            strided, _ = _pointed(pointer, inputs, hidden, view)
            assert all(map(torch.equal, strided, together))
        assert by_kernel
        for b in range(9):
            one = slice(b, b + 1)
            part = _inputs(
                *(
                    getattr(inputs, name)[one]
                    for name in ("input_ids", "attention_mask", "condition_ids", "condition_mask")
                )
            )
            part.lm_scores, part.cache = inputs.lm_scores[one], inputs.cache
            alone, _ = _pointed(pointer, part, hidden[one], keys[one])
            assert all(torch.equal(x, y[one]) for x, y in zip(alone, together, strict=True))


def test_torch_makes_scores_of_a_first_call_and_where_they_are_differentiated():
    pointer, inputs, hidden, memory = _trained(5, 3)
    keys = pointer.keys(memory)
    pointed, by_kernel = _pointed(pointer, inputs, hidden, keys)
    assert not by_kernel
    pointed.scores.sum().backward()
    assert pointer.query.weight.grad is not None
    with torch.no_grad():
        assert _pointed(pointer, inputs, hidden, keys.detach())[1]
        assert not _pointed(pointer, inputs, hidden, keys[:1].detach())[1]
        inputs.lm_scores = inputs.lm_scores.double()
        assert not _pointed(pointer, inputs, hidden, keys.detach())[1]
        inputs.lm_scores, inputs.cache = inputs.lm_scores.float(), None
        assert not _pointed(pointer, inputs, hidden, keys.detach())[1]
