"""Launch configurations, as data.

Keys hold dtypes and numbers of terms, never a batch size: a new N or length compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

WARP = 32  # threads; AMD's 64 changes how many vectors a thread takes, not what is computed


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        vectors: 16-byte vectors of the narrowest term that one thread has in flight per term.
        warps: warps in a program.
        programs: wanted per multiprocessor; fewer rows than that are split.
    """

    vectors: int
    warps: int
    programs: int


# By the largest number of terms: more bring more loads per column, and fewer vectors of each then fill the
# same registers.
FORWARD = {1: Config(vectors=4, warps=4, programs=4), 2: Config(2, 4, 4), 8: Config(1, 4, 4)}
FORWARD_STATS = {2: Config(1, 4, 4), 8: Config(1, 8, 4)}
# Both in one pass: so many programs for each multiprocessor, whose warps alone keep memory busy. Rows in
# flight share the L2 cache.
FUSED = {1: Config(vectors=4, warps=16, programs=1), 2: Config(2, 16, 1), 8: Config(1, 16, 1)}
FUSED_STATS = {8: Config(1, 16, 1)}
FUSED_REGISTERS = 128  # of a thread: all that so many warps can have
# Of the L2 cache, for the rows in flight. Its two halves copy what the other one holds, addresses share its
# sets unevenly, and gradients pass through it: what it keeps is less than its size. Nothing was measured.
CACHE_SHARE = 0.6
BACKWARD = {1: Config(vectors=4, warps=4, programs=4), 2: Config(2, 4, 4), 8: Config(1, 4, 4)}


@dataclass(frozen=True)
class TileConfig:
    """How a kernel that makes tiles of logits from hidden states is launched.

    Attributes:
        rows, ids, width: of a tile: BLOCK_N, BLOCK_V, and BLOCK_D of the operands at a time.
        warps: warps in a program.
        stages: operands in flight.
        group: row blocks that pass over a tile of the weight while it is in the L2 cache.
        slices: of a tile's ids, 1, 2, 4 or 8, that a loss takes one after the other.
    """

    rows: int
    ids: int
    width: int
    warps: int
    stages: int
    group: int
    slices: int


class Tiles(NamedTuple):
    """Two configurations of one kind of sum.

    Attributes:
        roomy: where registers are left.
        crowded: where they are not: operands whose columns are not adjacent or whose width is no multiple of
            the tile's, biases beside parts, more than two heads, statistics beside the loss.
    """

    roomy: TileConfig
    crowded: TileConfig


# Kinds of operands: those of 16 bits; float32 hidden states cut into 16-bit parts beside weights of 16 bits;
# float32 weights cut beside hidden states of 16 bits, which takes more registers; float32 alone.
HALF, PARTS, MIRRORED, FLOAT = "half", "parts", "mirrored", "float"
# By kind and number of accumulators, each rows * ids float32 in registers: the largest that spill nowhere. A
# float32 operand takes twice the memory, so that it is read in shorter pieces.
_TILES = {
    (HALF, 1): Tiles(TileConfig(128, 128, 64, 8, 3, 16, 4), TileConfig(64, 128, 64, 8, 3, 16, 4)),
    (HALF, 2): Tiles(TileConfig(64, 128, 64, 8, 3, 16, 4), TileConfig(64, 64, 64, 8, 3, 16, 2)),
    (PARTS, 1): Tiles(TileConfig(128, 128, 32, 8, 3, 16, 4), TileConfig(64, 128, 32, 8, 3, 16, 4)),
    (PARTS, 2): Tiles(TileConfig(64, 64, 32, 8, 3, 16, 2), TileConfig(32, 64, 32, 4, 2, 16, 2)),
    (MIRRORED, 1): Tiles(TileConfig(64, 128, 32, 8, 3, 16, 4), TileConfig(64, 64, 32, 8, 3, 16, 1)),
    (MIRRORED, 2): Tiles(TileConfig(32, 64, 32, 8, 2, 16, 1), TileConfig(32, 64, 32, 8, 2, 16, 1)),
    (FLOAT, 1): Tiles(TileConfig(64, 64, 32, 4, 2, 16, 1), TileConfig(32, 64, 32, 4, 2, 16, 1)),
    (FLOAT, 2): Tiles(TileConfig(32, 64, 32, 4, 2, 16, 2), TileConfig(32, 64, 32, 4, 2, 16, 1)),
}
TILES_MANY = TileConfig(32, 64, 32, 8, 2, 16, 1)
# By major compute capability, for GPUs that multiply out of shared memory: a tile twice as wide reads a third
# less for each product and ends half as often. Of the others, AMD's among them, an A100 stands for all.
A100, H100, B200 = 8, 9, 10
TILES = {
    A100: _TILES,
    H100: _TILES
    | {
        (HALF, 1): Tiles(TileConfig(128, 256, 64, 8, 3, 16, 8), TileConfig(128, 128, 64, 8, 3, 16, 4)),
        (PARTS, 1): Tiles(TileConfig(128, 256, 32, 8, 3, 16, 8), TileConfig(64, 128, 32, 8, 3, 16, 4)),
        (PARTS, 2): Tiles(TileConfig(64, 64, 32, 8, 3, 16, 2), TileConfig(32, 64, 32, 8, 2, 16, 1)),
        (MIRRORED, 1): Tiles(TileConfig(128, 128, 32, 8, 3, 16, 4), TileConfig(64, 64, 32, 8, 3, 16, 1)),
    },
    B200: _TILES
    | {
        (HALF, 1): Tiles(TileConfig(128, 256, 64, 8, 3, 16, 8), TileConfig(128, 128, 64, 8, 3, 16, 4)),
    },
}

