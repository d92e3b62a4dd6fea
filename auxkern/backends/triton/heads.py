"""Sums of heads as kernels take them: what the launches of those that make tiles have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auxkern.backends.triton import configs
from auxkern.backends.triton.launch import Launch, encode
from auxkern.core.terms import Head

HALF = (torch.float16, torch.bfloat16)
# A float32 operand beside a 16-bit one is multiplied in parts of that dtype, which tensor cores take and the
# accumulator adds up. Of its 24 bits a part in bfloat16 has 8 and one in float16 11, beside its sign: so many
# leave an error no larger than that of float32's own sums, and one less leaves 10 and 1,000 times as much.
PARTS = {torch.bfloat16: 3, torch.float16: 2}
_FLOAT16_IN_BFLOAT16 = 2  # parts of 8 bits that hold all 11
# Of two float32 operands in three bfloat16 parts each: what the smallest three of nine would add is less than
# float32 rounds off.
_SPLIT_PRODUCTS = 6
# An accumulator passes from one scale to the next by their ratio, unless that is extreme.
_MOST_RESCALING = 2.0**20


class _HeadArgument(NamedTuple):
    """A head as kernels take it; strides are coded, in elements."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor  # the weight where there is none
    largest: Tensor  # float32, magnitude of each row of what is cut into float16; the bias otherwise
    hidden_stride: int
    hidden_column: int
    weight_stride: int
    weight_column: int
    bias_stride: int
    rescale: float  # of what the accumulator holds before this head
    rows_rescale: float | Tensor  # of it, too: 1 or (N,) float32


class _Group(NamedTuple):
    """Heads that share an accumulator."""

    scale: float | Tensor  # or (N,) float32
    softcap: float


