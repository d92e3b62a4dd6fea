"""When two stores are a race: small kernels of two warps, in every order of the warps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from tests.support.ptx.lanes import SAME_VALUE
from tests.support.ptx.machine import ORDERS, Settings, Work, execute
from tests.support.ptx.memory import Allocation, Global, Shadow
from tests.support.ptx.parser import parse
from tests.support.ptx.report import Report
from tests.support.ptx.translate import Code

pytestmark = pytest.mark.ptx

_KERNEL = """
.visible .entry stores(.param .u64 .ptr .global out)
.reqntid 64
{{
    .reg .b32 %r<9>;
    .reg .b64 %rd<3>;
    ld.param.b64 %rd1, [out];
    mov.u32 %r1, %tid.x;
    shr.u32 %r2, %r1, 5;
    mov.b32 %r3, 7;
    mov.b32 %r4, 0;
    {body}
    ret;
}}
"""
BOTH, ITS_WARP = "%r3", "%r2"


def report(body: str, order: str, grid: int = 1) -> Report:
    return run(body, order, grid)[1]


def run(body: str, order: str, grid: int = 1) -> tuple[torch.Tensor, Report]:
    """What a kernel leaves in which %r3 is 7, %r2 the warp's number, %r4 an address in shared memory."""
    out = torch.zeros(1, dtype=torch.int32)
    allocation = Allocation([("out", out)])
    allocation.shadow = Shadow(4, 4, True)
    code = Code(parse(_KERNEL.format(body=body)))
    parameters = {"out": np.uint64(out.data_ptr()).tobytes()}
    result = Report()
    work = Work(code, (grid, 1, 1), parameters, Global([allocation]), 16)
    execute(work, Settings(order=order, lanes=64), result)
    return out, result


@pytest.mark.parametrize("order", ORDERS)
def test_warps_that_store_the_same_number_are_a_race_of_its_own_kind(order):
    assert report(f"st.shared.b32 [%r4], {BOTH};", order).kinds == {f"shared: {SAME_VALUE}"}
    assert report(f"st.global.b32 [%rd1], {BOTH};", order).kinds == {f"global out: {SAME_VALUE}"}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("space", ["shared.b32 [%r4]", "global.b32 [%rd1]"])
def test_different_numbers_are_a_race(order, space):
    kinds = report(f"st.{space}, {ITS_WARP};", order).kinds
    if order == "together":
        assert any("lanes store different values" in kind for kind in kinds)
    else:
        assert any("race, write after write" in kind for kind in kinds)


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_orders_stores_of_all_threads(order):
    first, second = f"st.shared.b32 [%r4], {BOTH};", "st.shared.b32 [%r4], 8;"
    assert report(f"{first}\nbar.sync 0;\n{second}", order).kinds == {f"shared: {SAME_VALUE}"}
    assert "shared: race, write after write" in report(f"{first}\n{second}", order).kinds


@pytest.mark.parametrize("order", ORDERS)
def test_programs_that_store_the_same_number_are_a_race(order):
    assert any("race" in kind for kind in report(f"st.global.b32 [%rd1], {BOTH};", order, grid=2).kinds)


@pytest.mark.parametrize("order", ORDERS)
def test_atomics_add_up_over_programs(order):
    out, found = run("atom.global.gpu.relaxed.add.u32 %r5, [%rd1], 3;", order, grid=2)
    assert not found.faults
    assert out.tolist() == [3 * 128]
    out, _ = run("red.global.max.s32 [%rd1], %r1;", order)
    assert out.tolist() == [63]
    out, _ = run("atom.global.cas.b32 %r5, [%rd1], 0, 9; atom.global.cas.b32 %r5, [%rd1], 0, 8;", order)
    assert out.tolist() == [9]
