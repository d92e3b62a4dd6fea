"""Approximate PTX instructions: exact without noise, within the ISA's bounds and beyond rounding with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext

import numpy as np
import pytest

from tests.support.exact_floats import floats, same_bits
from tests.support.ptx import approximate
from tests.support.ptx.approximate import Noise

F32, F64, U32 = np.float32, np.float64, np.uint32
LN2 = Decimal(2).ln()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def decimal_of(function: Callable[[Decimal], Decimal]) -> Callable[[np.ndarray], np.ndarray]:
    """The function of each float32 in 50 digits, as float64: exact for these comparisons."""

    def evaluate(x: np.ndarray) -> np.ndarray:
        with localcontext() as context:
            context.prec = 50
            return np.array([float(function(Decimal(v))) for v in x.astype(F64).tolist()])

    return evaluate


def ulp(y: np.ndarray) -> np.ndarray:
    """The last place of the float32 nearest to y, float64."""
    return np.ldexp(1.0, np.maximum(np.frexp(np.abs(y))[1] - 24, -149))


# (operands, true function, largest error of the true value y for operands x) of each instruction, as its
# section of the PTX ISA 9.1 says. "Two ulp from the correctly rounded result" is 2.5 from the true one.
SPANS = {
    "ex2": (floats(0, 2000, (-20, 7)), decimal_of(lambda v: (v * LN2).exp()), lambda x, y: 2.5 * ulp(y)),
    "lg2": (
        np.abs(np.concatenate([floats(1, 1000, (-126, -2)), floats(12, 1000, (1, 127))])),
        decimal_of(lambda v: v.ln() / LN2),
        lambda x, y: 2.0**-22 * np.abs(y),
    ),
    "lg2 near 1": (
        np.random.default_rng(2).uniform(0.75, 1.5, 1000).astype(F32),
        decimal_of(lambda v: v.ln() / LN2),
        lambda x, y: np.full(len(x), 2.0**-22),
    ),
    "rcp": (floats(3, 2000, (-125, 125)), decimal_of(lambda v: 1 / v), lambda x, y: ulp(y)),
    "sqrt": (np.abs(floats(4, 2000, (-149, 127))), decimal_of(lambda v: v.sqrt()), lambda x, y: 2.0**-23 * y),
    "rsqrt": (
        np.abs(floats(5, 2000, (-149, 127))),
        decimal_of(lambda v: 1 / v.sqrt()),
        lambda x, y: 2.0**-22.9 * y,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPANS)
def test_exact_without_noise(name: str) -> None:
    x, truth, _ = SPANS[name]
    # float64 functions are not exactly rounded: a float32 next to a middle may fall either way.
    error = np.abs(getattr(approximate, name.split()[0])(x).astype(F64) - truth(x))
    assert (error <= (0.5 + 2.0**-20) * ulp(truth(x))).all()


@pytest.mark.parametrize("name", SPANS)
def test_noise_fills_the_bound_and_keeps_it(name: str) -> None:
    x, truth, bound = SPANS[name]
    y = truth(x)
    error = getattr(approximate, name.split()[0])(x, Noise(1)).astype(F64) - y
    room = bound(x, y)
    # The float64 truth itself is within one of its own last places.
    assert (np.abs(error) <= room * (1 + 2.0**-20)).all()
    # As far as float32 can: one last place may be all that a bound leaves.
    reach = np.maximum(error / room, 0).max(), np.maximum(-error / room, 0).max()
    assert min(reach) > 0.8
    assert (np.abs(error) > 0.5 * ulp(y)).mean() > 0.05


def test_equal_operands_have_equal_errors() -> None:
    x = floats(9, 500, (-3, 3))
    result = approximate.ex2(x, Noise(1))
    order = np.random.default_rng(0).permutation(500)
    same_bits(approximate.ex2(x[order], Noise(1)), result[order])
    same_bits(approximate.ex2(x, Noise(1)), result)
    assert (approximate.ex2(x, Noise(2)) != result).any()
    # Instructions and operands of one seed do not err alike.
    noise = Noise(1)
    first, second = noise.shares("ex2", x), noise.shares("rcp", x)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.2


INF, NAN = float("inf"), float("nan")
SPECIALS = {
    "ex2": [(-INF, 0.0), (-0.0, 1.0), (0.0, 1.0), (INF, INF), (NAN, NAN), (-200.0, 0.0), (200.0, INF)],
    "lg2": [(-INF, NAN), (-1.0, NAN), (-0.0, -INF), (0.0, -INF), (INF, INF), (NAN, NAN)],
    "rcp": [(-INF, -0.0), (-0.0, -INF), (0.0, INF), (INF, 0.0), (NAN, NAN)],
    "sqrt": [(-INF, NAN), (-1.0, NAN), (-0.0, -0.0), (0.0, 0.0), (INF, INF), (NAN, NAN)],
    "rsqrt": [(-INF, NAN), (-1.0, NAN), (-0.0, -INF), (0.0, INF), (INF, 0.0), (NAN, NAN)],
}


def bits_of(values: list[float]) -> np.ndarray:
    x = np.array(values, F32)
    return np.where(np.isnan(x), np.array([0x7FFFFFFF], U32).view(F32), x)


@pytest.mark.parametrize("noise", [None, Noise(3), Noise(4)])
@pytest.mark.parametrize("name", SPECIALS)
def test_special_operands(name: str, noise: Noise | None) -> None:
    x, want = zip(*SPECIALS[name], strict=True)
    same_bits(getattr(approximate, name)(np.array(x, F32), noise), bits_of(list(want)))


@pytest.mark.parametrize("name", ["div_full", "div_approx"])
def test_division(name: str) -> None:
    divide = getattr(approximate, name)
    x, y = floats(10, 4000, (-20, 20)), floats(11, 4000, (-100, 105))
    truth = x.astype(F64) / y.astype(F64)
    error = np.abs(divide(x, y).astype(F64) - truth)
    assert (error <= (0.5 + 2.0**-20) * ulp(truth)).all()
    error = (divide(x, y, Noise(1)).astype(F64) - truth) / ulp(truth)
    assert error.max() > 1.5
    assert error.min() < -1.5
    assert np.abs(error).max() <= 2


@pytest.mark.parametrize("noise", [None, Noise(3)])
@pytest.mark.parametrize("name", ["div_full", "div_approx"])
def test_division_of_special_operands(name: str, noise: Noise | None) -> None:
    cases = [
        (1.0, 0.0, INF), (-1.0, 0.0, -INF), (0.0, 0.0, NAN), (0.0, -3.0, -0.0), (INF, 2.0, INF),
        (INF, INF, NAN), (5.0, -INF, -0.0), (NAN, 1.0, NAN), (1.0, NAN, NAN),
    ]  # fmt: skip
    x, y, want = (list(part) for part in zip(*cases, strict=True))
    same_bits(getattr(approximate, name)(np.array(x, F32), np.array(y, F32), noise), bits_of(want))


@pytest.mark.parametrize("noise", [None, Noise(3)])
def test_only_the_full_division_has_huge_divisors(noise: Noise | None) -> None:
    x = np.array([2.0**120, -(2.0**120), INF, NAN, 0.0, 2.0**120], F32)
    y = np.array([2.0**127, 2.0**127, 2.0**127, 2.0**127, -(2.0**127), 2.0**126], F32)
    want = [0.0, -0.0, NAN, NAN, -0.0]
    same_bits(approximate.div_approx(x, y, noise)[:5], bits_of(want))
    full = approximate.div_full(x, y, noise)
    np.testing.assert_allclose(full[[0, 1, 5]], [2.0**-7, -(2.0**-7), 2.0**-6], rtol=2.0**-22)
    assert np.isinf(full[2])
    np.testing.assert_allclose(approximate.div_approx(x, y, noise)[5], 2.0**-6, rtol=2.0**-22)
