"""From checked tensors to the launches that draw tokens, run by dispatch or compiled ahead of time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from auxkern.backends.triton import configs
from auxkern.backends.triton.device.rows import VECTOR_BYTES, as_term
from auxkern.backends.triton.heads_draw.kernels import heads_draw_kernel
from auxkern.backends.triton.heads_loss import launches as heads_loss
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_draw.kernels import (
    adjust_kernel,
    choose_kernel,
    draw_kernel,
    filter_kernel,
    sum_kernel,
)
from auxkern.core.mass import mass_shift
from auxkern.ops.registry import Draws, HeadRows

# Ten rounds of Philox for four ids, two logarithms: per id. Comparisons of a radix search: per id.
_NOISE_FLOPS, _SEARCH_FLOPS = 40, 2 * 8 * 16


class _RowDraws(NamedTuple):
    """``registry.Draws`` as kernels take it."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    seed: Tensor
    position: Tensor
    added_ids: Tensor
    added: Tensor
    bias_ids: Tensor
    bias: Tensor


class _Partial(NamedTuple):
    """What programs that share a row leave for ``choose_kernel``."""

    floats: Tensor  # (5, N, splits) float32
    ids: Tensor  # (N, splits) int32


class _Out(NamedTuple):
    token: Tensor  # (N,) int64
    status: Tensor  # (N,) int32
    logprob: Tensor  # (N,) float32, or nothing


class _Seen(NamedTuple):
    """Ids of each row's prompt and history, each once; the rest are -1."""

    ids: Tensor  # (N, S) int64
    generated: Tensor  # (N, S) int64: how often it is in the history


