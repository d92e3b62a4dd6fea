"""Top-k, top-p, min-p and the draw from written logits, exactly, with many programs for each row.

A column's *reach* says how many temperatures it lies below the row's largest logit, plus 1; its leading bits
are its *bin*. Bins are monotone in the logit, so that a threshold lies in one bin: what is in bins before
it is kept, what is behind is dropped, and only what is in it has to be told apart.

    peak_kernel        the largest logit of a row; its histogram is zeroed
    histogram_kernel   ids and probability mass in each bin
    gather_kernel      finds the bins of the thresholds, draws from what lies before them, lists what lies in
                       them
    finish_kernel      finds the thresholds among those listed, draws from what is kept, and chooses

All that is added up is an integer, and scores are relative to the largest logit of the row: what is drawn,
and its log-probability to the last bit, depends neither on the number of programs nor on their order. A
row of which many ids lie in a threshold's bin, such as one of equal logits, is read again by its last
program.
"""

# Triton's language is not Python's: kernels have no annotations.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from auxkern.backends.triton.device.draws import (
    EMPTY,
    INFINITE,
    NAN,
    NO_ID,
    OK,
    bits_of_ids,
    count_of,
    gumbel,
    noise_of,
    number_of,
)
from auxkern.backends.triton.device.mass import masses
from auxkern.backends.triton.device.numerics import log1p
from auxkern.backends.triton.device.rows import share_of_program

# Float bits of a reach of 1, and those that a bin leaves out: 128 bins from any power of two to the next.
_ONE_BITS: tl.constexpr = tl.constexpr(0x3F800000)
_WITHIN_BIN: tl.constexpr = tl.constexpr(16)
# A radix search decides 4 bits at a time between 16 thresholds, in 8 steps.
_DIGITS: tl.constexpr = tl.constexpr(16)
# A program splits its columns into 1, 8, 64 and 512 sets.
_LEVELS: tl.constexpr = tl.constexpr(4)
# So few ids are all listed, rather than those before the threshold drawn from where they lie.
_FEW: tl.constexpr = tl.constexpr(256)
# What a search weighs: each id of the bin of top-k; the mass of each id of a least key; each id of one key.
_COUNT: tl.constexpr = tl.constexpr(0)
_MASS: tl.constexpr = tl.constexpr(1)
_TIES: tl.constexpr = tl.constexpr(2)
# Noise lies between -3.14 and 22.9: no id of a larger reach than the first can be drawn; none of a larger one
# than the second has mass.
_DRAWN_REACH: tl.constexpr = tl.constexpr(29.0)
_MASS_REACH: tl.constexpr = tl.constexpr(48.0)


@triton.jit
def _settings(draws, row, V):
    """(whether greedy, temperature, its inverse, top-k, top-p, least d) of a row; no filters if greedy."""
    temperature = number_of(draws.temperature, row)
    greedy = temperature == 0
    temperature = tl.where(greedy, 1.0, temperature)
    # Any factor orders logits alike; an infinite one would make 0 * inf of the largest.
    inverse = tl.minimum(tl.div_rn(tl.full([], 1.0, tl.float32), temperature), 1e30)
    top_k = tl.where(greedy, V, count_of(draws.top_k, row))
    top_p = tl.where(greedy, 1.0, number_of(draws.top_p, row))
    log_min_p = tl.where(greedy, -float("inf"), number_of(draws.log_min_p, row))
    return greedy, temperature, inverse, top_k, top_p, log_min_p


@triton.jit
def _status(parts, row, plane, splits, SPLITS: tl.constexpr):
    """(status, largest logit) of a row."""
    lane = tl.arange(0, SPLITS)
    at = parts.floats + row * splits + lane
    largest = tl.max(tl.load(at, lane < splits, -float("inf")), axis=0)
    nans = tl.max(tl.load(at + plane, lane < splits, 0.0), axis=0)
    status = tl.where(largest == -float("inf"), EMPTY, OK)
    status = tl.where(largest == float("inf"), INFINITE, status)
    return tl.where(nans != 0, NAN, status), largest


@triton.jit
def _tile(z_row, start, BLOCK: tl.constexpr):
    """z of a tile; rows are as wide as whole tiles."""
    return tl.load(z_row + tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK))


