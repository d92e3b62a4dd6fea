"""From checked output heads to kernel launches: what dispatch runs, and what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auxkern.backends.triton import configs
from auxkern.backends.triton.device.rows import encode
from auxkern.backends.triton.heads_loss.kernels import (
    heads_combine_kernel,
    heads_forward_kernel,
    heads_gradient_kernel,
    heads_scale_kernel,
)
from auxkern.backends.triton.launch import Launch
from auxkern.ops.registry import HeadRows, Rows

MAX_HEADS = 4
# Scale, maximum, difference, exp, add: per logit, beside the products.
_LOGIT_FLOPS = 6
# An accumulator passes from one scale to the next by their ratio, unless that is extreme.
_MOST_RESCALING = 2.0**20
_HALF = (torch.float16, torch.bfloat16)
# dz lies in [-1, 1]; float16 keeps its small entries from underflow in the upper half of its range.
MAGNIFIED = {torch.float16: 2.0**12, torch.bfloat16: 1.0, torch.float32: 1.0}
# Multiplying D more numbers per logit takes as long as moving the bytes of e and dz once more: 4 bytes
# at 3.35 TB/s against 2 D operations at 989 TFLOP/s, the data-sheet rates of an H100.
_RECOMPUTED_WIDTH = 512


class _Head(NamedTuple):
    """A head as kernels take it; strides are coded, in elements."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor  # the weight where there is none
    hidden_stride: int
    hidden_column: int
    weight_stride: int
    weight_column: int
    bias_stride: int
    rescale: float  # of what the accumulator holds before this head


class _Group(NamedTuple):
    """Heads that share an accumulator."""

    scale: float
    softcap: float


class _Partial(NamedTuple):
    """What ``heads_forward_kernel`` leaves for ``heads_combine_kernel``; G groups."""

    sums: Tensor  # (2, 3 or 3 + 2 G, tiles, N) float32
    best: Tensor  # (2, tiles, N) int32
    target: Tensor  # (1 or 1 + G, N) float32


class _Out(NamedTuple):
    """``registry.Rows`` as a kernel takes it."""

    nll: Tensor
    row_max: Tensor
    log_sum: Tensor
    smooth: Tensor
    argmax: Tensor
    term_nll: Tensor


class _Coefficients(NamedTuple):
    row_max: Tensor
    exp_coefficient: Tensor
    constant: Tensor
    target_gradient: Tensor


