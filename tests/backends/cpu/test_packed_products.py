"""Products with packed weights at every instruction set, against float64 and, of int8, against integers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from auxkern.core.packed import PackedWeight
from auxkern.ops import packed as ops
from auxkern.ops.packed import pack, packed_linear
from tests.support.cases import DTYPES, FLOAT32_ULP, generator
from tests.support.instruction_sets import EACH, substituted
from tests.support.packed_rows import assert_rows_stand_alone

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (rows, inputs, outputs): rows to each side of a tile, ends of pairs, fours, groups, blocks and panels.
SHAPES = [
    (1, 1, 1),
    (2, 3, 17),
    (5, 17, 3),
    (12, 31, 31),
    (13, 64, 64),
    (64, 576, 65),
    (193, 31, 17),
    (3, 1537, 48),
    (1, 576, 576),
    (7, 130, 1537),
]
GROUPS = [(64, 64), (32, 64), (64, 32), (0, 0), (0, 64), (64, 0), (4, 4)]
COMPUTES = ["float32", "bfloat16", "int8"]
TORCHS = {
    "identity": lambda z: z,
    "silu": F.silu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}
# torch's own two lose the tail in 1 + erf and 1 + tanh, in float64 too.
EXACT = TORCHS | {
    "gelu_tanh": lambda z: z * torch.sigmoid((8 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)),
    "gelu": lambda z: z / 2 * torch.special.erfc(-z / 2**0.5),
}


@pytest.fixture(params=EACH)
def kernels(request, monkeypatch):
    """Every instruction set in turn."""
    return substituted(request.param, monkeypatch)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def operands(x: Tensor, weight: Tensor, compute: str) -> tuple[Tensor, Tensor]:
    """What is multiplied, in float64."""
    if compute == "bfloat16":
        x, weight = x.bfloat16(), weight.bfloat16()
    return x.double(), weight.double()


def assert_exact(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, compute: str = "float32"
) -> None:
    x, weight = operands(x, weight, compute)
    exact, size = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    # Sums of 128 terms and of their sums, whose rounding errors partly cancel.
    assert ((y - exact).abs() <= 8 * FLOAT32_ULP * size).all()


def quantised(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Rows (R, K) as integers (R, K) and scales (R, groups), the groups being runs of K."""
    runs = x.float().split(group or x.shape[1], dim=1)
    largest = torch.stack([run.abs().amax(1) for run in runs], 1)
    inverses = torch.tensor(127.0) / largest  # 127 / tensor would be a product with a reciprocal
    integers = [torch.round(run * inverse[:, None]) for run, inverse in zip(runs, inverses.T, strict=True)]
    return torch.cat(integers, 1).nan_to_num(0.0).long(), largest / 127