@triton.jit
def _reach(z, largest, inverse):
    """1 and the temperatures from z to the largest logit, about: rounded alike in every kernel."""
    return tl.fma(largest - z, inverse, 1.0)


@triton.jit
def _bin(reach, BINS: tl.constexpr):
    """int32 bin of a reach of 1 and more; the last one has no end."""
    return tl.minimum((reach.to(tl.int32, bitcast=True) - _ONE_BITS) >> _WITHIN_BIN, BINS - 1)


@triton.jit
def _distance(z, largest, temperature):
    """d of the filters, rounded as everywhere: ``/`` alone is an approximation on a GPU."""
    return tl.div_rn(z - largest, temperature)


@triton.jit
def _key(z):
    """uint32 that orders as the floats do; 0.0 and -0.0 are equal."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _float_of(key):
    """The float of a key."""
    ordered = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _drawn(best, d, kept, ids, noise, shift, LOGPROB: tl.constexpr):
    """The better of a draw (score, id, mass of all) and that of a tile; of equal scores the lowest id."""
    score = tl.where(kept, d + noise, -float("inf"))
    top = tl.max(score, axis=0)
    token = tl.min(tl.where(kept & (score == top), ids, NO_ID), axis=0)
    better = (top > best[0]) | ((top == best[0]) & (token < best[1]))
    total = best[2]
    if LOGPROB:
        total += tl.sum(tl.where(kept, masses(d, shift), 0), axis=0)
    return tl.where(better, top, best[0]), tl.where(better, token, best[1]), total


@triton.jit(do_not_specialize=["N", "V", "stride", "splits"])
def peak_kernel(
    z_in,  # (N, stride) float32, -inf from V on
    bins,  # Bins, zeroed
    parts,  # Parts: largest logit, whether there is a NaN, the bounds of top-k, out
    N, V, stride, splits,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest logit of row program_id(0) in its share program_id(1) of ``splits``."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    z_row = tl.multiple_of(z_in + row * stride, 16)
    begin, _, end = share_of_program(split, splits, V, BLOCK)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    nans = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        z = _tile(z_row, start, BLOCK)
        largest = tl.maximum(largest, z)
        nans |= (z != z).to(tl.int32)
    at = row * splits + split
    plane = N.to(tl.int64) * splits
    tl.store(parts.floats + at, tl.max(largest, axis=0))
    tl.store(parts.floats + plane + at, tl.max(nans, axis=0).to(tl.float32))
    for i in tl.static_range(_LEVELS):
        bound = float("inf")
        if (1 << (3 * i)) <= BLOCK:
            # The smallest of the sets' largest; of a share of less than a tile some sets are empty.
            sets = tl.reshape(largest, [BLOCK >> (3 * i), 1 << (3 * i)])
            bound = tl.where(end - begin >= BLOCK, tl.min(tl.max(sets, axis=0), axis=0), bound)
        tl.store(parts.floats + (3 + i) * plane + at, bound)
    for tile in tl.static_range(BINS // BLOCK):
        if tile % splits == split:
            at_bin = row * BINS + tile * BLOCK + tl.arange(0, BLOCK)
            tl.store(bins.counts + at_bin, tl.zeros([BLOCK], tl.int32))
            tl.store(bins.masses + at_bin, tl.zeros([BLOCK], tl.int64))


@triton.jit
def _bound_of_top_k(parts, row, plane, splits, top_k, SPLITS: tl.constexpr):
    """A logit that at least top-k ids reach: as many sets do, if it is the smallest of their largest."""
    lane = tl.arange(0, SPLITS)
    at = parts.floats + row * splits + lane
    bound = -float("inf")
    for level in tl.static_range(_LEVELS):
        # The most sets first, so that the fewest that are enough decide.
        i = _LEVELS - 1 - level
        largest = tl.load(at + (3 + i) * plane, lane < splits, float("inf"))
        sets = tl.sum((largest < float("inf")).to(tl.int32), axis=0) << (3 * i)
        bound = tl.where(sets >= top_k, tl.min(largest, axis=0), bound)
    return bound


@triton.jit(do_not_specialize=["N", "V", "stride", "splits", "shift"])
def histogram_kernel(
    z_in,  # (N, stride) float32, -inf from V on
    draws,  # Filters
    bins,  # Bins: (N, BINS) int32 ids, int64 mass, added to
    parts,  # Parts
    N, V, stride, splits,
    shift,  # mass_shift of V
    BINS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Ids and mass of row program_id(0) in each bin, from its share program_id(1) of ``splits``.

    Integers, so that the order in which programs add does not matter. Ids are counted only for
    top-k, masses added up only for top-p, and ids that top-k drops for certain are left out.
    """
    row = tl.program_id(0).to(tl.int64)
    settings = _settings(draws, row, V)
    temperature = settings[1]
    inverse = settings[2]
    top_k = settings[3]
    top_p = settings[4]
    status, largest = _status(parts, row, N.to(tl.int64) * splits, splits, SPLITS)
    counts = top_k < V
    weighs = top_p < 1
    if (counts | weighs) & (status == OK):
        z_row = tl.multiple_of(z_in + row * stride, 16)
        # V ids from here on have together less than the mass that top-p drops: they count in the last bin.
        dropped = tl.maximum(1.0 - top_p, 1e-30).to(tl.float32)
        far = 1.1 + 1.001 * (tl.log(V.to(tl.float32)) - tl.log(dropped))
        far = tl.where(counts, float("inf"), far)
        plane = N.to(tl.int64) * splits
        bound = tl.where(counts, _bound_of_top_k(parts, row, plane, splits, top_k, SPLITS), -float("inf"))
        rest = tl.zeros([BLOCK], tl.int64)
        begin, _, end = share_of_program(tl.program_id(1), splits, V, BLOCK)
        for start in range(begin, end, BLOCK):
            z = _tile(z_row, start, BLOCK)
            reach = _reach(z, largest, inverse)
            exists = (z >= bound) & (z > -float("inf"))
            at = row * BINS + _bin(reach, BINS)
            if counts:
                tl.atomic_add(bins.counts + at, exists.to(tl.int32), exists, sem="relaxed")
            if weighs:
                mass = tl.where(exists, masses(_distance(z, largest, temperature), shift), 0)
                near = reach <= far
                tl.atomic_add(bins.masses + at, mass, near & (mass > 0), sem="relaxed")
                rest += tl.where(near, 0, mass)
        if weighs:
            tl.atomic_add(bins.masses + row * BINS + (BINS - 1), tl.sum(rest, axis=0), sem="relaxed")


