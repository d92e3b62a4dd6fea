"""A decoder layer as one native call, at every instruction set; the expectation is its formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from auxkern.core.decoder import DecoderParts, Heads, Norm, Projection, Window
from auxkern.model.native.recognised import normed
from auxkern.ops.packed import pack
from tests.support.cases import generator
from tests.support.instruction_sets import EACH, substituted

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
}


@pytest.fixture(params=EACH)
def backend(request, monkeypatch):
    """Every instruction set in turn."""
    return substituted(request.param, monkeypatch, own_products=True)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)) * scale


class Layer:
    """Weights of a layer, the parts that they are packed into, and the formula."""

    def __init__(
        self,
        D: int,
        heads: Heads,
        inner: int,
        *,
        norms: dict[str, str],
        activation: str = "silu",
        gated: bool = True,
        parallel: bool = False,
        biases: bool = False,
        compute: str = "float32",
    ) -> None:
        queries, keys = heads.queries * heads.width, heads.keys * heads.width
        sizes = {
            "qkv": (queries + 2 * keys, D),
            "output": (D, queries),
            "up": (2 * inner if gated else inner, D),
            "down": (D, inner),
        }
        self.weights = {
            name: normal(*size, seed=i, scale=size[1] ** -0.5) for i, (name, size) in enumerate(sizes.items())
        }
        self.biases = {
            name: normal(size[0], seed=10 + i) if biases else None
            for i, (name, size) in enumerate(sizes.items())
        }
        self.norms = {}
        for i, (name, kind) in enumerate(norms.items()):
            width = {"query_norm": queries, "key_norm": keys}.get(name, D)
            if name in ("query_norm", "key_norm") and not heads.whole_norms:
                width = heads.width
            bias = normal(width, seed=30 + i) if kind == "layer" else None
            self.norms[name] = Norm(kind, 1 + normal(width, seed=20 + i, scale=0.3), bias, 1e-5)
        packed = {
            name: Projection(pack(weight, compute, gated=gated and name == "up"), self.biases[name])
            for name, weight in self.weights.items()
        }
        self.parts = DecoderParts(
            heads, self.norms, **packed, activation=activation, gated=gated, parallel=parallel
        )

    def normed(self, name: str, x: Tensor) -> Tensor:
        norm = self.norms.get(name)
        if norm is None:
            return x
        if norm.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        y = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.to(x.dtype)
        return y if norm.bias is None else y + norm.bias.to(x.dtype)

    def product(self, name: str, x: Tensor) -> Tensor:
        bias = self.biases[name]
        y = x @ self.weights[name].to(x.dtype).T
        return y if bias is None else y + bias.to(x.dtype)

    def formula(self, x: Tensor, past: tuple[Tensor, Tensor], mask: Tensor, angles: Any) -> Tensor:
        """(B, T, D) of x, in its dtype; past keys and values (B, heads, columns, width)."""
        heads = self.parts.heads
        B, T, _ = x.shape
        first = self.normed("attention_norm", x)
        qkv = self.product("qkv", first)
        if heads.clip:
            qkv = qkv.clamp(-heads.clip, heads.clip)
        widths = [heads.queries * heads.width, heads.keys * heads.width, heads.keys * heads.width]
        query, key, value = qkv.split(widths, -1)
        if heads.whole_norms:
            query, key = self.normed("query_norm", query), self.normed("key_norm", key)
        query, key, value = (t.view(B, T, -1, heads.width) for t in (query, key, value))
        if not heads.whole_norms:
            query, key = self.normed("query_norm", query), self.normed("key_norm", key)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if angles is not None:
            query, key = (turned(t, *angles) for t in (query, key))
        key, value = (torch.cat([old.to(x.dtype), t], 2) for old, t in zip(past, (key, value), strict=True))
        group = heads.queries // heads.keys
        z = heads.scale * query @ key.repeat_interleave(group, 1).transpose(2, 3)
        weights = z.masked_fill(~mask, -torch.inf).softmax(-1)
        out = (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).reshape(B, T, -1)
        y = x + self.normed("attention_after", self.product("output", out))
        second = first if self.parts.parallel else self.normed("mlp_norm", y)
        up = self.product("up", second)
        act = ACTIVATIONS[self.parts.activation]
        if self.parts.gated:
            gate, up = up.chunk(2, -1)
            inner = act(gate) * up
        else:
            inner = act(up)
        return y + self.normed("mlp_after", self.product("down", inner))


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.shape[-1]
    cos, sin, x = cos[:, None].to(heads.dtype), sin[:, None].to(heads.dtype), heads[..., :rotary]
    half = torch.cat([-x[..., rotary // 2 :], x[..., : rotary // 2]], -1)
    return torch.cat([x * cos + half * sin, heads[..., rotary:]], -1)


BEFORE = {"attention_norm": "rms", "mlp_norm": "rms"}
AFTER = {"attention_after": "rms", "mlp_after": "rms"}
# What each asks of the kernel; D, heads, inner and the numbers turned are ends of vectors, panels and groups.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "grouped heads": ({"D": 48, "heads": Heads(3, 1, 16, 0.25), "inner": 37, "norms": BEFORE}, 16),
    "one head": ({"D": 17, "heads": Heads(1, 1, 16, 0.25), "inner": 5, "norms": BEFORE}, 16),
    "biases, no angles, not gated": (
        {
            "D": 31,
            "heads": Heads(2, 2, 16, 0.25),
            "inner": 50,
            "norms": {"attention_norm": "layer", "mlp_norm": "layer"},
            "activation": "gelu_tanh",
            "gated": False,
            "biases": True,
        },
        0,
    ),
    "parallel, some turned": (
        {
            "D": 64,
            "heads": Heads(2, 2, 32, 0.2),
            "inner": 96,
            "norms": {"attention_norm": "layer", "query_norm": "layer", "key_norm": "layer"},
            "activation": "gelu",
            "gated": False,
            "parallel": True,
            "biases": True,
        },
        6,
    ),
    "sandwich, normed heads": (
        {
            "D": 40,
            "heads": Heads(4, 2, 16, 0.3),
            "inner": 64,
            "norms": {**BEFORE, **AFTER, "query_norm": "rms", "key_norm": "rms"},
            "activation": "gelu_tanh",
        },
        16,
    ),
    "norms after, whole norms": (
        {
            "D": 33,
            "heads": Heads(4, 2, 16, 0.25, whole_norms=True),
            "inner": 70,
            "norms": {**AFTER, "query_norm": "rms", "key_norm": "rms"},
        },
        16,
    ),
    "clip, relu": (
        {
            "D": 32,
            "heads": Heads(2, 1, 16, 0.25, clip=0.7),
            "inner": 48,
            "norms": BEFORE,
            "activation": "relu",
        },
        10,
    ),
}
# B, T and columns of the past
SIZES = [(1, 1, 0), (3, 1, 12), (2, 5, 4), (2, 300, 3)]


class Step:
    """A step's input: x, past keys and values, a mask with padding on the left, angles."""

    def __init__(self, layer: Layer, size: tuple[int, int, int], rotary: int) -> None:
        self.B, self.T, self.past = size
        heads = layer.parts.heads
        self.x = normal(self.B, self.T, layer.parts.qkv.weight.K, seed=50)
        old = (self.B, heads.keys, self.past, heads.width)
        self.keys, self.values = normal(*old, seed=51), normal(*old, seed=52)
        columns = self.past + self.T
        self.mask = (
            torch.ones(self.T, columns, dtype=torch.bool).tril(self.past).expand(self.B, 1, -1, -1).clone()
        )
        self.mask[-1, :, :, : self.past // 2] = False
        self.angles = None
        if rotary:
            angles = normal(self.B, self.T, rotary, seed=53, scale=3.0)
            self.angles = (angles.cos(), angles.sin())

    def room(self) -> Window:
        """A larger cache with the past in it; what nobody may read is NaN."""
        rooms = []
        for old in (self.keys, self.values):
            room = torch.full((self.B + 1, old.shape[1], self.past + self.T + 5, old.shape[3]), torch.nan)
            room[: self.B, :, 2 : 2 + self.past] = old
            rooms.append(room)
        return Window(*rooms, 2, 2 + self.past)

    def rows(self, rows: slice) -> Step:
        """Some of the sequences."""
        part = object.__new__(Step)
        part.__dict__.update(self.__dict__, x=self.x[rows], keys=self.keys[rows], values=self.values[rows])
        part.mask, part.B = self.mask[rows], self.x[rows].shape[0]
        part.angles = None if self.angles is None else tuple(one[rows] for one in self.angles)
        return part


def whole(backend: Any, layer: Layer, step: Step) -> tuple[Tensor, Window]:
    kernel, room = backend.decoder_layer(layer.parts), step.room()
    inputs = kernel.inputs((step.B, step.T), step.mask, step.angles)
    return kernel.whole(step.x, inputs, room), room


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_its_formula(backend, case, size):
    options, rotary = CASES[case]
    layer = Layer(**options)
    step = Step(layer, size, rotary)
    y, _ = whole(backend, layer, step)
    past = (step.keys, step.values)
    exact = layer.formula(step.x.double(), past, step.mask, step.angles)
    theirs = layer.formula(step.x, past, step.mask, step.angles)
    # As exact as the same formula in torch's float32; a few units of the last place where that is lucky.
    allowed = (theirs - exact).abs().max().item() + 8 * 2**-24 * exact.abs().max().item()
    assert (y - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
def test_narrow_arithmetic_is_close_to_it(backend, compute):
    layer = Layer(96, Heads(4, 2, 32, 0.2), 160, norms=BEFORE, biases=True, compute=compute)
    step = Step(layer, (3, 4, 6), 32)
    y, _ = whole(backend, layer, step)
    exact = layer.formula(step.x.double(), (step.keys, step.values), step.mask, step.angles)
    # Four products in a row whose operands keep 8 bits, or 7 beside the largest of 64.
    assert (y - exact).abs().max().item() <= 0.05 * (exact - step.x).abs().max().item()
    assert not torch.equal(
        y, whole(backend, Layer(96, Heads(4, 2, 32, 0.2), 160, norms=BEFORE, biases=True), step)[0]
    )


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("case", ["grouped heads", "sandwich, normed heads", "parallel, some turned"])
def test_rows_are_the_same_in_any_batch_on_any_threads(backend, case, compute, threads):
    options, rotary = CASES[case]
    layer = Layer(**options, compute=compute)
    step = Step(layer, (7, 3, 5), rotary)
    torch.set_num_threads(2)
    together, _ = whole(backend, layer, step)
    torch.set_num_threads(1)
    assert torch.equal(whole(backend, layer, step)[0], together)
    for b in range(7):
        assert torch.equal(whole(backend, layer, step.rows(slice(b, b + 1)))[0], together[b : b + 1])


@pytest.mark.parametrize("case", CASES)
def test_in_two_calls_it_is_the_same_to_the_last_bit(backend, case):
    options, rotary = CASES[case]
    layer = Layer(**options)
    step = Step(layer, (2, 3, 4), rotary)
    y, room = whole(backend, layer, step)
    kernel = backend.decoder_layer(layer.parts)
    inputs = kernel.inputs((2, 3), step.mask, step.angles)
    query, keys, values = kernel.projected(step.x, inputs)
    assert torch.equal(keys, room.keys[:2, :, 6:9])
    assert torch.equal(values, room.values[:2, :, 6:9])
    all_keys, all_values = torch.cat([step.keys, keys], 2), torch.cat([step.values, values], 2)
    assert torch.equal(kernel.attended(step.x, inputs, query, all_keys, all_values), y)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_cache_of_bfloat16_holds_rounded_columns_and_is_summed_as_float32(backend, case, size):
    options, rotary = CASES[case]
    layer = Layer(**options)
    step = Step(layer, size, rotary)
    step.keys, step.values = step.keys.bfloat16().float(), step.values.bfloat16().float()
    kernel = backend.decoder_layer(layer.parts)
    inputs = kernel.inputs((step.B, step.T), step.mask, step.angles)
    query, *new = kernel.projected(step.x, inputs)
    narrow = [one.bfloat16() for one in new]
    rounded = [
        torch.cat([old, one.float()], 2) for old, one in zip((step.keys, step.values), narrow, strict=True)
    ]
    expected = kernel.attended(step.x, inputs, query.clone(), *rounded)

    narrow_kernel = backend.decoder_layer(replace(layer.parts, cache_dtype=torch.bfloat16))
    wide = step.room()
    room = Window(wide.keys.bfloat16(), wide.values.bfloat16(), wide.begin, wide.end)
    assert torch.equal(narrow_kernel.whole(step.x, inputs, room), expected)
    for column, one in zip(room[:2], narrow, strict=True):
        assert torch.equal(column[: step.B, :, room.end : room.end + step.T], one)
    again, *made = narrow_kernel.projected(step.x, inputs)
    assert all(map(torch.equal, made, narrow))
    columns = [one.bfloat16() for one in rounded]
    assert torch.equal(narrow_kernel.attended(step.x, inputs, again, *columns), expected)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=str)
def test_a_cache_of_other_types_is_refused(backend, dtypes):
    options, rotary = CASES["grouped heads"]
    layer = Layer(**options)
    step = Step(layer, (2, 3, 4), rotary)
    room = step.room()
    kernel = backend.decoder_layer(layer.parts)
    inputs = kernel.inputs((2, 3), step.mask, step.angles)
    with pytest.raises(ValueError, match=rf"keys of {dtypes[0]} and values of {dtypes[1]}; give one of"):
        kernel.whole(
            step.x, inputs, room._replace(keys=room.keys.to(dtypes[0]), values=room.values.to(dtypes[1]))
        )


def test_only_new_columns_of_the_cache_are_written(backend):
    options, rotary = CASES["grouped heads"]
    layer = Layer(**options)
    step = Step(layer, (2, 3, 4), rotary)
    before = step.room()
    _, after = whole(backend, layer, step)
    for old, new in zip(before[:2], after[:2], strict=True):
        changed = (old != new) & ~(old.isnan() & new.isnan())
        assert changed[:2, :, 6:9].all()
        changed[:2, :, 6:9] = False
        assert not changed.any()


def test_a_row_of_nan_stays_alone(backend):
    options, rotary = CASES["grouped heads"]
    layer = Layer(**options)
    step = Step(layer, (3, 1, 4), rotary)
    expected, _ = whole(backend, layer, step)
    step.x[1] = torch.nan
    y, _ = whole(backend, layer, step)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


def test_a_mask_of_other_columns_is_refused(backend):
    options, rotary = CASES["grouped heads"]
    layer = Layer(**options)
    step = Step(layer, (2, 1, 4), rotary)
    step.mask = step.mask[..., 1:]
    with pytest.raises(ValueError, match="the mask is of 4 columns, but there are 5"):
        whole(backend, layer, step)


def test_parts_that_do_not_fit_are_refused(backend):
    options, rotary = CASES["grouped heads"]
    layer = Layer(**options)
    step = Step(layer, (1, 1, 0), rotary)
    layer.parts = replace(layer.parts, heads=Heads(2, 1, 16, 0.25))
    with pytest.raises(RuntimeError, match="a size is out of its range"):
        whole(backend, layer, step)


def test_a_cache_of_other_heads_is_refused(backend):
    options, rotary = CASES["grouped heads"]
    layer = Layer(**options)
    step = Step(layer, (2, 1, 4), rotary)
    step.keys = step.values = torch.randn(2, 2, 4, 16)
    with pytest.raises(
        ValueError, match=r"the cache has keys \(3, 2, 10, 16\).*this layer has 1 heads of 16"
    ):
        whole(backend, layer, step)
    kernel = backend.decoder_layer(layer.parts)
    inputs = kernel.inputs((2, 1), step.mask, step.angles)
    query, _, _ = kernel.projected(step.x, inputs)
    with pytest.raises(ValueError, match="this layer has 1 heads of 16"):
        kernel.attended(step.x, inputs, query, torch.randn(2, 1, 5, 16), torch.randn(2, 1, 5, 8))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("size", [(3, 5, 17), (1, 1, 576), (400, 2, 300), (0, 4, 16)], ids=str)
def test_a_norm_is_its_formula_and_its_rows_stand_alone(backend, kind, size, threads):
    width = size[-1]
    bias = normal(width, seed=3) if kind == "layer" else None
    norm = Norm(kind, 1 + normal(width, seed=2, scale=0.3), bias, 1e-5)
    x = normal(*size, seed=1, scale=4.0)
    torch.set_num_threads(2)
    y = backend.normed(norm, x)
    exact, theirs = normed(norm, x.double()), normed(norm, x)
    # As exact as the same formula in torch's float32; a few units of the last place where that is lucky.
    assert (
        (y - exact).abs().sum() - (theirs - exact).abs().sum()
    ).item() <= 4 * 2**-24 * exact.abs().sum().item()
    torch.set_num_threads(1)
    for b in range(min(size[0], 3)):
        assert torch.equal(backend.normed(norm, x[b, :1]), y[b, :1])
