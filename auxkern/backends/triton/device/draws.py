"""What draws of tokens are made of, from logits or from heads."""

# Triton's language is not Python's: kernels have no annotations.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from auxkern.backends.triton.device.numerics import log
from auxkern.backends.triton.device.rows import decode

NO_ID: tl.constexpr = tl.constexpr(2**31 - 1)
_UNIT: tl.constexpr = tl.constexpr(2.0**-32)
# ROW_OK, ROW_NAN, ROW_EMPTY, ROW_INFINITE of core/draws.py
OK: tl.constexpr = tl.constexpr(0)
NAN: tl.constexpr = tl.constexpr(1)
EMPTY: tl.constexpr = tl.constexpr(2)
INFINITE: tl.constexpr = tl.constexpr(3)


@triton.jit
def _philox_round(a, b, c, d, key, other_key):
    # One wide product instead of a low and a high one: Triton's own Philox takes half as many again.
    left = a.to(tl.uint64) * 0xD2511F53
    right = c.to(tl.uint64) * 0xCD9E8D57
    return (
        (right >> 32).to(tl.uint32) ^ b ^ key,
        right.to(tl.uint32),
        (left >> 32).to(tl.uint32) ^ d ^ other_key,
        left.to(tl.uint32),
    )


@triton.jit
def random_words(seed, position, counter):
    """Four uint32 blocks: the words of Philox4x32-10 for (counter, 0, position) under the key ``seed``.

    Args:
        seed, position: int64, scalars or blocks that broadcast with ``counter``.
        counter: int32 block.
    """
    a = counter.to(tl.uint32)
    b = tl.zeros_like(a)
    c = b + (position & 0xFFFFFFFF).to(tl.uint32)
    d = b + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key = (seed & 0xFFFFFFFF).to(tl.uint32)
    other_key = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b, c, d = _philox_round(a, b, c, d, key, other_key)
        key = tl.add(key, 0x9E3779B9, sanitize_overflow=False)
        other_key = tl.add(other_key, 0xBB67AE85, sanitize_overflow=False)
    return a, b, c, d


@triton.jit
def bits_of_ids(seed, position, ids):
    """uint32 random bits of each id, whatever ids stand beside it: word id % 4 of counter id // 4."""
    a, b, c, d = random_words(seed, position, ids >> 2)
    return tl.where((ids & 2) == 0, tl.where((ids & 1) == 0, a, b), tl.where((ids & 1) == 0, c, d))


@triton.jit
def _log1m(u):
    """-log(1 - u) of u in (0, 0.5], float32, within 3 units: Chebyshev's series of degree 10."""
    series = 1.7770181894302368 * u + -2.5557680130004883
    series = series * u + 2.049731969833374
    series = series * u + -0.6350128650665283
    series = series * u + 0.35381534695625305
    series = series * u + 0.17321175336837769
    series = series * u + 0.2521698474884033
    series = series * u + 0.3332449793815613
    series = series * u + 0.5000013709068298
    series = series * u + 1.0
    return u * series


@triton.jit
def gumbel(bits):
    """-log(-log1p(-u)) of u = (bits + 0.5) 2**-32; above a half from 1 - u, then the precise one."""
    below = bits < 0x80000000
    # Below 2**31 in either case, so that it may be converted as a signed number.
    small = tl.where(below, bits, bits ^ 0xFFFFFFFF).to(tl.int32).to(tl.float32)
    u = (small + 0.5) * _UNIT
    return -log(tl.where(below, _log1m(u), -log(u)))


@triton.jit
def noise_of(seed, position, counter):
    """Gumbel noise of ids, (4 K,) or (R, 4 K): of the four from 4 * ``counter`` on, one after the other.

    Args:
        seed, position: as for ``random_words``.
        counter: (K,) or (R, K) int32.
    """
    a, b, c, d = random_words(seed, position, counter)
    # join puts its arguments side by side in a new last dimension.
    words = tl.join(tl.join(a, c), tl.join(b, d))
    K: tl.constexpr = counter.shape[len(counter.shape) - 1]
    shape: tl.constexpr = [4 * K] if len(counter.shape) == 1 else [counter.shape[0], 4 * K]
    return gumbel(tl.reshape(words, shape))


@triton.jit
def score_of(z, temperature, bits):
    """z + temperature * gumbel(bits) as the sum of two floats: (the rounded sum, what it lacks).

    It depends on the column alone, and pairs compare as their sums do. So a cold draw still decides between
    equal logits by noise, however small that is beside them. (-inf, 0) where z is -inf or NaN.

    Args:
        temperature: float32; 0 for the largest logit.
    """
    there = z > -float("inf")
    z = tl.where(there, z, 0.0)
    # A fused 0, lest the product be fused with one of the sums: with rounded numbers those are exact (Knuth's
    # TwoSum).
    noise = tl.fma(gumbel(bits), temperature, 0.0)
    high = z + noise
    back = high - z
    low = (z - (high - back)) + (noise - back)
    low = tl.where(tl.abs(high) < float("inf"), low, 0.0)
    return tl.where(there, high, -float("inf")), tl.where(there, low, 0.0)


