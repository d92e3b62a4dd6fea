"""One test for each bug that other fused losses had, as far as it concerns logits.

The letters name the tracker: L linkedin/Liger-Kernel, CCE apple/ml-cross-entropy, FI flashinfer,
V vllm, PT pytorch.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import auxkern
from tests.support.cases import (
    DTYPES,
    FLOAT32_ULP,
    available_backends,
    check,
    confident_logits,
    device_of,
    fast_backends,
    formula,
    generator,
    ours,
    random_logits,
    random_target,
)

backends = pytest.mark.parametrize("backend", available_backends())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
poisoned = pytest.mark.usefixtures("poisoned_memory")


# --- arithmetic -------------------------------------------------------------------------------


@backends
def test_fp16_gradients_of_a_large_mean_do_not_underflow(backend: str) -> None:
    """L#512: p / N is 2**-25 here, below float16; a gradient scaler's 65536 must reach p first."""
    device, N, V = device_of(backend), 8192, 4099
    z = random_logits(N, V, dtype=torch.float16, device=device, spread=0.01).requires_grad_()
    y = random_target(N, V=V, device=device)
    loss = auxkern.cross_entropy([z], y, backend=backend)
    loss.backward(torch.tensor(65536.0, device=device))

    rows = [0, 1, N // 2, N - 1]
    exact = formula([z[rows]], y[rows], normalizer=N, grad_output=loss.new_tensor(65536.0))
    assert bool((z.grad != 0).all())
    torch.testing.assert_close(z.grad[rows].double(), exact.gradients[0], rtol=2**-10, atol=2**-24)


@backends
@dtypes
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("target_is_top", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_confident_targets(
    backend: str, dtype: torch.dtype, p: float, target_is_top: bool, offset: float
) -> None:
    """L#1329: 1 - p cancels; the error may be PyTorch's own and no more."""
    device = device_of(backend)
    z, y = confident_logits(6, 2049, p, target_is_top=target_is_top, offset=offset)
    check([z.to(dtype).to(device)], y.to(device), backend, return_stats=True)


@pytest.mark.parametrize("backend", fast_backends())
@pytest.mark.parametrize("surprise", [1e-3, 1e-6, 1e-9, 1e-20])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_sure_model_keeps_its_relative_precision(backend: str, surprise: float, offset: float) -> None:
    """The kernels keep the target out of the sum: nll and 1 - p are exact where float32's lse - z is 0."""
    device, V = device_of(backend), 2049
    z = torch.full((1, V), offset, device=device)
    # float32 holds 2**-10 at an offset of 1e4, so the gap is the one between two stored numbers.
    z[0, 7] += torch.tensor(V / surprise).log().item()
    gap = float(z[0, 7]) - offset
    nll = torch.log1p((V - 1) * torch.exp(torch.tensor(-gap, dtype=torch.float64)))
    result = ours([z], torch.tensor([7], device=device), backend)
    assert float(result.loss) == pytest.approx(float(nll), rel=1e-5)
    assert float(result.gradients[0][0, 7]) == pytest.approx(float(torch.expm1(-nll)), rel=1e-5)


@backends
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
def test_a_sum_that_float16_cannot_hold(backend: str, signs: tuple[int, int]) -> None:
    """Two float16 heads of 40,000 each: 80,000 is infinite in float16, opposite ones cancel."""
    device = device_of(backend)
    large = [torch.full((5, 301), 40_000.0 * s, dtype=torch.float16, device=device) for s in signs]
    terms = [*large, random_logits(5, 301, dtype=torch.float16, device=device)]
    result = check(terms, random_target(5, V=301, device=device), backend, return_stats=True)
    assert bool(result.loss.isfinite())


@backends
@pytest.mark.parametrize("offset", [1e4, -1e4, 1e6])
def test_a_common_offset_changes_nothing(backend: str, offset: float) -> None:
    """PT#195829."""
    device = device_of(backend)
    # Multiples of 1/8 are exact also beside the offset, so the two losses are of the same logits.
    z = (random_logits(5, 301) * 8).round().div(8).to(device)
    y = random_target(5, V=301, device=device)
    plain, moved = ours([z], y, backend), ours([z + offset], y, backend)
    torch.testing.assert_close(moved.loss, plain.loss, rtol=8 * FLOAT32_ULP, atol=0)
    torch.testing.assert_close(moved.gradients[0], plain.gradients[0], rtol=16 * FLOAT32_ULP, atol=1e-12)


@backends
@dtypes
@poisoned
@pytest.mark.parametrize("V", [1024, 5000, 8192])
def test_tiles_of_minus_infinity(backend: str, dtype: torch.dtype, V: int) -> None:
    """FI#1178: the first, the last, or all but one of a row's tiles hold nothing but -inf."""
    device = device_of(backend)
    z = random_logits(4, V, dtype=dtype, device=device)
    z[0, : V - 3] = -torch.inf
    z[1, 3:] = -torch.inf
    z[2, V // 4 : V // 2] = -torch.inf
    z[3] = -torch.inf
    z[3, V // 2] = 1.0
    y = torch.tensor([V - 1, 0, V - 1, V // 2], device=device)
    result = check(
        [z, random_logits(4, V, dtype=dtype, device=device, seed=1)], y, backend, return_stats=True
    )
    assert bool(result.loss.isfinite())
    assert bool(result.gradients[0].isfinite().all())


@backends
@poisoned
def test_an_impossible_target_costs_infinitely_much(backend: str) -> None:
    """As in PyTorch: the loss is inf, the gradient is p - 1 = -1 at the target and p elsewhere."""
    device = device_of(backend)
    z, y = random_logits(3, 301, device=device), torch.tensor([4, 5, 6], device=device)
    z[1, 5] = -torch.inf
    rows = auxkern.cross_entropy([z], y, backend=backend, reduction="none")
    assert rows.isinf().tolist() == [False, True, False]
    check([z], y, backend, reduction="sum")


@backends
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_spoilt_row_shows_and_stays_alone(backend: str, poison: float) -> None:
    device = device_of(backend)
    z, y = random_logits(3, 3001, device=device), torch.tensor([4, 5, 6], device=device)
    clean = ours([z], y, backend, reduction="none", grad_output=torch.ones(3, device=device))
    z = z.clone()
    z[1, 2900] = poison
    spoilt = ours([z], y, backend, reduction="none", grad_output=torch.ones(3, device=device))
    assert bool(spoilt.loss[1].isnan())
    assert torch.equal(spoilt.loss[[0, 2]], clean.loss[[0, 2]])
    assert torch.equal(spoilt.gradients[0][[0, 2]], clean.gradients[0][[0, 2]])


@backends
def test_a_row_without_any_possible_id_is_nan(backend: str) -> None:
    """As in PyTorch; a finite loss would hide a masking mistake."""
    device = device_of(backend)
    z = torch.full((1, 37), -torch.inf, device=device)
    assert bool(auxkern.cross_entropy([z], torch.tensor([3], device=device), backend=backend).isnan())


# --- rows that do not count -------------------------------------------------------------------


@backends
@poisoned
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_all_rows_ignored(backend: str, reduction: str, weighted: bool) -> None:
    """L#177: exactly 0, connected to the graph, zero gradients; never 0 / 0."""
    device = device_of(backend)
    z = random_logits(4, 301, device=device).requires_grad_()
    y = torch.full((4,), -100, device=device)
    weight = torch.ones(4, device=device) if weighted else None
    options = {"token_weight": weight, "label_smoothing": 0.1, "z_loss": 0.1}
    loss, stats = auxkern.cross_entropy(
        [z], y, reduction=reduction, backend=backend, return_stats=True, **options
    )
    assert bool((loss == 0).all())
    loss.sum().backward()
    assert torch.equal(z.grad, torch.zeros_like(z))
    assert torch.equal(stats.nll, torch.zeros(4, device=device))
    assert torch.equal(stats.lse, torch.zeros(4, device=device))
    assert stats.argmax.tolist() == [-1] * 4


@backends
def test_all_rows_ignored_and_nothing_to_normalise_by(backend: str) -> None:
    device = device_of(backend)
    z, y = random_logits(4, 301, device=device).requires_grad_(), torch.full((4,), -100, device=device)
    loss = auxkern.cross_entropy([z], y, normalizer=torch.tensor(0, device=device), backend=backend)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not z.grad.any()


@backends
@poisoned
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_that_are_all_zero(backend: str, reduction: str) -> None:
    """A batch whose every token is masked by weight is as one whose rows are ignored."""
    device = device_of(backend)
    z, y = random_logits(4, 301, device=device).requires_grad_(), random_target(4, V=301, device=device)
    weight = torch.zeros(4, device=device)
    loss = auxkern.cross_entropy([z], y, token_weight=weight, reduction=reduction, backend=backend)
    assert not loss.any()
    loss.sum().backward()
    assert torch.equal(z.grad, torch.zeros_like(z))


@backends
@poisoned
def test_ignored_rows_are_not_read(backend: str) -> None:
    """Padding may hold anything; 0 * NaN must not reach the loss."""
    device = device_of(backend)
    z = random_logits(6, 301, device=device)
    y = torch.tensor([1, -100, 2, -100, -100, 3], device=device)
    z[1], z[3], z[4] = torch.nan, torch.inf, -torch.inf
    terms = [z, auxkern.Logits(z, softcap=5.0), random_logits(6, 301, device=device, seed=1)]
    options = {"label_smoothing": 0.1, "z_loss": 0.1}
    result = ours(terms, y, backend, return_stats=True, **options)
    counts = y != -100
    kept = [z[counts], auxkern.Logits(z[counts], softcap=5.0), terms[2][counts]]
    exact = formula(kept, y[counts], **options)
    torch.testing.assert_close(result.loss.double(), exact.loss, rtol=1e-5, atol=0)
    assert all(bool(torch.stack([*s.reshape(-1, 6)]).isfinite().all()) for s in result.stats)
    for got, want in zip(result.gradients, exact.gradients, strict=True):
        assert not got[~counts].any()
        torch.testing.assert_close(got[counts].double(), want, rtol=1e-4, atol=1e-7)


# --- incoming gradients -----------------------------------------------------------------------


@backends
@dtypes
def test_rows_get_their_own_incoming_gradient(backend: str, dtype: torch.dtype) -> None:
    """L#1298: with reduction="none" every row has another gradient, some are 0."""
    device = device_of(backend)
    grad_output = torch.randn(9, generator=generator(3)).to(device)
    grad_output[4] = 0
    terms = [random_logits(9, 301, dtype=dtype, device=device, seed=i) for i in range(2)]
    y = random_target(9, V=301, device=device, ignored=0.2)
    result = check(terms, y, backend, reduction="none", grad_output=grad_output)
    assert not result.gradients[0][4].any()


@backends
@poisoned
def test_a_retained_graph_gives_right_gradients_twice(backend: str) -> None:
    """quack#209: the second backward must not see what the first wrote."""
    device = device_of(backend)
    z, b = (random_logits(5, 301, device=device, seed=i).requires_grad_() for i in range(2))
    y = random_target(5, V=301, device=device)
    before = z.detach().clone()
    loss = auxkern.cross_entropy([z, b], y, backend=backend)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (kept, again) = torch.autograd.grad(loss, (z, b), torch.tensor(-2.5, device=device), retain_graph=True)
    (third,) = torch.autograd.grad(loss, z)
    # The first may come from the forward pass, the others are made afresh: a few ulp apart.
    torch.testing.assert_close(third, first, rtol=32 * FLOAT32_ULP, atol=1e-12)
    torch.testing.assert_close(kept, -2.5 * third, rtol=4 * FLOAT32_ULP, atol=1e-12)
    torch.testing.assert_close(again, kept)
    assert torch.equal(z.detach(), before)


@backends
def test_changing_an_input_before_backward_is_an_error(backend: str) -> None:
    """The gradient is made from the inputs; changed ones would give a wrong number."""
    device = device_of(backend)
    base = random_logits(5, 301, device=device).requires_grad_()
    z = base * 1
    loss = auxkern.cross_entropy([z], random_target(5, V=301, device=device), backend=backend)
    z.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@backends
def test_incoming_gradients_of_stride_zero(backend: str) -> None:
    device = device_of(backend)
    z, y = random_logits(5, 301, device=device).requires_grad_(), random_target(5, V=301, device=device)
    ones = torch.ones(5, device=device)
    (want,) = torch.autograd.grad(auxkern.cross_entropy([z], y, reduction="none", backend=backend), z, ones)

    rows = auxkern.cross_entropy([z], y, reduction="none", backend=backend)
    (got,) = torch.autograd.grad(rows, z, torch.ones((), device=device).expand(5))
    assert torch.equal(got, want)
    loss = auxkern.cross_entropy([z], y, reduction="sum", backend=backend)
    (got,) = torch.autograd.grad(loss.expand(4, 3).sum(), z)
    torch.testing.assert_close(got, 12 * want, rtol=32 * FLOAT32_ULP, atol=1e-12)
    every_second = torch.arange(1.0, 11.0, device=device)[::2]
    rows = auxkern.cross_entropy([z], y, reduction="none", backend=backend)
    (got,) = torch.autograd.grad(rows, z, every_second)
    torch.testing.assert_close(got, want * every_second[:, None], rtol=4 * FLOAT32_ULP, atol=1e-12)


# --- compiled ---------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@backends
@poisoned
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_equals_eager_with_ignored_rows(backend: str) -> None:
    """L#1338: 25% of the rows are ignored and memory is poisoned; no row may be left unwritten."""
    device = device_of(backend)
    y = random_target(16, V=301, device=device)
    y[::4] = -100

    def loss(z: Tensor, b: Tensor) -> Tensor:
        return 2 * auxkern.cross_entropy([z * 2, b], y, backend=backend)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [random_logits(16, 301, device=device, seed=i).requires_grad_() for i in range(2)]
        value = function(*leaves)
        value.backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-9)
    assert not results[1][1][::4].any()


@pytest.mark.gpu
def test_no_host_synchronisation() -> None:
    """L#174."""
    z, b = (random_logits(64, 5001, device="cuda", seed=i).requires_grad_() for i in range(2))
    y = random_target(64, V=5001, device="cuda", ignored=0.3)
    count, weight = torch.tensor(40, device="cuda"), torch.rand(64, device="cuda")
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "token_weight": weight, "normalizer": count}
    for backend in (None, "triton"):
        auxkern.cross_entropy([z, b], y, backend=backend, **options).backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, _ = auxkern.cross_entropy([z, b], y, backend=backend, return_stats=True, **options)
            loss.backward()
            auxkern.cross_entropy([z, b], y, backend=backend).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- edges of the vocabulary and of memory ----------------------------------------------------


@backends
@poisoned
@pytest.mark.parametrize("V", [1025, 2053, 4097])
def test_the_last_tile(backend: str, V: int) -> None:
    """CCE#59: tile + 1 and prime widths, with the target, and the maximum, in the last column."""
    device = device_of(backend)
    z = random_logits(4, V, device=device)
    z[2:, -1] = 30.0
    y = torch.tensor([V - 1, 0, V - 1, 5], device=device)
    check([z], y, backend, return_stats=True)


@backends
@pytest.mark.parametrize("bad", [301, 305, -1, -101, 2**40, -(2**40), 2**63 - 1])
def test_a_target_out_of_range_never_gives_a_number(backend: str, bad: int) -> None:
    """verl#2899: raises on a CPU; on a device the row is NaN, in the loss and in the gradient."""
    device = device_of(backend)
    z = random_logits(3, 301, device=device).requires_grad_()
    y = torch.tensor([5, bad, 7], device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"target\[1\] .*is {bad}, outside \[0, 301\)"):
            auxkern.cross_entropy([z], y, backend=backend)
        return
    rows = auxkern.cross_entropy([z], y, backend=backend, reduction="none")
    rows.sum().backward()
    assert rows.isnan().tolist() == [False, True, False]
    assert bool(z.grad[1].isnan().all())
    assert bool(z.grad[[0, 2]].isfinite().all())


@backends
@dtypes
def test_a_view_of_a_padded_vocabulary(backend: str, dtype: torch.dtype) -> None:
    """V#42684: what lies between the rows is never read, and nothing is copied."""
    device = device_of(backend)
    storage = torch.full((6, 512), torch.nan, dtype=dtype, device=device)
    storage[:, :301] = random_logits(6, 301, dtype=dtype, device=device)
    check([storage[:, :301]], random_target(6, V=301, device=device), backend, return_stats=True)


@backends
@poisoned
@dtypes
@pytest.mark.parametrize("filler", [torch.nan, torch.inf, 1e4])
def test_ids_beyond_the_shared_vocabulary(backend: str, dtype: torch.dtype, filler: float) -> None:
    """torchtune#2119: probability 0 and gradient 0 whatever the padding holds."""
    device = device_of(backend)
    lm = random_logits(6, 320, dtype=dtype, device=device)
    lm[:, 301:] = filler
    terms = [auxkern.Logits(lm, softcap=20.0), lm, random_logits(6, 301, dtype=dtype, device=device, seed=1)]
    options = {"label_smoothing": 0.1, "vocab_size": 301}
    y = random_target(6, V=301, device=device, ignored=0.2)
    result = check(terms, y, backend, return_stats=True, **options)
    for gradient in result.gradients[:2]:
        assert torch.equal(gradient[:, 301:], torch.zeros_like(gradient[:, 301:]))


FAR_APART = {
    "rows": ((2, 301), (2**31, 1)),
    "ids": ((301, 3), (1, 2**30)),
    # The last ids stand in a later tile, whose start is itself beyond 32 bits.
    "tiles of ids": ((2, 1030), (1, 2**21)),
}


@backends
@pytest.mark.parametrize("layout", FAR_APART)
def test_strides_beyond_32_bits(backend: str, layout: str) -> None:
    """L#803, cheaply: 2**31 float16 elements are mapped, a few are touched and take memory."""
    if device_of(backend) != "cpu":
        pytest.skip("a device has no untouched memory; the slow test covers it")
    mapped = mmap.mmap(-1, 2 * (2**31 + 2**24))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        mapped.madvise(mmap.MADV_NOHUGEPAGE)
    storage = torch.frombuffer(mapped, dtype=torch.float16)
    z = storage.as_strided(*FAR_APART[layout])
    assert max((n - 1) * s for n, s in zip(z.shape, z.stride(), strict=True)) >= 2**31
    z.copy_(random_logits(*z.shape, dtype=torch.float16))
    y = random_target(len(z), V=z.shape[-1])
    result = ours([z], y, backend)
    plain = ours([z.contiguous()], y, backend)
    torch.testing.assert_close(result.loss, plain.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.gradients[0], plain.gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("backend", fast_backends())
def test_more_than_32_bits_of_logits(backend: str) -> None:
    """L#803: N * V > 2**31, the first and the last rows; takes 9 GB."""
    device, V = device_of(backend), 262144
    N = 2**31 // V + 3
    z = torch.zeros(N, V, dtype=torch.float16, device=device)
    rows = [0, 1, N - 2, N - 1]
    z[rows] = random_logits(4, V, dtype=torch.float16, device=device)
    y = torch.full((N,), 3, device=device)
    y[rows] = torch.tensor([0, V - 1, V // 2, V - 1], device=device)
    z.requires_grad_()
    losses = auxkern.cross_entropy([z], y, backend=backend, reduction="none")
    losses.sum().backward()
    exact = formula([z.detach()[rows]], y[rows], reduction="sum")
    torch.testing.assert_close(losses.detach()[rows].double(), exact.nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z.grad[rows].double(), exact.gradients[0], rtol=2**-10, atol=2**-24)
    middle = losses.detach()[2:-2]
    torch.testing.assert_close(middle, torch.full_like(middle, V).log(), rtol=1e-6, atol=0)


# --- training ---------------------------------------------------------------------------------


class Pair(torch.nn.Module):
    """A frozen head that gives float16 or bfloat16 logits and a float32 auxiliary one."""

    def __init__(self, device: str, lm_dtype: torch.dtype) -> None:
        super().__init__()
        self.lm = random_logits(8, 301, dtype=lm_dtype, device=device)
        self.hidden = random_logits(8, 16, device=device, spread=1, seed=1)
        self.head = torch.nn.Linear(16, 301, device=device)
        with torch.no_grad():
            self.head.weight.copy_(random_logits(301, 16, spread=0.3, seed=2))
            self.head.bias.zero_()

    def forward(self) -> list[Tensor]:
        return [self.lm, self.head(self.hidden)]


@backends
@pytest.mark.parametrize("lm_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_autocast_with_and_without_a_gradient_scaler(
    backend: str, lm_dtype: torch.dtype, scaled: bool
) -> None:
    """L#235: a float32 auxiliary model beside a half precision LM; the parameters' gradients are right."""
    device = device_of(backend)
    pair, y = Pair(device, lm_dtype), random_target(8, V=301, device=device, ignored=0.2)
    scaler = torch.amp.GradScaler(device, init_scale=65536.0, enabled=scaled)
    optimizer = torch.optim.SGD(pair.head.parameters(), lr=0.0)
    with torch.autocast(device, dtype=torch.bfloat16):
        terms = pair()
        assert terms[1].dtype == torch.bfloat16
        loss = auxkern.cross_entropy(terms, y, backend=backend)
        assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)

    exact = formula(terms, y)
    assert float(loss.detach()) == pytest.approx(float(exact.loss), rel=1e-6)
    d_logits = exact.gradients[1]
    # bfloat16 rounds the gradient of the logits, and again the products of the linear layer.
    allowed = 2**-8 * 3 * (d_logits.abs().T @ pair.hidden.double().abs())
    error = (pair.head.weight.grad.double() - d_logits.T @ pair.hidden.double()).abs()
    assert bool((error <= allowed + 1e-9).all())


@backends
def test_float16_logits_through_a_gradient_scaler(backend: str) -> None:
    """Gradients that float16 cannot hold unscaled arrive whole."""
    device = device_of(backend)
    N, V = 512, 1009
    bias = torch.zeros(V, device=device, requires_grad=True)
    y = random_target(N, V=V, device=device)
    scaler = torch.amp.GradScaler(device, init_scale=65536.0)
    # Each of the N * V gradients is 2e-6, of which float16 keeps five bits.
    loss = auxkern.cross_entropy([(bias + torch.zeros(N, V, device=device)).half()], y, backend=backend)
    scaler.scale(loss).backward()
    scaler.unscale_(torch.optim.SGD([bias], lr=0.1))
    exact = torch.full((V,), 1 / V, dtype=torch.float64) - torch.bincount(y.cpu(), minlength=V) / N
    torch.testing.assert_close(bias.grad.double().cpu(), exact, rtol=2**-10, atol=1e-7)


@backends
@pytest.mark.parametrize("as_tensor", [False, True])
def test_gradient_accumulation_with_unequal_counts(backend: str, as_tensor: bool) -> None:
    """L#802: micro-batches divided by the count of the whole batch add up to one big batch."""
    device = device_of(backend)
    z, y = random_logits(24, 301, device=device), random_target(24, V=301, device=device)
    y[2:8] = -100
    y[9:16] = -100
    whole = ours([z], y, backend)
    count = (y != -100).sum()
    normalizer = count if as_tensor else int(count)
    parts = [
        ours([z[s]], y[s], backend, normalizer=normalizer) for s in (slice(0, 8), slice(8, 16), slice(16, 24))
    ]
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss, rtol=1e-6, atol=0)
    joined = torch.cat([part.gradients[0] for part in parts])
    torch.testing.assert_close(joined, whole.gradients[0], rtol=1e-6, atol=1e-10)


@backends
@pytest.mark.parametrize("counts", [(64, 320), (0, 320), (0, 0)])
def test_ranks_with_unequal_counts(backend: str, counts: tuple[int, int]) -> None:
    """trl#6696: ranks that divide by the global count agree with one batch; one may be fully masked."""
    device, N = device_of(backend), 320
    z = random_logits(2, N, 101, device=device)
    y = random_target(2, N, V=101, device=device)
    for rank, valid in enumerate(counts):
        y[rank, valid:] = -100
    whole = ours([z], y, backend)
    everyone = torch.tensor(sum(counts), device=device)  # what an all-reduce of the counts gives
    ranks = [ours([z[r]], y[r], backend, normalizer=everyone) for r in range(2)]
    torch.testing.assert_close(ranks[0].loss + ranks[1].loss, whole.loss, rtol=1e-6, atol=0)
    joined = torch.stack([rank.gradients[0] for rank in ranks])
    torch.testing.assert_close(joined, whole.gradients[0], rtol=1e-6, atol=1e-10)
    if counts[0] == 0:
        assert float(ranks[0].loss) == 0
        assert not ranks[0].gradients[0].any()
