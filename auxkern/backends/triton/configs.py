"""Launch configurations, as data.

Keys hold dtypes and numbers of terms, never a batch size: a new N or length compiles nothing.

``Configs`` holds what is a choice of speed. Its defaults were chosen by a model of what binds a kernel; a GPU
that was measured brings its own (``tuned.py``). What results depend on in more than their last bits is a
constant here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

WARP = 32  # threads; AMD's 64 changes how many vectors a thread takes, not what is computed
# Adjacent columns of a tile that have one bound: what a thread reads of a 16-bit term at a time.
ADJACENT = 8
# Columns whose exponentials are added up to one number, within a warp: sums of a row do not depend on
# its splits.
PART = 128
# Ids of a prompt and a history that are compared each with each; more are sorted.
SEEN_MOST = 4096
# Of a multiprocessor, and the most that a thread can have.
_REGISTERS, _MOST_REGISTERS = 65536, 255

# What fields may be: powers of 2, and whole numbers, from a least to a largest.
_POWERS = {
    "vectors": (1, 8),
    "warps": (1, 32),
    "finish_warps": (1, 32),
    "rows": (16, 256),
    "ids": (16, 512),
    "width": (16, 256),
    "slices": (1, 8),
    "taken": (1, 1024),
    "step": (1, 1024),
    "block": (16, 16384),
    "finish_block": (128, 4096),
    "bins": (128, 8192),
}
_WHOLE = {
    "programs": (0, 32),
    "stages": (1, 8),
    "group": (1, 256),
    "listed": (1, 1 << 20),
    "least_listed": (1, 1 << 16),
}


class Checked:
    """A configuration whose fields are whole numbers, each in its range.

    Raises:
        ValueError: one is not.
    """

    def __post_init__(self) -> None:
        for its in fields(self):  # type: ignore[arg-type]
            value = getattr(self, its.name)
            power = its.name in _POWERS
            least, most = _POWERS[its.name] if power else _WHOLE[its.name]
            whole = type(value) is int and least <= value <= most
            if not whole or (power and value & (value - 1)):
                kind = "a power of 2" if power else "a whole number"
                raise ValueError(f"{its.name} is {value!r}; it must be {kind} from {least} to {most}")


@dataclass(frozen=True)
class Config(Checked):
    """How one kernel is launched.

    Attributes:
        vectors: 16-byte vectors of the narrowest term that one thread has in flight per term.
        warps: warps in a program.
        programs: wanted per multiprocessor; fewer rows than that are split.
    """

    vectors: int
    warps: int
    programs: int

    @property
    def registers(self) -> int:
        """Of a thread: all that so many warps on a multiprocessor can have."""
        return min(_MOST_REGISTERS, _REGISTERS // (WARP * self.warps * max(1, self.programs)))


@dataclass(frozen=True)
class TileConfig(Checked):
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
# float32 weights cut beside hidden states of 16 bits, which takes more registers; a sum with products of
# float32; those with both operands of float32 cut; nothing but those, in TF32, which tensor cores take.
HALF, PARTS, MIRRORED, FLOAT, SPLIT, TF32 = "half", "parts", "mirrored", "float", "split", "tf32"
# How products of float32 are made where TF32 will not do, as ``tl.dot`` names it: of three bfloat16 parts of
# each operand six products in tensor cores, or float32's own outside of them.
BF16X6, IEEE = "bf16x6", "ieee"
TilesByKind = Mapping[tuple[str, int], Tiles]


class TileTable(NamedTuple):
    """Configurations of the kernels that make tiles.

    Attributes:
        kinds: by kind and number of accumulators, each rows * ids float32 in registers.
        many: of more accumulators than these.
    """

    kinds: TilesByKind
    many: TileConfig


# The largest that spill nowhere. A float32 operand takes twice the memory, so that it is read in shorter
# pieces.
_TILES = {
    (HALF, 1): Tiles(TileConfig(128, 128, 64, 8, 3, 16, 4), TileConfig(64, 128, 64, 8, 3, 16, 4)),
    (HALF, 2): Tiles(TileConfig(64, 128, 64, 8, 3, 16, 4), TileConfig(64, 64, 64, 8, 3, 16, 2)),
    (PARTS, 1): Tiles(TileConfig(128, 128, 32, 8, 3, 16, 4), TileConfig(64, 128, 32, 8, 3, 16, 4)),
    (PARTS, 2): Tiles(TileConfig(64, 64, 32, 8, 3, 16, 2), TileConfig(32, 64, 32, 4, 2, 16, 2)),
    (MIRRORED, 1): Tiles(TileConfig(64, 128, 32, 8, 3, 16, 4), TileConfig(64, 64, 32, 8, 3, 16, 1)),
    (MIRRORED, 2): Tiles(TileConfig(32, 64, 32, 8, 2, 16, 1), TileConfig(32, 64, 32, 8, 2, 16, 1)),
    (FLOAT, 1): Tiles(TileConfig(64, 64, 32, 4, 2, 16, 1), TileConfig(32, 64, 32, 4, 2, 16, 1)),
    (FLOAT, 2): Tiles(TileConfig(32, 64, 32, 4, 2, 16, 2), TileConfig(32, 64, 32, 4, 2, 16, 1)),
    (SPLIT, 1): Tiles(TileConfig(128, 64, 32, 8, 3, 16, 4), TileConfig(64, 64, 32, 8, 2, 16, 2)),
    (SPLIT, 2): Tiles(TileConfig(64, 64, 32, 4, 2, 16, 4), TileConfig(32, 32, 32, 4, 2, 16, 1)),
    (TF32, 1): Tiles(TileConfig(128, 128, 32, 8, 3, 16, 4), TileConfig(64, 128, 32, 8, 3, 16, 4)),
    (TF32, 2): Tiles(TileConfig(64, 128, 32, 8, 3, 16, 4), TileConfig(64, 64, 32, 8, 3, 16, 2)),
}
# By major compute capability, for GPUs that multiply out of shared memory: a tile twice as wide reads a third
# less for each product and ends half as often. Of the others, AMD's among them, an A100 stands for all.
A100, H100, B200 = 8, 9, 10
_TILES_OF: Mapping[int, TilesByKind] = {
    H100: _TILES
    | {
        (HALF, 1): Tiles(TileConfig(128, 256, 64, 8, 3, 16, 8), TileConfig(128, 128, 64, 8, 3, 16, 4)),
        (PARTS, 1): Tiles(TileConfig(128, 256, 32, 8, 3, 16, 8), TileConfig(64, 128, 32, 8, 3, 16, 4)),
        (PARTS, 2): Tiles(TileConfig(64, 64, 32, 8, 3, 16, 2), TileConfig(32, 64, 32, 8, 2, 16, 1)),
        (MIRRORED, 1): Tiles(TileConfig(128, 128, 32, 8, 3, 16, 4), TileConfig(64, 64, 32, 8, 3, 16, 1)),
        (SPLIT, 1): Tiles(TileConfig(128, 128, 32, 8, 3, 16, 4), TileConfig(64, 64, 32, 4, 2, 16, 2)),
        (TF32, 1): Tiles(TileConfig(128, 256, 32, 8, 3, 16, 8), TileConfig(128, 128, 32, 8, 3, 16, 4)),
    },
    B200: _TILES
    | {
        (HALF, 1): Tiles(TileConfig(128, 256, 64, 8, 3, 16, 8), TileConfig(128, 128, 64, 8, 3, 16, 4)),
        (SPLIT, 1): Tiles(TileConfig(128, 64, 64, 8, 2, 16, 4), TileConfig(64, 64, 32, 8, 2, 16, 2)),
        (SPLIT, 2): Tiles(TileConfig(64, 64, 32, 4, 2, 16, 2), TileConfig(32, 64, 32, 8, 2, 16, 1)),
        (TF32, 1): Tiles(TileConfig(128, 256, 32, 8, 3, 16, 8), TileConfig(64, 128, 32, 8, 3, 16, 4)),
    },
}


def _with_rows_of_draws(tiles: TileConfig) -> TileConfig:
    # Of any batch 64 rows, though few be there: another kind of matrix instruction adds up in another order.
    # The noise takes registers beside the products: 128 rows would spill.
    t = tiles
    return TileConfig(min(t.rows, 64), t.ids, t.width, t.warps, t.stages, t.group, 1)


_DRAW_TILES = {
    (kind, groups): Tiles(*map(_with_rows_of_draws, _TILES[FLOAT if kind == TF32 else kind, groups]))
    for kind, groups in _TILES
} | {
    # More warps would cut the same operands again.
    (SPLIT, 1): Tiles(TileConfig(64, 64, 32, 4, 2, 16, 1), TileConfig(64, 64, 32, 4, 2, 16, 1)),
}


@dataclass(frozen=True)
class StepConfig(Checked):
    """How a kernel is launched that takes some rows, or entries of one, and of each a few things at a time.

    Attributes:
        taken: rows, or entries, of a program.
        step: entries or tiles that a turn of its loop takes.
        warps: warps in a program.
    """

    taken: int
    step: int
    warps: int


@dataclass(frozen=True)
class BlockConfig(Checked):
    """How a kernel is launched that draws tokens, or goes along one axis.

    Attributes:
        block: columns, or rows, in a tile.
        warps: warps in a program.
        programs: wanted per multiprocessor, as in ``Config``; 0 where a row is never split.
    """

    block: int
    warps: int
    programs: int = 0


@dataclass(frozen=True)
class FilterConfig(Checked):
    """How the kernels are launched that filter written logits.

    Attributes:
        block: columns in a tile; divides that of ``Configs.sample``.
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


