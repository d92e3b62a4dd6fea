"""Addresses are 64-bit wherever sizes are multiplied, in every kernel that dispatch launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.offsets import too_narrow

triton = pytest.importorskip("triton")
from auxkern.backends.triton.losses import Coefficients  # noqa: E402
from auxkern.backends.triton.sums import LogitsSum, heads_sum  # noqa: E402
from auxkern.ops.registry import HeadRows  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from auxkern.backends.triton import kernels  # noqa: E402
from auxkern.backends.triton.heads_draw import launches as heads_draw  # noqa: E402
from auxkern.backends.triton.heads_loss import launches as heads_loss  # noqa: E402
from auxkern.backends.triton.launch import Launch  # noqa: E402
from auxkern.backends.triton.logits_draw import cases as logits_draw_cases  # noqa: E402
from auxkern.backends.triton.logits_draw import launches as logits_draw  # noqa: E402
from auxkern.backends.triton.logits_loss import launches as logits_loss  # noqa: E402
from auxkern.backends.triton.logits_loss.kernels import forward_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(forward_kernel, triton.JITFunction),
    reason="TRITON_INTERPRET=1: nothing is compiled",
)

N, V, D = 64, 4096, 48
H, F32 = torch.float16, torch.float32


def _meta(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _heads(dtype: torch.dtype, cap: float) -> list[HeadRows]:
    """Stored the other way round: weights (D, V), hidden states (D, N), a bias in a column."""
    return [
        HeadRows(_meta(D, N, dtype=dtype).T, _meta(D, V, dtype=dtype).T, _meta(V, 3)[:, 0], 1.0, cap),
        HeadRows(_meta(D, N, dtype=dtype).T, _meta(D, V, dtype=dtype).T, None, 0.5, cap),
    ]


def _strided_heads() -> Iterator[tuple[str, Launch]]:
    for dtype, cap in ((H, 0.0), (F32, 9.0)):
        target = _meta(N, dtype=torch.int64)
        for stats in (False, True):
            summed = heads_sum(_heads(dtype, cap), V, stats, "ieee")
            e = None if stats else summed.buffer(heads_loss.e_dtype(dtype))
            for launch in heads_loss.forward(summed, target, -100, stats, stats, e)[2]:
                yield f"{dtype} {cap} {stats}", launch
        coefficients = Coefficients(*[_meta(N)] * 4)
        yield f"{dtype} {cap}", heads_loss.gradient(summed, target, coefficients, [-1], dtype)[1]
        for plain in (True, False):
            draws = logits_draw_cases.draws_of(plain=plain, rows=N)
            yield (
                f"{dtype} {cap} {plain}",
                heads_draw.sample(_heads(dtype, cap), V, draws, True, "ieee")[1][0],
            )


def _strided_logits() -> Iterator[tuple[str, Launch]]:
    """Four terms, columns apart, with all that can be asked."""
    for rows in (N, 4 * N * N):  # split over programs, and not
        values = [_meta(V, rows, dtype=dtype).T[None] for dtype in (H, F32, H, F32)]
        logits = LogitsSum(values, [1.0] * 4, [0.0, 3.0, 0.0, 0.0], V)
        target, row = _meta(rows, dtype=torch.int64), _meta(rows)
        for launch in logits_loss.forward(logits, target, -100, True, True, 132)[1]:
            yield f"{rows} rows", launch
        backward = logits_loss.backward(logits, target, Coefficients(row, row, row, row), [0, 1, 3], 132)[1]
        yield f"{rows} rows", backward
    for plain in (True, False):
        draws = logits_draw_cases.draws_of(plain=plain, history=5, rows=N)
        draws = type(draws)(**{**vars(draws), "row_scales": [None, _meta(N), None, None]})
        few = replace(logits, values=[v[:, :N] for v in logits.values])
        for launch in logits_draw.sample(few, draws, True, 132)[1]:
            yield f"{plain}", launch


def _launches() -> list[Any]:
    listed = [
        (f"{kernel.name}, {case.label}", case.launch)
        for kernel in kernels.KERNELS
        for case in kernel.cases("GPT-2" if kernel.any_row else "Llama-3")
    ]
    for made in (_strided_heads, _strided_logits):
        listed += [(f"{x.kernel.fn.__name__}, {made.__name__} {label}", x) for label, x in made()]
    return [pytest.param(launch, id=label.replace(" ", "-")) for label, launch in listed]


@pytest.mark.parametrize("launch", _launches())
def test_addresses_of_large_tensors(launch):
    assert too_narrow(launch.compile(GPUTarget("cuda", 90, 32)).asm["ttir"]) == []


ONE = "%a = tt.addptr %p, %o : !tt.ptr<f32>, i64"
PRODUCTS = {
    "two sizes": ("%o32 = arith.muli %N, %V : i32", False),
    "a size and a constant": ("%c = arith.constant 3 : i32\n%o32 = arith.muli %N, %c : i32", False),
    "a row and a stride": ("%r = tt.get_program_id x : i32\n%o32 = arith.muli %r, %stride : i32", False),
    "shifted": ("%c = arith.constant 3 : i32\n%o32 = arith.shli %N, %c : i32", False),
    "the sum of two sizes": ("%o32 = arith.addi %N, %V : i32", False),
    "a column and a stride": (
        "%l = tt.make_range {end = 8 : i32, start = 0 : i32} : tensor<8xi32>\n"
        "%s = tt.splat %stride : i32 -> tensor<8xi32>\n%o32 = arith.muli %l, %s : tensor<8xi32>",
        False,
    ),
    "tiles": (
        "%r = tt.get_program_id x : i32\n%c = arith.constant 64 : i32\n%o32 = arith.muli %r, %c : i32", True
    ),
    "a share": ("%r = tt.get_program_id y : i32\n%o32 = arith.muli %r, %V : i32", True),
    "a rounded size": (
        "%c = arith.constant 64 : i32\n%q = arith.divsi %V, %c : i32\n%o32 = arith.muli %q, %c : i32", True
    ),
    "a size rounded to more": (
        "%c = arith.constant 64 : i32\n%d = arith.constant 65 : i32\n"
        "%q = arith.divsi %V, %c : i32\n%o32 = arith.muli %q, %d : i32",
        False,
    ),
    "a size and a lane": ("%c = arith.constant 7 : i32\n%o32 = arith.addi %N, %c : i32", True),
}  # fmt: skip


@pytest.mark.parametrize(("text", "allowed"), PRODUCTS.values(), ids=PRODUCTS)
def test_the_rule(text, allowed):
    ttir = f"{text}\n%o = arith.extsi %o32 : i32 to i64\n{ONE}"
    assert (too_narrow(ttir) == []) is allowed
    # What no address is made of may be as narrow as it likes.
    assert too_narrow(text) == []
