"""The kernels of output heads on small shapes, interpreted and compiled.

The interpreter cannot multiply bfloat16 matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import auxkern
from auxkern import Head, Logits
from tests.support import shares
from tests.support.cases import IGNORE
from tests.support.heads import D32, B, H, close, exact, heads, ours, run, targets

triton = pytest.importorskip("triton")

from auxkern.backends.triton.heads_loss import launches as heads_loss  # noqa: E402
from auxkern.core.sums import Sum  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("machine", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("V", [1, 7, 127, 129, 200])
@pytest.mark.parametrize("N", [1, 33])
@pytest.mark.parametrize("dtypes", [(D32, D32), (H, H), (H, D32)], ids=["fp32", "fp16", "fp16+fp32"])
def test_shapes_and_dtypes(dtypes, N, V):
    run(heads(N, V, (48, 16), dtypes), targets(N, V))


@pytest.mark.nan
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtypes", [(H, H), (D32, D32)], ids=["fp16", "fp32"])
def test_both_schemes(dtypes, recompute, monkeypatch):
    monkeypatch.setattr(heads_loss, "one_write", lambda *_: not recompute)
    run(heads(33, 200, (48, 32), dtypes), targets(33, 200), label_smoothing=0.1, z_loss=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"label_smoothing": 0.3},
        {"z_loss": 0.05},
        {"chunk_rows": 4},
        {"token_weight": torch.tensor([0.0, 1.0, 2.5, 0.125, 1.0, 1.0, 0.5, 2.0, 1.0])},
        {"reduction": "none", "grad": torch.linspace(-2, 6000, 9)},
        {"return_stats": True},
        {"return_stats": True, "label_smoothing": 0.1, "z_loss": 1e-3},
    ],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("dtype", [H, D32], ids=["fp16", "fp32"])
def test_options(dtype, options):
    given = heads(9, 131, (32, 16), (dtype, dtype), biases=(1, 0))
    run(given, targets(9, 131), **options)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"scales": (1.0, 0.7, -0.7)},
        {"scales": (1.0, 0.0, 2.0)},
        {"scales": (1e-9, 1.0, -3.0), "biases": (1, 1, 1)},
        {"softcaps": (None, 3.0, None), "biases": (0, 1, 1)},
        {"softcaps": (2.0, None, 5.0), "scales": (2.0, 1.0, -1.0)},
        {"softcaps": (2.0, 1.0, 5.0)},
    ],
    ids=str,
)
def test_three_heads(settings, stats):
    given = heads(9, 131, (48, 16, 32), (D32,) * 3, **settings)
    run(given, targets(9, 131), return_stats=stats, label_smoothing=0.1)


def test_four_heads_share_one_accumulator_and_five_go_another_way(machine):
    given = heads(5, 67, (16,) * 5, (H,) * 5)
    run(given[:4], targets(5, 67))
    run(given, targets(5, 67))
    assert machine.backend.heads_refusal(Sum.of(given[:4], 67)) is None
    assert "5 heads" in machine.backend.heads_refusal(Sum.of(given, 67))


def test_wide_heads_take_several_steps_and_a_remainder():
    run(heads(5, 67, (200, 75), (D32, D32)), targets(5, 67))


@pytest.mark.parametrize(
    "dtypes", [(H, H), ((D32, H), (D32, H)), ((H, D32), H)], ids=["half", "parts", "mirrored"]
)
def test_the_widest_tiles(dtypes, monkeypatch):
    """Taken where their width divides the operands'; of targets in the first and in the last slice."""
    monkeypatch.setattr(heads_loss, "one_write", lambda *_: dtypes[0] == H)
    given, y = heads(3, 261, (128, 64), dtypes), torch.tensor([3, 255, 260])
    run(given, y)


def test_strides_and_a_shared_vocabulary():
    given = heads(9, 140, (32, 16), (D32, D32))
    first = Head(given[0].hidden.T.contiguous().T, given[0].weight.T.contiguous().T)
    sliced = Head(torch.randn(9, 40)[:, 3:19], torch.randn(150, 40)[5:145, 1:17])
    run([first, sliced], targets(9, 131), vocab_size=131)


