"""The next token of each row: Gumbel-max over a sum of logits, with or without filters.

A column's score is z + temperature * noise, exactly (``device/draws.py``), and the largest wins, however rows
are split. Its noise takes two logarithms, so ``draw_kernel``, which reads every logit once, works out no more
than a bound of the score: u, of which the noise is -log(-log1p(-u)) <= -log(u), has a logarithm that the bits
of u as a float are close to. A thread keeps the largest bound of its columns; a program leaves one for each
of its threads, a group of columns, and ``choose_kernel`` works out the scores of the groups whose bounds are
above the best score so far: of one group or two of a row, as a rule.

With filters or penalties the sum is written once, in float32 (``sum_kernel``); for the rows of a decoding
step it stays in the L2 cache, where ``adjust_kernel`` and the kernels of ``../filters`` work on it.
"""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from auxkern.backends.triton import configs
from auxkern.backends.triton.device.draws import (
    NO_ID,
    better_draw,
    finite_pivot,
    no_draw,
    number_of,
    random_words,
    sharpness_of,
    temperature_of,
    write_draw,
)
from auxkern.backends.triton.device.rows import read, row_pointer, share_of_program
from auxkern.backends.triton.device.terms import capped

_ADJACENT: tl.constexpr = tl.constexpr(configs.ADJACENT)
_PART: tl.constexpr = tl.constexpr(configs.PART)
# log2(x) of a float is at least its bits, as an integer, times 2**-23, less 127; and u is bits * 2**-32.
_BITS_UNIT: tl.constexpr = tl.constexpr(0.6931471805599453 * 2.0**-23)
_LOWEST_LOG: tl.constexpr = tl.constexpr(0.6931471805599453 * (127 + 32))


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
    z = tl.zeros(ids.shape, tl.float32)
    for i in tl.static_range(len(terms)):
        x = read(terms[i], pointers[i], ids, mask, UNIT[i])
        x = capped(terms[i], x, CAPPED[i])
        # Fused by name: two kernels that make the same z must round it alike.
        scale = tl.load(row_scales[i] + row) if SCALED[i] else terms[i].scale
        z = tl.fma(x, scale, z)
    return tl.where(mask, z, -float("inf"))


