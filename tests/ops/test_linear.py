"""Linear layers that are not trained, at every instruction set; the expectation is float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from auxkern.nn import FrozenEmbedding, FrozenLinear, JoinedLinears
from auxkern.ops.linear import linear
from tests.support.cases import DTYPES, FLOAT32_ULP, generator
from tests.support.instruction_sets import EACH, substituted

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (rows, inputs, outputs): one row to more than a block, and ends of vectors, tiles, parts and groups.
SHAPES = [
    (1, 1, 1),
    (1, 64, 8),
    (2, 15, 7),
    (3, 16, 9),
    (4, 17, 33),
    (5, 640, 8),
    (7, 641, 31),
    (3, 1281, 40),
    (64, 576, 65),
    (191, 33, 32),
    (193, 48, 5),
    (386, 20, 3),
]


@pytest.fixture(params=EACH)
def kernels(request, monkeypatch):
    """Every instruction set in turn."""
    return substituted(request.param, monkeypatch, own_products=True)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def assert_exact(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    # Up to K / lanes additions in turn, whose rounding errors partly cancel.
    assert ((y - exact).abs() <= 8 * FLOAT32_ULP * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product(kernels, shape, dtype):
    M, K, N = shape
    x, weight, bias = normal(M, K, seed=1), normal(N, K, seed=2).to(dtype), normal(N, seed=3)
    assert_exact(linear(x, weight, backend="cpu"), x, weight)
    assert_exact(linear(x, weight, bias, backend="cpu"), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_added_to_what_stands_there(kernels, dtype):
    x, weight, before = normal(5, 700, seed=1), normal(19, 700, seed=2).to(dtype), normal(5, 19, seed=3)
    y = before.clone()
    kernels.linear(x, weight, None, y, True)
    assert_exact(y - before, x, weight)


def test_strides_are_honoured(kernels):
    x, weight = normal(6, 90, seed=1)[::2, 5:75], normal(22, 100, seed=2).half()[1::2, 3:73]
    assert_exact(linear(x, weight), x, weight)
    columns = normal(70, 6, seed=3).T  # rows that are not contiguous
    assert_exact(linear(columns, weight), columns, weight)
    across = normal(70, 11, seed=4).T  # a weight that no kernel takes
    assert_exact(linear(x, across), x, across)
    wide = torch.full((3, 40), torch.nan)
    kernels.linear(x, weight, None, wide[:, 7:18], False)
    assert_exact(wide[:, 7:18], x, weight)
    assert wide[:, :7].isnan().all()
    assert wide[:, 18:].isnan().all()


def test_leading_shapes_and_empty_ones(kernels):
    x, weight = normal(2, 3, 4, 20, seed=1), normal(6, 20, seed=2)
    y = linear(x, weight)
    assert y.shape == (2, 3, 4, 6)
    assert_exact(y.view(-1, 6), x.view(-1, 20), weight)
    assert linear(x[0, 0, 0], weight).shape == (6,)
    assert linear(x[:0], weight).shape == (0, 3, 4, 6)
    assert linear(x, weight[:0]).shape == (2, 3, 4, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_batch_or_the_threads(kernels, dtype, threads):
    x, weight, bias = normal(197, 650, seed=1), normal(45, 650, seed=2).to(dtype), normal(45, seed=3)
    torch.set_num_threads(2)
    together = linear(x, weight, bias)
    for some in (1, 2, 4, 50):
        torch.set_num_threads(1 + some % 2)
        apart = torch.cat([linear(part, weight, bias) for part in x.split(some)])
        assert torch.equal(apart, together)


def test_nan_stays_in_its_row_and_column(kernels):
    x, weight = normal(9, 50, seed=1), normal(13, 50, seed=2)
    clean = linear(x, weight)
    x[4, 7], weight[11, 3] = torch.nan, torch.inf
    y = linear(x, weight)
    hit = torch.zeros(9, 13, dtype=torch.bool)
    hit[4], hit[:, 11] = True, True
    assert not y[hit].isfinite().any()
    assert torch.equal(y[~hit], clean[~hit])


def test_offsets_beyond_32_bits(monkeypatch):
    """The memory is only promised by the system; a few pages of it are written."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(3, 2**30, dtype=torch.float16)[:, :20]
    rows = torch.empty(3, 2**29)[:, :20]
    for row in range(3):
        far[row], rows[row] = normal(20, seed=row).half(), normal(20, seed=9 + row)
    assert_exact(linear(rows, far), rows, far)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_torchs(dtype):
    x, weight, bias = normal(4, 12, seed=1), normal(7, 12, seed=2).to(dtype), normal(7, seed=3)
    x.requires_grad_()
    y = linear(x, weight, bias)
    y.square().sum().backward()
    exact = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(exact, weight.float(), bias).square().sum().backward()
    assert torch.equal(x.grad, exact.grad)
    with pytest.raises(RuntimeError, match="makes no gradients"):
        linear(x, weight, backend="cpu")


