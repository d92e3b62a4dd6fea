"""Launch configurations, as data.

Keys hold dtypes and numbers of terms, never a batch size: a new N or length compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

WARP = 32  # threads; AMD's 64 changes how many vectors a thread takes, not what is computed
MAX_SPLITS = 128  # programs that may share a row; the width of the kernel that combines them


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

    def block(self, granule: int) -> int:
        """Columns in a tile, where a vector holds ``granule`` of them."""
        return self.vectors * self.warps * WARP * granule


# More terms bring more loads per column; fewer vectors of each then fill the same registers.
_FORWARD = {1: Config(vectors=4, warps=4, programs=4), 2: Config(2, 4, 4), 8: Config(1, 4, 4)}
_FORWARD_STATS = {2: Config(1, 4, 4), 8: Config(1, 8, 4)}
_BACKWARD = {1: Config(vectors=4, warps=4, programs=4), 2: Config(2, 4, 4), 8: Config(1, 4, 4)}


def _first_that_fits(table: dict[int, Config], number: int) -> Config:
    return next(config for limit, config in table.items() if number <= limit)


def forward(terms: int, want_stats: bool) -> Config:
    """Configuration of the forward kernel for 1 to 8 terms."""
    return _first_that_fits(_FORWARD_STATS if want_stats else _FORWARD, terms)


def backward(terms: int) -> Config:
    """Configuration of the backward kernel for 1 to 8 terms."""
    return _first_that_fits(_BACKWARD, terms)


def splits(rows: int, tiles: int, multiprocessors: int, config: Config | BlockConfig) -> int:
    """Programs that share one row: enough to give every multiprocessor its ``config.programs``.

    Args:
        rows: N.
        tiles: tiles in a row; no program gets less than one.
        multiprocessors: of the device.
    """
    wanted = -(-multiprocessors * config.programs // rows)
    return max(1, min(wanted, tiles, MAX_SPLITS))


@dataclass(frozen=True)
class TileConfig:
    """How a kernel that makes tiles of logits from hidden states is launched.

    Attributes:
        rows, ids, width: of a tile: BLOCK_N, BLOCK_V, and BLOCK_D of the operands at a time.
        warps: warps in a program.
        stages: operands in flight.
        group: row blocks that pass over a tile of the weight while it is in the L2 cache.
    """

    rows: int
    ids: int
    width: int
    warps: int
    stages: int
    group: int


# Every accumulator is rows * ids float32 in registers; a float32 operand takes twice the memory.
_TILES_HALF = {1: TileConfig(128, 128, 64, 8, 3, 16), 2: TileConfig(64, 64, 64, 8, 3, 16)}
_TILES_FLOAT = {1: TileConfig(64, 64, 16, 4, 2, 16), 2: TileConfig(32, 64, 32, 4, 2, 16)}
_TILES_MANY = TileConfig(32, 64, 32, 8, 2, 16)

# Rows and tiles that one program of the combining and of the scaling kernel takes at a time.
COMBINE_ROWS, COMBINE_LANES, COMBINE_WARPS = 16, 32, 4
SCALE_ROWS, SCALE_WARPS = 32, 4


def tiles(accumulators: int, half: bool) -> TileConfig:
    """Configuration of the kernels that make tiles of logits.

    Args:
        accumulators: that a program holds.
        half: whether every product has 16-bit operands.
    """
    return (_TILES_HALF if half else _TILES_FLOAT).get(accumulators, _TILES_MANY)


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


# A tile of a radix search is compared with 16 thresholds at once, in registers.
SAMPLE, FILTER, ADJUST = BlockConfig(2048, 8, programs=4), BlockConfig(1024, 8), BlockConfig(256, 2)


def draw_tiles(config: TileConfig, rows: int) -> TileConfig:
    """Configuration of the kernel that draws from heads, for few rows as for many.

    A decoding step reads its weights once; more rows in a tile than there are would be products of
    nothing. Sizes of batches fall in two classes, so that a run compiles no more than two kernels.
    The noise takes registers beside the products: 128 rows would spill.
    """
    return replace(config, rows=min(config.rows, 16 if rows <= 16 else 64))