@dataclass(frozen=True)
class HeadsSum:
    """A sum of heads as the tile kernels take it.

    Attributes:
        heads: those without a soft cap first, which share an accumulator; of them those with a scale for
            each row, which begin one.
        groups: scale and soft cap of each accumulator.
        constants: of every kernel that makes tiles.
        config: its launch configuration.
        group_of: the accumulator of each head, in the order given.
        V: ids.
        parts: of each head, products of 16-bit operands that make its product; 0 if it is float32's own or
            TF32's.
        choices: of the GPU.
    """

    heads: tuple[_HeadArgument, ...]
    groups: tuple[_Group, ...]
    constants: dict[str, object]
    config: configs.TileConfig
    group_of: list[int]
    V: int
    parts: tuple[int, ...]
    choices: configs.Configs

    @property
    def N(self) -> int:
        """Rows."""
        return self.heads[0].hidden.shape[0]

    @property
    def in_tensor_cores(self) -> bool:
        """Whether every product has 16-bit operands, or parts that do."""
        return all(self.parts)

    @property
    def width(self) -> int:
        """Sum of the heads' D, each as often as it is multiplied in 16 bits."""
        return sum(parts * h.hidden.shape[1] for h, parts in zip(self.heads, self.parts, strict=True))

    def slope_of(self, head: int) -> int:
        """The group whose soft cap's slope a head's gradient takes; -1 if it has none."""
        group = self.group_of[head]
        return group if self.groups[group].softcap > 0 else -1

    @property
    def tiles(self) -> int:
        """Vocabulary tiles."""
        return -(-self.V // self.config.ids)

    @property
    def input_bytes(self) -> int:
        """Bytes of hidden states and weights, each once."""
        return sum(
            h.hidden.shape[1] * (self.N * h.hidden.element_size() + self.V * h.weight.element_size())
            for h in self.heads
        )

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Uninitialised (N, tiles * BLOCK_V): as wide as whole tiles, so that stores need no mask."""
        return self.heads[0].hidden.new_empty((self.N, self.tiles * self.config.ids), dtype=dtype)

    def launch(
        self,
        kernel: Any,
        arguments: Mapping[str, object],
        constants: Mapping[str, object],
        *,
        bytes_moved: int,
        logit_flops: int,
        tiles: int | None = None,
    ) -> Launch:
        """A launch of a kernel that makes tiles.

        Args:
            arguments, constants: of this kernel beside those of every one.
            logit_flops: operations per logit beside the products.
            tiles: made of each row, where they are more than hold the V ids.
        """
        config = self.config
        blocks = -(-self.N // config.rows)
        tiles = self.tiles if tiles is None else tiles
        shape = {"BLOCK_N": config.rows, "BLOCK_V": config.ids, "BLOCK_D": config.width}
        exact = sum(h.hidden.shape[1] for h, parts in zip(self.heads, self.parts, strict=True) if not parts)
        return Launch(
            kernel,
            (blocks * tiles,),
            {
                "heads": self.heads,
                "groups": self.groups,
                "N": self.N,
                "V": self.V,
                "row_blocks": blocks,
                "tiles": tiles,
                **arguments,
            },
            {**self.constants, **shape, "GROUP": config.group, **constants},
            config.warps,
            bytes_moved=bytes_moved,
            flops=self.N * self.V * (logit_flops + 2 * exact),
            num_stages=config.stages,
            tensor_flops=2 * self.N * self.V * self.width,
        )


def _order(heads: Sequence[Head], separate: bool) -> list[int]:
    """As ``HeadsSum.heads`` stand."""
    indices = range(len(heads))
    if separate:
        return list(indices)
    return sorted(indices, key=lambda i: 2 if heads[i].softcap else not isinstance(heads[i].scale, Tensor))


def _joins(previous: Head, head: Head) -> bool:
    """Whether a head's products can be added to what the previous head's accumulator holds."""
    # A row's scale may be 0, which nothing is divided by.
    if previous.softcap or head.softcap or isinstance(head.scale, Tensor) or not head.scale:
        return False
    # To look at rows' scales would stop a GPU: they count as 1.
    before = 1.0 if isinstance(previous.scale, Tensor) else abs(float(previous.scale))
    return 1 / _MOST_RESCALING <= before / abs(head.scale) <= _MOST_RESCALING


def _ratio(previous: Head | None, head: Head, joins: bool) -> tuple[float, float | Tensor]:
    """What the accumulator is multiplied by between them."""
    if previous is None or not joins:
        return 1.0, 1.0
    if isinstance(previous.scale, Tensor):
        return 1.0 / float(head.scale), previous.scale
    return previous.scale / float(head.scale), 1.0


def _as_head(head: Head, rescale: tuple[float, float | Tensor]) -> _HeadArgument:
    bias = head.weight if head.bias is None else head.bias
    hidden_stride, hidden_column = map(encode, head.hidden.stride())
    weight_stride, weight_column = map(encode, head.weight.stride())
    strides = (hidden_stride, hidden_column, weight_stride, weight_column, encode(bias.stride(0)))
    return _HeadArgument(head.hidden, head.weight, bias, _largest(head), *strides, *rescale)


def _parts(head: Head, precision: str) -> int:
    """As ``HeadsSum.parts`` says."""
    dtypes = {head.hidden.dtype, head.weight.dtype}
    if dtypes == {torch.float32}:
        return _SPLIT_PRODUCTS if precision == configs.BF16X6 else 0
    if torch.float32 not in dtypes:
        return 1 if len(dtypes) == 1 else _FLOAT16_IN_BFLOAT16
    narrow = dtypes - {torch.float32}
    return PARTS[narrow.pop()]


def _cut_here(head: Head, parts: int) -> int:
    """Parts that a kernel cuts an operand into; the compiler cuts two of float32."""
    return 1 if head.hidden.dtype == head.weight.dtype else parts


def _largest(head: Head) -> Tensor:
    """(N,) or (V,) float32: magnitude of each row of a float32 operand beside a float16 one.

    A float16 reaches from 2**-24 to 65,504, hidden states of real models beyond; parts of a row that a power
    of two has brought there keep its entries to 2**-39 of the largest one.
    """
    for operand, other in ((head.hidden, head.weight), (head.weight, head.hidden)):
        if operand.dtype == torch.float32 and other.dtype == torch.float16:
            largest: Tensor = torch.linalg.vector_norm(operand, torch.inf, dim=1)
            return largest
    return head.weight if head.bias is None else head.bias


def _even(head: Head) -> bool:
    """Whether rows of both operands begin at multiples of 8 elements."""
    return head.hidden.stride(0) % 8 == 0 and head.weight.stride(0) % 8 == 0


def heads_sum(
    heads: Sequence[Head],
    V: int,
    separate: bool,
    precision: str = configs.BF16X6,
    *,
    crowded: bool = False,
    choices: configs.Configs = configs.DEFAULT,
    draws: bool = False,
) -> HeadsSum:
    """The sum of 1 to 4 heads as the kernels take it.

    Args:
        separate: whether each head needs an accumulator of its own.
        precision: of products of float32, as ``Gpu.float32_products``.
        crowded: whether statistics or entries take registers beside the products.
        choices: of the GPU.
        draws: whether tokens are drawn from it, not losses made.
    """
    order = _order(heads, separate)
    begins, rescales, group_of = [], [], [0] * len(heads)
    groups: list[_Group] = []
    previous: Head | None = None
    for i in order:
        head = heads[i]
        joins = previous is not None and not separate and _joins(previous, head)
        begins.append(not joins)
        rescales.append(_ratio(previous, head, joins))
        # A group counts in units of its last head's scale.
        group = _Group(head.scale, head.softcap or 0.0)
        groups[-1:] = [group] if joins else [*groups[-1:], group]
        group_of[i] = len(groups) - 1
        previous = head
    ordered, table = [heads[i] for i in order], choices.for_draws if draws else choices.for_losses
    parts = tuple(_parts(h, precision) for h in ordered)
    return HeadsSum(
        heads=tuple(map(_as_head, ordered, rescales)),
        groups=tuple(groups),
        constants={
            "D": tuple(h.hidden.shape[1] for h in ordered),
            "UNIT_HIDDEN": tuple(h.hidden.stride(1) == 1 for h in ordered),
            "UNIT_WEIGHT": tuple(h.weight.stride(1) == 1 for h in ordered),
            "EVEN": tuple(map(_even, ordered)),
            "BIAS": tuple(h.bias is not None for h in ordered),
            "BEGINS": tuple(begins),
            "RESCALED": tuple(isinstance(own, Tensor) or r != 1.0 for r, own in rescales),
            "PARTS": tuple(map(_cut_here, ordered, parts)),
            "CAPPED": tuple(g.softcap > 0 for g in groups),
            "PRECISION": precision,
        },
        config=_config(ordered, parts, len(groups), precision, crowded or separate, table),
        group_of=group_of,
        V=V,
        parts=parts,
        choices=choices,
    )


def _config(
    heads: Sequence[Head],
    parts: Sequence[int],
    groups: int,
    precision: str,
    crowded: bool,
    table: configs.TileTable,
) -> configs.TileConfig:
    """How a sum is cut into tiles; ``crowded`` if more than its operands takes registers."""
    kind = _kind(heads, parts, precision)
    if (kind, groups) not in table.kinds:
        # More warps would cut the same operands again.
        return table.kinds[kind, 2].crowded if kind == configs.SPLIT else table.many
    tiles = table.kinds[kind, groups]
    aligned = all(map(_adjacent, heads)) and all(h.hidden.shape[1] % tiles.roomy.width == 0 for h in heads)
    # Tiles of float32 are small: statistics and entries find room beside aligned operands.
    crowded = (crowded and kind not in (configs.FLOAT, configs.SPLIT)) or len(heads) > 2
    crowded |= kind != configs.HALF and any(h.bias is not None for h in heads)
    return tiles.roomy if aligned and not crowded else tiles.crowded


def _kind(heads: Sequence[Head], parts: Sequence[int], precision: str) -> str:
    if precision == "tf32" and not any(parts):
        return configs.TF32
    if not all(parts):
        return configs.FLOAT
    if max(parts) == 1:
        return configs.HALF
    if _SPLIT_PRODUCTS in parts:
        return configs.SPLIT
    mirrored = any(h.hidden.dtype in HALF and h.weight.dtype == torch.float32 for h in heads)
    return configs.MIRRORED if mirrored else configs.PARTS


def _adjacent(head: Head) -> bool:
    """Whether both operands' rows are stored as such, at multiples of 8 elements."""
    return _even(head) and head.hidden.stride(1) == head.weight.stride(1) == 1
