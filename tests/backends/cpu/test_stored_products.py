"""Products with weights in the blocks of a GGUF file, against integers and the file's numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from auxkern.core.packed import BLOCK_BYTES, STORED_COMPUTES, StoredRows
from auxkern.ops.packed import pack_stored, packed_linear
from tests.support.cases import FLOAT32_ULP, generator
from tests.support.instruction_sets import EACH, substituted
from tests.support.packed_rows import assert_rows_stand_alone

pytestmark = pytest.mark.usefixtures("poisoned_memory")

KINDS = list(BLOCK_BYTES)
# (rows, inputs, outputs): rows to each side of a tile, one block and many, ends of panels.
SHAPES = [(1, 32, 1), (2, 64, 17), (5, 96, 3), (12, 576, 65), (13, 1536, 48), (29, 32, 160), (193, 64, 31)]


@pytest.fixture(params=EACH)
def kernels(request, monkeypatch):
    """Every instruction set in turn."""
    return substituted(request.param, monkeypatch)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def numbers(kind: str, N: int, K: int, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Integers (N, K), scales and minima (N, K / 32) as a file may hold them, their ends included."""
    random = generator(seed)
    low, high = (-128, 128) if kind == "Q8_0" else (0, 16)
    q = torch.randint(low, high, (N, K), generator=random)
    q[0, :2], q[-1, -2:] = torch.tensor([low, high - 1]), torch.tensor([high - 1, low])
    d, m = torch.randn(2, N, K // 32, generator=random).mul(0.1).half()
    return q, d, m


def stored(kind: str, q: Tensor, d: Tensor, m: Tensor) -> StoredRows:
    """The blocks of these numbers."""
    N, K = q.shape
    q = q.view(N, -1, 32)
    values = q.to(torch.int8).view(torch.uint8)
    if kind != "Q8_0":
        values = (q[..., :16] | q[..., 16:] << 4).to(torch.uint8)
    halves = [d, m] if kind == "Q4_1" else [d]
    scales = torch.stack(halves, -1).view(torch.uint8).view(N, K // 32, -1)
    return StoredRows(kind, torch.cat([scales, values], -1).view(N, -1))


def weight(kind: str, N: int, K: int, seed: int = 2) -> StoredRows:
    return stored(kind, *numbers(kind, N, K, seed))


def rounded(x: Tensor, row_group: int) -> tuple[Tensor, Tensor]:
    """Rows (M, K) as integers, and the scale of each block of 32."""
    runs = x.split(row_group or x.shape[1], dim=1)
    largest = torch.stack([run.abs().amax(1) for run in runs], 1)
    inverses = torch.tensor(127.0) / largest  # 127 / tensor would be a product with a reciprocal
    integers = [torch.round(run * inverse[:, None]) for run, inverse in zip(runs, inverses.T, strict=True)]
    every = (largest / 127).repeat_interleave((row_group or x.shape[1]) // 32, 1)
    return torch.cat(integers, 1).nan_to_num(0.0).long(), every[:, : x.shape[1] // 32]


def by_integers(x: Tensor, kind: str, of: tuple[Tensor, Tensor, Tensor], row_group: int = 32) -> Tensor:
    """(M, N): exact sums of integers over each block, scaled in float32, added in turn."""
    q, d, m = of
    q = q - 8 if kind == "Q4_0" else q
    a, scales = rounded(x, row_group)
    total = torch.zeros(x.shape[0], q.shape[0])
    for block in range(x.shape[1] // 32):
        part = slice(32 * block, 32 * block + 32)
        scale = scales[:, block, None]
        term = (a[:, part] @ q[:, part].T).float() * scale * d[:, block].float()
        if kind == "Q4_1":
            term = term + a[:, part].sum(1)[:, None].float() * scale * m[:, block].float()
        total += term
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_widened_as_the_format_says(kind):
    N, K = 5, 96
    q, d, m = numbers(kind, N, K)
    scale, minimum = d.repeat_interleave(32, 1).double(), m.repeat_interleave(32, 1).double()
    exact = (q - 8 * (kind == "Q4_0")) * scale + (minimum if kind == "Q4_1" else 0)
    one = stored(kind, q, d, m)
    assert (one.N, one.K) == (N, K)
    # A product of 11 and 8 bits is exact in float32; its sum with a minimum is rounded once.
    assert torch.equal(one.widened(), exact.float())
    assert torch.equal(one.of(torch.tensor([3, 0])).widened(), exact[[3, 0]].float())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_the_gguf_package(kind):
    gguf = pytest.importorskip("gguf")
    of = getattr(gguf.GGMLQuantizationType, kind)
    blocks = gguf.quants.quantize(normal(7, 160, seed=1).numpy(), of)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, of))
    assert torch.equal(StoredRows(kind, torch.from_numpy(blocks)).widened(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_exact(kernels, shape, kind):
    M, K, N = shape
    x, bias, of = normal(M, K, seed=1), normal(N, seed=3), numbers(kind, N, K)
    packed = pack_stored(stored(kind, *of), "int8")
    assert (packed.kind, packed.compute, packed.N, packed.K) == (kind, "int8", N, K)
    expected = by_integers(x, kind, of)
    assert torch.equal(packed_linear(x, packed), expected)
    assert torch.equal(packed_linear(x, packed, bias), expected + bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_multiplies_the_widened_numbers(kernels, shape, kind):
    M, K, N = shape
    x, bias, of = normal(M, K, seed=1), normal(N, seed=3), weight(kind, N, K)
    packed = pack_stored(of)
    assert (packed.stored_kind, packed.compute, packed.nbytes % of.blocks.shape[1]) == (kind, "float32", 0)
    widened = of.widened().double()
    exact, size = x.double() @ widened.T, x.double().abs() @ widened.abs().T
    # Sums of 128 terms and of their sums, whose rounding errors partly cancel, as of a float32 weight.
    assert ((packed_linear(x, packed) - exact).abs() <= 8 * FLOAT32_ULP * size).all()
    assert torch.equal(packed_linear(x, packed, bias), packed_linear(x, packed) + bias)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_widens_as_the_format_says(kernels, kind):
    """One product a sum: the file's numbers themselves, to the last bit."""
    of = weight(kind, 40, 96)
    assert torch.equal(packed_linear(torch.eye(96), pack_stored(of)), of.widened().T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_group", [64, 96, 0])
def test_wider_groups_of_rows(kernels, kind, row_group):
    x, of = normal(7, 224, seed=1), numbers(kind, 33, 224)
    packed = pack_stored(stored(kind, *of), "int8", row_group=row_group)
    assert torch.equal(packed_linear(x, packed), by_integers(x, kind, of, row_group))


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_integers(kernels, kind):
    x = torch.ones(2, 64)
    x[1] = -1
    high = 127 if kind == "Q8_0" else 15
    q, one = torch.full((2, 64), high), torch.ones(2, 2, dtype=torch.float16)
    q[1] = -128 if kind == "Q8_0" else 0
    expected = by_integers(x, kind, (q, one, one))
    assert torch.equal(packed_linear(x, pack_stored(stored(kind, q, one, one), "int8")), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_rows_are_rounded(kernels, kind):
    x, of = normal(32, 576, seed=1), weight(kind, 96, 576)
    widened = of.widened()
    exact = x.double() @ widened.double().T
    error = (packed_linear(x, pack_stored(of, "int8")) - exact).square().mean().sqrt()
    step = rounded(x, 32)[1].square().mean()
    # A rounding error of a row is uniform over a step, and meets the weight's numbers; 1.1 for luck.
    assert error <= 1.1 * (576 / 12 * step * widened.square().mean()).sqrt()


@pytest.mark.parametrize("compute", STORED_COMPUTES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "inner"), [(1, 5), (14, 50), (25, 72)])
def test_gates(kernels, compute, kind, M, inner):
    x, bias, of = normal(M, 64, seed=1), normal(2 * inner, seed=3), weight(kind, 2 * inner, 64)
    halves = [of.of(slice(inner)), of.of(slice(inner, None))]
    y = packed_linear(x, pack_stored(halves, compute, gated=True), bias)
    apart = packed_linear(x, pack_stored(of, compute), bias)
    assert torch.equal(y, apart[:, :inner] * apart[:, inner:])


@pytest.mark.parametrize("compute", STORED_COMPUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_follow_each_other_wherever_they_stand(kernels, compute, kind):
    x, of = normal(9, 96, seed=1), weight(kind, 50, 96)
    expected = packed_linear(x, pack_stored(of, compute))
    parts = [of.of(slice(3)), of.of(torch.arange(3, 20)), of.of(slice(20, None))]
    assert torch.equal(packed_linear(x, pack_stored(parts, compute)), expected)
    wide = torch.zeros(50, 3 * of.blocks.shape[1], dtype=torch.uint8)
    wide[:, : of.blocks.shape[1]] = of.blocks
    apart = StoredRows(kind, wide[:, : of.blocks.shape[1]])
    assert torch.equal(packed_linear(x, pack_stored(apart, compute)), expected)


@pytest.mark.parametrize("compute", STORED_COMPUTES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 16, 30, 95])
def test_the_first_columns_alone_and_added(kernels, compute, kind, columns):
    x, packed, bias = normal(14, 64, seed=1), pack_stored(weight(kind, 99, 64), compute), normal(99, seed=3)
    whole, y = packed_linear(x, packed, bias)[:, :columns], torch.full((14, columns), torch.nan)
    kernels.packed_linear(x, packed, bias, y, False)
    assert torch.equal(y, whole)
    kernels.packed_linear(x, packed, bias, y, True)
    assert torch.equal(y, whole + whole)


@pytest.mark.parametrize("compute", STORED_COMPUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_batch_its_order_or_the_threads(kernels, compute, kind, threads):
    assert_rows_stand_alone(pack_stored(weight(kind, 150, 320), compute), normal(150, seed=3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_spoils_itself_alone(kernels, kind, value):
    x, packed = normal(15, 160, seed=1), pack_stored(weight(kind, 33, 160), "int8")
    clean = packed_linear(x, packed)
    x[4, 77] = value
    y = packed_linear(x, packed)
    assert y[4].isnan().all()
    rest = [*range(4), *range(5, 15)]
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("compute", STORED_COMPUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_give_the_bias(kernels, compute, kind):
    x, bias, (q, d, m) = normal(9, 96, seed=1), normal(33, seed=3), numbers(kind, 33, 96)
    x[4], d[20], m[20] = 0, 0, 0
    y = packed_linear(x, pack_stored(stored(kind, q, d, m), compute), bias)
    assert torch.equal(y[4], bias)
    assert torch.equal(y[:, 20], bias[20].expand(9))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_damaged_scale_is_refused(kernels, kind, value):
    q, d, m = numbers(kind, 33, 160)
    (m if kind == "Q4_1" else d)[32, 4] = value
    with pytest.raises(ValueError, match=f"a {kind} weight has scales or minima that are NaN or infinite"):
        pack_stored(stored(kind, q, d, m))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_of_the_file(kind):
    of = weight(kind, 160, 640)
    assert pack_stored(of, "int8").nbytes == of.blocks.numel()


def test_tiny_scales_keep_their_places(kernels):
    """Half precision's subnormal numbers, down to 2**-24."""
    q, d, m = numbers("Q8_0", 16, 32)
    d[:, 0] = torch.arange(1, 17) * 2.0**-24
    x = normal(3, 32, seed=1)
    expected = by_integers(x, "Q8_0", (q, d, m))
    assert torch.equal(packed_linear(x, pack_stored(stored("Q8_0", q, d, m), "int8")), expected)
    assert (expected != 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda one: [], ValueError, "empty list"),
        (
            lambda one: [one, weight("Q8_0", 4, 64)],
            ValueError,
            r"kinds \['Q4_1', 'Q8_0'\]; it must be one of",
        ),
        (lambda one: StoredRows("Q4_1", one.blocks.int()), TypeError, r"blocks are torch\.int32 on cpu"),
        (lambda one: StoredRows("Q4_1", one.blocks[:, :30]), ValueError, r"\[\(7, 30\)\]; .*blocks \* 20"),
        (lambda one: [one, weight("Q4_1", 4, 96)], ValueError, r"\[\(7, 40\), \(4, 60\)\]"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        pack_stored(change(weight("Q4_1", 7, 64)))


def test_refusals_of_options():
    with pytest.raises(
        ValueError, match="compute is 'bfloat16'; stored blocks are multiplied in float32 or int8"
    ):
        pack_stored(weight("Q4_1", 7, 64), "bfloat16")
    with pytest.raises(ValueError, match="row_group goes with compute='int8'"):
        pack_stored(weight("Q4_1", 7, 64), row_group=32)
    with pytest.raises(ValueError, match="row_group is 48; it must be a multiple of 32"):
        pack_stored(weight("Q4_1", 7, 64), "int8", row_group=48)
    with pytest.raises(ValueError, match="as many rows of gate"):
        pack_stored(weight("Q4_1", 7, 64), gated=True)


@pytest.mark.parametrize("compute", STORED_COMPUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_knows_it_as_an_operator(compute, kind):
    x, packed = normal(4, 64, seed=1), pack_stored(weight(kind, 8, 64), compute, gated=True)

    def product(rows: Tensor) -> Tensor:
        return packed_linear(rows, packed, activation="silu")

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), product(x))
        gate, up = packed_linear(x, pack_stored(weight(kind, 8, 64), compute)).chunk(2, 1)
    exact = F.silu(gate.double()) * up
    # A sigmoid has an exponential within 2 ulp and two divisions' and products' roundings behind it.
    assert ((product(x) - exact).abs() <= 4 * FLOAT32_ULP * exact.abs() + 1e-36).all()