@triton.jit
def _best_score(high, low, ids):
    """(score, as ``score_of`` gives it, and id) of the best of a block; the lowest id of equal ones.

    Of nothing but -inf the id is ``NO_ID``.
    """
    top = tl.max(high, axis=0)
    first = (high == top) & (high > -float("inf"))
    rest = tl.max(tl.where(first, low, -float("inf")), axis=0)
    token = tl.min(tl.where(first & (low == rest), ids, NO_ID), axis=0)
    return top, tl.where(token == NO_ID, 0.0, rest), token


@triton.jit
def _is_better(high, low, token, other_high, other_low, other_token):
    """Whether a score is above another one, or as high and of a lower id."""
    above = (high > other_high) | ((high == other_high) & (low > other_low))
    return above | ((high == other_high) & (low == other_low) & (token < other_token))


@triton.jit
def finite_pivot(largest):
    """``largest``, or 0 where it is infinite: inf - inf must not arise."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit
def has_nan(z):
    return tl.max((z != z).to(tl.int32), axis=0)


@triton.jit
def no_draw():
    """What ``better_draw`` begins with: (score in two floats, id, its z, whether a NaN was met)."""
    nothing = -float("inf")
    return nothing, 0.0, NO_ID, nothing, 0


@triton.jit
def better_draw(best, z, ids, temperature, seed, position):
    """The better of a draw and of the columns ``ids``, whose scores are worked out."""
    high, low = score_of(z, temperature, bits_of_ids(seed, position, ids))
    high, low, token = _best_score(high, low, ids)
    z_of_token = tl.max(tl.where((ids == token) & (z == z), z, -float("inf")), axis=0)
    wins = _is_better(high, low, token, best[0], best[1], best[2])
    return (
        tl.where(wins, high, best[0]),
        tl.where(wins, low, best[1]),
        tl.where(wins, token, best[2]),
        tl.where(wins, z_of_token, best[3]),
        tl.maximum(best[4], has_nan(z)),
    )


@triton.jit
def number_of(number, rows):
    """A number of all rows for each of these, or of a pointer to a number for each row, theirs."""
    # The interpreter's numbers are Python's.
    if hasattr(number, "dtype") and number.dtype.is_ptr():
        result = tl.load(number + rows)
    else:
        result = tl.where(rows >= 0, number, 0.0)
    return result


@triton.jit
def count_of(number, rows):
    """The same for integers; one of all rows is coded."""
    if hasattr(number, "dtype") and number.dtype.is_ptr():
        result = tl.load(number + rows)
    else:
        result = tl.where(rows >= 0, decode(number), 0)
    return result


@triton.jit
def temperature_of(draws, rows):
    """As given, 1e36 at most: no noise times it overflows, and logits below 1e29 make no difference there."""
    return tl.minimum(number_of(draws.temperature, rows), 1e36)


@triton.jit
def sharpness_of(temperature):
    """log2(e) / temperature, finite."""
    return tl.minimum(1.4426950408889634 / temperature, 3e38)


@triton.jit
def _log_share(parts, row, count, z, temperature, LANES: tl.constexpr):
    """log of exp(z / temperature) as a share of the row's sum, whose parts are added in one order."""
    sharpness = sharpness_of(temperature)
    lane = tl.arange(0, LANES)
    largest = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for first in range(0, count, LANES):
        inside = first + lane < count
        at = parts + 2 * (row * count + first + lane)
        top = tl.load(at, inside, -float("inf"))
        higher = tl.maximum(largest, top)
        pivot = finite_pivot(higher)
        total *= tl.exp2((largest - pivot) * sharpness)
        total += tl.load(at + 1, inside, 0.0) * tl.exp2((top - pivot) * sharpness)
        largest = higher
    top = finite_pivot(tl.max(largest, axis=0))
    total = tl.sum(total * tl.exp2((largest - top) * sharpness), axis=0)
    return (z - top) / temperature - tl.log(total)


@triton.jit
def write_draw(out, row, best, parts, count, temperature, LOGPROB: tl.constexpr, LANES: tl.constexpr):
    """The row's token, status and log-probability, of the draw ``best``.

    Args:
        parts: (N, count, 2) float32, largest logit and sum of each part of a row, if LOGPROB.
    """
    status = tl.where(best[2] == NO_ID, EMPTY, OK)
    status = tl.where(best[0] == float("inf"), INFINITE, status)
    status = tl.where(best[4] != 0, NAN, status)
    tl.store(out.token + row, tl.where(status == OK, best[2], -1).to(tl.int64))
    tl.store(out.status + row, status)
    if LOGPROB:
        greedy = temperature == 0
        share = _log_share(parts, row, count, best[3], tl.where(greedy, 1.0, temperature), LANES)
        tl.store(out.logprob + row, tl.where(status == OK, tl.where(greedy, 0.0, share), float("nan")))
