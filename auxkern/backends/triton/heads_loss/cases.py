"""Launches of the kernels of output heads that stand for the rest; ``kernels.py`` registers them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from auxkern.backends.triton.heads_loss import launches as heads_loss
from auxkern.backends.triton.launch import Launch
from auxkern.ops.registry import HeadRows

# D of a language model's and of an auxiliary model's hidden states.
WIDTHS = {"768+256": (768, 256), "576+256": (576, 256), "4096+512": (4096, 512)}
ROWS = 4096  # a chunk

_H, _B, _F = torch.float16, torch.bfloat16, torch.float32
_SHORT = {_H: "fp16", _B: "bf16", _F: "fp32"}


def heads_sum(
    V: int,
    widths: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    *,
    cap: float = 0.0,
    stats: bool = False,
    scales: tuple[float, ...] = (1.0, 1.0, -1.0),
) -> heads_loss.Sum:
    """``ROWS`` rows of a sum of heads, on tensors without memory."""
    heads = [
        HeadRows(
            torch.empty(ROWS, D, dtype=dtype, device="meta"),
            torch.empty(V, D, dtype=dtype, device="meta"),
            None,
            scale,
            cap,
        )
        for D, dtype, scale in zip(widths, dtypes, scales, strict=False)
    ]
    target = torch.empty(ROWS, dtype=torch.int64, device="meta")
    return heads_loss.heads_sum(heads, target, V, stats, "ieee")


def _row() -> torch.Tensor:
    return torch.empty(ROWS, device="meta")


def forward_launches(heads: heads_loss.Sum, *, smooth: bool = False, stats: bool = False) -> list[Launch]:
    """A forward pass without gradient."""
    return heads_loss.forward(heads, -100, smooth, stats, None)[2]


def one_write_launch(heads: heads_loss.Sum) -> Launch:
    """The forward kernel that writes e."""
    e = heads.buffer(_H if heads.half else _F)
    return heads_loss.forward(heads, -100, False, False, e)[2][0]


def scale_launch(heads: heads_loss.Sum, dtype: torch.dtype) -> Launch:
    """The kernel that turns e into dz."""
    tops = torch.empty(heads.tiles, ROWS, device="meta")
    e = heads.buffer(heads_loss.e_dtype(dtype))
    return heads_loss.scale(heads, e, tops, _row(), (_row(), _row(), _row()), dtype)[1]


def gradient_launch(heads: heads_loss.Sum, dtype: torch.dtype, wanted: tuple[int, ...] = (1,)) -> Launch:
    """The kernel that makes dz from the hidden states again."""
    slopes = list(dict.fromkeys(heads.slope_of(i) for i in wanted))
    return heads_loss.gradient(heads, _row(), (_row(), _row(), _row()), slopes, dtype)[1]


def forward_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Labels and launches of ``heads_forward_kernel``."""
    for dtype in (_H, _B):
        for name, widths in WIDTHS.items():
            heads = heads_sum(V, widths, (dtype, dtype))
            yield f"{_SHORT[dtype]} {name}", forward_launches(heads)[0]
            if dtype == _B:
                yield f"bf16 {name}, writes e", one_write_launch(heads)
    widths = WIDTHS["768+256"]
    yield "fp16+fp32 768+256", forward_launches(heads_sum(V, widths, (_H, _F)))[0]
    yield "fp32 768+256, writes e", one_write_launch(heads_sum(V, widths, (_F, _F)))
    yield "bf16, softcap", forward_launches(heads_sum(V, widths, (_B, _B), cap=30.0))[0]
    yield "bf16, smooth", forward_launches(heads_sum(V, widths, (_B, _B)), smooth=True)[0]
    separate = heads_sum(V, widths, (_B, _B), stats=True)
    yield "bf16, smooth, stats", forward_launches(separate, smooth=True, stats=True)[0]
    three = heads_sum(V, (768, 256, 256), (_B, _B, _B))
    yield "3 x bf16 768+256+256", forward_launches(three)[0]


def combine_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Of ``heads_combine_kernel``."""
    widths = WIDTHS["768+256"]
    yield "bf16", forward_launches(heads_sum(V, widths, (_B, _B)))[1]
    separate = heads_sum(V, widths, (_B, _B), stats=True)
    yield "bf16, smooth, stats", forward_launches(separate, smooth=True, stats=True)[1]


def scale_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Of ``heads_scale_kernel``."""
    for dtype in (_H, _B, _F):
        yield _SHORT[dtype], scale_launch(heads_sum(V, WIDTHS["768+256"], (dtype, dtype)), dtype)


def gradient_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Of ``heads_gradient_kernel``."""
    for dtype in (_H, _B):
        narrow = heads_sum(V, (256, 256), (dtype, dtype))
        yield f"{_SHORT[dtype]} 256+256", gradient_launch(narrow, dtype)
    yield "fp32 256+256", gradient_launch(heads_sum(V, (256, 256), (_F, _F)), _F)
    capped = heads_sum(V, WIDTHS["768+256"], (_B, _B), cap=30.0)
    yield "bf16, softcap", gradient_launch(capped, _B)
    yield "bf16, softcap, both wanted", gradient_launch(capped, _B, (0, 1))
