"""The native kernels at every instruction set that this CPU has, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from auxkern.backends.chunked import RowKernels
from auxkern.backends.reference import BACKEND as REFERENCE
from auxkern.core.backend import Backend
from auxkern.core.loss import Loss, RowLosses, RowSlopes, RowSums
from auxkern.core.sums import Sum
from auxkern.core.terms import Logits
from tests.support.cases import (
    DTYPES,
    FLOAT32_ULP,
    HARD,
    generator,
    hard_logits,
    random_logits,
    random_target,
)

try:
    from auxkern.backends.cpu import Cpu
    from auxkern.backends.cpu.abi import ISAS
except OSError as error:  # as on a GPU machine, where nothing was built; elsewhere another test fails
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=ISAS)
def cpu(request: pytest.FixtureRequest) -> Cpu:
    try:
        return Cpu(request.param)
    except ValueError as error:
        pytest.skip(str(error))


def sum_of(values: list[Tensor], scales: list[float], caps: list[float]) -> Sum:
    terms = [Logits(x, scale, cap or None) for x, scale, cap in zip(values, scales, caps, strict=True)]
    return Sum(tuple(terms), values[0].shape[-1])


def rows_of(
    backend: Backend, values: list[Tensor], target: Tensor, scales: list[float], caps: list[float]
) -> RowLosses:
    loss = Loss(label_smoothing=0.1, stats=True)
    return backend.losses(sum_of(values, scales, caps), target, loss, None, [{}] * len(values))


def gradients_of(
    backend: RowKernels, logits: Sum, target: Tensor, slopes: RowSlopes, places: list[int]
) -> list[Tensor]:
    """Of the values of the terms in ``places``."""
    wanted = [
        {"values": torch.empty_like(term.values)} if i in places else {}
        for i, term in enumerate(logits.logits)
    ]
    backend.logits_gradients(logits, target, slopes, wanted)
    return [wanted[i]["values"] for i in places]


def assert_rows_close(got: RowLosses, want: RowLosses) -> None:
    for name in ("nll", "row_max", "log_sum", "smooth", "term_nll"):
        # float32 holds 2e-7 of the logits, which reach 1e4 in the hard cases.
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(want, name), rtol=1e-5, atol=2e-3, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("V", [1, 3, 8, 15, 16, 17, 31, 33, 1023, 1024, 1025, 2500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_and_dtypes(cpu: Cpu, dtype: torch.dtype, V: int) -> None:
    values = [random_logits(1, 5, V, dtype=dtype, seed=i) for i in range(3)]
    target, scales, caps = random_target(5, V=V, ignored=0.2), [1.0, -0.5, 2.0], [0.0, 0.0, 3.0]
    rows = rows_of(cpu, values, target, scales, caps)
    assert_rows_close(rows, rows_of(REFERENCE, [v.double() for v in values], target, scales, caps))

    g, counts = torch.rand(5, generator=generator(1)), target >= 0
    slopes = RowSlopes(g, rows.sums, counts, Loss(label_smoothing=0.1, z_loss=0.01), V)
    got = gradients_of(cpu, sum_of(values, scales, caps), target, slopes, [0, 2])
    wide = sum_of([v.double() for v in values], scales, caps)
    exact = replace(slopes, g=g.double(), sums=RowSums(*[x.double() for x in rows.sums]))
    want = gradients_of(REFERENCE, wide, target, exact, [0, 2])
    for one, other in zip(got, want, strict=True):
        rounding = torch.finfo(dtype).eps / 2 + 64 * FLOAT32_ULP
        torch.testing.assert_close(
            one[0, counts].double(), other[0, counts], rtol=rounding, atol=torch.finfo(dtype).tiny + 1e-6
        )


@pytest.mark.parametrize("kind", HARD)
def test_hard_logits(cpu: Cpu, kind: str) -> None:
    terms, target = hard_logits(kind, 6, 2500)
    values = [t[None] for t in terms]
    plain = ([1.0] * len(values), [0.0] * len(values))
    rows = rows_of(cpu, values, target, *plain)
    assert_rows_close(rows, rows_of(REFERENCE, [v.double() for v in values], target, *plain))


def test_a_target_out_of_range_is_nan(cpu: Cpu) -> None:
    """The operator refuses it first; the kernel alone must not read beyond the row."""
    z, target = random_logits(1, 4, 37), torch.tensor([3, 37, -5, 2**40])
    rows = rows_of(cpu, [z], target, [1.0], [0.0])
    assert rows.nll.isnan().tolist() == [False, True, True, True]
    assert rows.row_max.isnan().tolist() == [False, True, True, True]


def test_own_threads_give_the_same_bits() -> None:
    values, target = [random_logits(1, 67, 5003)], random_target(67, V=5003)
    pooled = rows_of(Cpu(), values, target, [1.0], [0.0])
    own = rows_of(Cpu(own_threads=True), values, target, [1.0], [0.0])
    for one, other in zip(pooled, own, strict=True):
        assert torch.equal(one, other)


def test_an_unknown_instruction_set_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"isa is 'sse9'.*'generic'"):
        Cpu("sse9")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_gradients_larger_than_the_caches_equal_small_ones(cpu: Cpu, dtype: torch.dtype, offset: int) -> None:
    # Above 16 MiB stores go around the caches, in aligned pieces: the same bits must arrive.
    rows, V = 180, 50_257
    logits = random_logits(1, 8, V, dtype=dtype)[0].repeat(rows // 8 + 1, 1)[:rows]
    values = [logits[None]]
    target = random_target(rows, V=V, ignored=0.1)
    weight = torch.full((rows,), 1 / rows)

    def gradient(part: slice) -> Tensor:
        count = part.stop - part.start
        memory = torch.full((count * V + offset,), torch.nan, dtype=dtype)
        out = memory[offset:].view(1, count, V)
        chunk = sum_of([v[:, part] for v in values], [0.5], [0.0])
        loss = Loss(label_smoothing=0.1, z_loss=0.01)
        cpu.losses(chunk, target[part], loss, weight[part], [{"values": out}])
        return out

    large = gradient(slice(0, rows))
    assert large.numel() * dtype.itemsize > 16 << 20
    for start in range(0, rows, 60):
        small = gradient(slice(start, start + 60))
        assert small.numel() * dtype.itemsize < 16 << 20
        assert torch.equal(large[:, start : start + 60], small)
