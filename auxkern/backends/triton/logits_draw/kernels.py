"""The next token of each row: Gumbel-max over a sum of logits, with or without filters.

Without filters one pass over the terms decides (``draw_kernel``): a program keeps the best of its share
of a row, relative to the largest logit so far, and ``choose_kernel`` compares the programs' bests.
With filters or penalties the sum is written once, in float32 (``sum_kernel``); for the rows of a decoding
step it stays in the L2 cache, where ``adjust_kernel`` and the kernels of ``../filters`` work on it.
"""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from auxkern.backends.triton.device.draws import NO_ID, finite_pivot, gumbel
from auxkern.backends.triton.device.numerics import exp
from auxkern.backends.triton.device.rows import row_pointer
from auxkern.backends.triton.device.terms import shares_of

# ROW_OK, ROW_NAN, ROW_EMPTY, ROW_INFINITE of core/draws.py
_OK: tl.constexpr = tl.constexpr(0)
_NAN: tl.constexpr = tl.constexpr(1)
_EMPTY: tl.constexpr = tl.constexpr(2)
_INFINITE: tl.constexpr = tl.constexpr(3)


@triton.jit
def _noise(seed, position, start, BLOCK: tl.constexpr):
    """(BLOCK,) Gumbel noise of ids from ``start``, a multiple of 4: word id % 4 of counter id // 4."""
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    low = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a, b, c, d = tl.philox(seed, counter, zero, low, high)
    # join puts its arguments side by side in a new last dimension.
    return gumbel(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK]))


@triton.jit
def _row_pointers(terms, row, ALIGNED: tl.constexpr):
    """Pointers to [row, 0] of each term, as a tuple."""
    pointers = ()
    for i in tl.static_range(len(terms)):
        pointers += (row_pointer(terms[i], row, ALIGNED[i]),)
    return pointers


