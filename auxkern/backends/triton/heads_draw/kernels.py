"""The next token of each row from output heads: Gumbel-max in the epilogue of the products.

A program makes a tile of z as for the loss (``device/tiles.py``), draws from it, and leaves the
tile's best; ``heads_choose_kernel`` compares the scores of the tiles' bests. Tiles lie where they lie
whatever else is drawn, so neither draws nor log-probabilities depend on the batch. No logit is written,
unless filters or penalties follow, which then work on a buffer in the L2 cache. Sparse terms and biases enter
the tiles where none do.
"""

# Triton's language is not Python's: kernels have no annotations and build tuples entry by entry.
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from auxkern.backends.triton.device.draws import (
    NO_ID,
    better_draw,
    finite_pivot,
    no_draw,
    noise_of,
    sharpness_of,
    temperature_of,
    write_draw,
)
from auxkern.backends.triton.device.entries import entries_of, with_entries
from auxkern.backends.triton.device.terms import total_of
from auxkern.backends.triton.device.tiles import group_shares, products_of, tile_indices, tile_of_program


@triton.jit(do_not_specialize=["N", "V", "row_blocks", "tiles"])
def heads_draw_kernel(
    heads,  # I of (N, D) hidden states and (>= V, D) weights
    groups,  # scale and softcap of each accumulator
    entries,  # Entries: of sparse terms and biases beside the heads, if ENTRIES
    draws,  # Draws: (N,) temperature, seed, position
    partial,  # TileDraws, out, unless WRITE
    z_out,  # (N, tiles * BLOCK_V) float32, out, if WRITE
    N, V, row_blocks, tiles,
    D: tl.constexpr, UNIT_HIDDEN: tl.constexpr, UNIT_WEIGHT: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, BEGINS: tl.constexpr, RESCALED: tl.constexpr, PARTS: tl.constexpr,
    CAPPED: tl.constexpr, LOGPROB: tl.constexpr, WRITE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, ENTRIES: tl.constexpr,
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
    present = rows < N
    if ENTRIES:
        first, end = entries_of(entries, read_rows, tile)
        z = with_entries((z,), entries, read_rows, present, tile * BLOCK_V, first, end, False)[0]
    z = tl.where((columns < V)[None, :], z, nothing)
    if WRITE:
        # Rows are as wide as whole tiles: no mask along them, so that stores stay wide.
        width = tiles * BLOCK_V
        at = z_out + rows.to(tl.int64)[:, None] * tl.multiple_of(width, BLOCK_V) + columns[None, :]
        tl.store(at, z, mask=present[:, None])
    else:
        temperature = temperature_of(draws, read_rows)
        seed = tl.load(draws.seed + read_rows)
        position = tl.load(draws.position + read_rows)
        counter = tile * BLOCK_V // 4 + tl.arange(0, BLOCK_V // 4)
        counter = counter[None, :] + tl.zeros([BLOCK_N, 1], tl.int32)
        noise = noise_of(seed[:, None], position[:, None], counter)
        largest = tl.max(z, axis=1)
        d = z - finite_pivot(largest)[:, None]
        # Between columns of a tile float32 decides, as it does where all logits are at hand.
        score = tl.fma(noise, tl.broadcast_to(temperature[:, None], d.shape), d)
        top = tl.max(score, axis=1)
        winner = (score == top[:, None]) & (z > nothing)
        token = tl.min(tl.where(winner, columns[None, :], NO_ID), axis=1)
        z_of_token = tl.max(tl.where(columns[None, :] == token[:, None], z, nothing), axis=1)
        bad = tl.max((z != z).to(tl.int32), axis=1) != 0
        at = rows.to(tl.int64) * tiles + tile
        tl.store(partial.z + at, tl.where(bad, float("nan"), z_of_token), mask=present)
        tl.store(partial.ids + at, token, mask=present)
        if LOGPROB:
            sharpness = sharpness_of(tl.where(temperature == 0, 1.0, temperature))
            total = tl.sum(tl.exp2(d * sharpness[:, None]), axis=1)
            tl.store(partial.parts + 2 * at, largest, mask=present)
            tl.store(partial.parts + 2 * at + 1, total, mask=present)


@triton.jit(do_not_specialize=["tiles"])
def heads_choose_kernel(
    draws,  # Draws
    partial,  # what heads_draw_kernel left
    out,  # (N,) int64, int32, float32
    tiles,
    LOGPROB: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The best of the draws of row program_id(0)'s tiles, LANES at a time."""
    row = tl.program_id(0).to(tl.int64)
    temperature = temperature_of(draws, row)
    seed = tl.load(draws.seed + row)
    position = tl.load(draws.position + row)
    lane = tl.arange(0, LANES)
    best = no_draw()
    for first in range(0, tiles, LANES):
        inside = first + lane < tiles
        at = row * tiles + first + lane
        z = tl.load(partial.z + at, inside, -float("inf"))
        ids = tl.load(partial.ids + at, inside, NO_ID)
        best = better_draw(best, z, ids, temperature, seed, position)
    write_draw(out, row, best, partial.parts, tiles, temperature, LOGPROB, LANES)
