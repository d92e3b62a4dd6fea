"""Addresses are 64-bit wherever sizes are multiplied, in every kernel that dispatch launches."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import auxkern
from tests.support.machines import one_compiled
from tests.support.offsets import too_narrow

triton = pytest.importorskip("triton")

from auxkern.backends.triton import kernels  # noqa: E402
from auxkern.backends.triton.cases import H100, coefficients_of, slopes_of, target_of  # noqa: E402
from auxkern.backends.triton.heads import heads_sum  # noqa: E402
from auxkern.backends.triton.heads_draw import launches as heads_draw  # noqa: E402
from auxkern.backends.triton.heads_loss import launches as heads_loss  # noqa: E402
from auxkern.backends.triton.launch import Launch  # noqa: E402
from auxkern.backends.triton.logits_draw import cases as logits_draw_cases  # noqa: E402
from auxkern.backends.triton.logits_draw import launches as logits_draw  # noqa: E402
from auxkern.backends.triton.logits_draw.launches import RowDraws  # noqa: E402
from auxkern.backends.triton.logits_loss import launches as logits_loss  # noqa: E402
from auxkern.backends.triton.logits_loss.kernels import forward_kernel  # noqa: E402
from auxkern.core.loss import Loss  # noqa: E402
from auxkern.core.sums import Sum  # noqa: E402
from auxkern.core.terms import Head, Logits, Sparse, like  # noqa: E402
from tests.support.executed import BENIGN, executed  # noqa: E402
from tests.support.ptx.report import Report  # noqa: E402
from tests.support.ptx.runner import Executor, lowered  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(forward_kernel, triton.JITFunction),
    reason="TRITON_INTERPRET=1: nothing is compiled",
)

N, V, D = 64, 4096, 48
H, F32 = torch.float16, torch.float32


def _meta(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _heads(dtype: torch.dtype, cap: float | None) -> Sum:
    """Stored the other way round: weights (D, V), hidden states (D, N), a bias in a column."""
    return Sum(
        (
            Head(_meta(D, N, dtype=dtype).T, _meta(D, V, dtype=dtype).T, _meta(V, 3)[:, 0], 1.0, cap),
            Head(_meta(D, N, dtype=dtype).T, _meta(D, V, dtype=dtype).T, None, 0.5, cap),
        ),
        V,
    )


def _strided_heads() -> Iterator[tuple[str, Launch]]:
    for dtype, cap in ((H, None), (F32, 9.0)):
        target = target_of(N)
        for stats in (False, True):
            summed = heads_sum(_heads(dtype, cap).heads, V, stats, "ieee")
            loss = Loss(label_smoothing=0.1 if stats else 0.0, stats=stats)
            e = None if stats else summed.buffer(heads_loss.e_dtype(dtype))
            for launch in heads_loss.forward(summed, target, loss, e)[2]:
                yield f"{dtype} {cap} {stats}", launch
        yield f"{dtype} {cap}", heads_loss.gradient(summed, target, coefficients_of(N), [-1], dtype)[1]
        for plain in (True, False):
            draws = logits_draw_cases.draws_of(plain=plain, rows=N)
            heads = _heads(dtype, cap)
            yield (
                f"{dtype} {cap} {plain}",
                heads_draw.plan(heads, RowDraws.of(heads, draws), True, H100, "ieee")[1][0],
            )


def _strided_logits() -> Iterator[tuple[str, Launch]]:
    """Four terms, columns apart, with all that can be asked."""
    for rows in (N, 4 * N * N):  # split over programs, and not
        values = [_meta(V, rows, dtype=dtype).T[None] for dtype in (H, F32, H, F32)]
        logits = Sum((Logits(values[0]), Logits(values[1], softcap=3.0), *map(Logits, values[2:])), V)
        target = target_of(rows)
        for launch in logits_loss.forward(logits, target, Loss(label_smoothing=0.1, stats=True), H100)[1]:
            yield f"{rows} rows", launch
        wanted = [
            {} if i == 2 else {"values": torch.empty(x.shape, dtype=x.dtype, device="meta")}
            for i, x in enumerate(values)
        ]
        yield f"{rows} rows", logits_loss.backward(logits, target, slopes_of(rows, logits.V), wanted, H100)
    for plain in (True, False):
        draws = logits_draw_cases.draws_of(plain=plain, history=5, rows=N)
        few = [term.rows(slice(0, N)) for term in logits.logits]
        few[1] = like(few[1], scale=_meta(N))
        summed = Sum(tuple(few), V)
        for launch in logits_draw.plan(summed, RowDraws.of(summed, draws), True, H100)[1]:
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
    assert too_narrow(lowered(launch, 90, "ttir")[0]) == []


@pytest.mark.parametrize("arch", one_compiled())
def test_a_weight_stored_the_other_way_round_beyond_32_bits(arch, monkeypatch):
    """(D, V) of more than 2**31 elements, in memory that the system maps only where it is written."""
    width, rows, ids, step = 18, 3, 131, 2**27 + 8
    assert (width - 1) * step > 2**31
    flat = torch.from_numpy(np.frombuffer(mmap.mmap(-1, 2 * ((width - 1) * step + ids)), dtype=np.float16))
    weight = flat.as_strided((ids, width), (1, step))
    source = torch.Generator().manual_seed(1)
    weight.copy_(torch.randn(ids, width, generator=source))
    hidden = torch.randn(rows, width, generator=source).half()
    far, near = Head(hidden, weight), Head(hidden, weight.contiguous())
    entries = Sparse(torch.randint(0, ids, (rows, 3), generator=source), torch.randn(rows, 3))
    executor = Executor(arch, report=Report(BENIGN), races=False)

    def results(head: Head) -> tuple[torch.Tensor, ...]:
        leaf = head.hidden.clone().requires_grad_()
        terms = [Head(leaf, head.weight), entries]
        loss = auxkern.cross_entropy(terms, torch.arange(rows) * 60, backend="triton")
        loss.backward()
        drawn = auxkern.sample(head, seed=torch.arange(rows), position=0, backend="triton")
        return loss.detach(), leaf.grad, drawn.tokens

    ran = []
    with executed(executor, monkeypatch) as machine:
        run = machine.backend.executor.run
        monkeypatch.setattr(
            executor, "run", lambda launch: ran.append(launch.kernel.fn.__name__) or run(launch)
        )
        for mine, right in zip(results(far), results(near), strict=True):
            assert torch.equal(mine, right)
    # Every kernel that reads a weight.
    assert {"heads_forward_kernel", "heads_gradient_kernel", "heads_draw_kernel"} <= set(ran)
    assert not executor.report.faults, str(executor.report)


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
    "a share that a reduction chose": (
        '%i = "tt.reduce"(%x) <{axis = 0 : i32}> ({\n%c = arith.constant 64 : i32\n'
        "%n = arith.divsi %i, %c : i32\n%t = arith.divsi %V, %c : i32\n%q = arith.divsi %t, %splits : i32\n"
        "%share = arith.muli %q, %c : i32\n%o32 = arith.muli %n, %share : i32",
        True,
    ),
    "a share of a size's number": (
        "%c = arith.constant 64 : i32\n%n = arith.divsi %N, %c : i32\n"
        "%t = arith.divsi %V, %c : i32\n%q = arith.divsi %t, %splits : i32\n"
        "%share = arith.muli %q, %c : i32\n%o32 = arith.muli %n, %share : i32",
        False,
    ),
    "a reduced index and a size": (
        '%i = "tt.reduce"(%x) <{axis = 0 : i32}> ({\n%c = arith.constant 64 : i32\n'
        "%n = arith.divsi %i, %c : i32\n%o32 = arith.muli %n, %V : i32",
        False,
    ),
    "a lane's list": (
        "%l = tt.make_range {end = 8 : i32, start = 0 : i32} : tensor<8xi32>\n"
        "%b = tt.splat %bits : i32 -> tensor<8xi32>\n%n = arith.shrsi %l, %b : tensor<8xi32>\n"
        "%s = tt.splat %capacity : i32 -> tensor<8xi32>\n%o32 = arith.muli %n, %s : tensor<8xi32>",
        True,
    ),
    "a list of a row": (
        "%r = tt.get_program_id x : i32\n%o32 = arith.muli %r, %capacity : i32",
        False,
    ),
    "a tile of a list": (
        "%c = arith.constant 64 : i32\n%q = arith.divsi %x, %c : i32\n%o32 = arith.shli %q, %bits : i32", True
    ),
    "a size shifted by the bits of a list": ("%o32 = arith.shli %V, %bits : i32", False),
    "lanes that are set before one": (
        "%e = arith.extui %set : tensor<8xi1> to tensor<8xi32>\n"
        '%p = "tt.scan"(%e) <{axis = 0 : i32, reverse = false}> ({\n'
        "%s = tt.splat %count : i32 -> tensor<8xi32>\n%o32 = arith.addi %s, %p : tensor<8xi32>",
        True,
    ),
    "a sum of sizes before a lane": (
        '%p = "tt.scan"(%sizes) <{axis = 0 : i32, reverse = false}> ({\n'
        "%s = tt.splat %count : i32 -> tensor<8xi32>\n%o32 = arith.addi %s, %p : tensor<8xi32>",
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
