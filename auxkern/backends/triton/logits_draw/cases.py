"""Launches of the sampling kernels that stand for the rest; ``kernels.py`` registers them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from auxkern.backends.triton.heads_loss.cases import WIDTHS
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_draw import launches as logits_draw
from auxkern.ops.registry import Draws, HeadRows

ROWS = 64  # a decoding batch
_MULTIPROCESSORS = 132  # H100 SXM; decides how rows are split, not what is compiled
_H, _B, _F = torch.float16, torch.bfloat16, torch.float32
_SUMS = {"bf16+bf16": (_B, _B), "fp16+fp32": (_H, _F), "fp32+fp32": (_F, _F), "bf16": (_B,)}


def draws_of(*, plain: bool, history: int = 0, rows: int = ROWS) -> Draws:
    """Parameters of some rows, on tensors without memory."""

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(rows, *shape, device="meta")

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(rows, *shape, dtype=torch.int64, device="meta")

    return Draws(
        temperature=floats(),
        top_k=integers(),
        top_p=floats().double(),
        log_min_p=floats(),
        repetition=floats(),
        presence=floats(),
        frequency=floats(),
        seed=integers(),
        position=integers(),
        prompt=integers(0),
        history=integers(history),
        added_ids=integers(0),
        added=floats(0),
        bias_ids=integers(0),
        bias=floats(0),
        row_scales=[],
        plain=plain,
    )


def launches(
    V: int, dtypes: tuple[torch.dtype, ...], draws: Draws, *, logprob: bool = False, scaled: bool = False
) -> list[Launch]:
    """The launches of one call on logits of these dtypes."""
    values = [torch.empty(1, ROWS, V, dtype=dtype, device="meta") for dtype in dtypes]
    scales = [torch.empty(ROWS, device="meta") if scaled else None for _ in dtypes]
    chosen = Draws(**{**vars(draws), "row_scales": scales})
    settings = ([1.0] * len(values), [0.0] * len(values), V, chosen, logprob, _MULTIPROCESSORS)
    return logits_draw.sample(values, *settings)[1]


def draw_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Labels and launches of ``draw_kernel``."""
    for name, dtypes in _SUMS.items():
        yield name, launches(V, dtypes, draws_of(plain=True))[0]
    yield "bf16+bf16, logprob", launches(V, (_B, _B), draws_of(plain=True), logprob=True)[0]
    yield "fp16+fp32, row scales", launches(V, (_H, _F), draws_of(plain=True), scaled=True)[0]


def choose_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Of ``choose_kernel``."""
    for logprob in (False, True):
        label = "logprob" if logprob else "plain"
        yield label, launches(V, (_B, _B), draws_of(plain=True), logprob=logprob)[1]


def sum_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Of ``sum_kernel``."""
    for name, dtypes in _SUMS.items():
        yield name, launches(V, dtypes, draws_of(plain=False))[0]


def adjust_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Of ``adjust_kernel``."""
    yield "history", launches(V, (_B, _B), draws_of(plain=True, history=512))[1]


def filter_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Of ``filter_kernel``."""
    for logprob in (False, True):
        label = "logprob" if logprob else "plain"
        yield label, launches(V, (_B, _B), draws_of(plain=False), logprob=logprob)[-1]


def head_launch(
    V: int,
    widths: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    *,
    rows: int = ROWS,
    cap: float = 0.0,
    write: bool = False,
    logprob: bool = False,
) -> Launch:
    """The launch that draws from heads, or that writes their logits."""
    heads = [
        HeadRows(
            torch.empty(rows, D, dtype=dtype, device="meta"),
            torch.empty(V, D, dtype=dtype, device="meta"),
            None,
            1.0,
            cap,
        )
        for D, dtype in zip(widths, dtypes, strict=True)
    ]
    draws = draws_of(plain=not write, rows=rows)
    return logits_draw.sample_heads(heads, V, draws, logprob, "ieee")[1][0]


def head_draw_cases(V: int) -> Iterator[tuple[str, Launch]]:
    """Of ``heads_draw_kernel``."""
    for name, widths in WIDTHS.items():
        yield f"bf16 {name}", head_launch(V, widths, (_B, _B))
    widths = WIDTHS["768+256"]
    yield "fp16 768+256", head_launch(V, widths, (_H, _H))
    yield "bf16, 16 rows", head_launch(V, widths, (_B, _B), rows=16)
    yield "bf16, 512 rows", head_launch(V, widths, (_B, _B), rows=512)
    yield "bf16, logprob", head_launch(V, widths, (_B, _B), logprob=True)
    yield "bf16, writes z", head_launch(V, widths, (_B, _B), write=True)
    yield "bf16, softcap", head_launch(V, widths, (_B, _B), cap=30.0)
    yield "fp16+fp32", head_launch(V, widths, (_H, _F))