def test_a_sure_target_keeps_its_digits():
    hidden = torch.tensor([[8.0], [17.0], [40.0]]).repeat(1, 16) / 16
    weight = torch.zeros(130, 16)
    weight[77] = 1.0
    given = [Head(hidden, weight)]
    y = torch.tensor([77, 77, 77])
    loss, _, _ = ours(given, y, torch.ones(3), reduction="none")
    # Written as lse - z, float64 has no digit left where z is 40.
    right = torch.log1p(129 * torch.exp(-hidden.double().sum(-1)))
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scales", [(40.3,), (40.3, 0.7)], ids=["one scale", "two scales"])
def test_rows_that_are_sure_of_another_id(scales):
    """Of logits of some hundred the largest must be rounded alike in the loss and where it is made again."""
    given = heads(9, 131, (48, 16)[: len(scales)], (D32,) * len(scales), scales=scales)
    y = targets(9, 131)
    leaves = [Head(h.hidden.clone(), h.weight.clone(), scale=h.scale) for h in given]
    inputs = [x.requires_grad_() for h in leaves for x in (h.hidden, h.weight)]
    z = sum(h.scale * (h.hidden @ h.weight.T) for h in leaves)
    functional.cross_entropy(z, y, ignore_index=IGNORE).backward()
    _, gradients, _ = ours(given, y)
    _, right, _, _ = exact(given, y)
    for gradient, x, its in zip(gradients, inputs, right, strict=True):
        error, torchs = ((g - its).abs().max() / its.abs().max() for g in (gradient, x.grad))
        # Four roundings of the largest entry; what a logit of 400 is rounded by moves it by up to 256.
        assert error <= torchs + 2.0**-22


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_changes_nothing(offset):
    given = heads(5, 131, (16,), (D32,))
    shifted = Head(given[0].hidden, given[0].weight, torch.full((131,), offset))
    y = targets(5, 131)
    plain, moved = ours(given, y)[0], ours([shifted], y)[0]
    # z is rounded to float32 at 1e4.
    torch.testing.assert_close(plain, moved, rtol=0, atol=2 * abs(offset) * 2.0**-23)