def by_integers(x: Tensor, weight: Tensor, group: int, row_group: int) -> Tensor:
    """(M, N): exact sums of integers over runs of k, each scaled in float32, added in turn."""
    K = x.shape[1]
    group, row_group = group or K, row_group or K
    (a, a_scales), (b, b_scales) = quantised(x, row_group), quantised(weight, group)
    total = torch.zeros(x.shape[0], weight.shape[0])
    run = min(group, row_group)
    for begin in range(0, K, run):
        exact = (a[:, begin : begin + run] @ b[:, begin : begin + run].T).float()
        total += exact * a_scales[:, begin // row_group, None] * b_scales[:, begin // group]
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_floats(kernels, shape, compute, dtype):
    M, K, N = shape
    x, weight, bias = normal(M, K, seed=1), normal(N, K, seed=2).to(dtype), normal(N, seed=3)
    packed = pack(weight, compute)
    assert packed.compute == compute
    assert_exact(packed_linear(x, packed), x, weight, compute=compute)
    assert_exact(packed_linear(x, packed, bias), x, weight, bias, compute)


@pytest.mark.parametrize("K", [576, 1536, 4096])
def test_float32_is_as_exact_as_torch(kernels, K):
    x, weight = normal(64, K, seed=1), normal(256, K, seed=2)
    exact = x.double() @ weight.double().T

    def error(y: Tensor) -> float:
        return float((y - exact).square().mean().sqrt())

    # The mean over 16,384 results has no luck left in it; one rounding of a result is allowed.
    assert error(packed_linear(x, pack(weight))) <= error(F.linear(x, weight)) + FLOAT32_ULP * K**0.5


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_bytes_are_exact(kernels, shape, groups):
    M, K, N = shape
    group, row_group = groups
    x, weight, bias = normal(M, K, seed=1), normal(N, K, seed=2), normal(N, seed=3)
    packed = pack(weight, "int8", group=group, row_group=row_group)
    expected = by_integers(x, weight, group, row_group)
    assert torch.equal(packed_linear(x, packed), expected)
    assert torch.equal(packed_linear(x, packed, bias), expected + bias)


def test_the_largest_integer_sums_do_not_overflow(kernels):
    x = torch.ones(2, 65_536)
    x[1] = -1
    weight = torch.ones(3, 65_536)
    weight[1] = -1
    y = packed_linear(x, pack(weight, "int8", group=0))
    assert torch.equal(
        y, torch.tensor([[1.0, -1, 1], [-1, 1, -1]]) * (127 * 127 * 65_536 * (1 / 127) * (1 / 127))
    )


def test_bytes_stay_close_to_the_product(kernels):
    """Of int8, what quantising itself costs: two operands, each rounded to half a step of 1 / 127."""
    x, weight = normal(32, 576, seed=1), normal(96, 576, seed=2)
    exact = x.double() @ weight.double().T
    error = (packed_linear(x, pack(weight, "int8")) - exact).square().mean().sqrt()
    steps = [quantised(operand, 64)[1].square().mean() for operand in (x, weight)]
    # A rounding error is uniform over a step, and meets a number of variance 1; 1.1 for luck.
    assert error <= 1.1 * (576 / 12 * sum(steps)).sqrt()


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_half_weight_is_packed_as_its_numbers(kernels, compute):
    x, weight = normal(5, 70, seed=1), normal(33, 70, seed=2).half()
    assert torch.equal(
        packed_linear(x, pack(weight, compute)), packed_linear(x, pack(weight.float(), compute))
    )


@pytest.mark.parametrize("compute", COMPUTES)
def test_strides_are_honoured(kernels, compute):
    weight = normal(22, 100, seed=2)[1::2, 3:73]
    x = normal(6, 90, seed=1)[::2, 5:75]
    expected = packed_linear(x.contiguous(), pack(weight.contiguous(), compute))
    assert torch.equal(packed_linear(x, pack(weight, compute)), expected)
    across = weight.T.contiguous().T  # contiguous in its rows, as GPT-2's layers have it
    assert torch.equal(packed_linear(x.T.contiguous().T, pack(across, compute)), expected)
    wide = torch.full((3, 40), torch.nan)
    kernels.packed_linear(x.contiguous(), pack(weight, compute), None, wide[:, 7:18], False)
    assert torch.equal(wide[:, 7:18], expected)
    assert wide[:, :7].isnan().all()
    assert wide[:, 18:].isnan().all()


@pytest.mark.parametrize("compute", COMPUTES)
def test_it_is_added_to_what_stands_there(kernels, compute):
    x, weight, bias = normal(5, 70, seed=1), normal(35, 70, seed=2), normal(35, seed=3)
    packed, before = pack(weight, compute), normal(5, 35, seed=4)
    y = before.clone()
    kernels.packed_linear(x, packed, bias, y, True)
    assert torch.equal(y, packed_linear(x, packed, bias) + before)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("columns", [1, 16, 30, 95])
def test_the_first_columns_alone(kernels, compute, columns):
    x, packed, bias = normal(14, 70, seed=1), pack(normal(99, 70, seed=2), compute), normal(99, seed=3)
    y = torch.full((14, columns), torch.nan)
    kernels.packed_linear(x, packed, bias, y, False)
    assert torch.equal(y, packed_linear(x, packed, bias)[:, :columns])


@pytest.mark.parametrize("compute", COMPUTES)
def test_weights_follow_each_other(kernels, compute):
    x, weight = normal(9, 72, seed=1), normal(50, 72, seed=2)
    together = packed_linear(x, pack(weight.split([3, 17, 30]), compute))
    assert torch.equal(together, packed_linear(x, pack(weight, compute)))


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize(("M", "inner"), [(1, 5), (4, 16), (14, 50), (25, 72)])
def test_gates(kernels, compute, M, inner):
    x, weight, bias = normal(M, 68, seed=1), normal(2 * inner, 68, seed=2), normal(2 * inner, seed=3)
    gated = pack(list(weight.split(inner)), compute, gated=True)
    apart = packed_linear(x, pack(weight, compute), bias)
    y = packed_linear(x, gated, bias)
    assert torch.equal(y, apart[:, :inner] * apart[:, inner:])
    silu = packed_linear(x, gated, bias, activation="silu")
    exact = F.silu(apart[:, :inner].double()) * apart[:, inner:]
    # A sigmoid has an exponential within 2 ulp and two divisions' and products' roundings behind it.
    assert ((silu - exact).abs() <= 4 * FLOAT32_ULP * exact.abs() + 1e-36).all()


@pytest.mark.parametrize("activation", TORCHS)
def test_activations(kernels, activation):
    z = torch.cat([torch.linspace(-80, 100, 4001), torch.logspace(-30, 1, 300), -torch.logspace(-30, 1, 300)])
    y = packed_linear(z[:, None], pack(torch.ones(1, 1)), activation=activation)[:, 0]
    exact = EXACT[activation](z.double())
    # 4 roundings each of an exponent, which are as much larger in its exponential, and behind it; and
    # results below float32's normal numbers.
    exponent = (z / exact).abs().log().clamp(max=100)
    assert ((y - exact).abs() <= 4 * (1 + exponent) * FLOAT32_ULP * exact.abs() + 2e-38).all()
    torchs = (TORCHS[activation](z) - exact).abs()
    assert (y - exact).abs().mean() <= torchs.mean() + FLOAT32_ULP * exact.abs().mean() / 8
    odd = packed_linear(
        torch.tensor([[torch.nan], [torch.inf]]), pack(torch.ones(1, 1)), activation=activation
    )
    assert odd[0].isnan()
    assert odd[1] == torch.inf


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_row_does_not_depend_on_the_batch_its_order_or_the_threads(kernels, compute, threads):
    assert_rows_stand_alone(pack(normal(150, 330, seed=2), compute), normal(150, seed=3))


def test_every_instruction_set_has_the_same_bytes_and_results_of_bytes():
    x, weight, bias = normal(14, 330, seed=1), normal(150, 330, seed=2), normal(150, seed=3)
    expected = packed_linear(x, pack(weight, "int8", gated=True), bias, activation="silu")
    packed = {compute: pack(weight, compute) for compute in COMPUTES}
    ran = 0
    for isa in EACH:
        with pytest.MonkeyPatch.context() as monkeypatch:
            try:
                substituted(isa, monkeypatch)
            except pytest.skip.Exception:
                continue
            ran += 1
            for compute in COMPUTES:
                assert torch.equal(pack(weight, compute).values, packed[compute].values)
                assert torch.equal(pack(weight, compute).scales, packed[compute].scales)
            gated = pack(weight, "int8", gated=True)
            assert torch.equal(packed_linear(x, gated, bias, activation="silu"), expected)
    assert ran >= 1


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_spoils_itself_alone(kernels, compute, value):
    x, packed = normal(15, 150, seed=1), pack(normal(33, 150, seed=2), compute)
    clean = packed_linear(x, packed)
    x[4, 77] = value
    y = packed_linear(x, packed)
    assert not y[4].isfinite().any()
    if compute == "int8":
        assert y[4].isnan().all()
    rest = [*range(4), *range(5, 15)]
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_kept(kernels, compute):
    x, weight = normal(9, 50, seed=1), normal(33, 50, seed=2)
    clean = packed_linear(x, pack(weight, compute))
    weight[11, 3], weight[17, 49] = torch.nan, torch.inf
    y = packed_linear(x, pack(weight, compute))
    hit = torch.zeros(33, dtype=torch.bool)
    hit[[11, 17]] = True
    assert not y[:, hit].isfinite().any()
    assert torch.equal(y[:, ~hit], clean[:, ~hit])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_int8_refuses_weights_that_are_not_finite(kernels, value):
    weight = normal(33, 150, seed=2)
    weight[32, 149] = value
    with pytest.raises(ValueError, match="NaN or infinite values, which int8 cannot keep"):
        pack(weight, "int8")


@pytest.mark.parametrize("compute", COMPUTES)
def test_zeros_give_the_bias(kernels, compute):
    x, weight, bias = normal(9, 150, seed=1), normal(33, 150, seed=2), normal(33, seed=3)
    x[4] = 0
    weight[20] = 0
    y = packed_linear(x, pack(weight, compute), bias)
    assert torch.equal(y[4], bias)
    assert torch.equal(y[:, 20], bias[20].expand(9))
    # So small that a scale has no reciprocal: zeros, not what an infinite one would make of them.
    assert torch.equal(packed_linear(x * 1e-38, pack(weight, "int8")), torch.zeros(9, 33))


def test_leading_shapes_and_empty_ones(kernels):
    x, packed = normal(2, 3, 4, 20, seed=1), pack(normal(6, 20, seed=2))
    y = packed_linear(x, packed)
    assert y.shape == (2, 3, 4, 6)
    assert torch.equal(y.view(-1, 6), packed_linear(x.view(-1, 20), packed))
    assert packed_linear(x[0, 0, 0], packed).shape == (6,)
    assert packed_linear(x[:0], packed).shape == (0, 3, 4, 6)


@pytest.mark.parametrize("compute", COMPUTES)
def test_rows_and_weights_far_apart(kernels, compute, monkeypatch):
    """The memory is only promised by the system; a few pages of it are written."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(3, 2**30, dtype=torch.float16)[:, :20]
    rows = torch.empty(3, 2**29)[:, :20]
    y = torch.empty(3, 2**29)[:, :3]
    for row in range(3):
        far[row], rows[row] = normal(20, seed=row).half(), normal(20, seed=9 + row)
    packed = pack(far, compute)
    kernels.packed_linear(rows, packed, None, y, False)
    assert torch.equal(y, packed_linear(rows.contiguous(), pack(far.contiguous(), compute)))


def test_panels_beyond_32_bits(monkeypatch):
    """2**31 values and some more, all but the last panel of which are pages that nobody wrote."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    N, K = 2**19 + 16, 4096
    weight, x = normal(16, K, seed=1).half(), normal(1, K, seed=2)
    last = pack(weight)
    values = torch.empty(2 * N * K, dtype=torch.uint8)
    values[-last.values.numel() :] = last.values
    packed = dataclasses.replace(last, N=N, values=values)
    assert torch.equal(packed_linear(x, packed)[:, -16:], packed_linear(x, last))


def test_memory_is_that_of_the_values():
    weight = normal(160, 640, seed=1)
    assert pack(weight).nbytes == 4 * 160 * 640
    assert pack(weight.half()).nbytes == 2 * 160 * 640
    assert pack(weight, "bfloat16").nbytes == 2 * 160 * 640
    assert pack(weight, "int8").nbytes == 160 * 640 + 4 * 160 * 10
    assert pack(weight, "int8", group=0, row_group=64).nbytes == 160 * 640 + 4 * 160


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute": "int4"}, "compute is 'int4'; choose one of 'float32', 'bfloat16', 'int8'"),
        ({"group": 64}, "go with compute='int8', not 'float32'"),
        ({"compute": "int8", "group": 6}, "group is 6 and row_group 6; they must be multiples of 4"),
        ({"compute": "int8", "group": -4}, "group is -4"),
        ({"compute": "int8", "group": 64, "row_group": 40}, "row_group is 40 but group 64"),
        ({"gated": True}, "as many rows of gate"),
    ],
)
def test_refusals_of_pack(options, message):
    with pytest.raises(ValueError, match=message):
        pack(normal(7, 200, seed=1), **options)


