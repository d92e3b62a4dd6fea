"""The kernels of logits on small shapes: interpreted, and as compiled for GPUs.

The interpreter must be switched on before Triton is imported: ``test_interpreted.py`` runs these files in a
process that has it. There it is the arithmetic that is proved; in the executor of PTX also what a GPU makes
of it, and that no access is out of bounds, races or reads what nobody wrote.
"""

from __future__ import annotations

import math
import mmap
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Logits
from tests.support.cases import (
    HARD,
    IGNORE,
    check,
    confident_logits,
    formula,
    hard_logits,
    ours,
    random_logits,
    random_target,
)
from tests.support.machines import INTERPRETED

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from auxkern.backends.triton.device import numerics  # noqa: E402
from auxkern.backends.triton.logits_loss import launches as logits_loss  # noqa: E402
from auxkern.core.loss import Loss, RowSlopes  # noqa: E402
from auxkern.core.sums import Sum  # noqa: E402
from tests.support.gpus import with_multiprocessors  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("machine", "poisoned_memory"),
    # Columns that no one keeps may overflow, as they may on a GPU; NumPy warns of them.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN slice) encountered:RuntimeWarning"),
]

H, B, F = torch.float16, torch.bfloat16, torch.float32
SUMS = {"fp32": (F,), "fp16+fp32": (H, F), "bf16+fp16": (B, H), "3 terms": (F, B, H)}
EVERYTHING: dict[str, Any] = {"return_stats": True, "label_smoothing": 0.1, "z_loss": 1e-3}


def run(terms: list[Any], target: Tensor, **options: Any) -> Any:
    """``cases.check``, but for bfloat16 gradients: the interpreter cuts them off, a GPU rounds."""
    dtypes = [term.values.dtype if isinstance(term, Logits) else term.dtype for term in terms]
    wanted = options.pop("wanted", range(len(terms)))
    cut_off = [i for i in wanted if dtypes[i] == B and INTERPRETED]
    if cut_off:
        result = ours(terms, target, "triton", wanted=cut_off, **options)
        exact = formula(terms, target, **{k: v for k, v in options.items() if k != "return_stats"})
        for i in cut_off:
            gradient = result.gradients[i].double()
            torch.testing.assert_close(gradient, exact.gradients[i], rtol=2**-7, atol=1e-7)
    return check(terms, target, "triton", wanted=[i for i in wanted if i not in cut_off], **options)