@triton.jit
def _needed(top_p, total):
    """Mass that reaches top-p of ``total``; at least 1: one id stays."""
    return tl.maximum((top_p * total.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _thresholds(bins, row, top_k, top_p, V, BINS: tl.constexpr):
    """(first and last bin to list, top-k's bin, ids before that, mass before it, mass before the first); BINS
    and 0 where there is no threshold.

    How much mass top-k keeps of its bin is not known yet; so top-p's threshold lies in one of several bins.
    """
    at = tl.arange(0, BINS)
    bin_k = tl.full([], BINS, tl.int32)
    ids_before = tl.zeros([], tl.int32)
    few = tl.full([], False, tl.int1)
    if top_k < V:
        reached = tl.cumsum(tl.load(bins.counts + row * BINS + at), axis=0)
        bin_k = tl.sum((reached < top_k).to(tl.int32), axis=0)
        ids_before = tl.max(tl.where(at < bin_k, reached, 0), axis=0)
        few = (bin_k < BINS) & (tl.max(tl.where(at <= bin_k, reached, 0), axis=0) <= _FEW)
    first = bin_k
    last = bin_k
    mass_before = tl.zeros([], tl.int64)
    mass_first = tl.zeros([], tl.int64)
    if top_p < 1:
        mass = tl.cumsum(tl.load(bins.masses + row * BINS + at), axis=0)
        mass_before = tl.max(tl.where(at < bin_k, mass, 0), axis=0)
        with_bin = tl.max(tl.where(at <= bin_k, mass, 0), axis=0)
        first = tl.sum((mass < _needed(top_p, mass_before)).to(tl.int32), axis=0)
        last = tl.sum((mass < _needed(top_p, with_bin)).to(tl.int32), axis=0)
        mass_first = tl.max(tl.where(at < first, mass, 0), axis=0)
    if few:
        first = tl.zeros([], tl.int32)
        mass_first = tl.zeros([], tl.int64)
    return first, last, bin_k, ids_before, mass_before, mass_first


@triton.jit
def _listed(bin, first, last, bin_k):
    """Whether a column may lie at a threshold."""
    return ((bin >= first) & (bin <= last)) | (bin == bin_k)


@triton.jit(do_not_specialize=["N", "V", "stride", "splits", "capacity", "shift"])
def gather_kernel(
    z_in,  # (N, stride) float32, -inf from V on
    draws,  # Filters
    bins,  # Bins
    parts,  # Parts: score, id and mass of the draw, how many ids are listed, and they; out
    thresholds,  # (N, 6) int64, out
    N, V, stride, splits, capacity,
    shift,  # mass_shift of V
    LOGPROB: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The draw of row program_id(0) before its thresholds, and the ids at them, of share program_id(1).

    Of more than ``capacity`` ids the first are listed, and all are counted.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    greedy, temperature, inverse, top_k, top_p, log_min_p = _settings(draws, row, V)
    plane = N.to(tl.int64) * splits
    status, largest = _status(parts, row, plane, splits, SPLITS)
    z_row = tl.multiple_of(z_in + row * stride, 16)
    own = row * splits + split
    best = (-float("inf"), NO_ID, tl.zeros([], tl.int64))
    count = 0
    if status == OK:
        bounds = _thresholds(bins, row, top_k, top_p, V, BINS)
        first = bounds[0]
        last = bounds[1]
        bin_k = bounds[2]
        if split == 0:
            for i in tl.static_range(6):
                tl.store(thresholds + row * 6 + i, bounds[i].to(tl.int64))
        farthest = 1.1 - 1.001 * log_min_p
        farthest = tl.minimum(farthest, _MASS_REACH if LOGPROB else _DRAWN_REACH)
        begin, _, end = share_of_program(split, splits, V, BLOCK)
        for start in range(begin, end, BLOCK):
            z = _tile(z_row, start, BLOCK)
            ids = start + tl.arange(0, BLOCK)
            reach = _reach(z, largest, inverse)
            bin = _bin(reach, BINS)
            exists = z > -float("inf")
            kept = exists & (bin < first) & (reach <= farthest) & ((z == largest) | (greedy == 0))
            listed = (exists & _listed(bin, first, last, bin_k)).to(tl.int32)
            present = tl.max(kept.to(tl.int32) + 2 * listed, axis=0)
            if present >= 2:
                place = count + tl.cumsum(listed, axis=0) - 1
                fits = (listed != 0) & (place < capacity)
                tl.store(parts.listed + own * capacity + place, ids, fits)
                count += tl.sum(listed, axis=0)
            if tl.max(kept.to(tl.int32), axis=0) != 0:
                d = _distance(z, largest, temperature)
                # Read here: kept over the loop, they would take registers that spill.
                seed = tl.load(draws.seed + row)
                position = tl.load(draws.position + row)
                noise = noise_of(seed, position, start // 4 + tl.arange(0, BLOCK // 4))
                noise = tl.where(greedy, 0.0, noise)
                best = _drawn(best, d, kept & (d >= log_min_p), ids, noise, shift, LOGPROB)
    tl.store(parts.floats + 2 * plane + own, best[0])
    tl.store(parts.ints + own, best[1])
    tl.store(parts.ints + plane + own, count)
    tl.store(parts.mass + own, best[2])


@triton.jit
def _entries(start, source, bounds, scale, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """(ids, z, bin, whether listed) of the next ids that may lie at a threshold, from place ``start`` on.

    Args:
        source: (row of z, its lists, their lengths, splits, capacity, log2 of the places that a tile has for
            each list, V, whether a list is too long, so that the row is read instead).
        bounds: (first bin, last bin, bin of top-k).
        scale: (largest logit, inverse temperature, temperature).
    """
    z_row, lists, lengths, splits, capacity, bits, V, whole = source
    lane = tl.arange(0, BLOCK)
    split = lane >> bits
    place = (start // BLOCK << bits) + (lane & ((1 << bits) - 1))
    length = tl.load(lengths + split, (split < splits) & (whole == 0), 0)
    ids = tl.load(lists + split * capacity + place, place < length, NO_ID)
    ids = tl.where(whole, start + lane, ids)
    z = tl.load(z_row + ids, ids < V, -float("inf"))
    bin = _bin(_reach(z, scale[0], scale[1]), BINS)
    return ids, z, bin, (z > -float("inf")) & _listed(bin, bounds[0], bounds[1], bounds[2])


@triton.jit
def _span(end, source, bounds, scale, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """(bits that differ between the smallest and the largest key that is listed, the largest)."""
    smallest = tl.full([BLOCK], 0xFFFFFFFF, tl.uint32)
    largest = tl.zeros([BLOCK], tl.uint32)
    for start in range(0, end, BLOCK):
        entries = _entries(start, source, bounds, scale, BINS, BLOCK)
        key = _key(entries[1])
        listed = entries[3]
        smallest = tl.minimum(smallest, tl.where(listed, key, 0xFFFFFFFF))
        largest = tl.maximum(largest, tl.where(listed, key, 0))
    top = tl.max(largest, axis=0)
    return tl.min(smallest, axis=0) ^ top, top


@triton.jit
def _search(
    end, source, bounds, scale, span, least, wanted, shift,
    WEIGHT: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(largest key whose weight at or above it reaches ``wanted``, weight above it, weight at or above it).

    Args:
        span: bits that differ between keys, and one of the keys.
        least: smallest key that has weight; the only one if ties are counted, whose ids then are the keys,
            the lowest the largest.
        wanted: no more than there is.
    """
    digit = tl.arange(0, _DIGITS).to(tl.uint32)
    prefix = tl.zeros([], tl.uint32)
    above = tl.zeros([], tl.int64)
    reached = tl.zeros([], tl.int64)
    for turn in range(8):
        bit = 28 - 4 * turn
        # Keys of few bins have their leading digits in common; the last one counts what reaches.
        if (span[0] >> bit == 0) & (bit > 0):
            prefix = span[1] >> bit << bit
        else:
            thresholds = prefix + (digit << bit)
            totals = tl.zeros([_DIGITS], tl.int64)
            for start in range(0, end, BLOCK):
                ids, z, bin, listed = _entries(start, source, bounds, scale, BINS, BLOCK)
                key = _key(z)
                if WEIGHT == _COUNT:
                    weight = (listed & (bin == bounds[2])).to(tl.int64)
                elif WEIGHT == _MASS:
                    mass = masses(_distance(z, scale[0], scale[2]), shift)
                    weight = tl.where(listed & (key >= least), mass, 0)
                else:
                    weight = (listed & (key == least)).to(tl.int64)
                    key = ids.to(tl.uint32) ^ 0xFFFFFFFF
                totals += tl.sum(tl.where(key[:, None] >= thresholds[None, :], weight[:, None], 0), axis=0)
            # Thresholds rise and totals fall; the first one was reached in the turn before.
            chosen = tl.max(tl.where((totals >= wanted) | (digit == 0), digit, 0), axis=0)
            above = tl.where(chosen == 15, above, tl.max(tl.where(digit == chosen + 1, totals, 0), axis=0))
            reached = tl.max(tl.where(digit == chosen, totals, 0), axis=0)
            prefix += chosen << bit
    return prefix, above, reached


@triton.jit
def _nucleus(end, source, bounds, scale, span, least, kept, shift, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """(smallest key of the nucleus, its last id of that key).

    Args:
        least: smallest key that top-k keeps.
        kept: (top-p, mass before top-k's bin, mass before the first bin).
    """
    in_bin = tl.zeros([BLOCK], tl.int64)
    for start in range(0, end, BLOCK):
        entries = _entries(start, source, bounds, scale, BINS, BLOCK)
        z = entries[1]
        its = entries[3] & (entries[2] == bounds[2]) & (_key(z) >= least)
        in_bin += tl.where(its, masses(_distance(z, scale[0], scale[2]), shift), 0)
    wanted = _needed(kept[0], kept[1] + tl.sum(in_bin, axis=0)) - kept[2]
    smallest, above, reached = _search(
        end, source, bounds, scale, span, least, wanted, shift, _MASS, BINS, BLOCK
    )
    each = tl.maximum(masses(_distance(_float_of(smallest), scale[0], scale[2]), shift), 1)
    equals = (wanted - above + each - 1) // each
    last_id = NO_ID
    if equals < (reached - above) // each:
        # Of ids as keys the bits of V differ, and no more.
        ids_span = (source[6].to(tl.uint32), tl.full([], 0xFFFFFFFF, tl.uint32))
        tie = _search(end, source, bounds, scale, ids_span, smallest, equals, shift, _TIES, BINS, BLOCK)
        last_id = (tie[0] ^ 0xFFFFFFFF).to(tl.int32)
    return smallest, last_id


@triton.jit(do_not_specialize=["N", "V", "stride", "splits", "capacity", "bits", "shift"])
def finish_kernel(
    z_in,  # (N, stride) float32
    draws,  # Filters
    parts,  # Parts
    thresholds,  # (N, 6) int64
    out,  # (N,) int64, int32, float32
    N, V, stride, splits, capacity,
    bits,  # log2 of the ids that a tile holds of each list
    shift,  # mass_shift of V
    unit,  # of mass: 2 ** -(31 + shift)
    LOGPROB: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Thresholds of row program_id(0), and the best of the draws, with that from listed ids that are kept."""
    row = tl.program_id(0).to(tl.int64)
    greedy, temperature, inverse, top_k, top_p, log_min_p = _settings(draws, row, V)
    plane = N.to(tl.int64) * splits
    status, largest = _status(parts, row, plane, splits, SPLITS)
    z_row = z_in + row * stride
    lane = tl.arange(0, SPLITS)
    own = row * splits + lane
    valid = lane < splits
    score = tl.load(parts.floats + 2 * plane + own, valid, -float("inf"))
    drawn = tl.load(parts.ints + own, valid, NO_ID)
    longest = tl.max(tl.load(parts.ints + plane + own, valid, 0), axis=0)
    top = tl.max(score, axis=0)
    total = tl.sum(tl.load(parts.mass + own, valid, 0), axis=0)
    best = (top, tl.min(tl.where(score == top, drawn, NO_ID), axis=0), total)
    if longest > 0:
        whole = longest > capacity
        end = tl.where(whole, V, tl.cdiv(longest, 1 << bits) * BLOCK)
        lists = parts.listed + row * splits * capacity
        lengths = parts.ints + plane + row * splits
        source = (z_row, lists, lengths, splits, capacity, bits, V, whole)
        at = thresholds + row * 6
        bounds = (tl.load(at), tl.load(at + 1), tl.load(at + 2))
        scale = (largest, inverse, temperature)
        span = _span(end, source, bounds, scale, BINS, BLOCK)
        least = tl.zeros([], tl.uint32)
        if bounds[2] < BINS:
            wanted = top_k - tl.load(at + 3)
            least = _search(end, source, bounds, scale, span, least, wanted, shift, _COUNT, BINS, BLOCK)[0]
        last_id = NO_ID
        if top_p < 1:
            kept_mass = (top_p, tl.load(at + 4), tl.load(at + 5))
            least, last_id = _nucleus(end, source, bounds, scale, span, least, kept_mass, shift, BINS, BLOCK)
        seed = tl.load(draws.seed + row)
        position = tl.load(draws.position + row)
        for start in range(0, end, BLOCK):
            entries = _entries(start, source, bounds, scale, BINS, BLOCK)
            ids = entries[0]
            z = entries[1]
            key = _key(z)
            d = _distance(z, largest, temperature)
            kept = entries[3] & ((key > least) | ((key == least) & (ids <= last_id))) & (d >= log_min_p)
            best = _drawn(best, d, kept, ids, gumbel(bits_of_ids(seed, position, ids)), shift, LOGPROB)
    token = tl.where(status == OK, best[1], -1)
    tl.store(out.token + row, token.to(tl.int64))
    tl.store(out.status + row, status)
    if LOGPROB:
        d = _distance(tl.load(z_row + token, status == OK, 0.0), largest, temperature)
        # The largest logit is kept, with a mass of 1: what the others have is added exactly.
        others = (best[2] - (tl.full([], 1, tl.int64) << (31 + shift))).to(tl.float32) * unit
        logprob = tl.where(greedy, 0.0, d - log1p(others))
        tl.store(out.logprob + row, tl.where(status == OK, logprob, float("nan")))