@triton.jit
def _sum(
    terms, row_scales, pointers, row, ids, V,
    UNIT: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """z at ``ids``, -inf from V on; a WHOLE tile needs no mask, which would make its loads narrow."""
    mask = ids == ids
    if not WHOLE:
        mask = ids < V
    shares = shares_of(terms, pointers, ids, mask, UNIT, CAPPED)
    z = tl.zeros_like(shares[0])
    for i in tl.static_range(len(shares)):
        if SCALED[i]:
            z += shares[i] * tl.load(row_scales[i] + row)
        else:
            z += shares[i]
    return tl.where(mask, z, -float("inf"))


@triton.jit
def _nans(z):
    return tl.max((z != z).to(tl.int32), axis=0)


@triton.jit
def _share_of_program(split, splits, V, BLOCK: tl.constexpr):
    """(begin, end of whole tiles, end) of the columns that program ``split`` takes."""
    share = tl.cdiv(tl.cdiv(V, BLOCK), splits) * BLOCK
    # Not cut at V, which would hide from the compiler that it is a multiple of BLOCK.
    begin = split * share
    end = tl.minimum(begin + share, V)
    return begin, begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK, end


@triton.jit
def _merge(state, other):
    """The better of two draws (largest logit, score, d of its id, id, sum of exp d, has NaN).

    Scores, d and sums are relative to the largest logit, in units of the temperature: see ``_moved``.
    """
    better = (other[1] > state[1]) | ((other[1] == state[1]) & (other[3] < state[3]))
    return (
        state[0],
        tl.where(better, other[1], state[1]),
        tl.where(better, other[2], state[2]),
        tl.where(better, other[3], state[3]),
        state[4] + other[4],
        tl.maximum(state[5], other[5]),
    )


@triton.jit
def _moved(state, largest, temperature):
    """``state`` relative to another largest logit."""
    shift = tl.where(
        state[0] == -float("inf"), 0.0, (finite_pivot(state[0]) - finite_pivot(largest)) / temperature
    )
    return largest, state[1] + shift, state[2] + shift, state[3], state[4] * exp(shift), state[5]


@triton.jit
def _tile_draw(d, kept, ids, noise, largest, has_nan, LOGPROB: tl.constexpr):
    """The draw of one tile, relative to ``largest``."""
    d = tl.where(kept, d, -float("inf"))
    score = d + noise
    top = tl.max(score, axis=0)
    token = tl.min(tl.where((score == top) & kept, ids, NO_ID), axis=0)
    of_token = tl.max(tl.where(ids == token, d, -float("inf")), axis=0)
    total = 0.0
    if LOGPROB:
        total = tl.sum(exp(d), axis=0)
    return largest, top, of_token, token, total, has_nan


@triton.jit
def _step(
    state, z, ids, seed, position, start, greedy, temperature, LOGPROB: tl.constexpr, BLOCK: tl.constexpr
):
    """``state`` after another tile."""
    noise = tl.where(greedy, 0.0, _noise(seed, position, start, BLOCK))
    largest = tl.maximum(state[0], tl.max(z, axis=0))
    d = (z - finite_pivot(largest)) / temperature
    tile = _tile_draw(d, z > -float("inf"), ids, noise, largest, _nans(z), LOGPROB)
    return _merge(_moved(state, largest, temperature), tile)


@triton.jit
def _write(state, out, row, greedy, LOGPROB: tl.constexpr):
    """The row's token, status and log-probability."""
    status = tl.where(state[0] == -float("inf"), _EMPTY, _OK)
    status = tl.where(state[0] == float("inf"), _INFINITE, status)
    status = tl.where(state[5] != 0, _NAN, status)
    tl.store(out.token + row, tl.where(status == _OK, state[3], -1).to(tl.int64))
    tl.store(out.status + row, status)
    if LOGPROB:
        logprob = tl.where(greedy, 0.0, state[2] - tl.log(state[4]))
        tl.store(out.logprob + row, tl.where(status == _OK, logprob, float("nan")))


@triton.jit(do_not_specialize=["N", "V", "splits"])
def draw_kernel(
    terms,  # I of (N, >= V) logits, float16, bfloat16 or float32
    row_scales,  # I of (N,) float32, where SCALED
    draws,  # Draws: (N,) temperature, seed, position
    partial,  # (5, N, splits) float32 and (1, N, splits) int32
    N, V, splits,
    ALIGNED: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
    LOGPROB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The draw of row program_id(0) among the columns of its share program_id(1) of ``splits``.

    Reads each logit once and writes none.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    temperature = tl.load(draws.temperature + row)
    greedy = temperature == 0
    temperature = tl.where(greedy, 1.0, temperature)
    seed = tl.load(draws.seed + row)
    position = tl.load(draws.position + row)
    pointers = _row_pointers(terms, row, ALIGNED)
    begin, whole, end = _share_of_program(split, splits, V, BLOCK)
    nothing = -float("inf")
    state = (nothing, nothing, nothing, NO_ID, 0.0, 0)
    for start in range(begin, whole, BLOCK):
        ids = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        z = _sum(terms, row_scales, pointers, row, ids, V, UNIT, CAPPED, SCALED, True)
        state = _step(state, z, ids, seed, position, start, greedy, temperature, LOGPROB, BLOCK)
    if whole < end:
        ids = tl.multiple_of(whole, BLOCK) + tl.arange(0, BLOCK)
        z = _sum(terms, row_scales, pointers, row, ids, V, UNIT, CAPPED, SCALED, False)
        state = _step(state, z, ids, seed, position, whole, greedy, temperature, LOGPROB, BLOCK)
    plane = N.to(tl.int64) * splits
    at = row * splits + split
    for i in tl.static_range(3):
        tl.store(partial.floats + i * plane + at, state[i])
    tl.store(partial.floats + 3 * plane + at, state[4])
    tl.store(partial.floats + 4 * plane + at, tl.where(state[5] != 0, 1.0, 0.0))
    tl.store(partial.ids + at, state[3])


@triton.jit(do_not_specialize=["N", "splits"])
def choose_kernel(
    draws,  # Draws
    partial,  # what draw_kernel or heads_draw_kernel left
    out,  # (N,) int64, int32, float32
    N, splits,
    LOGPROB: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The best of the draws of row program_id(0)'s programs, LANES at a time."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(draws.temperature + row)
    greedy = temperature == 0
    temperature = tl.where(greedy, 1.0, temperature)
    plane = N.to(tl.int64) * splits
    lane = tl.arange(0, LANES)
    nothing = -float("inf")
    state = (nothing, nothing, nothing, NO_ID, 0.0, 0.0)
    for first in range(0, splits, LANES):
        valid = first + lane < splits
        at = partial.floats + row * splits + first + lane
        tile_largest = tl.load(at, valid, nothing)
        score = tl.load(at + plane, valid, nothing)
        d = tl.load(at + 2 * plane, valid, nothing)
        total = tl.load(at + 3 * plane, valid, 0.0)
        nans = tl.load(at + 4 * plane, valid, 0.0)
        ids = tl.load(partial.ids + row * splits + first + lane, valid, NO_ID)
        largest = tl.maximum(state[0], tl.max(tile_largest, axis=0))
        tiles = _moved((tile_largest, score, d, ids, total, nans), largest, temperature)
        top = tl.max(tiles[1], axis=0)
        token = tl.min(tl.where(tiles[1] == top, ids, NO_ID), axis=0)
        of_token = tl.max(tl.where(ids == token, tiles[2], nothing), axis=0)
        best = (largest, top, of_token, token, tl.sum(tiles[4], axis=0), tl.max(nans, axis=0))
        state = _merge(_moved(state, largest, temperature), best)
    _write(state, out, row, greedy, LOGPROB)


@triton.jit(do_not_specialize=["V", "stride", "splits"])
def sum_kernel(
    terms,  # I of (N, >= V) logits, float16, bfloat16 or float32
    row_scales,  # I of (N,) float32, where SCALED
    z_out,  # (N, stride) float32, whole tiles
    V, stride, splits,
    ALIGNED: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """z of row program_id(0), from its share program_id(1) of ``splits`` of the columns."""
    row = tl.program_id(0).to(tl.int64)
    pointers = _row_pointers(terms, row, ALIGNED)
    begin, whole, end = _share_of_program(tl.program_id(1), splits, V, BLOCK)
    z_row = tl.multiple_of(z_out + row * stride, 16)
    for start in range(begin, whole, BLOCK):
        ids = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        z = _sum(terms, row_scales, pointers, row, ids, V, UNIT, CAPPED, SCALED, True)
        tl.store(z_row + ids, z)
    if whole < end:
        ids = tl.multiple_of(whole, BLOCK) + tl.arange(0, BLOCK)
        z = _sum(terms, row_scales, pointers, row, ids, V, UNIT, CAPPED, SCALED, False)
        tl.store(z_row + ids, z)


@triton.jit
def _add_all(z_row, ids, values, row, width, V):
    """z[ids] += values, one after the other: equal ids add up, in the order given."""
    for k in range(width):
        at = tl.load(ids + row * width + k)
        exists = (at >= 0) & (at < V)
        before = tl.load(z_row + at, exists, 0.0)
        tl.store(z_row + at, before + tl.load(values + row * width + k), exists)
        # The next one may be of the same id.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["V", "stride", "added_width", "bias_width", "seen_width"])
def adjust_kernel(
    z_out,  # (N, stride) float32
    draws,  # Draws
    seen,  # Seen: (N, S) int64 ids, each once or out of range; (N, S) int64 times it was generated
    V, stride, added_width, bias_width, seen_width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sparse terms, biases and penalties of row program_id(0), in place."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_out + row * stride
    _add_all(z_row, draws.added_ids, draws.added, row, added_width, V)
    _add_all(z_row, draws.bias_ids, draws.bias, row, bias_width, V)
    repetition = tl.load(draws.repetition + row)
    presence = tl.load(draws.presence + row)
    frequency = tl.load(draws.frequency + row)
    for start in range(0, seen_width, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        inside = lane < seen_width
        ids = tl.load(seen.ids + row * seen_width + lane, inside, -1)
        generated = tl.load(seen.generated + row * seen_width + lane, inside, 0)
        exists = (ids >= 0) & (ids < V)
        z = tl.load(z_row + ids, exists, 0.0)
        penalized = tl.where(z > 0, z / repetition, z * repetition)
        z = tl.where(repetition != 1, penalized, z)
        paid = presence + frequency * generated.to(tl.float32)
        tl.store(z_row + ids, tl.where(generated > 0, z - paid, z), exists)