@triton.jit
def _larger(a, b):
    """NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _four_blocks(x):
    """Of (M, 2, 2) the four (M,) in turn."""
    evens, odds = tl.split(x)
    first, third = tl.split(evens)
    second, fourth = tl.split(odds)
    return first, second, third, fourth


@triton.jit
def _raised_by_four(bounds, z, counter, seed, position, unit):
    """(M,) largest of ``bounds`` and of those of four columns, z (M, 2, 2), that one Philox block serves."""
    words = random_words(seed, position, counter)
    z = _four_blocks(z)
    for i in tl.static_range(4):
        # 2**23 (log2(bits) + 127) or less: as close as the bits of a float come to its logarithm.
        octaves = words[i].to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
        bounds = _larger(bounds, tl.fma(octaves, unit, z[i]))
    return bounds


@triton.jit
def _raised(bounds, z, start, seed, position, unit, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """(BLOCK // TOGETHER,) ``bounds`` raised to what z + temperature * noise is not above, but for rounding.

    z is cut as threads read it, TOGETHER columns at a time: each then makes the noise of its own.

    Args:
        unit: -temperature * log(2) * 2**-23.
    """
    lane = tl.arange(0, BLOCK // TOGETHER)
    if TOGETHER == 4:
        z = tl.reshape(z, [BLOCK // 4, 2, 2])
        bounds = _raised_by_four(bounds, z, start // 4 + lane, seed, position, unit)
    else:
        z = tl.permute(tl.reshape(z, [BLOCK // 8, 2, 2, 2]), [0, 2, 3, 1])
        left, right = tl.split(z)
        bounds = _raised_by_four(bounds, left, start // 4 + 2 * lane, seed, position, unit)
        bounds = _raised_by_four(bounds, right, start // 4 + 2 * lane + 1, seed, position, unit)
    return bounds


@triton.jit
def _store_parts(parts, at, z, start, sharpness, BLOCK: tl.constexpr):
    """Largest z and sum of exp((z - largest) / temperature) of each part of a tile."""
    count: tl.constexpr = BLOCK // _PART
    z = tl.reshape(z, [count, _PART])
    largest = tl.max(z, axis=1)
    total = tl.sum(tl.exp2((z - finite_pivot(largest)[:, None]) * sharpness), axis=1)
    at = 2 * (at + start // _PART) + tl.arange(0, 2 * count)
    tl.store(parts + at, tl.reshape(tl.join(largest, total), [2 * count]))


@triton.jit(do_not_specialize=["V", "splits", "parts"])
def draw_kernel(
    terms,  # I of (N, >= V) logits, float16, bfloat16 or float32
    row_scales,  # I of (N,) float32, where SCALED
    draws,  # Noise: temperature, seed, position
    partial,  # Bounds, out
    V, splits, parts,
    ALIGNED: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
    LOGPROB: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Bounds of the scores in row program_id(0), of the columns of its share program_id(1) of ``splits``.

    Reads each logit once and writes none. No barrier: a thread meets no other one's numbers.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    temperature = temperature_of(draws, row)
    seed = tl.load(draws.seed + row)
    position = tl.load(draws.position + row)
    unit = -temperature * _BITS_UNIT
    sharpness = sharpness_of(tl.where(temperature == 0, 1.0, temperature))
    pointers = _row_pointers(terms, row, ALIGNED)
    begin, whole, end = share_of_program(split, splits, V, BLOCK)
    bounds = tl.full([BLOCK // TOGETHER], -float("inf"), tl.float32)
    for start in range(begin, whole, BLOCK):
        ids = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        z = _sum(terms, row_scales, pointers, row, ids, V, UNIT, CAPPED, SCALED, True)
        bounds = _raised(bounds, z, start, seed, position, unit, BLOCK, TOGETHER)
        if LOGPROB:
            _store_parts(partial.parts, row * parts, z, start, sharpness, BLOCK)
    if whole < end:
        ids = tl.multiple_of(whole, BLOCK) + tl.arange(0, BLOCK)
        z = _sum(terms, row_scales, pointers, row, ids, V, UNIT, CAPPED, SCALED, False)
        bounds = _raised(bounds, z, whole, seed, position, unit, BLOCK, TOGETHER)
        if LOGPROB:
            _store_parts(partial.parts, row * parts, z, whole, sharpness, BLOCK)
    groups: tl.constexpr = BLOCK // _ADJACENT
    if TOGETHER < _ADJACENT:
        left, right = tl.split(tl.reshape(bounds, [groups, 2]))
        bounds = _larger(left, right)
    bounds += temperature * _LOWEST_LOG
    tl.store(partial.bounds + (row * splits + split) * groups + tl.arange(0, groups), bounds)


@triton.jit
def _better_of_group(
    best, group, terms, row_scales, pointers, row, numbers, V, splits,
    UNIT: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``best``, or the best of the columns of a group, whose scores are worked out, if that is better.

    Args:
        numbers: temperature, seed and position of the row.
    """
    groups: tl.constexpr = BLOCK // _ADJACENT
    begin, _, end = share_of_program(group // groups, splits, V, BLOCK)
    k = tl.arange(0, TILES * _ADJACENT)
    place = k // _ADJACENT * BLOCK + group % groups * _ADJACENT + k % _ADJACENT
    for start in range(begin, end, TILES * BLOCK):
        ids = start + place
        z = _sum(terms, row_scales, pointers, row, ids, end, UNIT, CAPPED, SCALED, False)
        best = better_draw(best, z, ids, numbers[0], numbers[1], numbers[2])
    return best


@triton.jit
def _still_open(bounds, index, best, temperature, share, BLOCK: tl.constexpr):
    """Which groups may hold a better column than ``best``, or a NaN if none was met."""
    groups: tl.constexpr = BLOCK // _ADJACENT
    # What rounding may have taken: of the sum, of 159 octaves as float32, of what is too small for ``unit``.
    slack = tl.where(temperature == 0, 0.0, tl.abs(bounds) * 2.0**-22 + temperature * 2.0**-14 + 1e-28)
    most = bounds + slack
    first = index // groups * share + index % groups * _ADJACENT
    above = (most > best[0]) | ((most == best[0]) & (first < best[2]))
    return ((bounds != bounds) | above) & (best[4] == 0)


@triton.jit(do_not_specialize=["V", "splits", "parts"])
def choose_kernel(
    terms, row_scales, draws,  # as draw_kernel takes them
    partial,  # what it left
    out,  # (N,) int64, int32, float32
    V, splits, parts,
    ALIGNED: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
    LOGPROB: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The draw of row program_id(0): the best score of the groups whose bounds are not below it.

    Looks at LANES bounds at a time, and at a group in TILES tiles.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = temperature_of(draws, row)
    numbers = (temperature, tl.load(draws.seed + row), tl.load(draws.position + row))
    pointers = _row_pointers(terms, row, ALIGNED)
    groups = splits * (BLOCK // _ADJACENT)
    share = tl.cdiv(tl.cdiv(V, BLOCK), splits) * BLOCK
    at = partial.bounds + row * groups
    lane = tl.arange(0, LANES)
    nothing = -float("inf")

    largest = tl.full([LANES], nothing, tl.float32)
    place = tl.full([LANES], NO_ID, tl.int32)
    place_of_nan = tl.full([LANES], NO_ID, tl.int32)
    for first in range(0, groups, LANES):
        bounds = tl.load(at + first + lane, first + lane < groups, nothing)
        place_of_nan = tl.where((bounds != bounds) & (place_of_nan == NO_ID), first + lane, place_of_nan)
        place = tl.where(bounds > largest, first + lane, place)
        largest = tl.where(bounds > largest, bounds, largest)
    # A NaN comes before all else: one that is true decides the row.
    chosen = tl.min(place_of_nan, axis=0)
    of_largest = tl.min(tl.where(largest == tl.max(largest, axis=0), place, NO_ID), axis=0)
    chosen = tl.where(chosen == NO_ID, of_largest, chosen)

    best = no_draw()
    if chosen < NO_ID:
        best = _better_of_group(
            best, chosen, terms, row_scales, pointers, row, numbers, V, splits,
            UNIT, CAPPED, SCALED, BLOCK, TILES,
        )  # fmt: skip
    for first in range(0, groups, LANES):
        index = first + lane
        bounds = tl.load(at + index, index < groups, nothing)
        candidate = (index != chosen) & _still_open(bounds, index, best, temperature, share, BLOCK)
        for _ in range(tl.sum(candidate.to(tl.int32), axis=0)):
            group = tl.min(tl.where(candidate, index, NO_ID), axis=0)
            if group < NO_ID:
                best = _better_of_group(
                    best, group, terms, row_scales, pointers, row, numbers, V, splits,
                    UNIT, CAPPED, SCALED, BLOCK, TILES,
                )  # fmt: skip
            candidate &= (index > group) & _still_open(bounds, index, best, temperature, share, BLOCK)
    write_draw(out, row, best, partial.parts, parts, temperature, LOGPROB, LANES)


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
    begin, whole, end = share_of_program(tl.program_id(1), splits, V, BLOCK)
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


@triton.jit(do_not_specialize=["prompt", "history", "P", "H"])
def seen_kernel(
    prompt, history,  # (N, P) and (N, H) int64
    listed,  # Listed: seen, generated, out
    P, H,
    LANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """LANES ids of the prompt and the history of row program_id(0), -1 for one that has stood before."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    of_prompt = tl.load(prompt + row * P + lane, lane < P, -1)
    of_history = tl.load(history + row * H + (lane - P), (lane >= P) & (lane < P + H), -1)
    ids = tl.where(lane < P, of_prompt, of_history)
    sooner = tl.zeros([LANES], tl.int32)
    times = tl.zeros([LANES], tl.int32)
    for start in range(0, P, STEP):
        place = start + tl.arange(0, STEP)
        other = tl.load(prompt + row * P + place, place < P, -1)
        same = (other[None, :] == ids[:, None]) & (place < P)[None, :]
        sooner += tl.sum((same & (place[None, :] < lane[:, None])).to(tl.int32), axis=1)
    for start in range(0, H, STEP):
        place = start + tl.arange(0, STEP)
        other = tl.load(history + row * H + place, place < H, -1)
        same = (other[None, :] == ids[:, None]) & (place < H)[None, :]
        times += tl.sum(same.to(tl.int32), axis=1)
        sooner += tl.sum((same & ((P + place)[None, :] < lane[:, None])).to(tl.int32), axis=1)
    there = lane < P + H
    to = row * P + row * H + lane  # not of a sum of 32 bits
    tl.store(listed.seen + to, tl.where(sooner > 0, -1, ids), there)
    tl.store(listed.generated + to, times.to(tl.int64), there)


@triton.jit(do_not_specialize=["V", "stride", "added_width", "seen_width"])
def adjust_kernel(
    z_out,  # (N, stride) float32
    penalties,  # Penalties
    listed,  # Listed
    V, stride, added_width, seen_width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sparse terms, biases and penalties of row program_id(0), in place."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_out + row * stride
    _add_all(z_row, listed.added_ids, listed.added, row, added_width, V)
    repetition = number_of(penalties.repetition, row)
    presence = number_of(penalties.presence, row)
    frequency = number_of(penalties.frequency, row)
    for start in range(0, seen_width, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        inside = lane < seen_width
        ids = tl.load(listed.seen + row * seen_width + lane, inside, -1)
        generated = tl.load(listed.generated + row * seen_width + lane, inside, 0)
        exists = (ids >= 0) & (ids < V)
        z = tl.load(z_row + ids, exists, 0.0)
        penalized = tl.where(z > 0, z / repetition, z * repetition)
        z = tl.where(repetition != 1, penalized, z)
        paid = presence + frequency * generated.to(tl.float32)
        tl.store(z_row + ids, tl.where(generated > 0, z - paid, z), exists)