def test_refusals_of_weights():
    with pytest.raises(ValueError, match="empty list"):
        pack([])
    with pytest.raises(ValueError, match=r"\[\(3, 4\), \(3, 5\)\]; they must be \(N, K\) with one K"):
        pack([normal(3, 4, seed=1), normal(3, 5, seed=1)])
    with pytest.raises(TypeError, match=r"a weight is torch\.float64 on cpu"):
        pack(normal(3, 4, seed=1).double())
    with pytest.raises(TypeError, match="on meta"):
        pack(torch.empty(3, 4, device="meta"))
    with pytest.raises(ValueError, match="more than 65536"):
        pack(torch.zeros(1, 65_540), "int8", group=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, b: (x[:, :5], b), ValueError, r"\(4, 5\) but the packed weight \(7, 12\)"),
        (lambda x, b: (x, b[:3]), ValueError, r"bias has shape \(3,\); give \(7,\)"),
        (lambda x, b: (x.double(), b), TypeError, r"x has dtype torch\.float64"),
        (lambda x, b: (x.requires_grad_(), b), RuntimeError, "a packed weight makes no gradients"),
        (lambda x, b: (x, b.requires_grad_()), RuntimeError, "a packed weight makes no gradients"),
    ],
)
def test_refusals_of_rows(change, error, message):
    x, bias = change(normal(4, 12, seed=1), normal(7, seed=3))
    with pytest.raises(error, match=message):
        packed_linear(x, pack(normal(7, 12, seed=2)), bias)


def test_an_unknown_activation():
    with pytest.raises(ValueError, match="activation is 'tanh'; choose one of 'identity', 'silu'"):
        packed_linear(normal(4, 12, seed=1), pack(normal(7, 12, seed=2)), activation="tanh")


@pytest.mark.parametrize("compute", COMPUTES)
def test_torch_knows_it_as_an_operator(compute):
    x, packed = normal(4, 12, seed=1), pack(normal(8, 12, seed=2), compute, gated=True)
    given = (x, packed.values, packed.scales, None, packed.kind, _sizes(packed), "silu")
    torch.library.opcheck(torch.ops.auxkern.packed_linear.default, given)

    def product(rows: Tensor) -> Tensor:
        return packed_linear(rows, packed, activation="silu")

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), product(x))


def _sizes(packed: PackedWeight) -> list[int]:
    return [packed.N, packed.K, packed.group, packed.row_group, int(packed.gated)]


def test_this_machine_packs():
    assert ops.pack_refusal() is None
