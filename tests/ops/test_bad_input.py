"""Every refusal names the argument, the values that disagree and the remedy; nothing is written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import auxkern
from tests.support.cases import available_backends, device_of, random_logits, random_target

Z = random_logits(4, 7)
Y = random_target(4, V=7)
META = torch.empty(4, 7, device="meta")


def call(terms: Any = None, target: Any = None, **options: Any) -> Any:
    return auxkern.cross_entropy([Z] if terms is None else terms, Y if target is None else target, **options)


def refusals() -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    """Name of the case, the call, the exception, and what its text must hold in this order."""
    weight = torch.ones(4)
    learnt = torch.tensor(0.5, requires_grad=True)
    return {
        # terms
        "no terms": (lambda: call([]), ValueError, "terms has 0 entries.*1 to 8"),
        "nine terms": (lambda: call([Z] * 9), ValueError, "terms has 9 entries.*1 to 8"),
        "terms is a number": (lambda: call(3.0), TypeError, "terms must be a sequence.*Logits.*got float"),
        "terms is text": (lambda: call("z"), TypeError, "terms must be a sequence.*got str"),
        "terms is an iterator": (
            lambda: call(iter([Z])),
            TypeError,
            "terms must be a sequence.*got list_iterator",
        ),
        "a term is a list": (lambda: call([Z, [1.0]]), TypeError, r"terms\[1\] is a list.*auxkern\.Logits"),
        "a term is None": (lambda: call([None, Z]), TypeError, r"terms\[0\] is a NoneType.*auxkern\.Logits"),
        "values is a list": (
            lambda: auxkern.Logits([1.0]),
            TypeError,
            "Logits.values must be a torch.Tensor, got list",
        ),
        "integer logits": (lambda: call([Y[:, None]]), TypeError, "values has dtype torch.int64.*float32"),
        "complex logits": (
            lambda: call([Z.to(torch.complex64)]),
            TypeError,
            "values has dtype torch.complex64.*float32",
        ),
        "0-d logits": (lambda: call([torch.tensor(1.0)]), ValueError, r"no dimensions.*\(\.\.\., V\)"),
        "sparse logits": (lambda: call([Z.to_sparse()]), TypeError, "values.*sparse.*to_dense"),
        "no vocabulary": (lambda: call([Z[:, :0]]), ValueError, "vocabulary has 0 ids.*at least 1"),
        # scale and softcap
        "scale is learnt": (
            lambda: auxkern.Logits(Z, scale=learnt),
            TypeError,
            "scale is a tensor that requires grad.*float.*multiply",
        ),
        "scale is a tensor": (
            lambda: auxkern.Logits(Z, scale=torch.tensor(0.5)),
            ValueError,
            "scale is a tensor.*float",
        ),
        "a scale for each row": (
            lambda: call([auxkern.Logits(Z, scale=torch.ones(Z.shape[:-1]))]),
            TypeError,
            r"terms\[0\].scale is a tensor.*float.*auxkern.sample",
        ),
        "scale is text": (lambda: auxkern.Logits(Z, scale="1"), TypeError, "scale must be a number, got str"),
        "scale is a bool": (
            lambda: auxkern.Logits(Z, scale=True),
            TypeError,
            "scale must be a number, got bool",
        ),
        "scale is None": (
            lambda: auxkern.Logits(Z, scale=None),
            TypeError,
            "scale must be a number, got NoneType",
        ),
        "scale is NaN": (lambda: auxkern.Logits(Z, scale=math.nan), ValueError, "scale is nan.*finite"),
        "scale is infinite": (lambda: auxkern.Logits(Z, scale=math.inf), ValueError, "scale is inf.*finite"),
        "softcap is zero": (
            lambda: auxkern.Logits(Z, softcap=0.0),
            ValueError,
            "softcap is 0.0.*positive.*None",
        ),
        "softcap is negative": (
            lambda: auxkern.Logits(Z, softcap=-1),
            ValueError,
            "softcap is -1.0.*positive.*None",
        ),
        "softcap is NaN": (lambda: auxkern.Logits(Z, softcap=math.nan), ValueError, "softcap is nan.*finite"),
        "softcap is a tensor": (
            lambda: auxkern.Logits(Z, softcap=learnt),
            TypeError,
            "softcap is a tensor.*float",
        ),
        "scale beyond float32": (
            lambda: auxkern.Logits(Z, scale=-1e39),
            ValueError,
            "scale is -1e.39.*finite in float32",
        ),
        "softcap beyond float32": (
            lambda: auxkern.Logits(Z, softcap=1e300),
            ValueError,
            "softcap is 1e.300.*finite in float32",
        ),
        "softcap below float32": (
            lambda: auxkern.Logits(Z, softcap=1e-40),
            ValueError,
            "softcap is 1e-40.*no cap",
        ),
        # target
        "target is a list": (
            lambda: call(target=[1, 2, 3, 4]),
            TypeError,
            "target must be a torch.Tensor of ids, got list",
        ),
        "target of floats": (
            lambda: call(target=Y.float()),
            TypeError,
            "target has dtype torch.float32.*torch.int64",
        ),
        "target of bools": (
            lambda: call(target=Y > 3),
            TypeError,
            "target has dtype torch.bool.*torch.int64",
        ),
        "target too short": (
            lambda: call(target=Y[:3]),
            ValueError,
            r"terms\[0\].*\(4, 7\).*\(4,\).*\(3,\).*reshape",
        ),
        "target of another rank": (
            lambda: call(target=Y[:, None]),
            ValueError,
            r"\(4, 7\).*\(4,\).*\(4, 1\).*reshape",
        ),
        "target too large": (
            lambda: call(target=Y + 7),
            ValueError,
            r"target\[0\].*is 7.*outside \[0, 7\).*ignore_index=-100",
        ),
        "target negative": (
            lambda: call(target=Y - 50),
            ValueError,
            r"target\[0\].*outside \[0, 7\).*ignore_index",
        ),
        "target beyond vocab_size": (
            lambda: call(target=torch.tensor([0, 1, 5, 2]), vocab_size=5),
            ValueError,
            r"target\[2\].*is 5.*outside \[0, 5\).*ignore_index",
        ),
        "-100 with another ignore_index": (
            lambda: call(target=torch.tensor([0, -100, 5, 2]), ignore_index=-1),
            ValueError,
            r"target\[1\].*is -100.*outside \[0, 7\).*ignore_index=-1",
        ),
        # terms that disagree
        "other leading shape": (
            lambda: call([Z, Z[:3]]),
            ValueError,
            r"terms\[1\].*\(3, 7\).*\(3,\).*\(4,\).*reshape",
        ),
        "other vocabulary": (
            lambda: call([Z, Z[:, :5]]),
            ValueError,
            r"terms\[1\].*5 ids.*terms\[0\].*7.*vocab_size=5",
        ),
        "vocab_size too large": (
            lambda: call([Z, Z[:, :5]], vocab_size=6),
            ValueError,
            r"vocab_size is 6.*terms\[1\].*5 ids.*vocab_size=5",
        ),
        "vocab_size zero": (lambda: call(vocab_size=0), ValueError, "0 ids.*at least 1"),
        "vocab_size negative": (lambda: call(vocab_size=-3), ValueError, "-3 ids.*at least 1"),
        "vocab_size a float": (
            lambda: call(vocab_size=5.0),
            TypeError,
            "vocab_size must be an int, got float",
        ),
        "vocab_size a bool": (
            lambda: call(vocab_size=True),
            TypeError,
            "vocab_size must be an int, got bool",
        ),
        # devices
        "terms on two devices": (
            lambda: call([Z, META]),
            ValueError,
            r"terms\[1\].*meta.*terms\[0\].*cpu.*one device",
        ),
        "target elsewhere": (lambda: call(target=Y.to("meta")), ValueError, "target is on meta.*cpu.*move"),
        "weight elsewhere": (
            lambda: call(token_weight=weight.to("meta")),
            ValueError,
            "token_weight is on meta.*cpu.*move",
        ),
        "normalizer elsewhere": (
            lambda: call(normalizer=torch.tensor(3.0, device="meta")),
            ValueError,
            "normalizer is on meta.*cpu",
        ),
        # options
        "reduction unknown": (
            lambda: call(reduction="avg"),
            ValueError,
            "reduction is 'avg'.*'none', 'mean', 'sum'",
        ),
        "reduction None": (
            lambda: call(reduction=None),
            ValueError,
            "reduction is None.*'none', 'mean', 'sum'",
        ),
        "smoothing over 1": (
            lambda: call(label_smoothing=1.5),
            ValueError,
            r"label_smoothing is 1.5.*\[0, 1\]",
        ),
        "smoothing negative": (
            lambda: call(label_smoothing=-0.1),
            ValueError,
            r"label_smoothing is -0.1.*\[0, 1\]",
        ),
        "smoothing NaN": (
            lambda: call(label_smoothing=math.nan),
            ValueError,
            r"label_smoothing is nan.*\[0, 1\]",
        ),
        "smoothing infinite": (
            lambda: call(label_smoothing=math.inf),
            ValueError,
            r"label_smoothing is inf.*\[0, 1\]",
        ),
        "smoothing a tensor": (
            lambda: call(label_smoothing=torch.tensor(0.1)),
            TypeError,
            "label_smoothing must be a number, got Tensor",
        ),
        "smoothing a bool": (
            lambda: call(label_smoothing=True),
            TypeError,
            "label_smoothing must be a number, got bool",
        ),
        "z_loss negative": (lambda: call(z_loss=-1e-4), ValueError, "z_loss is -0.0001.*not negative"),
        "z_loss NaN": (lambda: call(z_loss=math.nan), ValueError, "z_loss is nan.*finite"),
        "z_loss infinite": (lambda: call(z_loss=math.inf), ValueError, "z_loss is inf.*finite"),
        "z_loss text": (lambda: call(z_loss="1e-4"), TypeError, "z_loss must be a number, got str"),
        "ignore_index a float": (
            lambda: call(ignore_index=-100.0),
            TypeError,
            "ignore_index must be an int, got float",
        ),
        "ignore_index None": (
            lambda: call(ignore_index=None),
            TypeError,
            "ignore_index must be an int, got NoneType",
        ),
        "ignore_index a bool": (
            lambda: call(ignore_index=True),
            TypeError,
            "ignore_index must be an int, got bool",
        ),
        "ignore_index of 65 bits": (
            lambda: call(ignore_index=2**64),
            ValueError,
            "ignore_index is 18446744073709551616.*int64",
        ),
        "normalizer zero": (lambda: call(normalizer=0), ValueError, "normalizer is 0.*positive"),
        "normalizer negative": (lambda: call(normalizer=-2.0), ValueError, "normalizer is -2.0.*positive"),
        "normalizer NaN": (
            lambda: call(normalizer=math.nan),
            ValueError,
            "normalizer is nan.*positive and finite",
        ),
        "normalizer infinite": (
            lambda: call(normalizer=math.inf),
            ValueError,
            "normalizer is inf.*positive and finite",
        ),
        "normalizer a vector": (
            lambda: call(normalizer=torch.ones(2)),
            ValueError,
            r"normalizer has shape \(2,\).*0-d",
        ),
        "normalizer text": (
            lambda: call(normalizer="8"),
            TypeError,
            "normalizer must be a number or a 0-d tensor, got str",
        ),
        "normalizer a bool": (
            lambda: call(normalizer=True),
            TypeError,
            "normalizer must be a number or a 0-d tensor, got bool",
        ),
        "normalizer without a sum": (
            lambda: call(normalizer=4, reduction="none"),
            ValueError,
            'normalizer.*reduction="mean" or "sum"',
        ),
        "weight of integers": (
            lambda: call(token_weight=Y),
            TypeError,
            "token_weight must be a floating-point tensor, got torch.int64",
        ),
        "weight a list": (
            lambda: call(token_weight=[1.0] * 4),
            TypeError,
            "token_weight must be a floating-point tensor, got list",
        ),
        "weight too short": (
            lambda: call(token_weight=weight[:3]),
            ValueError,
            r"token_weight has shape \(3,\).*target has \(4,\)",
        ),
        "shift without positions": (
            lambda: call([Z[0]], Y[0], shift=True),
            ValueError,
            "shift=True needs a position dimension.*0-d",
        ),
        "shift is text": (lambda: call(shift="yes"), TypeError, "shift must be a bool, got str"),
        # backends
        "backend unknown": (
            lambda: call(backend="cuda"),
            ValueError,
            "backend is 'cuda'.*'triton', 'cpu', 'reference'",
        ),
        "backend not for float64": (
            lambda: call([Z.double()], backend="cpu"),
            RuntimeError,
            "backend='cpu' cannot run.*float64.*backend=None",
        ),
        "backend not for the device": (
            lambda: call([META], Y.to("meta"), backend="cpu"),
            RuntimeError,
            "backend='cpu' cannot run.*meta.*backend=None",
        ),
        "triton on the CPU": (
            lambda: call(backend="triton"),
            RuntimeError,
            "backend='triton' cannot run.*backend=None",
        ),
        # keywords
        "unknown keyword": (lambda: call(weight=weight), TypeError, "unexpected keyword argument 'weight'"),
        "unknown field": (
            lambda: auxkern.Logits(Z, temperature=2.0),
            TypeError,
            "unexpected keyword argument 'temperature'",
        ),
        "positional option": (lambda: auxkern.cross_entropy([Z], Y, -100), TypeError, "positional argument"),
        "unknown module option": (
            lambda: auxkern.nn.CrossEntropyLoss(weight=weight),
            TypeError,
            "unexpected keyword argument 'weight'",
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_refusal(name: str) -> None:
    before = [t.clone() for t in (Z, Y)]
    function, error, text = refusals()[name]
    with pytest.raises(error) as caught:
        function()
    assert re.search(text, str(caught.value), re.DOTALL), str(caught.value)
    assert torch.equal(Z, before[0])
    assert torch.equal(Y, before[1])


@pytest.mark.parametrize("name", ["triton", "cpu", "reference"])
def test_a_named_backend_runs_or_raises_with_its_reason(name: str) -> None:
    """No silent fallback from a named choice."""
    reason = auxkern.backends.choice.refusal(name, Z.device, (Z.dtype,))
    if reason is None:
        assert bool(call(backend=name).isfinite())
    else:
        with pytest.raises(RuntimeError, match=re.escape(f"backend={name!r} cannot run: {reason}")):
            call(backend=name)


@pytest.mark.parametrize("backend", available_backends())
def test_after_a_refusal_the_next_call_is_right(backend: str) -> None:
    device = device_of(backend)
    z, y = Z.to(device), Y.to(device)
    with pytest.raises(ValueError, match="label_smoothing"):
        auxkern.cross_entropy([z], y, label_smoothing=2.0, backend=backend)
    want = torch.nn.functional.cross_entropy(z, y)
    torch.testing.assert_close(auxkern.cross_entropy([z], y, backend=backend), want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_module_refuses_what_the_function_refuses(reduction: str) -> None:
    module = auxkern.nn.CrossEntropyLoss(reduction=reduction, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.5"):
        module([Z], Y)


def test_a_term_is_immutable() -> None:
    """What was checked when it was made stays true."""
    term = auxkern.Logits(Z)
    with pytest.raises(AttributeError):
        term.scale = math.nan
