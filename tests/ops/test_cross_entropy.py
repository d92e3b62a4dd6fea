"""Every backend that runs here against the exact answer: dtypes, shapes, options, layouts, demand.

Tolerances are those of the numerical contract, see ``cases.assert_contract``. Output memory holds
NaN before the kernels run.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from tests.support.cases import (
    DTYPES,
    HARD,
    ROW_ERROR,
    available_backends,
    check,
    device_of,
    fast_backends,
    generator,
    hard_logits,
    ours,
    peak_extra_bytes,
    random_logits,
    random_target,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
backends = pytest.mark.parametrize("backend", available_backends())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# Vector widths and tiles of every kernel are powers of two: one below, on, and one above.
EDGES = sorted({n + d for k in range(3, 14) for n in [2**k] for d in (-1, 0, 1)})


# --- shapes -----------------------------------------------------------------------------------


@backends
@dtypes
@pytest.mark.parametrize("N", [1, 3, 17])
@pytest.mark.parametrize("V", [1, 2, 7, 101, 1023, 1024, 1025, 4099])
def test_shapes(backend: str, dtype: torch.dtype, N: int, V: int) -> None:
    device = device_of(backend)
    terms = [random_logits(N, V, dtype=dtype, device=device, seed=i) for i in range(2)]
    check(terms, random_target(N, V=V, device=device, ignored=0.2), backend)


@backends
@dtypes
@pytest.mark.parametrize("V", [50257, 262144])
def test_vocabularies_of_real_models(backend: str, dtype: torch.dtype, V: int) -> None:
    device = device_of(backend)
    terms = [random_logits(3, V, dtype=dtype, device=device, seed=i) for i in range(2)]
    target = torch.tensor([V - 1, 0, V // 2], device=device)
    check(terms, target, backend, return_stats=True)


@backends
@dtypes
def test_widths_about_every_power_of_two(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    for V in EDGES:
        terms = [random_logits(2, V, dtype=dtype, device=device, seed=i) for i in range(2)]
        # The last column is where a tile that ends early shows.
        check(terms, torch.tensor([V - 1, V // 2], device=device), backend, return_stats=True)


@backends
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_an_empty_batch_is_zero_and_connected(backend: str, reduction: str, shape: tuple[int, ...]) -> None:
    device = device_of(backend)
    z = torch.empty(*shape, 11, device=device, requires_grad=True)
    y = torch.empty(shape, dtype=torch.int64, device=device)
    loss, stats = auxkern.cross_entropy([z], y, reduction=reduction, backend=backend, return_stats=True)
    assert loss.shape == (shape if reduction == "none" else ())
    assert bool((loss == 0).all())
    assert stats.nll.shape == shape
    assert stats.term_nll.shape == (1, *shape)
    loss.sum().backward()
    assert z.grad.shape == z.shape


@backends
def test_one_row_without_leading_dimensions(backend: str) -> None:
    device = device_of(backend)
    check([random_logits(101, device=device)], torch.tensor(100, device=device), backend, return_stats=True)


@backends
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (1, 6, 1, 2)])
def test_leading_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    device = device_of(backend)
    terms = [random_logits(*shape, 37, device=device, seed=i) for i in range(2)]
    target = random_target(*shape, V=37, device=device, ignored=0.2)
    for reduction in ("mean", "none"):
        grad_output = torch.randn(shape, generator=generator(9)).to(device) if reduction == "none" else None
        check(terms, target, backend, reduction=reduction, grad_output=grad_output, return_stats=True)


@backends
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_dtypes_of_the_target(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    z, y = random_logits(9, 101, device=device), random_target(9, V=101, device=device)
    got = ours([z], y.to(dtype), backend)
    want = ours([z], y, backend)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.gradients[0], want.gradients[0])


# --- options ----------------------------------------------------------------------------------


def option_sets(N: int, device: str) -> dict[str, dict[str, Any]]:
    weight = torch.rand(N, generator=generator(7)).to(device)
    grad_output = torch.randn(N, generator=generator(8)).to(device)
    return {
        "plain": {},
        "sum": {"reduction": "sum", "grad_output": torch.tensor(-3.0, device=device)},
        "none": {"reduction": "none", "grad_output": grad_output},
        "ignore an id": {"ignore_index": 5},
        "smoothing": {"label_smoothing": 0.1},
        "smoothing 1": {"label_smoothing": 1.0},
        "z_loss": {"z_loss": 1e-2},
        "weight": {"token_weight": weight},
        "weight none": {"token_weight": weight, "reduction": "none", "grad_output": grad_output},
        "normalizer": {"normalizer": 12.5},
        "0-d normalizer": {"normalizer": torch.tensor(12, device=device)},
        "shift": {"shift": True},
        "vocab_size": {"vocab_size": 5},
        "all": {
            "reduction": "sum",
            "ignore_index": 2,
            "label_smoothing": 0.1,
            "z_loss": 1e-2,
            "token_weight": weight,
            "normalizer": 12.5,
            "shift": True,
            "vocab_size": 5,
        },
    }


@backends
@dtypes
@pytest.mark.parametrize("V", [7, 1025])
@pytest.mark.parametrize("name", option_sets(1, "cpu"))
def test_options(backend: str, dtype: torch.dtype, V: int, name: str) -> None:
    N, device = 9, device_of(backend)
    options = option_sets(N, device)[name]
    ignore_index = options.get("ignore_index", -100)
    ids = options.get("vocab_size", V)
    target = random_target(N, V=ids, device=device, ignored=0.2, ignore_index=ignore_index)
    terms = [
        auxkern.Logits(random_logits(N, V, dtype=dtype, device=device, seed=0), scale=0.5),
        auxkern.Logits(random_logits(N, V, dtype=dtype, device=device, seed=1), scale=-1.5, softcap=4.0),
        random_logits(N, V, dtype=dtype, device=device, seed=2),
    ]
    check(terms, target, backend, return_stats=True, **options)


@backends
@pytest.mark.parametrize("softcap", [0.25, 30.0, 1e6])
@pytest.mark.parametrize("spread", [1e-3, 3.0, 200.0])
def test_softcap_from_linear_to_saturated(backend: str, softcap: float, spread: float) -> None:
    device = device_of(backend)
    terms = [auxkern.Logits(random_logits(5, 301, device=device, spread=spread), softcap=softcap)]
    check(terms, random_target(5, V=301, device=device), backend)


@backends
@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-4, 50.0])
def test_scales(backend: str, scale: float) -> None:
    device = device_of(backend)
    terms = [
        random_logits(5, 301, device=device),
        auxkern.Logits(random_logits(5, 301, device=device, seed=1), scale=scale),
    ]
    check(terms, random_target(5, V=301, device=device), backend, return_stats=True)


@backends
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("V", [257, 3001])
def test_hard_logits(backend: str, kind: str, V: int) -> None:
    device = device_of(backend)
    terms, target = hard_logits(kind, 6, V)
    check([t.to(device) for t in terms], target.to(device), backend, return_stats=True)


# --- terms ------------------------------------------------------------------------------------


@backends
@dtypes
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_numbers_of_terms(backend: str, dtype: torch.dtype, count: int) -> None:
    device = device_of(backend)
    terms = [random_logits(5, 1025, dtype=dtype, device=device, spread=1, seed=i) for i in range(count)]
    check(terms, random_target(5, V=1025, device=device, ignored=0.2), backend, return_stats=True)


@backends
@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("second", DTYPES, ids=str)
def test_mixed_dtypes(backend: str, first: torch.dtype, second: torch.dtype) -> None:
    device = device_of(backend)
    terms = [
        random_logits(5, 1025, dtype=first, device=device),
        random_logits(5, 1025, dtype=second, device=device, seed=1),
        random_logits(5, 1025, dtype=first, device=device, seed=2),
    ]
    check(terms, random_target(5, V=1025, device=device), backend, return_stats=True)


@backends
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, -0.5)])
def test_one_tensor_as_two_terms(backend: str, scales: tuple[float, float]) -> None:
    device = device_of(backend)
    x, y = random_logits(5, 301, device=device).requires_grad_(), random_target(5, V=301, device=device)
    auxkern.cross_entropy([auxkern.Logits(x, s) for s in scales], y, backend=backend).backward()
    (want,) = ours([auxkern.Logits(x, sum(scales))], y, backend).gradients
    # Two float32 gradients are rounded, then added.
    torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-7)


@backends
def test_gradients_of_two_terms_are_two_tensors(backend: str) -> None:
    """Gradient scalers and clipping work in place: on shared memory they would act twice."""
    device = device_of(backend)
    terms = [random_logits(5, 301, device=device, seed=i) for i in range(3)]
    result = ours(terms, random_target(5, V=301, device=device), backend)
    assert len({g.data_ptr() for g in result.gradients}) == 3
    copy = result.gradients[1].clone()
    result.gradients[0].zero_()
    assert torch.equal(result.gradients[1], copy)


@backends
@dtypes
def test_equal_soft_caps_have_their_own_slopes(backend: str, dtype: torch.dtype) -> None:
    """Terms that differ in nothing but their values: a gradient can be shared without a cap only."""
    device = device_of(backend)
    terms = [
        auxkern.Logits(random_logits(5, 301, dtype=dtype, device=device, seed=i), scale=0.5, softcap=3.0)
        for i in range(2)
    ]
    check(terms, random_target(5, V=301, device=device), backend, return_stats=True)


@backends
def test_vocabularies_padded_differently(backend: str) -> None:
    device = device_of(backend)
    terms = [random_logits(5, V, device=device, seed=V) for V in (301, 304, 320)]
    target = random_target(5, V=300, device=device, ignored=0.2)
    check(terms, target, backend, vocab_size=300, label_smoothing=0.1, return_stats=True)


# --- layouts ----------------------------------------------------------------------------------


def layouts() -> dict[str, Any]:
    """Functions of (dtype, seed) to (2, 3, 101) logits that lie in memory in different ways."""

    def logits(*shape: int) -> Any:
        return lambda dtype, seed: random_logits(*shape, dtype=dtype, seed=seed)

    return {
        "contiguous": logits(2, 3, 101),
        "padded vocabulary": lambda d, s: logits(2, 3, 128)(d, s)[..., :101],
        "vocabulary from the middle": lambda d, s: logits(2, 3, 128)(d, s)[..., 9:110],
        "without the last position": lambda d, s: logits(2, 4, 101)(d, s)[:, :-1],
        "without the first position": lambda d, s: logits(2, 4, 101)(d, s)[:, 1:],
        "every second position": lambda d, s: logits(2, 6, 101)(d, s)[:, ::2],
        "every second id": lambda d, s: logits(2, 3, 202)(d, s)[..., ::2],
        "batch and position swapped": lambda d, s: logits(3, 2, 101)(d, s).transpose(0, 1),
        "vocabulary first": lambda d, s: logits(101, 2, 3)(d, s).permute(1, 2, 0),
        "one row for all": lambda d, s: logits(101)(d, s).expand(2, 3, 101),
        "one row for each sequence": lambda d, s: logits(2, 1, 101)(d, s).expand(2, 3, 101),
        "one logit for all ids": lambda d, s: logits(2, 3, 1)(d, s).expand(2, 3, 101),
        "odd offset": lambda d, s: logits(2 * 3 * 101 + 1)(d, s)[1:].view(2, 3, 101),
    }


@backends
@dtypes
@pytest.mark.parametrize("name", layouts())
def test_layouts(backend: str, dtype: torch.dtype, name: str) -> None:
    device = device_of(backend)
    strided = layouts()[name](dtype, 0)
    # .to keeps the strides of a dense tensor only; views are made again on the device.
    strided = strided if device == "cpu" else layouts_on(device, strided)
    terms = [strided, random_logits(2, 3, 101, dtype=dtype, device=device, seed=1)]
    target = random_target(2, 3, V=101, device=device, ignored=0.2)
    result = check(terms, target, backend, return_stats=True)
    plain = ours([strided.contiguous(), terms[1]], target, backend)
    torch.testing.assert_close(result.gradients[0], plain.gradients[0], rtol=1e-5, atol=1e-7)


def layouts_on(device: str, strided: Tensor) -> Tensor:
    storage = strided.as_strided((strided.untyped_storage().size() // strided.element_size(),), (1,), 0)
    return storage.to(device).as_strided(strided.shape, strided.stride(), strided.storage_offset())


@backends
def test_two_layouts_side_by_side(backend: str) -> None:
    device = device_of(backend)
    y = random_target(2, 3, V=101, device=device)
    terms = [
        random_logits(2, 4, 128, device=device)[:, :-1, :101],
        random_logits(3, 2, 101, dtype=torch.float16, device=device).transpose(0, 1),
        random_logits(101, device=device).expand(2, 3, 101),
    ]
    check(terms, y, backend, return_stats=True)


@backends
def test_four_dimensions_with_two_strides(backend: str) -> None:
    """(2, 3, 4, V) whose last two leading dimensions are one run of rows."""
    device = device_of(backend)
    z = random_logits(2, 5, 4, 37, device=device)[:, :3]
    check([z], random_target(2, 3, 4, V=37, device=device), backend)


@backends
def test_a_layout_that_needs_a_copy_is_refused(backend: str) -> None:
    device = device_of(backend)
    z = random_logits(2, 4, 6, 37, device=device)[:, :3, :5]
    y = random_target(2, 3, 5, V=37, device=device)
    with pytest.raises(
        ValueError, match=r"terms\[1\]\.values of shape \(2, 3, 5, 37\) and strides .*contiguous\(\)"
    ):
        auxkern.cross_entropy([z.contiguous(), z], y, backend=backend)
    check([z.contiguous()], y, backend)


@backends
@dtypes
def test_gradients_of_a_view_reach_its_base(backend: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    base = random_logits(2, 4, 128, dtype=dtype, device=device).requires_grad_()
    y = random_target(2, 3, V=101, device=device)
    auxkern.cross_entropy([base[:, :-1, :101]], y, backend=backend).backward()
    (want,) = ours([base.detach()[:, :-1, :101].contiguous()], y, backend).gradients
    got = base.grad[:, :-1, :101]
    if device == "cpu":
        assert torch.equal(got, want)
    else:
        # Rows that begin elsewhere are cut elsewhere: sums of exponentials, and with them p, go in another
        # order, each within ROW_ERROR; p - 1 of one of 6 rows has p's error. Then both are rounded.
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=2 * ROW_ERROR + rounding, atol=2 * ROW_ERROR / 6)
    assert not base.grad[:, -1].any()
    assert not base.grad[..., 101:].any()


@backends
def test_an_imaginary_part_that_is_a_lazy_negation(backend: str) -> None:
    """``x.conj().imag`` has the storage of ``x.imag`` and a flag that says to negate it."""
    device = device_of(backend)
    x = torch.randn(4, 37, dtype=torch.complex64, generator=generator(0)).to(device)
    y = random_target(4, V=37, device=device)
    lazy = x.conj().imag
    assert lazy.is_neg()
    got = auxkern.cross_entropy([lazy], y, backend=backend)
    assert torch.equal(got, auxkern.cross_entropy([-x.imag], y, backend=backend))
    x.requires_grad_()
    gradients = [
        torch.autograd.grad(auxkern.cross_entropy([imaginary], y, backend=backend), x)[0]
        for imaginary in (x.conj().imag, -x.imag)
    ]
    assert torch.equal(*gradients)


# --- gradients only for what asks -------------------------------------------------------------


@backends
@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_gradient_for_what_asks(backend: str, wanted: tuple[int, ...]) -> None:
    device = device_of(backend)
    terms = [random_logits(5, 301, dtype=d, device=device) for d in DTYPES]
    result = check(terms, random_target(5, V=301, device=device, ignored=0.2), backend, wanted=wanted)
    assert [g is not None for g in result.gradients] == [i in wanted for i in range(3)]


@backends
def test_no_graph_without_a_demand(backend: str) -> None:
    device = device_of(backend)
    z, y = random_logits(5, 301, device=device), random_target(5, V=301, device=device)
    assert auxkern.cross_entropy([z], y, backend=backend).grad_fn is None
    with torch.no_grad():
        assert auxkern.cross_entropy([z.requires_grad_()], y, backend=backend).grad_fn is None
    with torch.inference_mode():
        assert auxkern.cross_entropy([z], y, backend=backend).grad_fn is None


@pytest.mark.parametrize("backend", fast_backends())
@pytest.mark.parametrize("divisor", [1, 4])
def test_memory_is_one_gradient(backend: str, divisor: int) -> None:
    """Two terms, one of them frozen: no buffer of the frozen one's size, no sum, no softmax.

    Also if the loss is divided first, as gradient accumulation does.
    """
    device = device_of(backend)
    N, V = 400, 50257  # a gradient of over 32 MiB
    lm = random_logits(N, V, device=device)
    aux = random_logits(N, V, dtype=torch.float16, device=device, seed=1).requires_grad_()
    target = random_target(N, V=V, device=device)
    small = slice(0, 2)
    auxkern.cross_entropy([lm[small], aux[small]], target[small], backend=backend).backward()  # loads code
    aux.grad = None
    gc.collect()

    def step() -> None:
        (auxkern.cross_entropy([lm, aux], target, backend=backend) / divisor).backward()

    gradient = aux.numel() * aux.element_size()
    assert peak_extra_bytes(step, device) <= 1.1 * gradient
    assert lm.grad is None


@pytest.mark.parametrize("backend", fast_backends())
def test_memory_of_a_loss_without_gradients_is_rows(backend: str) -> None:
    device = device_of(backend)
    N, V = 200, 50257
    z, target = random_logits(N, V, device=device), random_target(N, V=V, device=device)
    auxkern.cross_entropy([z[:2], z[:2]], target[:2], backend=backend, return_stats=True)
    gc.collect()
    extra = peak_extra_bytes(
        lambda: auxkern.cross_entropy([z, z], target, backend=backend, return_stats=True), device
    )
    assert extra <= 0.1 * z.numel() * z.element_size()
