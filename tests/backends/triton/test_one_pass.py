"""Losses and gradients of logits in one pass: the same bits as in two, whatever gradient comes in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Logits
from tests.support.cases import IGNORE, check, random_logits, random_target

pytest.importorskip("triton")
import triton
import triton.language as tl

from auxkern.backends.triton.device import numerics
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_loss import launches
from auxkern.core.loss import Loss, RowLosses, RowSlopes
from auxkern.core.sums import Sum
from tests.support.gpus import seen_as, with_multiprocessors

pytestmark = [
    pytest.mark.usefixtures("machine", "poisoned_memory"),
    # Columns that no one keeps may overflow, as they may on a GPU; NumPy warns of them.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

H, B, F = torch.float16, torch.bfloat16, torch.float32
FULL = Loss(IGNORE, label_smoothing=0.1, z_loss=1e-3, stats=True)


@pytest.fixture
def names(machine: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of the kernels that are launched, in order, on one multiprocessor, where one pass is best."""
    seen_as(monkeypatch, machine.backend, multiprocessors=1)
    launched: list[str] = []
    run = Launch.run if not machine.compiled else type(machine.backend.executor).run

    def noted(self: Any, *given: Launch) -> None:
        launched.append((given or (self,))[0].kernel.fn.__name__)
        run(self, *given)

    owner = type(machine.backend.executor) if machine.compiled else Launch
    monkeypatch.setattr(owner, "run", noted)
    return launched


