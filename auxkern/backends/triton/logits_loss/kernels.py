"""Cross-entropy of a sum of logits, forward and backward.

Forward: each program folds its share of a row, lane by lane, into an online softmax (Milakov and
Gimelshein 2018, arXiv 1805.02867); lanes meet once, at the end, so the loop has no barrier. The
target is left out of the fold: with p[y] near 1 the nll is log1p(everything else), not a difference.
Few rows are split over programs, whose partial results a second kernel combines in fixed order.

Backward: one pass, each gradient written once.

Both in one: a program makes the statistics of a whole row, then its gradient for the incoming gradient
that is expected; so few rows are in flight that the second time their logits come from the L2 cache.
"""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from auxkern.backends.triton.device.numerics import exp, exp_and_expm1, tanh_slope
from auxkern.backends.triton.device.rows import (
    body_pointers,
    contiguous_width,
    head_columns,
    read,
    row_pointer,
)
from auxkern.backends.triton.device.softmax import (
    NO_COLUMN,
    NO_TARGET,
    absent_logit,
    comes_first,
    largest_and_where,
    nll_of,
    pivot_of,
)
from auxkern.backends.triton.device.terms import share_of, shares_of, total_of


@triton.jit
def _fold(softmax, z):
    """R online softmaxes (largest, sum of exp(z - largest)) with the columns of z (R, K); their largest.

    The second is NaN where there is NaN and no inf among them: the sum is NaN then, but for inf as well.
    """
    top = tl.max(z, axis=1)
    # NaN, which a maximum may keep, must not become the pivot of columns that come later.
    largest = tl.where(top > softmax[0], top, softmax[0])
    pivot = pivot_of(largest)
    added = tl.sum(exp(z - pivot[:, None]), axis=1)
    total = softmax[1] * exp(softmax[0] - pivot) + added
    return (largest, total), tl.where((added != added) & (top < float("inf")), float("nan"), top)


@triton.jit
def _fold_distance(distance, pivot, z, counted):
    """Add columns to (sum of pivot - z, number of columns), whose pivot was ``pivot[0]``.

    A column at -inf or NaN is not in the number: its gap has settled the sum, wherever the pivot moves. A
    number made of ``counted`` alone would have no layout but a default one, and pass through shared memory.
    """
    moved = distance[0] + distance[1] * (pivot[1] - pivot[0])
    gaps = tl.sum(tl.where(counted, pivot[1][:, None] - z, 0.0), axis=1)
    above = tl.where(counted, z, -float("inf")) > -float("inf")
    return moved + gaps, distance[1] + tl.sum(above.to(tl.float32), axis=1)


@triton.jit
def _empty_state(TERMS: tl.constexpr, R: tl.constexpr):
    """R lanes before any column: softmax of z, distance, best, softmax of each of I terms."""
    zero = tl.zeros([R], tl.float32)
    softmax = (zero - float("inf"), zero)
    best = (zero - float("inf"), tl.full([R], NO_COLUMN, tl.int32))
    terms = ()
    for _ in tl.static_range(TERMS):
        terms += (softmax,)
    return softmax, (zero, zero), best, terms