def test_small_gradients_survive_float16():
    N, V = 64, 8192
    given = heads(N, V, (16, 16), (H, H))
    y = targets(N, V)
    grad = torch.tensor(65536.0)
    _, found, _ = ours(given, y, grad)
    _, right, _, _ = exact(given, y, grad)
    for a, b in zip(found, right, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 2**-10


@pytest.mark.parametrize("factor", [1.0, 0.0, -3.0, 65536.0])
@pytest.mark.parametrize("dtype", [H, D32], ids=["fp16", "fp32"])
def test_the_gradient_of_the_forward_pass_serves_any_factor(dtype, factor):
    weight = torch.tensor([0.0, 1.0, 2.5, 0.125, 1.0, 1.0, 0.5, 2.0, 1.0])
    given = heads(9, 131, (32, 16), (dtype, dtype), biases=(1, 0))
    given = [Head(h.hidden, h.weight / 64, h.bias) for h in given]
    run(given, targets(9, 131), torch.tensor(factor), token_weight=weight)


def test_two_backwards_of_one_graph():
    given = heads(9, 131, (32, 16), (D32, D32))
    leaves = [x.requires_grad_() for head in given for x in head.tensors.values()]
    loss = auxkern.cross_entropy(given, targets(9, 131), backend="triton")
    loss.backward(torch.tensor(2.0), retain_graph=True)
    first = [x.grad.clone() for x in leaves]
    loss.backward(torch.tensor(-1.0))
    for x, before in zip(leaves, first, strict=True):
        torch.testing.assert_close(x.grad, before / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.nan
def test_bad_rows_spoil_nothing_but_themselves():
    given = heads(5, 131, (16, 16), (D32, D32))
    given[0].hidden[1] = math.nan  # ignored
    given[0].hidden[3] = math.nan
    y = torch.tensor([3, IGNORE, 130, 5, 0])
    loss, gradients, _ = ours(given, y, torch.ones(5), reduction="none")
    assert loss.isnan().tolist() == [False, False, False, True, False]
    assert gradients[0].isnan().any(-1).tolist() == [False, False, False, True, False]
    assert bool((gradients[2][1] == 0).all())
    # Of no weight, the row is as good as ignored.
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    _, gradients, _ = ours(given, y, weight, reduction="none")
    assert not any(bool(g.isnan().any()) for g in gradients)


def _ranging(like: Tensor) -> Tensor:
    """Powers of two that spread a row's entries over 2**-20 to 2**20."""
    return 2.0 ** torch.randint(-20, 21, like.shape, generator=torch.Generator().manual_seed(like.shape[0]))


def _cancelling(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of a row all but a thousandth is taken away again."""
    half = hidden.shape[1] // 2
    hidden[:, half:], weight[:, half:] = hidden[:, :half], -weight[:, :half] * (1 + 1e-3 * weight[:, half:])
    return 30 * hidden, weight


HARD: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "long rows": lambda hidden, weight: (1e4 * hidden, weight / 1e2),
    "cancelling": _cancelling,
    "of any size in a row": lambda hidden, weight: (hidden * _ranging(hidden), weight * _ranging(weight)),
    "very large beside very small": lambda hidden, weight: (1e30 * hidden, 1e-30 * weight),
    "very small beside very large": lambda hidden, weight: (1e-30 * hidden, 1e30 * weight),
    "subnormal beside others": lambda hidden, weight: (
        torch.where(hidden > 0.5, 1e-40 * hidden, hidden),
        torch.where(weight > 0.5, 1e-40 * weight, weight),
    ),
    "the largest that bfloat16 has": lambda hidden, weight: (
        torch.where(torch.arange(96) == 5, 3.38e38 * hidden.sign(), hidden),
        torch.where(torch.arange(96) == 5, 1e-20 * weight, weight),
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_float32_operands_are_as_exact_as_in_torch(name):
    source = torch.Generator().manual_seed(11)
    hidden, weight = (torch.randn(n, 96, generator=source) for n in (5, 70))
    hidden, weight = HARD[name](hidden, weight / math.sqrt(96))
    y = torch.arange(5)
    z = hidden.double() @ weight.double().T
    right = functional.cross_entropy(z, y, reduction="none")
    torchs = (functional.cross_entropy(hidden @ weight.T, y, reduction="none") - right).abs().max()
    loss, _, _ = ours([Head(hidden, weight)], y, torch.ones(5), reduction="none")
    # A sum of 96 products of float32 is up to so much off, whatever cancels; three products of parts in place
    # of six would leave 2**-17.
    size = (hidden.double().abs() @ weight.double().abs().T).max()
    assert (loss - right).abs().max() <= torchs + 2.0**-22 * size


@pytest.mark.nan
def test_infinite_weights_are_infinite_logits():
    """What is left of an infinite entry in parts is NaN, and an infinite part of one times 0 is, too."""
    given = heads(3, 40, (24,), (D32,))[0]
    given.hidden[:, 7] = torch.tensor([1.0, 2.0, -0.5])
    given.weight[5:30, 7] = -math.inf
    row = ours([given], torch.tensor([3, 9, 33]), torch.ones(3), reduction="none")[0]
    z = given.hidden.double() @ given.weight.double().T
    assert bool((z[:2, 5:30] == -math.inf).all() & (z[2, 5:30] == math.inf).all())
    right = functional.cross_entropy(z, torch.tensor([3, 9, 33]), reduction="none")
    assert (math.isfinite(right[0]), float(right[1])) == (True, math.inf)
    torch.testing.assert_close(row[:2].double(), right[:2], rtol=1e-6, atol=0)
    assert not math.isfinite(row[2])


@pytest.mark.nan
def test_infinite_logits():
    given = heads(3, 300, (16,), (D32,))
    bias = torch.full((300,), -math.inf)
    bias[130:140] = 0.5
    row = ours([Head(given[0].hidden, given[0].weight, bias)], torch.tensor([130, 139, 5]), torch.ones(3),
               reduction="none")[0]  # fmt: skip
    assert row.isinf().tolist() == [False, False, True]
    assert not bool(row.isnan().any())


def test_all_rows_ignored():
    loss, gradients, _ = ours(heads(4, 67, (16,), (D32,)), torch.full((4,), IGNORE))
    assert float(loss) == 0
    assert all(bool((g == 0).all()) for g in gradients)


def test_runs_are_bitwise_equal():
    given, y = heads(33, 200, (48, 16), (H, H)), targets(33, 200)
    first, again = ours(given, y), ours(given, y)
    assert torch.equal(first[0], again[0])
    assert all(map(torch.equal, first[1], again[1]))


def test_bfloat16_is_left_to_the_library_in_the_interpreter(machine):
    head = Head(torch.zeros(1, 16, dtype=B), torch.zeros(1, 16))
    refusal = machine.backend.heads_refusal(Sum.of([head], 1))
    assert refusal is None if machine.compiled else "interpreter" in refusal
    run(heads(5, 67, (16,), (D32,)), targets(5, 67))


@pytest.mark.parametrize("name", [name for name in shares.CASES if name != "bfloat16 logits"])
def test_a_shard_is_what_its_ids_add_up_to(name):
    shares.check("triton", name, smoothing=0.1 if "everything" in name or name == "heads" else 0.0)


@pytest.mark.parametrize("lower", [B, H], ids=str)
@pytest.mark.parametrize("dtypes", [(D32, D32), (H, H), (H, D32)], ids=["fp32", "fp16", "fp16+fp32"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_autocast_changes_nothing(softcap, dtypes, lower):
    given, y = heads(9, 200, (48, 16), dtypes, softcaps=(softcap, softcap), biases=(True,)), targets(9, 200)
    outside = ours(given, y)
    with torch.autocast("cpu", dtype=lower):
        under = ours(given, y)
    assert torch.equal(under[0], outside[0])
    assert all(map(torch.equal, under[1], outside[1]))


@pytest.mark.nan
@pytest.mark.parametrize("stats", [False, True])
def test_zero_times_an_infinite_logit_is_nan(stats):
    """In a head's bias and in logits, as on every backend; a capped term of scale 0 takes no part."""
    given, bias = heads(3, 40, (16,), (D32,))[0], torch.zeros(40)
    bias[7] = -math.inf
    y = torch.tensor([1, 2, 3])
    for scaled in (Head(given.hidden, given.weight, bias, 0.0), Logits(bias.expand(3, 40), 0.0)):
        out = auxkern.cross_entropy(
            [given, scaled], y, reduction="none", return_stats=stats, backend="triton"
        )
        assert bool((out[0] if stats else out).isnan().all())
    capped = Logits(bias.expand(3, 40), 0.0, softcap=2.0)
    alone, both = (auxkern.cross_entropy(t, y, backend="triton") for t in (given, [given, capped]))
    close(both, alone.double(), 1e-6)
