"""What the statistics of a row's softmax are made of, from logits or from heads."""

# Triton's language is not Python's: kernels have no annotations.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from auxkern.backends.triton.device.numerics import exp, log1p
from auxkern.core import loss

# Out of the running in an argmax.
NO_KEY: tl.constexpr = tl.constexpr(-(2**31))
NO_COLUMN: tl.constexpr = tl.constexpr(2**31 - 1)
# A row whose target is among the ids of another shard: its logit here is -inf.
NO_TARGET: tl.constexpr = tl.constexpr(loss.NO_TARGET)


@triton.jit
def pivot_of(largest):
    """``largest``, or 0 where there is no finite value yet: inf - inf must not arise."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def largest_and_where(z):
    """The largest of z (R,), NaN being that, and (R,) whether an entry is as large."""
    nan = z != z
    any_nan = tl.max(nan.to(tl.int32), axis=0) != 0
    top = tl.max(z, axis=0)
    return tl.where(any_nan, float("nan"), top), tl.where(any_nan, nan, z == top)


@triton.jit
def comes_first(z, at, other, other_at):
    """Whether argmax takes z, at ``at``, before another: the largest, NaN above all, of equals the lowest."""
    nan, other_nan = z != z, other != other
    above = (z > other) | (nan & (other == other))
    return above | (((z == other) | (nan & other_nan)) & (at < other_at))


@triton.jit
def fold_best(best, z, columns, valid):
    """Add columns to (key of the largest, its lowest column); NaN is the largest, as in torch."""
    # Floats ordered as ints; -0 becomes 0 before, for they tie.
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(z == z, bits ^ ((bits >> 31) & 0x7FFFFFFF), 2**31 - 1)
    key = tl.where(valid, key, NO_KEY)
    top = tl.max(key, axis=1)
    column = tl.min(tl.where(key == top[:, None], columns, NO_COLUMN), axis=1)
    better = (top > best[0]) | ((top == best[0]) & (column < best[1]))
    return tl.where(better, top, best[0]), tl.where(better, column, best[1])


@triton.jit
def nll_of(softmax, target):
    """(nll, max, log of the sum of exp(z - max)) of a row from its other columns and its target.

    Of a row of nothing but -inf, max and log are -inf and the nll is NaN.
    """
    largest = tl.maximum(softmax[0], target)
    pivot = pivot_of(largest)
    others = softmax[1] * exp(softmax[0] - pivot)
    on_top = (target >= softmax[0]) & (largest > -float("inf"))
    # Where the target is not on top, the others hold at least the 1 of the largest.
    excess = tl.where(on_top, others, (others - 1.0) + exp(target - pivot))
    log_sum = log1p(tl.where(largest < float("inf"), excess, float("nan")))
    log_sum = tl.where(largest == -float("inf"), others - float("inf"), log_sum)
    nll = tl.where(on_top, log_sum, (largest - target) + log_sum)
    return nll, largest, log_sum


@triton.jit
def absent_logit(y):
    """The logit of a target outside the vocabulary: -inf if another shard has it, else NaN."""
    return tl.where(y == NO_TARGET, -float("inf"), float("nan"))


@triton.jit
def coefficients_of(coefficients, rows, present):
    """(row maximum, the three coefficients, whether the row has a gradient) of rows."""
    e = tl.load(coefficients.exp_coefficient + rows, present, 0.0)
    c = tl.load(coefficients.constant + rows, present, 0.0)
    t = tl.load(coefficients.target_gradient + rows, present, 0.0)
    live = (e != 0) | (c != 0) | (t != 0)
    return tl.load(coefficients.row_max + rows, present, 0.0), e, c, t, live
