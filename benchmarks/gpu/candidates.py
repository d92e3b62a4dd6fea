"""What ``--tune`` tries: for each choice of speed the values beside its default, and what measures them.

The most important choices come first, for a run may be out of time before the last. Values that are known to
spill or not to fit on an H100 are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from auxkern import SamplingParams
from auxkern.backends.triton.configs import BlockConfig, Config, Configs, FilterConfig, TileConfig
from auxkern.backends.triton.tuned import keys
from benchmarks.gpu.works import (
    BATCH,
    LLAMA3,
    ROWS,
    SMOLLM2,
    Heads,
    Prepare,
    Work,
    backward,
    draw,
    forward,
    fused,
    heads_draw,
    heads_loss,
    step,
)

_H, _B, _F = torch.float16, torch.bfloat16, torch.float32
_WARPS = 64  # of a multiprocessor


@dataclass(frozen=True)
class Candidates:
    """Of one choice.

    Attributes:
        key: as ``tuned.keys`` gives it.
        values: beside the default.
        works: that it is measured by; the sum of their shares of the default's times decides.
    """

    key: str
    values: tuple[Any, ...]
    works: tuple[Work, ...]


def _both(name: str, N: int, prepare: Prepare) -> tuple[Work, ...]:
    """For both vocabularies."""
    return tuple(_work(name, N, V, prepare) for V in (SMOLLM2, LLAMA3))


def _work(name: str, N: int, V: int, prepare: Prepare) -> Work:
    return Work(f"{name}, N {N:,}, V {V:,}", N, V, prepare)


def _many_and_few(name: str, N: int, prepare: Prepare) -> tuple[Work, ...]:
    """Beside them few rows, which are split over programs."""
    return (*_both(name, N, prepare), _work(name, BATCH, LLAMA3, prepare))


def _rows(default: Config, vectors: tuple[int, ...]) -> tuple[Config, ...]:
    tried = (Config(*three) for three in product(vectors, (4, 8, 16), (2, 4, 8)))
    return tuple(
        config
        for config in tried
        if config != default
        and config.warps * config.programs <= _WARPS
        and config.vectors * config.warps < 32
    )


def _passes(default: Config, vectors: tuple[int, ...], most: int) -> tuple[Config, ...]:
    """Of the kernel whose programs each hold on to a row: all warps of a multiprocessor together."""
    tried = (Config(*three) for three in product(vectors, (8, 16, 32), (1, 2)))
    return tuple(
        config
        for config in tried
        if config != default
        and config.warps * config.programs in (16, 32)
        # Twice as many warps have half of the registers.
        and config.vectors * config.warps * config.programs <= most
    )


def _tiles(default: TileConfig, *, draws: bool = False) -> tuple[TileConfig, ...]:
    """Around a default that fills the registers: nothing that needs more of them for a thread."""
    d = default
    tried = [replace(d, stages=d.stages + 1), replace(d, stages=d.stages - 1)]
    tried += [replace(d, group=8), replace(d, group=32)]
    if d.ids > 64:
        narrow = replace(d, ids=d.ids // 2, slices=max(1, d.slices // 2))
        tried += [narrow, replace(narrow, stages=d.stages + 1)]
    if d.rows > 64 and d.ids <= 128 and not draws:
        tried += [replace(d, rows=d.rows // 2)]
    if d.warps == 8 and d.ids > 64:
        tried += [replace(d, ids=d.ids // 2, slices=max(1, d.slices // 2), warps=4)]
    return tuple(tile for tile in tried if tile.stages >= 2)


def _samples(default: BlockConfig) -> tuple[BlockConfig, ...]:
    tried = (BlockConfig(*three) for three in product((1024, 2048, 4096), (4, 8), (4, 8, 16)))
    return tuple(config for config in tried if config != default)


def _filters(default: FilterConfig) -> tuple[FilterConfig, ...]:
    tried = (
        replace(default, block=block, warps=warps, programs=programs)
        for block, warps, programs in product((512, 1024, 2048), (4, 8), (2, 4, 8))
    )
    return tuple(config for config in tried if config != default)


# A frozen language model beside an auxiliary one.
_SMALL, _LARGE = (576, 256), (4096, 512)
_ODD = (584, 264)  # no multiples of a tile's width
_ALL = SamplingParams(0.8, top_k=50, top_p=0.9, min_p=0.01)
_KINDS = {
    "half": Heads(_SMALL, (_B, _B)),
    "parts": Heads(_SMALL, (_B, _B), hidden=_F),
    "mirrored": Heads(_SMALL, (_F, _F), hidden=_B),
    # The package's own recipe: a frozen model of 16 bits, float32 states, an auxiliary of float32.
    "split": Heads(_SMALL, (_B, _F), hidden=_F),
}


def _loss_of(kind: str, crowded: bool, accumulators: int) -> tuple[Work, ...]:
    # Two accumulators: of soft caps, or, crowded, of statistics.
    pointer, capped = crowded and accumulators == 1, not crowded and accumulators == 2
    heads = replace(_KINDS[kind], pointer=pointer, softcap=20.0 if capped else None)
    if kind == "split":  # which is crowded by odd widths alone; its pointer finds room
        heads = replace(heads, widths=_ODD if crowded else _SMALL, pointer=accumulators == 1)
    works = [(heads, SMOLLM2, ROWS)]
    if kind == "half" and not crowded:
        works.append((replace(heads, widths=_LARGE), LLAMA3, ROWS // 4))
    name = f"loss of {kind} heads" + (" beside a pointer" if heads.pointer else "")
    return tuple(
        Work(
            f"{name}, {'+'.join(map(str, its.widths))}, N {N:,}, V {V:,}",
            N,
            V,
            heads_loss(its, stats=accumulators == 2 and crowded),
        )
        for its, V, N in works
    )


def _draw_of(kind: str, crowded: bool) -> tuple[Work, ...]:
    heads = replace(_KINDS[kind], widths=_ODD) if crowded else _KINDS[kind]
    name = f"draw from {kind} heads{', odd widths' if crowded else ''}"
    return _both(name, BATCH, heads_draw(SamplingParams(), heads))


def _scaled(key: str, default: Any) -> tuple[tuple[Any, ...], tuple[Work, ...]] | None:
    """Values and works of a choice; None for one that is not measured."""
    name, *rest = key.split(".")
    terms = {"1": (_B,), "2": (_B, _F), "8": (_B,) * 4}.get(rest[0] if rest else "", ())
    N = ROWS if len(terms) < 4 else ROWS // 4
    vectors = (1, 2, 4) if len(terms) < 4 else (1, 2)
    if name in ("forward", "forward_stats"):
        stats = name == "forward_stats"
        return _rows(default, vectors), _many_and_few(
            f"forward {len(terms)}", N, forward(*terms, stats=stats)
        )
    if name == "backward":
        return _rows(default, vectors), _many_and_few(f"backward {len(terms)}", N, backward(*terms))
    if name in ("fused", "fused_stats"):
        stats = name == "fused_stats"
        most = 64 if len(terms) < 4 else 16 if stats else 32
        return _passes(default, vectors, most), _both(f"one pass {len(terms)}", N, fused(*terms, stats=stats))
    if name == "cache_share":
        works = (*_both("step 1", ROWS, step(_B)), *_both("step 2", ROWS, step(_B, _B)))
        return (0.0, 0.3, 0.75), works
    if name == "recomputed_width":
        widths = ((256, 256), (576, 256), (1024, 512))
        return (0, 256, 1024, 2048), tuple(
            Work(
                f"training of heads {D[0]}+{D[1]}, N 4,096, V {SMOLLM2:,}",
                4096,
                SMOLLM2,
                heads_loss(Heads(D, (_B, _B)), trained=True),
            )
            for D in widths
        )
    if rest and rest[0] in ("tf32", "float"):
        # PyTorch would have to be told that TF32 will do, for these works alone. Products of float32 itself
        # are left to GPUs that are not NVIDIA's.
        return None
    if name == "tiles":
        return _tiles(default), _loss_of(rest[0], rest[2] == "crowded", int(rest[1]))
    if name == "draw_tiles" and rest[1] == "1":
        return _tiles(default, draws=True), _draw_of(rest[0], rest[2] == "crowded")
    if name == "sample":
        works = (
            *_both("draw", BATCH, draw(SamplingParams(), _B, _B)),
            *_both("draw", 1, draw(SamplingParams(), _B, _B)),
        )
        return _samples(default), works
    if name == "filter":
        return _filters(default), (
            *_both("filtered draw", BATCH, draw(_ALL, _B, _B)),
            *_both("filtered draw", 1, draw(_ALL, _B, _B)),
        )
    return None


_FIRST = (
    "forward.2", "backward.2", "fused.2", "cache_share", "tiles.half.1.roomy", "tiles.split.1.roomy",
    "tiles.parts.1.roomy", "draw_tiles.split.1.roomy", "draw_tiles.half.1.roomy", "filter", "sample",
    "recomputed_width", "forward.1", "backward.1", "fused.1", "tiles.half.1.crowded",
)  # fmt: skip


def table(configs: Configs) -> Iterator[Candidates]:
    """Every choice that is measured, in order.

    Args:
        configs: the defaults.
    """
    defaults = keys(configs)
    for key in (*_FIRST, *(key for key in defaults if key not in _FIRST)):
        its = _scaled(key, defaults[key])
        if its is not None:
            yield Candidates(key, *its)