def logits(dtypes: tuple[torch.dtype, ...], *shape: int) -> list[Tensor]:
    return [random_logits(*shape, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]


# --- shapes, dtypes, options ------------------------------------------------------------------


# 2,049 is one more than a tile of two 16-bit terms; 1 and 7 are shorter than a vector.
@pytest.mark.parametrize("V", [1, 7, 127, 1031, 2049])
@pytest.mark.parametrize("dtypes", SUMS.values(), ids=SUMS)
def test_shapes_and_dtypes(dtypes, V):
    for N in (1, 5):
        target = random_target(N, V=V, ignored=0.2)
        run(logits(dtypes, N, V), target, **EVERYTHING)


@pytest.mark.parametrize("V", [4096, 4097, 8200])
def test_tiles_of_one_half_precision_term(V):
    run(logits((H,), 3, V), torch.tensor([V - 1, 0, V // 2]))


def test_eight_terms():
    dtypes = (F, H, B, F, H, B, F, H)
    scales = (1.0, -0.5, 2.0, 0.25, 1.0, -1.0, 0.0, 0.5)
    terms = [Logits(x, s) for x, s in zip(logits(dtypes, 3, 1031), scales, strict=True)]
    run(terms, random_target(3, V=1031), return_stats=True)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "none", "grad_output": torch.tensor([0.5, -2.0, 0.0, 60000.0])},
        {"label_smoothing": 0.3},
        {"label_smoothing": 1.0},
        {"z_loss": 0.01},
        {"token_weight": torch.tensor([0.0, 1.0, 2.5, 0.1])},
        {"normalizer": 7},
        {"ignore_index": 3},
        {"vocab_size": 257},
        {"vocab_size": 257, **EVERYTHING},
        {"wanted": [1]},
        {"wanted": [0]},
        {"wanted": []},
        {"grad_output": torch.tensor(65536.0)},
    ],
    ids=lambda options: ", ".join(f"{k}" for k in options),
)
def test_options(options):
    target = torch.tensor([256, 3, 0, 77])
    run(logits((H, F), 4, 301), target, **options)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_scale_and_softcap(softcap):
    lm, aux = logits((H, F), 4, 1031)
    terms = [Logits(lm, scale=-1.5, softcap=softcap), Logits(aux, scale=0.7, softcap=2 * softcap)]
    run(terms, random_target(4, V=1031), return_stats=True)


def test_softcap_slope_of_large_logits_does_not_cancel():
    # tanh(12)**2 rounds to 1 in float32: 1 - 1 would say that nothing can be learned.
    z = torch.tensor([[12.0, -12.0, 0.5, 1e-3]])
    result = run([Logits(z, softcap=1.0)], torch.tensor([1]))
    assert bool((result.gradients[0] != 0).all())


def test_causal_shift():
    terms = logits((F, H), 2, 3, 129)
    run(terms, random_target(2, 3, V=129), shift=True, return_stats=True)


# --- numbers on which careless arithmetic fails -----------------------------------------------


@pytest.mark.nan
@pytest.mark.parametrize("kind", HARD)
def test_hard_logits(kind):
    terms, target = hard_logits(kind, 4, 3000)
    run(terms, target, return_stats=True)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_confident_target_is_as_exact_as_torch(p, offset):
    z, target = confident_logits(4, 1031, p, offset=offset)
    run([z], target)


def test_loss_of_a_sure_model_has_all_its_digits():
    # lse - z[y] and log(1 + x) round to a multiple of 6e-8; here the nll is 1e-6 and less.
    for margin in (10.0, 17.0, 30.0):
        z = random_logits(4, 1031, spread=0.5)
        target = random_target(4, V=1031)
        z.scatter_(-1, target[:, None], 7.0 + margin)
        result = ours([z], target, "triton", return_stats=True, reduction="sum")
        rest = (z.double() - z.double().gather(-1, target[:, None])).scatter(-1, target[:, None], -math.inf)
        exact = rest.exp().sum(-1).log1p()
        torch.testing.assert_close(result.stats.nll.double(), exact, rtol=2e-6, atol=0)
        at_target = result.gradients[0].gather(-1, target[:, None])[:, 0]
        torch.testing.assert_close(at_target.double(), torch.expm1(-exact), rtol=2e-6, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_smoothing_survives_an_offset(offset):
    z, target = confident_logits(4, 1031, 0.9, offset=offset)
    run([z], target, label_smoothing=0.2)


def test_sum_beyond_float16():
    z = torch.full((2, 129), 40000.0, dtype=H)
    z[:, 5] = 39968.0
    run([z, z.clone()], torch.tensor([5, 7]))


def test_float16_gradients_survive_a_mean_over_many_rows():
    # One live row among 8,192 in the mean, scaled as GradScaler does: p / 8192 alone flushes to 0.
    z, target = [0.1 * random_logits(2, 1031, dtype=H)], torch.tensor([3, IGNORE])
    result = run(z, target, normalizer=8192, grad_output=torch.tensor(65536.0))
    assert bool((result.gradients[0][0] != 0).all())


@pytest.mark.nan
def test_tiles_of_minus_infinity():
    z = torch.full((2, 9000), -math.inf)
    z[:, 4100:4110] = random_logits(2, 10)
    run([z, random_logits(2, 9000)], torch.tensor([4100, 4109]), return_stats=True)


@pytest.mark.nan
def test_impossible_target_costs_infinity():
    z = random_logits(2, 129)
    z[0, 5] = -math.inf
    _, stats = auxkern.cross_entropy([z], torch.tensor([5, 5]), return_stats=True, backend="triton")
    assert stats.nll[0] == math.inf
    assert stats.nll[1].isfinite()
    smooth = auxkern.cross_entropy(
        [z], torch.tensor([6, 6]), label_smoothing=0.1, reduction="none", backend="triton"
    )
    assert smooth[0] == math.inf
    assert smooth[1].isfinite()


@pytest.mark.nan
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [5, 2080, 2999])
def test_bad_logit_spoils_its_row_only(bad, column):
    z = random_logits(3, 3000)
    z[1, column] = bad
    target = torch.tensor([1, 5, 2])
    result = ours([z], target, "triton", return_stats=True, reduction="sum", label_smoothing=0.1)
    assert result.stats.nll.isnan().tolist() == [False, True, False]
    assert result.stats.lse.isnan().tolist() == [False, True, False]
    assert result.gradients[0].isnan().any(-1).tolist() == [False, True, False]
    assert result.stats.argmax.tolist() == z.argmax(-1).tolist()


@pytest.mark.nan
def test_row_of_minus_infinity_is_nan_as_in_torch():
    z = random_logits(3, 129)
    z[1] = -math.inf
    row = auxkern.cross_entropy([z], torch.tensor([1, 2, 3]), reduction="none", backend="triton")
    assert row.isnan().tolist() == [False, True, False]


def test_argmax_takes_the_lowest_id_among_equals():
    z = torch.zeros(4, 3000)
    z[0, [2999, 1500, 17]] = 4.0
    z[1, 0] = -0.0
    z[2, [9, 2998]] = 1.0
    target = torch.tensor([2999, 5, 2998, IGNORE])
    _, stats = auxkern.cross_entropy([z], target, return_stats=True, backend="triton")
    assert stats.argmax.tolist() == [17, 0, 9, -1]


@pytest.mark.nan
@pytest.mark.parametrize("dtype", [F, H])
@pytest.mark.parametrize("multiprocessors", [1, 64])
def test_argmax_of_bad_rows_that_begin_anywhere(machine, dtype, multiprocessors):
    # Rows of 3,001 begin at other distances from a boundary; a negative NaN is one, too.
    z = random_logits(1, 6, 3001, dtype=dtype)
    z[0, 0] = -math.inf
    z[0, 1, [2, 2500, 3000]] = torch.tensor([math.nan, -math.nan, math.inf], dtype=dtype)
    z[0, 2, 2998] = -math.nan
    z[0, 3, [0, 1, 3000]] = math.inf
    z[0, 4, :3000] = -math.inf
    rows, launched = logits_loss.forward(
        Sum((Logits(z),), 3001), torch.full((6,), 7), Loss(stats=True), with_multiprocessors(multiprocessors)
    )
    machine.backend.run(launched, z.device)
    assert rows.argmax.tolist() == z[0].argmax(-1).tolist()


# --- rows that do not count -------------------------------------------------------------------


@pytest.mark.nan
def test_ignored_rows_are_not_read():
    z = random_logits(4, 1031)
    z[[0, 3]] = math.nan
    target = torch.tensor([IGNORE, 4, 5, IGNORE])
    result = ours([z], target, "triton", **EVERYTHING)
    assert bool(result.loss.isfinite())
    assert bool((result.gradients[0][[0, 3]] == 0).all())
    assert result.stats.nll[[0, 3]].tolist() == [0, 0]
    assert result.stats.argmax[[0, 3]].tolist() == [-1, -1]


def test_all_rows_ignored():
    terms, target = logits((H, F), 3, 129), torch.full((3,), IGNORE)
    result = ours(terms, target, "triton")
    assert result.loss == 0
    assert all(bool((g == 0).all()) for g in result.gradients)


@pytest.mark.nan
def test_target_out_of_range_is_nan(machine):
    # The operator raises for CPU tensors; on a GPU the check would stop the device.
    z, target = random_logits(1, 4, 129), torch.tensor([5, 129, -1, 2**40])
    loss = Loss(label_smoothing=0.1, stats=True)
    rows = machine.backend.losses(Sum((Logits(z),), 129), target, loss, None, [{}])
    for values in (rows.nll, rows.row_max, rows.smooth, rows.term_nll[0]):
        assert values.isnan().tolist() == [False, True, True, True]
    assert rows.argmax.tolist() == z[0].argmax(-1).tolist()


# --- memory layouts ---------------------------------------------------------------------------


def padded(*shape: int, by: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A [..., :V] view of logits with a padded vocabulary, whose padding is NaN."""
    whole = random_logits(*shape[:-1], shape[-1] + by, dtype=dtype, seed=seed)
    whole[..., shape[-1] :] = math.nan
    return whole[..., : shape[-1]]


LAYOUTS = {
    "padded": lambda: [padded(3, 1031, by=17, dtype=H), padded(3, 1031, by=9, dtype=F, seed=1)],
    "padded beside contiguous": lambda: [padded(3, 1031, by=1, dtype=H), random_logits(3, 1031)],
    "not at a boundary": lambda: [random_logits(3, 1032, dtype=H)[:, 1:], random_logits(3, 1034)[:, 3:]],
    "columns apart": lambda: [random_logits(1031, 3).T, random_logits(3, 2062, dtype=B)[:, ::2]],
    "one row for all": lambda: [random_logits(1, 1031, dtype=H).expand(3, 1031), random_logits(3, 1031)],
    "one column for all": lambda: [random_logits(3, 1).expand(3, 1031), random_logits(3, 1031)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    run(LAYOUTS[layout](), random_target(3, V=1031, ignored=0.2), return_stats=True)


@pytest.mark.parametrize("dtypes", [(H, F), (B, B)])
def test_rows_that_do_not_merge(dtypes):
    # [:, :-1] of (2, 4, V) and (3, 2, V) transposed: each term has its own outer and inner stride.
    sliced = random_logits(2, 4, 131, dtype=dtypes[0])[:, :-1]
    transposed = random_logits(3, 2, 131, dtype=dtypes[1], seed=1).transpose(0, 1)
    run([sliced, transposed], random_target(2, 3, V=131), return_stats=True)


def test_offsets_beyond_32_bits():
    # Rows 2**31 + 8 elements apart, in memory that the system maps only where it is written.
    stride, V = 2**31 + 8, 129
    flat = torch.from_numpy(np.frombuffer(mmap.mmap(-1, 2 * (stride + V)), dtype=np.float16))
    z = flat.as_strided((2, V), (stride, 1))
    z.copy_(random_logits(2, V, dtype=H))
    run([z], torch.tensor([1, V - 1]))
    columns = flat.as_strided((2, 2), (1, stride))
    columns.copy_(random_logits(2, 2, dtype=H, seed=3))
    run([columns, random_logits(2, 2)], torch.tensor([1, 0]))


# --- rows split over programs -----------------------------------------------------------------


@pytest.mark.nan
@pytest.mark.parametrize("multiprocessors", [1, 64])
@pytest.mark.parametrize("dtypes", [(H, F), (F,)])
def test_splits_agree_with_the_formula(machine, dtypes, multiprocessors):
    N, V = 3, 5001
    values = [x[None] for x in logits(dtypes, N, V)]
    target = torch.tensor([V - 1, IGNORE, 2049])
    summed, loss = Sum(tuple(map(Logits, values)), V), Loss(IGNORE, label_smoothing=0.1, stats=True)
    rows, launches = logits_loss.forward(summed, target, loss, with_multiprocessors(multiprocessors))
    assert len(launches) == 2
    machine.backend.run(launches, target.device)
    exact = formula([x[0] for x in values], target)
    assert torch.equal(rows.lse, rows.row_max + rows.log_sum)
    for found, expected in ((rows.nll, exact.nll), (rows.lse, exact.lse), (rows.term_nll, exact.term_nll)):
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    assert rows.argmax.tolist() == exact.argmax.tolist()

    slopes = RowSlopes(torch.ones(N), rows.sums, target != IGNORE, Loss(IGNORE), V)
    gradients = list(map(torch.empty_like, values))
    wanted = [{"values": gradient} for gradient in gradients]
    gradient = logits_loss.backward(summed, target, slopes, wanted, with_multiprocessors(multiprocessors))
    machine.backend.run([gradient], target.device)
    for gradient, expected in zip(
        gradients,
        formula([x[0] for x in values], target, grad_output=None, reduction="sum").gradients,
        strict=True,
    ):
        half_ulp = torch.finfo(gradient.dtype).eps / 2
        torch.testing.assert_close(gradient[0].double(), expected, rtol=half_ulp + 1e-5, atol=6e-8)


def test_two_runs_are_bitwise_equal():
    terms, target = logits((H, F), 2, 9001), torch.tensor([5, 9000])
    first, second = (ours(terms, target, "triton", **EVERYTHING) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    for a, b in zip(first.gradients, second.gradients, strict=True):
        assert torch.equal(a, b)


# --- what a maximum is here -------------------------------------------------------------------


@triton.jit
def _maxima_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, tl.maximum(x, y))
    tl.store(out_ptr + BLOCK + at, tl.minimum(x, y))
    tl.store(out_ptr + 2 * BLOCK, tl.max(x, axis=0))
    tl.store(out_ptr + 2 * BLOCK + 1, tl.min(x, axis=0))


@pytest.mark.nan
def test_maximum_is_that_of_the_machine(machine):
    x, y = torch.tensor([math.nan, 2.0, math.nan, -1.0]), torch.tensor([1.0, math.nan, math.nan, -math.inf])
    out = torch.zeros(10)
    machine.launch(_maxima_kernel, {"x_ptr": x, "y_ptr": y, "out_ptr": out}, BLOCK=4)
    # Once the interpreter's own drops NaN as well, as of Triton 3.9, one run of these files is enough.
    drops = machine.compiled or os.environ.get("AUXKERN_TEST_MAXIMUM") == "drops"
    mixed = [1.0, 2.0] if drops else [math.nan, math.nan]
    expected = torch.tensor([*mixed, math.nan, -1.0, *mixed, math.nan, -math.inf, 2.0, -1.0])
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


# --- functions of numerics.py -----------------------------------------------------------------


@triton.jit
def evaluate(x_ptr, out_ptr, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if WHICH == 0:
        y = numerics.log1p(x)
    elif WHICH == 1:
        y = numerics.tanh(x)
    elif WHICH == 2:
        y = numerics.tanh_slope(x)
    else:
        y = numerics.exp(x)
    tl.store(out_ptr + offsets, y)


def test_functions_are_exact_to_a_few_ulp(machine):
    size = 1 << 14
    positive = torch.cat([torch.tensor([0.0]), torch.linspace(-60, 14, size - 1).exp()])
    both = torch.linspace(-12, 12, size)
    both[: size // 4] = torch.linspace(-40, 0, size // 4).exp()
    slope = 1 / torch.cosh(both.double()) ** 2
    for which, x, exact, ulps in (
        # Compiled: divisions are off by 2 ulp, exponentials as numerics.py says.
        (0, positive, positive.double().log1p(), 6 if machine.compiled else 4),
        # 1 - q**2 is one contracted product and difference; the interpreter rounds it twice.
        (1, both, both.double().tanh(), 5 if machine.compiled else 7.5),
        (2, both, slope, 28 if machine.compiled else 30),  # exp(-24): to 1.22 units for each unit of 24
    ):
        out = torch.empty_like(x)
        machine.launch(evaluate, {"x_ptr": x, "out_ptr": out}, WHICH=which, BLOCK=size)
        assert float(((out.double() - exact).abs() / exact.abs().clamp_min(1e-38)).max()) < ulps * 2**-24


def test_hyperbolic_tangent_of_the_ends_of_its_range(machine):
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-30, -3e38, 60.0])
    out = torch.empty_like(x)
    machine.launch(evaluate, {"x_ptr": x, "out_ptr": out}, WHICH=1, BLOCK=8)
    expected = torch.tensor([0.0, -0.0, 1.0, -1.0, math.nan, 1e-30, -1.0, 1.0])
    torch.testing.assert_close(out, expected, rtol=5 * 2**-24, atol=0, equal_nan=True)
    assert torch.equal(out.signbit()[:4], expected.signbit()[:4])


def test_exponentials_are_exact_to_their_argument(machine):
    size = 1 << 14
    x = torch.linspace(-100, 80, size)
    x[:4] = torch.tensor([0.0, -math.inf, math.inf, math.nan])
    out = torch.empty_like(x)
    machine.launch(evaluate, {"x_ptr": x, "out_ptr": out}, WHICH=3, BLOCK=size)
    torch.testing.assert_close(
        out[:4], torch.tensor([1.0, 0.0, math.inf, math.nan]), rtol=0, atol=0, equal_nan=True
    )
    x, exact = x[4:].double(), x[4:].double().exp()
    # The product x log2(e) is rounded, and log2(e): 1.22 units for each unit of |x|; exp2 is off by 2.
    allowed = (1.22 * x.abs() + 2) * 2**-24 * exact
    # What is not a normal number may be 0.
    allowed = torch.where(exact < 2**-126, exact, allowed)
    assert bool(((out[4:].double() - exact).abs() <= allowed).all())
