"""Attention over a cache, at every instruction set; the expectation is the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auxkern.ops.attention import attention
from tests.support.cases import FLOAT32_ULP, generator
from tests.support.instruction_sets import EACH, substituted

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (B, H, G, T, P, D): groups of one to seven heads, one query position and several, ends of vectors and tiles
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 9, 3, 1, 37, 64),
    (3, 8, 8, 5, 20, 16),
    (2, 4, 2, 7, 7, 48),
    (1, 14, 2, 2, 65, 128),
    (2, 5, 1, 3, 9, 80),
    (1, 2, 2, 17, 33, 256),
]


@pytest.fixture(params=EACH)
def kernels(request, monkeypatch):
    """Every instruction set in turn."""
    return substituted(request.param, monkeypatch, own_products=True)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def made(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as a projection leaves them, keys and values as windows of a larger cache."""
    B, H, G, T, P, D = shape
    query = normal(B, T, H, D, seed=1).transpose(1, 2)
    return (
        query,
        normal(B, G, P + 9, D, seed=2)[:, :, 4 : P + 4],
        normal(B, G, P + 9, D, seed=3)[:, :, 2 : P + 2],
    )


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    z = scale * query.double() @ key.transpose(2, 3)
    return (z.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def causal(T: int, P: int) -> Tensor:
    return torch.ones(T, P, dtype=torch.bool).tril(P - T)


def assert_close(found: Tensor, expected: Tensor) -> None:
    # Products of D terms and sums of P weights in float32; the weights add up to 1.
    assert (found - expected).abs().max() <= 64 * FLOAT32_ULP * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_formula(kernels, shape):
    query, key, value = made(shape)
    B, _, _, T, P, D = shape
    some = torch.rand(B, 1, T, P, generator=generator(4)) > 0.5
    some[..., P // 2] = True
    masks = {"": None, "each": some, "one for all": some[:1], "per sequence": some[:, :, :1]}
    for mask in masks.values():
        full = causal(T, P) if mask is None else mask.expand(B, 1, T, P)
        found = attention(query, key, value, mask, scale=D**-0.5, backend="cpu")
        assert found.is_contiguous()
        assert_close(found, exact(query, key, value, full, D**-0.5))


def test_large_products_do_not_overflow(kernels):
    query, key, value = made((2, 4, 2, 3, 30, 32))
    found = attention(100 * query, 100 * key, value, scale=1.0)
    assert_close(found, exact(100 * query, 100 * key, value, causal(3, 30), 1.0))


def test_what_is_not_seen_does_not_matter(kernels, threads):
    """To the last bit: padding before, between and behind, whatever it holds, other rows and threads."""
    query, key, value = made((4, 6, 2, 3, 50, 32))
    mask = torch.rand(4, 1, 3, 50, generator=generator(5)) > 0.4
    together = attention(query, key, value, mask, scale=0.2)
    torch.set_num_threads(1)
    for b in range(4):
        for t in range(3):
            columns = mask[b, 0, t].nonzero()[:, 0]
            alone = attention(
                query[b : b + 1, :, t : t + 1],
                key[b : b + 1, :, columns],
                value[b : b + 1, :, columns],
                scale=0.2,
            )
            assert torch.equal(alone[0, 0], together[b, t])
    never = ~mask.any(2)[:, 0]
    key, value = key.clone(), value.clone()
    key.transpose(1, 2)[never], value.transpose(1, 2)[never] = torch.nan, torch.inf
    assert torch.equal(attention(query, key, value, mask, scale=0.2), together)


def test_a_row_that_sees_nothing_is_zero(kernels):
    query, key, value = made((2, 2, 1, 2, 9, 16))
    mask = torch.ones(2, 1, 2, 9, dtype=torch.bool)
    mask[1, 0, 0] = False
    found = attention(query, key, value, mask, scale=1.0)
    assert (found[1, 0] == 0).all()
    assert found[1, 1].abs().max() > 0


def test_nan_stays_in_its_row(kernels):
    query, key, value = made((2, 4, 2, 2, 9, 16))
    clean = attention(query, key, value, scale=1.0)
    key[1, 0, 3] = torch.nan
    found = attention(query, key, value, scale=1.0)
    assert found[1, :, :2].isnan().all()
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1, :, 2:], clean[1, :, 2:])