@dataclass(frozen=True)
class Sum:
    """A sum of heads as the tile kernels take it.

    Attributes:
        arguments, constants: of every kernel that makes tiles.
        config: its launch configuration.
        group_of: the accumulator of each head, in the order given.
        N, V, width: rows, ids, sum of the heads' D.
        half: whether every product has 16-bit operands.
    """

    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: configs.TileConfig
    group_of: list[int]
    N: int
    V: int
    width: int
    half: bool

    def slope_of(self, head: int) -> int:
        """The group whose soft cap's slope a head's gradient takes; -1 if it has none."""
        group = self.group_of[head]
        return group if self.constants["CAPPED"][group] else -1

    @property
    def tiles(self) -> int:
        """Vocabulary tiles."""
        return -(-self.V // self.config.ids)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Uninitialised (N, tiles * BLOCK_V): as wide as whole tiles, so that stores need no mask."""
        return self.arguments["target"].new_empty((self.N, self.tiles * self.config.ids), dtype=dtype)

    def launch(self, kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], moved: int) -> Launch:
        """A launch of a kernel that makes tiles."""
        config = self.config
        blocks = -(-self.N // config.rows)
        shape = {"BLOCK_N": config.rows, "BLOCK_V": config.ids, "BLOCK_D": config.width}
        products = 2 * self.N * self.V * self.width
        return Launch(
            kernel,
            (blocks * self.tiles,),
            self.arguments | {"row_blocks": blocks, "tiles": self.tiles} | arguments,
            self.constants | shape | {"GROUP": config.group} | constants,
            config.warps,
            bytes_moved=moved,
            flops=self.N * self.V * _LOGIT_FLOPS + (0 if self.half else products),
            num_stages=config.stages,
            tensor_flops=products if self.half else 0,
        )


def refusal(heads: Sequence[HeadRows]) -> str | None:
    """Why no kernel takes this sum of heads; None if one does."""
    if len(heads) > MAX_HEADS:
        return f"there are {len(heads)} heads; kernels take {MAX_HEADS} at most"
    if any(head.hidden.shape[1] == 0 for head in heads):
        return "a head has hidden states of width 0"
    return None


def gradient_dtype(heads: Sequence[HeadRows]) -> torch.dtype:
    """What dz is rounded to for these heads: their dtype if it is 16-bit and they agree, else float32."""
    dtypes = {x.dtype for head in heads for x in (head.hidden, head.weight)}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def e_dtype(dtype: torch.dtype) -> torch.dtype:
    """What e, which lies in [0, 1], is rounded to: float16 has three bits more than bfloat16 there."""
    return torch.float16 if dtype in _HALF else torch.float32


def one_write(heads: Sum, wanted: Sequence[int]) -> bool:
    """Whether e is written and turned into dz, not dz made from the hidden states again.

    A narrow sum is cheaper to make again than to read and write once more; float32 products are
    not. The slope of a soft cap needs its head's own products, which e does not hold.
    """
    if any(heads.slope_of(i) >= 0 for i in wanted):
        return False
    return not heads.half or heads.width > _RECOMPUTED_WIDTH


def _order(heads: Sequence[HeadRows], separate: bool) -> list[int]:
    """Heads without a soft cap first: those share an accumulator."""
    indices = range(len(heads))
    return list(indices) if separate else sorted(indices, key=lambda i: heads[i].softcap > 0)


def _joins(previous: HeadRows, head: HeadRows) -> bool:
    """Whether a head's products can be added to what the previous head's accumulator holds."""
    if previous.softcap or head.softcap or not previous.scale or not head.scale:
        return False
    return 1 / _MOST_RESCALING <= abs(previous.scale / head.scale) <= _MOST_RESCALING


def _as_head(head: HeadRows, rescale: float) -> _Head:
    bias = head.weight if head.bias is None else head.bias
    hidden_stride, hidden_column = map(encode, head.hidden.stride())
    weight_stride, weight_column = map(encode, head.weight.stride())
    strides = (hidden_stride, hidden_column, weight_stride, weight_column, encode(bias.stride(0)))
    return _Head(head.hidden, head.weight, bias, *strides, rescale)


def _even(head: HeadRows) -> bool:
    """Whether rows of both operands begin at multiples of 8 elements."""
    return head.hidden.stride(0) % 8 == 0 and head.weight.stride(0) % 8 == 0


def heads_sum(heads: Sequence[HeadRows], target: Tensor, V: int, separate: bool, precision: str) -> Sum:
    """The sum of 1 to 4 heads as the kernels take it.

    Args:
        separate: whether each head needs an accumulator of its own.
        precision: of products of float32: "ieee" or "tf32".
    """
    order = _order(heads, separate)
    begins, rescales, group_of = [], [], [0] * len(heads)
    groups: list[_Group] = []
    previous: HeadRows | None = None
    for i in order:
        head = heads[i]
        joins = previous is not None and not separate and _joins(previous, head)
        begins.append(not joins)
        rescales.append(previous.scale / head.scale if joins and previous is not None else 1.0)
        # A group counts in units of its last head's scale.
        group = _Group(head.scale, head.softcap)
        groups[-1:] = [group] if joins else [*groups[-1:], group]
        group_of[i] = len(groups) - 1
        previous = head
    ordered = [heads[i] for i in order]
    half = all(h.hidden.dtype == h.weight.dtype and h.weight.dtype in _HALF for h in heads)
    return Sum(
        arguments={
            "heads": tuple(map(_as_head, ordered, rescales)),
            "groups": tuple(groups),
            "target": target,
            "N": target.shape[0],
            "V": V,
        },
        constants={
            "D": tuple(h.hidden.shape[1] for h in ordered),
            "UNIT_HIDDEN": tuple(h.hidden.stride(1) == 1 for h in ordered),
            "UNIT_WEIGHT": tuple(h.weight.stride(1) == 1 for h in ordered),
            "EVEN": tuple(map(_even, ordered)),
            "BIAS": tuple(h.bias is not None for h in ordered),
            "BEGINS": tuple(begins),
            "RESCALED": tuple(r != 1.0 for r in rescales),
            "CAPPED": tuple(g.softcap > 0 for g in groups),
            "PRECISION": precision,
        },
        config=configs.tiles(len(groups), half),
        group_of=group_of,
        N=target.shape[0],
        V=V,
        width=sum(h.hidden.shape[1] for h in heads),
        half=half,
    )


def input_bytes(heads: Sum) -> int:
    """Bytes of hidden states and weights, each once."""
    itemsizes = [(h.hidden.element_size(), h.weight.element_size()) for h in heads.arguments["heads"]]
    return sum(
        D * (heads.N * hidden + heads.V * weight)
        for D, (hidden, weight) in zip(heads.constants["D"], itemsizes, strict=True)
    )


def forward(
    heads: Sum, ignore_index: int, want_smooth: bool, want_stats: bool, e: Tensor | None
) -> tuple[Rows, Tensor, list[Launch]]:
    """The launches of a forward pass, in order, the rows they fill, and the tiles' (tiles, N) maxima.

    Args:
        heads: separate if ``want_stats``.
        e: ``heads.buffer(...)`` that receives exp(z - the tile's maximum), or None.
    """
    N, target = heads.N, heads.arguments["target"]
    groups = len(heads.arguments["groups"])

    def floats(*shape: int) -> Tensor:
        return target.new_empty(shape, dtype=torch.float32)

    out = _Out(
        nll=floats(N),
        row_max=floats(N),
        log_sum=floats(N),
        smooth=floats(N if want_smooth else 0),
        argmax=target.new_empty(N if want_stats else 0),
        term_nll=floats(groups, N) if want_stats else floats(0, 0),
    )
    fields = 3 + 2 * groups if want_stats else 3 if want_smooth else 2
    partial = _Partial(
        sums=floats(fields, heads.tiles, N),
        best=target.new_empty((2 if want_stats else 0, heads.tiles, N), dtype=torch.int32),
        target=floats(1 + groups if want_stats else 1, N),
    )
    written = 0 if e is None else N * heads.V * e.element_size()
    options = {"SMOOTH": want_smooth, "STATS": want_stats}
    made = heads.launch(
        heads_forward_kernel,
        {"partial": partial, "e_out": partial.sums if e is None else e},
        options | {"WRITE": e is not None},
        input_bytes(heads) + written,
    )
    sizes = fields * heads.tiles * N
    combined = Launch(
        heads_combine_kernel,
        (-(-N // configs.COMBINE_ROWS),),
        {
            "target": target,
            "partial": partial,
            "out": out,
            "N": N,
            "V": heads.V,
            "ignore_index": ignore_index,
            "tiles": heads.tiles,
        },
        options
        | {
            "GROUPS": groups,
            "BLOCK_V": heads.config.ids,
            "R": configs.COMBINE_ROWS,
            "LANES": configs.COMBINE_LANES,
        },
        configs.COMBINE_WARPS,
        bytes_moved=4 * sizes,
        flops=2 * sizes,
    )
    return Rows(*out), partial.sums[0], [made, combined]


def scale(
    heads: Sum, e: Tensor, tops: Tensor, row_max: Tensor, coefficients: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Launch]:
    """The launch that turns ``e`` into dz of ``dtype``, and dz (N, V), in the memory of ``e``."""
    d = e.view(dtype)
    N = heads.N
    launch = Launch(
        heads_scale_kernel,
        (-(-N // configs.SCALE_ROWS), heads.tiles),
        {
            "e_in": e,
            "d_out": d,
            "target": heads.arguments["target"],
            "tops": tops,
            "coefficients": _Coefficients(row_max, *coefficients),
            "N": N,
            "tiles": heads.tiles,
        },
        {"R": configs.SCALE_ROWS, "BLOCK_V": heads.config.ids},
        configs.SCALE_WARPS,
        bytes_moved=2 * N * heads.V * e.element_size(),
        flops=2 * N * heads.V,
    )
    return d[:, : heads.V], launch


def gradient(
    heads: Sum, row_max: Tensor, coefficients: Sequence[Tensor], capped: Sequence[int], dtype: torch.dtype
) -> tuple[list[Tensor], Launch]:
    """The launch that makes dz (N, V) from the hidden states again, and the tensors it fills.

    Args:
        capped: for each tensor, the group whose slope multiplies dz, or -1 for dz itself.
    """
    out = [heads.buffer(dtype) for _ in capped]
    launch = heads.launch(
        heads_gradient_kernel,
        {"coefficients": _Coefficients(row_max, *coefficients), "d_out": tuple(out)},
        {"SLOPES": tuple(capped)},
        input_bytes(heads) + sum(heads.N * heads.V * d.element_size() for d in out),
    )
    return [d[:, : heads.V] for d in out], launch