@triton.jit
def _accumulate(
    state, terms, pointers, columns, first, valid, others,
    UNIT: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Fold the tile ``columns`` (R, K) into ``state``: ``valid`` columns only, ``others`` than the target.

    ``first`` (R,) are the first columns of the tile's rows; of the largest logit no more is kept, and of NaN
    in a row of the tile that has inf, too, nothing.
    """
    shares = shares_of(terms, pointers, columns, valid, UNIT, CAPPED)
    z = total_of(shares)
    counted = valid & others
    softmax, top = _fold(state[0], tl.where(counted, z, -float("inf")))
    distance = state[1]
    best = state[2]
    per_term = state[3]
    if SMOOTH:
        distance = _fold_distance(distance, (pivot_of(state[0][0]), pivot_of(softmax[0])), z, counted)
    if STATS:
        better = comes_first(top, first, best[0], best[1])
        best = (tl.where(better, top, best[0]), tl.where(better, first, best[1]))
        per_term = ()
        for i in tl.static_range(len(shares)):
            share = tl.where(counted, shares[i], -float("inf"))
            per_term += (_fold(state[3][i], share)[0],)
    return softmax, distance, best, per_term


@triton.jit
def _meet(softmax):
    """The online softmaxes of all lanes as one."""
    largest = tl.max(softmax[0], axis=0)
    return largest, tl.sum(softmax[1] * exp(softmax[0] - pivot_of(largest)), axis=0)


@triton.jit
def _meet_all(state, SMOOTH: tl.constexpr, STATS: tl.constexpr):
    """``state`` of R lanes as the state of one."""
    softmax = _meet(state[0])
    distance = (0.0, 0.0)
    best = (0.0, NO_COLUMN)
    per_term = ()
    if SMOOTH:
        moved = state[1][0] + state[1][1] * (pivot_of(softmax[0]) - pivot_of(state[0][0]))
        distance = (tl.sum(moved, axis=0), tl.sum(state[1][1], axis=0))
    if STATS:
        top, has = largest_and_where(state[2][0])
        best = (top, tl.min(tl.where(has, state[2][1], NO_COLUMN), axis=0))
        for i in tl.static_range(len(state[3])):
            per_term += (_meet(state[3][i]),)
    return softmax, distance, best, per_term


@triton.jit
def _target_shares(terms, row, y, in_range, UNIT: tl.constexpr, CAPPED: tl.constexpr):
    """(z[y], each term's share of it), ``absent_logit`` where the target is outside the vocabulary."""
    pointers = ()
    for i in tl.static_range(len(terms)):
        pointers += (row_pointer(terms[i], row),)
    shares = shares_of(terms, pointers, y, in_range, UNIT, CAPPED)
    return tl.where(in_range, total_of(shares), absent_logit(y)), shares


@triton.jit
def _argmax(terms, row, first, V, UNIT: tl.constexpr, CAPPED: tl.constexpr, G: tl.constexpr):
    """The column of the largest logit among the G from ``first`` on, which are read again; -1 without any."""
    pointers = ()
    for i in tl.static_range(len(terms)):
        pointers += (row_pointer(terms[i], row),)
    columns = first + tl.arange(0, G)
    valid = (first < V) & (columns < V)
    z = total_of(shares_of(terms, pointers, columns, valid, UNIT, CAPPED))
    _, has = largest_and_where(tl.where(valid, z, -float("inf")))
    column = tl.min(tl.where(valid & has, columns, NO_COLUMN), axis=0)
    return tl.where(column == NO_COLUMN, -1, column)


@triton.jit
def _write_row(
    state, terms, out, row, N, V, y, ignored,
    UNIT: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, STATS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """A row's results from the state of all its columns but the target: (nll, maximum, log of the sum)."""
    in_range = (y >= 0) & (y < V) & (ignored == 0)
    target, shares = _target_shares(terms, row, y, in_range, UNIT, CAPPED)
    nll, largest, log_sum = nll_of(state[0], target)
    nll = tl.where(ignored, 0.0, nll)
    row_max = tl.where(ignored, 0.0, tl.where(log_sum == log_sum, largest, float("nan")))
    row_sum = tl.where(ignored, 0.0, log_sum)
    tl.store(out.nll + row, nll)
    tl.store(out.row_max + row, row_max)
    tl.store(out.log_sum + row, row_sum)
    tl.store(out.lse + row, row_max + row_sum)
    if SMOOTH:
        distance = state[1][0] + state[1][1] * (largest - pivot_of(state[0][0]))
        distance += tl.where(y == NO_TARGET, 0.0, largest - target)
        tl.store(out.smooth + row, tl.where(ignored, 0.0, log_sum + distance / V))
    if STATS:
        column = _argmax(terms, row, state[2][1], V, UNIT, CAPPED, G).to(tl.int64)
        is_target = in_range & comes_first(target, y, state[2][0], state[2][1])
        tl.store(out.argmax + row, tl.where(is_target, y, column))
        for i in tl.static_range(len(terms)):
            term_nll, _, _ = nll_of(state[3][i], tl.where(in_range, shares[i], absent_logit(y)))
            tl.store(out.term_nll + i * N.to(tl.int64) + row, tl.where(ignored, 0.0, term_nll))
    return nll, row_max, row_sum


@triton.jit
def _store_partial(state, partial, row, split, N, splits, SMOOTH: tl.constexpr, STATS: tl.constexpr):
    """One program's state of one row into (fields, N, splits) buffers."""
    plane = N.to(tl.int64) * splits
    at = partial.sums + row * splits + split
    tl.store(at, state[0][0])
    tl.store(at + plane, state[0][1])
    if SMOOTH:
        tl.store(at + 2 * plane, state[1][0])
        tl.store(at + 3 * plane, state[1][1])
    if STATS:
        tl.store(at + (4 + 2 * len(state[3])) * plane, state[2][0])
        tl.store(partial.best + row * splits + split, state[2][1])
        for i in tl.static_range(len(state[3])):
            tl.store(at + (4 + 2 * i) * plane, state[3][i][0])
            tl.store(at + (5 + 2 * i) * plane, state[3][i][1])


@triton.jit
def _load_partials(
    partial, row, N, splits, TERMS: tl.constexpr, R: tl.constexpr, SMOOTH: tl.constexpr, STATS: tl.constexpr
):
    """The states of a row's programs, one in each of R lanes."""
    softmax, distance, best, per_term = _empty_state(TERMS, R)
    plane = N.to(tl.int64) * splits
    lane = tl.arange(0, R)
    valid = lane < splits
    at = partial.sums + row * splits + lane
    softmax = (tl.load(at, valid, -float("inf")), tl.load(at + plane, valid, 0.0))
    if SMOOTH:
        distance = (tl.load(at + 2 * plane, valid, 0.0), tl.load(at + 3 * plane, valid, 0.0))
    if STATS:
        top = tl.load(at + (4 + 2 * TERMS) * plane, valid, -float("inf"))
        best = (top, tl.load(partial.best + row * splits + lane, valid, NO_COLUMN))
        per_term = ()
        for i in tl.static_range(TERMS):
            largest = tl.load(at + (4 + 2 * i) * plane, valid, -float("inf"))
            per_term += ((largest, tl.load(at + (5 + 2 * i) * plane, valid, 0.0)),)
    return softmax, distance, best, per_term


@triton.jit
def _edge_columns(head, body, width, G: tl.constexpr, R: tl.constexpr):
    """(columns, valid) (R,): the head and the tail, fewer than G columns each; they fit in 2 G lanes."""
    lane = tl.arange(0, R)
    columns = tl.where(lane < G, lane - head, body + lane - G)
    valid = (lane < head) | ((lane >= G) & (lane < 2 * G) & (columns < width))
    return columns, valid


@triton.jit
def _cut(terms, gradients, row, width, LEADER: tl.constexpr, G: tl.constexpr):
    """(head, end of the body, end of the row) of a row of ``width`` columns, counted from the head."""
    head = 0
    # Not (terms + gradients)[LEADER]: in Triton 3.6 what is added to a tuple loses the names of its fields.
    if LEADER >= 0:
        leader = terms[LEADER] if len(terms) > LEADER else gradients[LEADER - len(terms)]
        head = tl.minimum(head_columns(leader, row, G), width)
    body = tl.multiple_of((width - head) // G * G, G)
    return head, body, width - head


@triton.jit
def _range_of_program(body, split, splits, BLOCK: tl.constexpr):
    """(begin, end of whole tiles, end) of the body's columns that program ``split`` takes."""
    share = tl.cdiv(tl.cdiv(body, BLOCK), splits) * BLOCK
    begin = tl.minimum(split * share, body)
    end = tl.minimum(begin + share, body)
    # Ends are multiples of a granule: a mask against them stays constant within a vector.
    return begin, begin + (end - begin) // BLOCK * BLOCK, end


@triton.jit
def _others(y, R: tl.constexpr, G: tl.constexpr):
    """(R, G): whether a tile's column is another than its column y.

    Counted from its granule, the target is compared with constants: no column needs its own number.
    """
    return (y - tl.arange(0, R) * G)[:, None] != tl.arange(0, G)[None, :]


@triton.jit
def _statistics(
    terms, pointers, cut, y_column, split, splits,
    UNIT: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, STATS: tl.constexpr,
    G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state of a row's columns but its target, of those that program ``split`` of ``splits`` takes.

    ``cut`` is (head, end of the body, end of the row) as ``_cut`` gives it; ``pointers`` and ``y_column``
    count from the end of the head.
    """
    R: tl.constexpr = BLOCK // G
    head, body, width = cut
    edge, valid = _edge_columns(head, body, width, G, R)
    valid &= split == 0
    state = _accumulate(
        _empty_state(len(terms), R), terms, pointers,
        edge[:, None], tl.where(valid, edge, NO_COLUMN), valid[:, None], (edge != y_column)[:, None],
        UNIT, CAPPED, SMOOTH, STATS,
    )  # fmt: skip
    granules = tl.arange(0, R) * G
    tile = granules[:, None] + tl.arange(0, G)[None, :]
    everywhere = tile == tile  # folds to no mask at all
    begin, full, end = _range_of_program(body, split, splits, BLOCK)
    for start in range(begin, full, BLOCK):
        columns, first = tl.multiple_of(start, G) + tile, start + granules
        others = _others(y_column - start, R, G)
        state = _accumulate(
            state, terms, pointers, columns, first, everywhere, others, UNIT, CAPPED, SMOOTH, STATS
        )
    for start in range(full, end, BLOCK):  # at most once
        columns, first = tl.multiple_of(start, G) + tile, start + granules
        # Of a row of nothing but -inf no granule behind its end may be the first.
        first = tl.where(first < end, first, NO_COLUMN)
        others = _others(y_column - start, R, G)
        state = _accumulate(
            state, terms, pointers, columns, first, columns < end, others, UNIT, CAPPED, SMOOTH, STATS
        )
    softmax, distance, best, per_term = _meet_all(state, SMOOTH, STATS)
    first = tl.where(best[1] == NO_COLUMN, NO_COLUMN, best[1] + head)
    return softmax, distance, (best[0], first), per_term


@triton.jit(do_not_specialize=["target", "N", "V", "ignore_index", "splits"])
def forward_kernel(
    terms,  # I of (N, >= V) logits, float16, bfloat16 or float32
    target,  # (N,) int64
    out,  # Rows: (N,) float32 and so on
    partial,  # (5 + 2 I, N, splits) float32 and (N, splits) int32, if splits > 1
    N, V, ignore_index, splits,
    ALIGNED: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr, LEADER: tl.constexpr,
    SMOOTH: tl.constexpr, STATS: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of row program_id(0) from its share program_id(1) of ``splits`` of the columns.

    Reads each logit once. Memory-bound: BLOCK columns of every term are in flight per program, G per
    thread and load; each group of G columns has its own online softmax, in registers.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    y = tl.load(target + row)
    ignored = y == ignore_index
    # An ignored row is a row without columns: nothing of it is read.
    head, body, width = _cut(terms, (), row, tl.where(ignored, 0, V), LEADER, G)
    y_column = tl.where((y >= 0) & (y < V), y - head, NO_COLUMN).to(tl.int32)
    pointers = body_pointers(terms, row, head, ALIGNED)

    cut = (head, body, width)
    state = _statistics(
        terms, pointers, cut, y_column, split, splits, UNIT, CAPPED, SMOOTH, STATS, G, BLOCK
    )  # fmt: skip
    if splits > 1:
        _store_partial(state, partial, row, split, N, splits, SMOOTH, STATS)
    else:
        _write_row(state, terms, out, row, N, V, y, ignored, UNIT, CAPPED, SMOOTH, STATS, G)


@triton.jit(do_not_specialize=["target", "N", "V", "ignore_index", "splits"])
def combine_kernel(
    terms,  # as above
    target,  # (N,) int64
    out,  # Rows
    partial,  # written by forward_kernel
    N, V, ignore_index, splits,
    UNIT: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, STATS: tl.constexpr,
    G: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Statistics of row program_id(0) from the partial results of its ``splits`` programs."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    state = _load_partials(partial, row, N, splits, len(terms), LANES, SMOOTH, STATS)
    state = _meet_all(state, SMOOTH, STATS)
    _write_row(state, terms, out, row, N, V, y, y == ignore_index, UNIT, CAPPED, SMOOTH, STATS, G)


@triton.jit
def _coefficients(g, sums, slope, ignored):
    """``RowSlopes.coefficients`` of a row whose (nll, maximum, log of the sum) are ``sums``.

    (maximum, factor of the exponential, what is taken from it, gradient at the target, whether any is not 0)
    """
    nll, row_max, log_sum = sums
    p, p_less_1 = exp_and_expm1(-nll)
    share_of_max, _ = exp_and_expm1(-log_sum)
    z_slope = slope.z_slope * (row_max + log_sum)
    constant = g * slope.uniform
    at_target = g * slope.kept * p_less_1 - constant
    at_target += g * (slope.smoothing + z_slope) * p
    factor = g * (1.0 + z_slope) * share_of_max
    live = ((factor != 0) | (constant != 0) | (at_target != 0)) & (ignored == 0)
    live = live.to(tl.int32)  # 1 for NaN; Triton's interpreter wants an int
    # Of a dead row z is 0: with a maximum of 0 no inf or NaN arises to spoil its zeros.
    return (
        tl.where(live != 0, row_max, 0.0), tl.where(live != 0, factor, 0.0),
        tl.where(live != 0, constant, 0.0), tl.where(live != 0, at_target, 0.0), live,
    )  # fmt: skip


@triton.jit
def _write_gradients(
    terms, pointers, gradients, out, columns, valid, others, coefficients,
    WANTED: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of columns, read only if the row is live, written where ``valid``.

    ``others`` are all columns but the target.
    """
    row_max, exp_coefficient, constant, target_gradient, live = coefficients
    values = ()
    z = 0.0
    for i in tl.static_range(len(terms)):
        x = read(terms[i], pointers[i], columns, valid & (live != 0), UNIT[i])
        values += (x,)
        z += share_of(terms[i], x, CAPPED[i])
    dz = exp_coefficient * exp(z - row_max) - constant
    dz = tl.where(others, dz, target_gradient)
    for j in tl.static_range(len(gradients)):
        term = terms[WANTED[j]]
        d = dz * term.scale
        if CAPPED[WANTED[j]]:
            d *= tanh_slope(values[WANTED[j]], 1.0 / term.softcap)
        tl.store(out[j] + columns, d.to(out[j].dtype.element_ty), mask=valid)


@triton.jit
def _write_padding(gradient, row, begin, split, splits, BLOCK: tl.constexpr):
    """Zeros in columns [begin, width) of a gradient's row."""
    pointer = row_pointer(gradient, row)
    width = contiguous_width(gradient)
    for start in range(begin + split * BLOCK, width, splits * BLOCK):
        columns = start + tl.arange(0, BLOCK)
        zero = tl.zeros([BLOCK], pointer.dtype.element_ty)
        tl.store(pointer + columns, zero, mask=columns < width)


@triton.jit
def _write_row_gradients(
    terms, pointers, gradients, out, row, cut, y_column, coefficients, split, splits,
    WANTED: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a row's columns, those that program ``split`` of ``splits`` takes; as ``_statistics``."""
    head, body, width = cut
    if split == 0:
        edge, valid = _edge_columns(head, body, width, G, 2 * G)
        _write_gradients(
            terms, pointers, gradients, out, edge, valid, edge != y_column,
            coefficients, WANTED, UNIT, CAPPED,
        )  # fmt: skip
    tile = tl.arange(0, BLOCK)
    everywhere = tile == tile  # folds to no mask at all
    begin, full, end = _range_of_program(body, split, splits, BLOCK)
    for start in range(begin, full, BLOCK):
        columns = tl.multiple_of(start, G) + tile
        _write_gradients(
            terms, pointers, gradients, out, columns, everywhere, tile != y_column - start,
            coefficients, WANTED, UNIT, CAPPED,
        )  # fmt: skip
    for start in range(full, end, BLOCK):  # at most once
        columns = tl.multiple_of(start, G) + tile
        _write_gradients(
            terms, pointers, gradients, out, columns, columns < end, tile != y_column - start,
            coefficients, WANTED, UNIT, CAPPED,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "target", "g", "g_step", "written", "written_step", "nll", "row_max", "log_sum", "V", "ignore_index",
        "splits",
    ]
)  # fmt: skip
def backward_kernel(
    terms,  # I of (N, >= V) logits, float16, bfloat16 or float32
    gradients,  # (N, as wide as its term) of terms[WANTED[j]], out
    target,  # (N,) int64
    g, g_step,  # float32 [n * g_step]: gradient of the row's loss
    written, written_step,  # the same, for which ``gradients`` hold the gradients; read if READY
    nll, row_max, log_sum,  # (N,) float32
    slope,  # numbers of the loss
    V, ignore_index, splits,
    READY: tl.constexpr, WANTED: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_OUT: tl.constexpr,
    PADDED: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr, LEADER: tl.constexpr,
    G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of row program_id(0) in share program_id(1) of ``splits`` of its columns.

    Reads each logit once, none of a row without gradient, and writes each gradient once.
    Memory-bound, as the forward. A row whose gradients are written already is left as it is.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    incoming = tl.load(g + row * g_step)
    y = tl.load(target + row)
    ignored = y == ignore_index
    sums = (tl.load(nll + row), tl.load(row_max + row), tl.load(log_sum + row))
    coefficients = _coefficients(incoming, sums, slope, ignored)
    columns = V
    if READY:
        before = tl.load(written + row * written_step)
        # A row without columns: nothing of it is read or written.
        columns = tl.where((incoming == before) | ignored, 0, V)

    head, body, width = _cut(terms, gradients, row, columns, LEADER, G)
    y_column = tl.where((y >= 0) & (y < V), y - head, NO_COLUMN).to(tl.int32)
    pointers = body_pointers(terms, row, head, ALIGNED)
    out = body_pointers(gradients, row, head, ALIGNED_OUT)
    cut = (head, body, width)
    _write_row_gradients(
        terms, pointers, gradients, out, row, cut, y_column, coefficients, split, splits,
        WANTED, UNIT, CAPPED, G, BLOCK,
    )  # fmt: skip
    for j in tl.static_range(len(gradients)):
        if PADDED[j] and not READY:
            _write_padding(gradients[j], row, V, split, splits, BLOCK)


@triton.jit(do_not_specialize=["target", "weight", "weight_step", "N", "V", "ignore_index"])
def fused_kernel(
    terms,  # I of (N, >= V) logits, float16, bfloat16 or float32, their columns side by side
    gradients,  # (N, as wide as its term) of terms[WANTED[j]], out
    target,  # (N,) int64
    weight, weight_step,  # float32 [n * weight_step]: the gradient of the row's loss that is expected
    out,  # Rows: (N,) float32 and so on
    slope,  # numbers of the loss
    N, V, ignore_index,
    WANTED: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_OUT: tl.constexpr, PADDED: tl.constexpr,
    UNIT: tl.constexpr, CAPPED: tl.constexpr, LEADER: tl.constexpr,
    SMOOTH: tl.constexpr, STATS: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of a row, then its gradients, of every num_programs(0)-th row from program_id(0) on.

    Reads each logit twice, the second time from the L2 cache, and writes each gradient once. Memory-bound;
    there are few programs, so that few rows are in flight, and each has many warps.
    """
    for number in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.full([], 0, tl.int64) + number
        y = tl.load(target + row)
        ignored = y == ignore_index
        head, body, width = _cut(terms, gradients, row, V, LEADER, G)
        y_column = tl.where((y >= 0) & (y < V), y - head, NO_COLUMN).to(tl.int32)
        pointers = body_pointers(terms, row, head, ALIGNED)
        # Statistics of a row without columns: nothing of an ignored one is read.
        counted = (tl.where(ignored, 0, head), tl.where(ignored, 0, body), tl.where(ignored, 0, width))
        state = _statistics(terms, pointers, counted, y_column, 0, 1, UNIT, CAPPED, SMOOTH, STATS, G, BLOCK)
        sums = _write_row(state, terms, out, row, N, V, y, ignored, UNIT, CAPPED, SMOOTH, STATS, G)
        coefficients = _coefficients(tl.load(weight + row * weight_step), sums, slope, ignored)
        pointers_out = body_pointers(gradients, row, head, ALIGNED_OUT)
        cut = (head, body, width)
        _write_row_gradients(
            terms, pointers, gradients, pointers_out, row, cut, y_column, coefficients, 0, 1,
            WANTED, UNIT, CAPPED, G, BLOCK,
        )  # fmt: skip
        for j in tl.static_range(len(gradients)):
            if PADDED[j]:
                _write_padding(gradients[j], row, V, 0, 1, BLOCK)


@triton.jit(do_not_specialize=["target", "N", "ignore_index"])
def count_kernel(
    target,  # (N,) int64
    out,  # (2,) float32
    N, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """How many rows count, 1 if none does, and the reciprocal of that; one program."""
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        rows = start + lanes
        y = tl.load(target + rows, mask=rows < N, other=ignore_index)
        total += (y != ignore_index).to(tl.int32)
    number = tl.maximum(tl.sum(total, axis=0), 1).to(tl.float32)
    tl.store(out, number)
    # As autograd divides the incoming gradient of 1.
    tl.store(out + 1, tl.math.div_rn(1.0, number))