def test_nothing_to_do(kernels):
    query, key, value = made((2, 4, 2, 2, 9, 16))
    assert attention(query[:0], key[:0], value[:0], scale=1.0).shape == (0, 2, 4, 16)


@pytest.mark.parametrize(
    ("width", "dtype", "mask", "reason"),
    [
        (20, torch.float32, None, "width of 20, which is no multiple of 16"),
        (16, torch.float64, None, "no kernels for torch.float64"),
        (16, torch.bfloat16, None, "takes float32"),
        (16, torch.float32, torch.zeros(2, 1, 2, 9), "not one of bools"),
        (16, torch.float32, torch.ones(2, 4, 2, 9, dtype=torch.bool), "for all heads"),
    ],
)
def test_torch_takes_what_the_kernel_does_not(width, dtype, mask, reason):
    query, key, value = (x.to(dtype) for x in made((2, 4, 2, 2, 9, width)))
    mask = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
    found = attention(query, key, value, mask, scale=0.5)
    assert found.dtype == dtype
    full = causal(2, 9) if mask is None else torch.ones(2, 9, dtype=torch.bool)
    tolerance = {torch.bfloat16: 2e-2, torch.float64: 1e-12}.get(dtype, 1e-5)
    torch.testing.assert_close(
        found.double(), exact(query, key, value, full, 0.5), rtol=tolerance, atol=tolerance
    )
    with pytest.raises(RuntimeError, match=reason):
        attention(query, key, value, mask, scale=0.5, backend="cpu")


def test_refusals_name_the_shapes():
    query, key, value = made((2, 4, 2, 2, 9, 16))
    with pytest.raises(ValueError, match=r"\(2, 4, 2, 16\), key \(2, 2, 8, 16\) and value \(2, 2, 9, 16\)"):
        attention(query, key[:, :, :8], value, scale=1.0)
    with pytest.raises(ValueError, match="G must divide H"):
        attention(query[:, :3], key, value, scale=1.0)


def test_torch_knows_it_as_an_operator():
    given = made((2, 4, 2, 2, 9, 16))
    torch.library.opcheck(torch.ops.auxkern.attention.default, (*given, None, 0.5, ""))

    def scaled(*tensors: Tensor) -> Tensor:
        return attention(*tensors, scale=0.5)

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), attention(*given, scale=0.5))


@pytest.mark.parametrize(
    ("shapes", "mask", "message"),
    [
        ({"key": (1, 2, 9, 16)}, None, r"query has shape \(2, 4, 2, 16\), key \(1, 2, 9, 16\)"),
        ({"key": (2, 2, 9, 32)}, None, r"key \(2, 2, 9, 32\).*must be \(B, H, T, D\)"),
        ({"key": (2, 2, 1, 16)}, None, "P = 1 columns are the T = 2 positions'"),
        ({"key": (2, 0, 9, 16)}, None, "G must divide H"),
        ({}, (2, 1, 2, 8), r"mask has shape \(2, 1, 2, 8\).*P = 9"),
        ({}, (3, 1, 2, 9), r"mask has shape \(3, 1, 2, 9\).*B = 2"),
        ({}, (2, 1, 3, 9), r"mask has shape \(2, 1, 3, 9\).*T = 2"),
        ({}, (2, 9), r"mask has shape \(2, 9\)"),
    ],
)
def test_shapes_that_the_kernel_would_read_beyond_are_refused(shapes, mask, message):
    query = torch.zeros(2, 4, 2, 16)
    key = torch.zeros(shapes.get("key", (2, 2, 9, 16)))
    seen = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        attention(query, key, key, seen, scale=1.0)


@pytest.mark.parametrize("name", ["key", "value", "mask"])
def test_all_are_on_one_device(name):
    given = {"key": torch.zeros(2, 2, 9, 16), "value": torch.zeros(2, 2, 9, 16)}
    given["mask"] = torch.ones(2, 1, 2, 9, dtype=torch.bool)
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta but query on cpu; move it there"):
        attention(torch.zeros(2, 4, 2, 16), **given, scale=1.0)


def test_fewer_columns_than_positions_are_torchs():
    query, key, value = made((2, 4, 2, 3, 9, 16))
    mask = torch.ones(2, 1, 3, 2, dtype=torch.bool)
    found = attention(query, key[:, :, :2], value[:, :, :2], mask, scale=0.5)
    assert_close(found, exact(query, key[:, :, :2], value[:, :, :2], mask, 0.5))