def sample(
    values: list[Tensor],
    scales: list[float],
    softcaps: list[float],
    V: int,
    draws: Draws,
    want_logprob: bool,
    multiprocessors: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Tokens, statuses and log-probabilities, and the launches that fill them, in order.

    Args:
        multiprocessors: of the device; decides over how many programs a row is split.
    """
    N = draws.temperature.shape[0]
    adjusts, out = _adjusts(draws), _out(draws, want_logprob)
    rows = _row_draws(draws)
    config = configs.SAMPLE
    splits = configs.splits(N, -(-V // config.block), multiprocessors, config)
    summed, constants = _summed(values, scales, softcaps, draws)
    read = N * V * sum(x.element_size() for x in values)
    if draws.plain and not adjusts:
        partial = _partial(draws, splits)
        draw = Launch(
            draw_kernel,
            (N, splits),
            {**summed, "draws": rows, "partial": partial, "N": N, "V": V, "splits": splits},
            {**constants, "LOGPROB": want_logprob, "BLOCK": config.block},
            config.warps,
            bytes_moved=read,
            flops=N * V * (_NOISE_FLOPS + 2 * len(values)),
        )
        return (out.token, out.status, out.logprob), [draw, _choose(rows, partial, out)]
    z = draws.seed.new_empty((N, padded(V)), dtype=torch.float32)
    made = Launch(
        sum_kernel,
        (N, splits),
        {**summed, "z_out": z, "V": V, "stride": z.shape[1], "splits": splits},
        {**constants, "BLOCK": config.block},
        config.warps,
        bytes_moved=read + 4 * N * V,
        flops=2 * N * V * len(values),
    )
    return (out.token, out.status, out.logprob), [made, *_from_logits(z, rows, draws, V, out)]


def sample_heads(
    heads: list[HeadRows], V: int, draws: Draws, want_logprob: bool, precision: str
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """As ``sample``, from output heads; ``precision`` of products of float32: "ieee" or "tf32"."""
    N = draws.temperature.shape[0]
    out, rows = _out(draws, want_logprob), _row_draws(draws)
    summed = heads_loss.heads_sum(heads, draws.seed, V, False, precision)
    config = configs.draw_tiles(summed.config, N)
    # No draw looks at a target.
    arguments = {name: value for name, value in summed.arguments.items() if name != "target"}
    write = not draws.plain or _adjusts(draws)
    tiles = padded(V) // config.ids if write else -(-V // config.ids)
    blocks = -(-N // config.rows)
    partial = _partial(draws, 0 if write else tiles)
    z = draws.seed.new_empty((N, padded(V)) if write else (0, 0), dtype=torch.float32)
    products = 2 * N * V * summed.width
    made = Launch(
        heads_draw_kernel,
        (blocks * tiles,),
        arguments | {"draws": rows, "partial": partial, "z_out": z, "row_blocks": blocks, "tiles": tiles},
        summed.constants
        | {
            "LOGPROB": want_logprob,
            "WRITE": write,
            "BLOCK_N": config.rows,
            "BLOCK_V": config.ids,
            "BLOCK_D": config.width,
            "GROUP": config.group,
        },
        config.warps,
        bytes_moved=heads_loss.input_bytes(summed) + (4 * N * V if write else 0),
        flops=N * V * (2 if write else _NOISE_FLOPS) + (0 if summed.half else products),
        num_stages=config.stages,
        tensor_flops=products if summed.half else 0,
    )
    rest = _from_logits(z, rows, draws, V, out) if write else [_choose(rows, partial, out)]
    return (out.token, out.status, out.logprob), [made, *rest]


def padded(V: int) -> int:
    """Columns of written logits: whole tiles, filled with -inf, so that no reader needs a mask."""
    return -(-V // configs.SAMPLE.block) * configs.SAMPLE.block


def _adjusts(draws: Draws) -> bool:
    return any(t.shape[1] for t in (draws.prompt, draws.history, draws.added_ids, draws.bias_ids))


def _out(draws: Draws, want_logprob: bool) -> _Out:
    N = draws.seed.shape[0]
    return _Out(
        draws.seed.new_empty(N),
        draws.seed.new_empty(N, dtype=torch.int32),
        draws.seed.new_empty(N if want_logprob else 0, dtype=torch.float32),
    )


def _partial(draws: Draws, parts: int) -> _Partial:
    N = draws.seed.shape[0]
    return _Partial(
        draws.seed.new_empty((5, N, parts), dtype=torch.float32),
        draws.seed.new_empty((N, parts), dtype=torch.int32),
    )


def _choose(rows: _RowDraws, partial: _Partial, out: _Out) -> Launch:
    N, parts = partial.ids.shape
    return Launch(
        choose_kernel,
        (N,),
        {"draws": rows, "partial": partial, "out": out, "N": N, "splits": parts},
        {"LOGPROB": out.logprob.numel() > 0, "LANES": configs.MAX_SPLITS},
        1,
        bytes_moved=24 * N * parts,
        flops=8 * N * parts,
    )


def _from_logits(z: Tensor, rows: _RowDraws, draws: Draws, V: int, out: _Out) -> list[Launch]:
    """Penalties, filters and the draw from (N, stride) float32 logits, -inf from V on."""
    N, stride = z.shape
    last = Launch(
        filter_kernel,
        (N,),
        {"z_in": z, "draws": rows, "out": out, "V": V, "stride": stride, "shift": mass_shift(V)},
        {"LOGPROB": out.logprob.numel() > 0, "BLOCK": configs.FILTER.block},
        configs.FILTER.warps,
        bytes_moved=4 * N * V,
        flops=N * V * (_NOISE_FLOPS + _SEARCH_FLOPS),
    )
    return [_adjust(z, rows, draws, V, stride), last] if _adjusts(draws) else [last]


def _row_draws(draws: Draws) -> _RowDraws:
    return _RowDraws(*(getattr(draws, name).contiguous() for name in _RowDraws._fields))


def _summed(
    values: list[Tensor], scales: list[float], softcaps: list[float], draws: Draws
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of a kernel that adds up the terms."""
    unused = draws.temperature
    arguments = {
        "terms": tuple(map(as_term, values, scales, softcaps)),
        "row_scales": tuple(unused if scale is None else scale for scale in draws.row_scales),
    }
    return arguments, {
        "ALIGNED": tuple(_is_aligned(x) for x in values),
        "UNIT": tuple(x.stride(2) == 1 for x in values),
        "CAPPED": tuple(softcap > 0 for softcap in softcaps),
        "SCALED": tuple(scale is not None for scale in draws.row_scales),
    }


def _is_aligned(x: Tensor) -> bool:
    """Whether every row begins at a 16-byte boundary."""
    starts = [x.data_ptr()]
    starts += [x.stride(i) * x.element_size() for i in (0, 1) if x.shape[i] > 1]
    return x.stride(2) == 1 and all(start % VECTOR_BYTES == 0 for start in starts)


def _adjust(z: Tensor, rows: _RowDraws, draws: Draws, V: int, stride: int) -> Launch:
    seen = _seen(draws.prompt, draws.history)
    widths = draws.added_ids.shape[1] + draws.bias_ids.shape[1] + seen.ids.shape[1]
    return Launch(
        adjust_kernel,
        (z.shape[0],),
        {
            "z_out": z,
            "draws": rows,
            "seen": seen,
            "V": V,
            "stride": stride,
            "added_width": draws.added_ids.shape[1],
            "bias_width": draws.bias_ids.shape[1],
            "seen_width": seen.ids.shape[1],
        },
        {"BLOCK": configs.ADJUST.block},
        configs.ADJUST.warps,
        bytes_moved=20 * z.shape[0] * widths,
        flops=6 * z.shape[0] * widths,
    )


def _seen(prompt: Tensor, history: Tensor) -> _Seen:
    """Each id once, and how often it was generated, by sorting; nothing here looks at the numbers."""
    ids = torch.cat([prompt, history], 1).sort(dim=1).values
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    generated = history.sort(dim=1).values
    last = torch.searchsorted(generated, ids, right=True)
    times = last - torch.searchsorted(generated, ids)
    return _Seen(torch.where(again, -1, ids).contiguous(), times.contiguous())