# Rows and tiles that one program of the combining and of the scaling kernel takes at a time.
COMBINE_ROWS, COMBINE_LANES, COMBINE_WARPS = 16, 32, 4
SCALE_ROWS, SCALE_WARPS = 32, 4
# Entries of sparse terms: those (or tiles) that a program ranks and those that it compares them with at a
# time; rows of a program that makes their gradients, and of one that makes the nll of a term alone, with the
# entries of a turn of its loop.
ENTRY_LANES, ENTRY_STEP, ENTRY_WARPS = 128, 32, 4
ENTRY_ROWS, ENTRY_NLL_ROWS, ENTRY_NLL_STEP = 32, 32, 4

# Ids of a prompt and a history that a program looks at, those that it compares them with at a time, and as
# many as are compared each with each; more are sorted.
SEEN_LANES, SEEN_STEP, SEEN_WARPS, SEEN_MOST = 128, 32, 4, 4096

# Ids by which the entries of a term that stands alone are sorted, where no kernel makes tiles.
ENTRY_IDS = 128


@dataclass(frozen=True)
class BlockConfig:
    """How a kernel that draws tokens is launched.

    Attributes:
        block: columns in a tile.
        warps: warps in a program.
        programs: wanted per multiprocessor, as in ``Config``; 0 where a row is never split.
    """

    block: int
    warps: int
    programs: int = 0


COUNT = BlockConfig(2048, 8)
SAMPLE, ADJUST = BlockConfig(2048, 4, programs=8), BlockConfig(256, 2)

# Adjacent columns of a tile that have one bound: what a thread reads of a 16-bit term at a time.
ADJACENT = 8
# Columns whose exponentials are added up to one number, within a warp: sums of a row do not depend on
# its splits.
PART = 128
# Bounds that the kernel which chooses looks at at a time, and tiles of a group.
CHOOSE, CHOOSE_TILES = BlockConfig(1024, 4), 16
# Tiles of heads whose draws are compared at a time.
CHOOSE_TILE = BlockConfig(512, 4)


@dataclass(frozen=True)
class FilterConfig:
    """How the kernels are launched that filter written logits.

    Attributes:
        block: columns in a tile; divides that of ``SAMPLE``.
        warps: warps in a program.
        programs: wanted per multiprocessor, as in ``Config``.
        bins: of a row's histogram, a power of 2: 128 for each doubling of the distance to the largest logit.
        listed: ids at a threshold that are listed of a row, if its programs find as many each.
        least_listed: that each program has room for.
        finish_block, finish_warps: of the kernel that ends a row, whose tiles are compared with 16 thresholds
            at once, in registers.
    """

    block: int
    warps: int
    programs: int
    bins: int
    listed: int
    least_listed: int
    finish_block: int
    finish_warps: int


FILTER = FilterConfig(1024, 4, 4, bins=2048, listed=8192, least_listed=256, finish_block=512, finish_warps=8)