def test_other_backends():
    x, weight = normal(4, 12, seed=1), normal(7, 12, seed=2).half()
    assert_exact(linear(x, weight, backend="reference"), x, weight)
    wide = linear(x.double(), weight)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, x.double() @ weight.double().T, rtol=1e-14, atol=1e-14)
    with pytest.raises(RuntimeError, match=r"no kernels for torch\.float64"):
        linear(x.double(), weight.double(), backend="cpu")
    with pytest.raises(RuntimeError, match="not contiguous"):
        linear(x, normal(12, 7, seed=2).T, backend="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[:, :5], w, b), r"\(4, 5\) but weight \(7, 12\)"),
        (lambda x, w, b: (x, w[0], b), r"\(\.\.\., K\) and \(N, K\)"),
        (lambda x, w, b: (x, w, b[:3]), r"bias has shape \(3,\) but weight has 7 rows"),
        (lambda x, w, b: (x.half(), w, b), "weight has dtype torch.float32 but x torch.float16"),
        (lambda x, w, b: (x, w.to("meta"), b), "weight is on meta but x on cpu"),
        (lambda x, w, b: (x, w, b.to("meta")), "bias is on meta but x on cpu"),
    ],
)
def test_refusals_name_both_values(change, message):
    given = change(normal(4, 12, seed=1), normal(7, 12, seed=2), normal(7, seed=3))
    with pytest.raises(ValueError, match=message):
        linear(*given)


def test_torch_knows_it_as_an_operator():
    x, weight = normal(4, 12, seed=1), normal(7, 12, seed=2).half()
    torch.library.opcheck(torch.ops.auxkern.linear.default, (x, weight, None, ""))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), linear(x, weight))


def test_layers_share_the_weights_of_those_they_replace():
    plain, table = torch.nn.Linear(20, 6), torch.nn.Embedding(5, 20, padding_idx=0)
    layer, rows = FrozenLinear.of(plain), FrozenEmbedding.of(table.half())
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert rows.weight is table.weight
    assert rows.padding_idx == 0
    assert layer.state_dict().keys() == plain.state_dict().keys()
    x = normal(3, 20, seed=1)
    with torch.no_grad():
        assert_exact(layer(x), x, plain.weight, plain.bias)
        found = rows(torch.tensor([[1, 4]]))
    assert found.dtype == torch.float32
    assert torch.equal(found[0], table.weight[[1, 4]].float())
    with pytest.raises(ValueError, match="max_norm"):
        FrozenEmbedding.of(torch.nn.Embedding(5, 20, max_norm=1.0))


def _small_layers(compute):
    layers = [FrozenLinear.of(torch.nn.Linear(250, N)).requires_grad_(False) for N in (64, 1, 1, 3)]
    for layer in layers:
        layer.compute = compute
    return layers


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
@pytest.mark.usefixtures("kernels")
def test_joined_layers_make_what_each_makes_alone(compute):
    torch.manual_seed(0)
    layers, joined = _small_layers(compute), JoinedLinears()
    for rows in (0, 1, 5, 64, 257):
        x = normal(rows, 2, 250, seed=rows)
        for found, layer in zip(joined.of(layers, x), layers, strict=True):
            assert torch.equal(found, layer(x))


def test_joined_layers_follow_changes_and_call_hooks():
    torch.manual_seed(1)
    layers, joined, x, called = _small_layers("int8"), JoinedLinears(), normal(2, 250, seed=1), []
    changes = (lambda: layers[1].weight.mul_(2), lambda: layers[2].bias.add_(1))
    for index, change in enumerate(changes, 1):
        before = joined.of(layers, x)[index]
        change()
        assert not torch.equal(joined.of(layers, x)[index], before)
    copied = copy.deepcopy((layers, joined))
    copied[0][3].weight.mul_(3)
    for chosen, product in ((layers, joined), copied):
        for found, layer in zip(product.of(chosen, x), chosen, strict=True):
            assert torch.equal(found, layer(x))
    layers[3].register_forward_hook(lambda *_: called.append(True))
    joined.of(layers, x)
    assert called
    layers[3] = torch.nn.Linear(250, 2)
    assert joined.of(layers, x)[3].requires_grad
