"""The next token of each row from output heads: Gumbel-max in the epilogue of the products.

A program makes a tile of z as for the loss (``device/tiles.py``), draws from it, and leaves the
tile's best; ``choose_kernel`` compares the tiles' bests. No logit is written, unless filters or
penalties follow, which then work on a buffer in the L2 cache.
"""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from auxkern.backends.triton.device.draws import NO_ID, finite_pivot, gumbel
from auxkern.backends.triton.device.terms import total_of
from auxkern.backends.triton.device.tiles import group_shares, products_of, tile_indices, tile_of_program


@triton.jit
def _noise(seed, position, start, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """(BLOCK_N, BLOCK_V) Gumbel noise of ids from ``start``: the noise of one row, for each row."""
    counter = (start // 4 + tl.arange(0, BLOCK_V // 4))[None, :] + tl.zeros([BLOCK_N, 1], tl.int32)
    zero = tl.zeros([BLOCK_N, BLOCK_V // 4], tl.uint32)
    low = zero + (position & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    a, b, c, d = tl.philox(seed[:, None], counter, zero, low, high)
    return gumbel(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK_N, BLOCK_V]))


@triton.jit(do_not_specialize=["N", "V", "row_blocks", "tiles"])
def heads_draw_kernel(
    heads,  # I of (N, D) hidden states and (>= V, D) weights
    groups,  # scale and softcap of each accumulator
    draws,  # Draws: (N,) temperature, seed, position
    partial,  # (5, N, tiles) float32 and (N, tiles) int32, out, unless WRITE
    z_out,  # (N, tiles * BLOCK_V) float32, out, if WRITE
    N, V, row_blocks, tiles,
    D: tl.constexpr, UNIT_HIDDEN: tl.constexpr, UNIT_WEIGHT: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, BEGINS: tl.constexpr, RESCALED: tl.constexpr, PARTS: tl.constexpr,
    CAPPED: tl.constexpr, LOGPROB: tl.constexpr, WRITE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The draw from a tile (BLOCK_N rows, BLOCK_V ids) of z, or the tile itself if WRITE."""
    block, tile = tile_of_program(tl.program_id(0), row_blocks, tiles, GROUP)
    rows, columns, read_rows, read_ids = tile_indices(block, tile, N, V, BLOCK_N, BLOCK_V)
    products = products_of(
        heads, read_rows, read_ids,
        D, UNIT_HIDDEN, UNIT_WEIGHT, EVEN, BIAS, BEGINS, RESCALED, PARTS, BLOCK_D, PRECISION,
    )  # fmt: skip
    z = total_of(group_shares(groups, products, read_rows, CAPPED))
    nothing = -float("inf")
    z = tl.where((columns < V)[None, :], z, nothing)
    present = rows < N
    if WRITE:
        # Rows are as wide as whole tiles: no mask along them, so that stores stay wide.
        width = tiles * BLOCK_V
        at = z_out + rows.to(tl.int64)[:, None] * tl.multiple_of(width, BLOCK_V) + columns[None, :]
        tl.store(at, z, mask=present[:, None])
    else:
        temperature = tl.load(draws.temperature + read_rows)
        greedy = temperature == 0
        temperature = tl.where(greedy, 1.0, temperature)
        seed = tl.load(draws.seed + read_rows)
        position = tl.load(draws.position + read_rows)
        noise = _noise(seed, position, tile * BLOCK_V, BLOCK_N, BLOCK_V)
        largest = tl.max(z, axis=1)
        d = (z - finite_pivot(largest)[:, None]) / temperature[:, None]
        score = tl.where(greedy[:, None], d, d + noise)
        top = tl.max(score, axis=1)
        winner = (score == top[:, None]) & (z > nothing)
        token = tl.min(tl.where(winner, columns[None, :], NO_ID), axis=1)
        of_token = tl.max(tl.where(columns[None, :] == token[:, None], d, nothing), axis=1)
        plane = N.to(tl.int64) * tiles
        at = rows.to(tl.int64) * tiles + tile
        tl.store(partial.floats + at, largest, mask=present)
        tl.store(partial.floats + plane + at, top, mask=present)
        tl.store(partial.floats + 2 * plane + at, of_token, mask=present)
        if LOGPROB:
            tl.store(partial.floats + 3 * plane + at, tl.sum(tl.exp(d), axis=1), mask=present)
        nans = tl.max((z != z).to(tl.int32), axis=1)
        tl.store(partial.floats + 4 * plane + at, tl.where(nans != 0, 1.0, 0.0), mask=present)
        tl.store(partial.ids + at, token, mask=present)