def a_sum(dtypes: tuple[torch.dtype, ...], N: int, V: int, *, pad: int = 0, cap: float | None = None) -> Sum:
    """Of (1, N, V + pad) logits, the first of which has a scale and maybe a soft cap; NaN behind V."""
    values = [random_logits(1, N, V + pad, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
    for x in values:
        x[..., V:] = math.nan
    return Sum((Logits(values[0], -0.5, cap), *map(Logits, values[1:])), V)


def memory(logits: Sum, places: tuple[int, ...]) -> list[dict[str, Tensor]]:
    return [
        {"values": torch.full_like(term.values, math.nan)} if i in places else {}
        for i, term in enumerate(logits.logits)
    ]


def in_one_pass(
    machine: Any,
    logits: Sum,
    target: Tensor,
    loss: Loss,
    g: Tensor,
    places: tuple[int, ...],
    processors: int = 2,
) -> tuple[RowLosses, list[dict[str, Tensor]]]:
    wanted = memory(logits, places)
    rows, [launch] = launches.fused(logits, target, loss, g, wanted, with_multiprocessors(processors))
    machine.backend.run([launch], target.device)
    return rows, wanted


def slopes(rows: RowLosses, target: Tensor, loss: Loss, g: Tensor, V: int, **options: Any) -> RowSlopes:
    return RowSlopes(g, rows.sums, target != loss.ignore_index, loss, V, **options)


@pytest.mark.parametrize(
    ("dtypes", "V", "pad", "places", "cap", "loss"),
    [
        ((F,), 1031, 0, (0,), None, Loss(IGNORE)),
        ((H, F), 2049, 0, (0, 1), None, FULL),
        ((B, B), 1500, 3, (1,), None, Loss(IGNORE)),
        ((F, B, H), 7, 9, (0, 2), 3.0, FULL),
    ],
    ids=["fp32", "fp16+fp32, all", "bf16+bf16, padded", "3 terms, capped"],
)
def test_gradients_are_those_of_two_passes_to_the_last_bit(machine, dtypes, V, pad, places, cap, loss):
    logits, target = a_sum(dtypes, 5, V, pad=pad, cap=cap), torch.tensor([0, V - 1, IGNORE, V // 2, 1])
    g = torch.tensor([0.25, -1.0, 3.0, 0.0, 65536.0])
    rows, fused = in_one_pass(machine, logits, target, loss, g, places)
    apart = memory(logits, places)
    machine.backend.run(
        [launches.backward(logits, target, slopes(rows, target, loss, g, V), apart, with_multiprocessors(2))],
        target.device,
    )
    for i in places:
        assert torch.equal(fused[i]["values"], apart[i]["values"])
        # Rows that do not count, and ids that do not: 0, not what the memory held.
        assert not fused[i]["values"][0, [2, 3]].any()
        assert not fused[i]["values"][..., V:].any()
        assert bool(fused[i]["values"][0, [0, 1, 4], :V].isfinite().all())


def test_rows_are_those_of_the_forward_kernel(machine):
    logits, target = a_sum((H, F), 5, 1031), torch.tensor([5, 1030, IGNORE, 7, 0])
    rows, _ = in_one_pass(machine, logits, target, FULL, torch.ones(1).expand(5), (1,))
    other, forward = launches.forward(logits, target, FULL, with_multiprocessors(1))
    machine.backend.run(forward, target.device)
    assert torch.equal(rows.argmax, other.argmax)
    for name in ("nll", "row_max", "log_sum", "smooth", "term_nll", "lse"):
        # Columns lie in other lanes: sums of 1,031 are added up in another order.
        torch.testing.assert_close(getattr(rows, name), getattr(other, name), rtol=2e-6, atol=2e-6)


def test_only_rows_whose_gradient_is_another_are_written_again(machine):
    logits, target = a_sum((H, F), 4, 1031, pad=1), torch.tensor([5, 6, IGNORE, 7])
    expected = torch.tensor([0.25]).expand(4)
    rows, wanted = in_one_pass(machine, logits, target, Loss(IGNORE), expected, (0, 1))
    incoming = torch.tensor([0.25, 0.25 * 65536, 1.0, 0.25])
    apart = memory(logits, (0, 1))
    gpu, its = with_multiprocessors(1), slopes(rows, target, Loss(IGNORE), incoming, 1031)
    anew = launches.backward(logits, target, its, apart, gpu)
    for term in wanted:
        term["values"][0, [0, 2, 3], 3] = 7.0  # what nobody writes to stays
    again = slopes(rows, target, Loss(IGNORE), incoming, 1031, written=expected)
    machine.backend.run(
        [anew, launches.backward(logits, target, again, wanted, gpu)],
        target.device,
    )
    for term, other in zip(wanted, apart, strict=True):
        assert torch.equal(term["values"][0, 1], other["values"][0, 1])
        assert term["values"][0, [0, 2, 3], 3].tolist() == [7.0] * 3


def trained(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return random_logits(*shape, dtype=dtype, seed=seed).requires_grad_()


def test_a_scaled_loss_gets_gradients_from_the_logits_not_from_rounded_ones(machine, names):
    frozen, target = 0.1 * random_logits(3, 1031, dtype=H), torch.tensor([3, IGNORE, 1030])
    scaled, plain = (torch.zeros(3, 1031, dtype=H, requires_grad=True) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    loss = auxkern.cross_entropy([frozen, scaled], target, normalizer=8192, backend="triton")
    scaler.scale(loss).backward()
    assert names == ["fused_kernel", "backward_kernel"]
    rows = auxkern.cross_entropy([frozen, plain], target, reduction="none", backend="triton")
    rows.backward(torch.full((3,), 65536.0 / 8192))
    assert names[2:] == ["forward_kernel", "backward_kernel"]
    # A probability over 8,192 is 0 in float16, and stays 0 whatever it is multiplied by.
    assert bool((scaled.grad[0] != 0).all())
    # The statistics are sums in another order.
    torch.testing.assert_close(scaled.grad, plain.grad, rtol=2e-3, atol=0)


def test_a_second_backward_leaves_the_first_ones_gradients_alone(machine, names):
    lm, aux, target = trained(3, 301, dtype=F), trained(3, 301, dtype=H, seed=1), torch.tensor([3, IGNORE, 7])
    loss = auxkern.cross_entropy([lm, aux], target, backend="triton")
    first = torch.autograd.grad(loss, [lm, aux], retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, [lm, aux], torch.tensor(-4.0), retain_graph=True)
    third = torch.autograd.grad(loss, [lm, aux])
    for a, b, c, copy in zip(first, second, third, kept, strict=True):
        assert torch.equal(a, copy)
        # Subnormals of float16 are 6e-8 apart: rounded, and four times as large.
        torch.testing.assert_close(b.float(), -4 * copy.float(), rtol=1e-3, atol=2e-7)
        assert torch.equal(c, copy)
        assert len({x.data_ptr() for x in (a, b, c)}) == 3
    assert names == ["count_kernel", "fused_kernel", *["backward_kernel"] * 3]


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"normalizer": 3.0},
        {"normalizer": torch.tensor(3.0)},
        {"token_weight": torch.tensor([0.5, 2.0, 0.0, 1.0])},
        {"label_smoothing": 1.0, "z_loss": 0.1},
    ],
    ids=lambda options: ", ".join(options),
)
def test_what_autograd_brings_is_what_was_expected(machine, names, options):
    terms, target = [random_logits(4, 131, dtype=H), random_logits(4, 131)], torch.tensor([3, IGNORE, 5, 9])
    written: list[bool] = []
    backward = launches.backward

    def noted(logits: Sum, target: Tensor, its: RowSlopes, *rest: Any) -> Launch:
        written.append(its.written is not None and torch.equal(its.g, its.written))
        return backward(logits, target, its, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "backward", noted)
        check(terms, target, "triton", **options)
    assert names[-2:] == ["fused_kernel", "backward_kernel"]
    assert written == [True]


@pytest.mark.parametrize("N", [1, 5, 2048, 4099])
def test_rows_that_count(machine, N):
    target = random_target(N, V=9, ignored=0.4)
    target[-1] = 3
    for ignore_index, rows in ((IGNORE, int((target != IGNORE).sum())), (3, int((target != 3).sum()))):
        number, reciprocal = machine.backend.counted(target, ignore_index, F)
        assert float(number) == max(1, rows)
        assert torch.equal(reciprocal, torch.ones(()) / number)
    assert machine.backend.counted(torch.full((N,), 3), 3, F)[0] == 1


@triton.jit
def exponentials(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    whole, less = numerics.exp_and_expm1(tl.load(x_ptr + at))
    tl.store(out_ptr + at, whole)
    tl.store(out_ptr + BLOCK + at, less)


def test_exponential_and_what_it_is_less_one_are_exact_to_2_units(machine):
    size = 1 << 14
    x = torch.linspace(-86.9, 20, size)
    x[: size // 2] = -torch.linspace(-40, 1, size // 2).exp()
    x[:6] = torch.tensor([0.0, -88.0, -math.inf, math.inf, math.nan, 89.0])
    out = torch.empty(2 * size)
    machine.launch(exponentials, {"x_ptr": x, "out_ptr": out}, BLOCK=size)
    ends = torch.tensor([1.0, 0.0, 0.0, math.inf, math.nan, math.inf])
    torch.testing.assert_close(out[:6], ends, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out[size : size + 6], ends - 1, rtol=0, atol=0, equal_nan=True)
    for got, exact in ((out[6:size], x[6:].double().exp()), (out[size + 6 :], x[6:].double().expm1())):
        assert float(((got.double() - exact).abs() / exact.abs()).max()) < 2 * 2**-24