@dataclass(frozen=True)
class Configs:
    """Every choice of speed for one GPU.

    For one value of it results are the same to the last bit in every run. With another value the last bits
    of losses change: sums are cut elsewhere (``forward``, ``forward_stats``, ``fused``, ``fused_stats``,
    ``tiles``, ``combine``, ``entry_nll``), are made by another kernel (``cache_share``), or a gradient is
    rounded after another step (``recomputed_width``). Draws from heads may change with ``draw_tiles`` where
    two scores agree in nearly all of their bits. Tokens that are drawn from logits depend on none of it.

    Attributes:
        forward, forward_stats, backward: losses of logits and their gradients in two passes, by the largest
            number of terms. More bring more loads per column, and fewer vectors of each then fill the same
            registers.
        fused, fused_stats: both in one pass: so many programs for each multiprocessor, whose warps alone keep
            memory busy. Rows in flight share the L2 cache.
        cache_share: of that cache, for the rows in flight. Its two halves copy what the other one holds,
            addresses share its sets unevenly, and gradients pass through it: what it keeps is less than its
            size. 0 makes every loss of logits in two passes.
        count: targets.
        tiles, tiles_many: losses of heads, as in ``TileTable``.
        recomputed_width: sum of D up to which dz is made from hidden states again. Multiplying D more numbers
            per logit takes as long as moving the bytes of e and dz once more: 4 bytes at 3.35 TB/s against
            2 D operations at 989 TFLOP/s, the data-sheet rates of an H100.
        combine: rows, and tiles at a time, of the kernel that adds up what tiles leave.
        scale: rows of a program that turns e into dz.
        entry_ids: ids by which entries are sorted of a sparse term that stands alone, where no kernel makes
            tiles.
        entry_order: entries (or tiles) that a program ranks and those that it compares them with at a time.
        entry_gradient, entry_nll: rows, and entries at a time, of gradients and of the nll of a term alone.
        draw_tiles: draws from heads, as in ``TileTable``; ids divide the block of ``sample``.
        choose_tile: tiles of heads whose draws are compared at a time.
        sample: draws from logits.
        choose, choose_tiles: bounds that the kernel which chooses looks at at a time, and tiles of a group.
        seen: ids of a prompt and a history that a program looks at, and those that it compares them with at a
            time.
        adjust: penalties.
        filter: top-k, top-p and min-p.

    Raises:
        ValueError: two of these do not go together.
    """

    forward: Mapping[int, Config] = field(
        default_factory=lambda: {1: Config(4, 4, 4), 2: Config(2, 4, 4), 8: Config(1, 4, 4)}
    )
    forward_stats: Mapping[int, Config] = field(
        default_factory=lambda: {2: Config(1, 4, 4), 8: Config(1, 8, 4)}
    )
    fused: Mapping[int, Config] = field(
        default_factory=lambda: {1: Config(4, 16, 1), 2: Config(2, 16, 1), 8: Config(1, 16, 1)}
    )
    fused_stats: Mapping[int, Config] = field(default_factory=lambda: {8: Config(1, 16, 1)})
    cache_share: float = 0.6
    backward: Mapping[int, Config] = field(
        default_factory=lambda: {1: Config(4, 4, 4), 2: Config(2, 4, 4), 8: Config(1, 4, 4)}
    )
    count: BlockConfig = BlockConfig(2048, 8)
    tiles: TilesByKind = field(default_factory=lambda: _TILES)
    tiles_many: TileConfig = TileConfig(32, 64, 32, 8, 2, 16, 1)
    recomputed_width: int = 512
    combine: StepConfig = StepConfig(16, 32, 4)
    scale: BlockConfig = BlockConfig(32, 4)
    entry_ids: int = 128
    entry_order: StepConfig = StepConfig(128, 32, 4)
    entry_gradient: StepConfig = StepConfig(32, 32, 4)
    entry_nll: StepConfig = StepConfig(32, 4, 1)
    draw_tiles: TilesByKind = field(default_factory=lambda: _DRAW_TILES)
    choose_tile: BlockConfig = BlockConfig(512, 4)
    sample: BlockConfig = BlockConfig(2048, 4, programs=8)
    choose: BlockConfig = BlockConfig(1024, 4)
    choose_tiles: int = 16
    seen: StepConfig = StepConfig(128, 32, 4)
    adjust: BlockConfig = BlockConfig(256, 2)
    filter: FilterConfig = FilterConfig(
        1024, 4, 4, bins=2048, listed=8192, least_listed=256, finish_block=512, finish_warps=8
    )

    @classmethod
    def of(cls, capability: int) -> Configs:
        """The defaults for a major compute capability."""
        return cls(tiles=_TILES_OF.get(capability, _TILES))

    def __post_init__(self) -> None:
        for name, least, most in (("recomputed_width", 0, 1 << 20), ("entry_ids", 16, 4096)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from {least} to {most}")
        if type(self.choose_tiles) is not int or self.choose_tiles not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"choose_tiles is {self.choose_tiles!r}; it must be a power of 2 from 1 to 32")
        if type(self.cache_share) not in (int, float) or not 0 <= self.cache_share <= 1:
            raise ValueError(f"cache_share is {self.cache_share!r}; it must be a number from 0 to 1")
        block = self.sample.block
        drawn = {tile.ids for tiles in self.draw_tiles.values() for tile in tiles} | {self.tiles_many.ids}
        dividing = {"PART": {PART}, "filter.block": {self.filter.block}, "ids of draw_tiles": drawn}
        dividing["filter.finish_block"] = {self.filter.finish_block}
        for name, sizes in dividing.items():
            for size in sizes:
                if block % size:
                    raise ValueError(f"sample.block is {block}; {name}, {size}, must divide it")
        if self.filter.block > self.filter.bins:
            raise ValueError(
                f"filter.bins is {self.filter.bins}; filter.block is {self.filter.block}, not less"
            )
        for key, tiles in self.draw_tiles.items():
            for tile in tiles:
                if tile.rows > 64:
                    raise ValueError(f"rows of draw_tiles {key} are {tile.rows}; a draw takes 64 at most")

    @property
    def for_losses(self) -> TileTable:
        return TileTable(self.tiles, self.tiles_many)

    @property
    def for_draws(self) -> TileTable:
        return TileTable(self.draw_tiles, self.tiles_many)


DEFAULT = Configs()
