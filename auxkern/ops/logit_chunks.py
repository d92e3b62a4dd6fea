"""Chunks of rows whose logits are written to a buffer: for every sum of terms, on every backend.

For C rows the heads' products are added up in one float32 buffer (C, V), a backend's row kernel turns
the buffer into the rows' losses and, in place, into its own gradient, and two products per head bring
that back to hidden states and weights. Nothing else has V columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from auxkern.core.loss import gradient_coefficients
from auxkern.core.terms import Head
from auxkern.ops.parts import HEAD, HEAD_WITH_BIAS, LOGITS, SPARSE, Part, empty
from auxkern.ops.registry import Rows

_CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}
_CONVERTED_IDS = 8192  # rows of a half-precision weight that are converted at a time on a CPU


def default_chunk_rows(V: int, device: torch.device) -> int:
    """Rows of a (C, V) float32 buffer of about 48 MiB on a CPU and 512 MiB on a GPU, 16 at least.

    Large enough for the products to run near their full rate: a library repacks the weight for every
    chunk, and every chunk reads and writes the weight's gradient once.
    """
    budget = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"])
    return max(16, budget // (4 * V) // 16 * 16)


def chunks_of_rows(target: Tensor, ignore_index: int, C: int) -> list[Any]:
    """The rows of each chunk of C: slices, or indices where ignored rows are left out.

    Finding the ignored rows would stop a GPU, so there they pass through, with zero gradients.
    """
    N = target.shape[0]
    if target.device.type == "cpu":
        counts = (target != ignore_index).nonzero()[:, 0]
        if counts.shape[0] < N:
            return list(counts.split(C)) if counts.numel() else []
    return [slice(n, min(n + C, N)) for n in range(0, N, C)]


@dataclass
class _Summand:
    """What the row kernel takes for one term: ``scale * softcap(sum of factor * part)``."""

    scale: float
    softcap: float
    parts: list[tuple[Part, float]] = field(default_factory=list)

    @property
    def logits(self) -> Tensor | None:
        """The logits themselves where they exist already."""
        part = self.parts[0][0]
        return part.tensors[0] if part.kind == LOGITS else None


def _summands(parts: list[Part], separate: bool) -> list[_Summand]:
    """One summand for all heads and sparse terms that simply add up, unless terms are asked apart."""
    shared = _Summand(1.0, 0.0)
    listed = []
    for part in parts:
        if separate or part.kind == LOGITS or part.softcap:
            listed.append(_Summand(part.scale, part.softcap, [(part, 1.0)]))
            continue
        if not shared.parts:
            listed.append(shared)
        shared.parts.append((part, part.scale))
    return listed


def _add_product(z: Tensor, a: Tensor, b: Tensor, factor: float, keep: bool, kernel: Any = None) -> None:
    """z (C, V) = factor * a (C, D) @ b (V, D).T, plus what z held if ``keep``; rounded to z's dtype only.

    A backend's ``kernel`` makes the product if it takes it.
    """
    beta = 1 if keep else 0
    if factor == 0:
        # A library skips what is multiplied by 0; elsewhere 0 * inf is NaN.
        a, factor = a * 0.0, 1.0
    if hasattr(kernel, "linear") and kernel.linear_refusal(z, b) is None:
        a = a.to(z.dtype)
        kernel.linear(a if factor == 1.0 else a * factor, b, None, z, keep)
    elif a.dtype == b.dtype == z.dtype:
        z.addmm_(a, b.T, beta=beta, alpha=factor)
    elif a.is_cuda and a.dtype == b.dtype:
        product = torch.mm(a, b.T, out_dtype=z.dtype)
        torch.add(z if keep else 0, product, alpha=factor, out=z)
    else:
        a = a.to(z.dtype)
        for v in range(0, b.shape[0], _CONVERTED_IDS):
            block = b[v : v + _CONVERTED_IDS].to(z.dtype)
            z[:, v : v + _CONVERTED_IDS].addmm_(a, block.T, beta=beta, alpha=factor)


def add_head(
    z: Tensor, head: Head, rows: slice, V: int, factor: float, *, keep: bool, kernel: Any = None
) -> None:
    """z (C, V) = factor * (hidden @ weight.T + bias) of these rows, plus what z held if ``keep``."""
    hidden = head.hidden.reshape(head.leading.numel(), head.hidden.shape[-1])
    _add_product(z, hidden[rows], head.weight[:V], factor, keep, kernel)
    if head.bias is not None:
        z.add_(head.bias[:V], alpha=factor)


def _fill(z: Tensor, summand: _Summand, rows: Any, kernel: Any) -> None:
    """z (C, V) = the summand's logits for these rows."""
    V = z.shape[1]
    keep = False
    for part, factor in sorted(summand.parts, key=lambda p: p[0].kind == SPARSE):
        if part.kind == SPARSE:
            ids, values = part.tensors
            if not keep:
                z.zero_()
            z.scatter_add_(1, ids[rows].long(), factor * values[rows].to(z.dtype))
        else:
            hidden, weight, *bias = part.tensors
            _add_product(z, hidden[rows], weight[:V], factor, keep, kernel)
            for b in bias:
                z.add_(b[:V], alpha=factor)
        keep = True


def _add_gradients(dz: Tensor, summand: _Summand, rows: Any, gradients: dict[int, Tensor]) -> None:
    """Bring dz (C, V), the gradient of a summand's logits, to the inputs that want one."""
    V = dz.shape[1]
    for part, factor in summand.parts:
        d_first, d_second = gradients.get(part.first), gradients.get(part.first + 1)
        if part.kind == LOGITS and d_first is not None:
            d_first[rows] = dz
        elif part.kind == SPARSE and d_second is not None:
            ids = part.tensors[0][rows].long()
            d_second[rows] = (factor * dz.gather(1, ids)).to(d_second.dtype)
        elif part.kind in (HEAD, HEAD_WITH_BIAS):
            hidden, weight = part.tensors[:2]
            if d_first is not None:
                back = torch.empty((dz.shape[0], hidden.shape[1]), dtype=dz.dtype, device=dz.device)
                _product_back(back, dz, weight[:V], factor)
                d_first[rows] = back.to(d_first.dtype)
            if d_second is not None:
                d_second[:V].addmm_(dz.T, hidden[rows].to(dz.dtype), alpha=factor)
            if part.first + 2 in gradients and part.kind == HEAD_WITH_BIAS:
                gradients[part.first + 2][:V].add_(dz.sum(0), alpha=factor)


def _product_back(out: Tensor, dz: Tensor, weight: Tensor, factor: float) -> None:
    """out (C, D) = factor * dz (C, V) @ weight (V, D), in float32 whatever the weight's dtype."""
    if weight.dtype == out.dtype:
        torch.mm(dz, weight, out=out).mul_(factor)
        return
    out.zero_()
    for v in range(0, weight.shape[0], _CONVERTED_IDS):
        block = weight[v : v + _CONVERTED_IDS].to(out.dtype)
        out.addmm_(dz[:, v : v + _CONVERTED_IDS], block, alpha=factor)


def rows_of_logits(values: Tensor, rows: Any) -> Tensor:
    """(1, C, V) of (outer, inner, V): a view for a range of rows where there is one outer index."""
    if values.shape[0] == 1:
        return values[:, rows]
    n = torch.arange(values.shape[0] * values.shape[1], device=values.device)[rows]
    return values[n // values.shape[1], n % values.shape[1]][None]


def _row_kernel(
    backend: Any,
    values: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    summands: list[_Summand],
    V: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_stats: bool,
    wanted: list[int],
    in_place: list[bool],
) -> tuple[Any, list[Tensor]]:
    """One chunk through a backend: its rows and, if there is a weight, the gradients of ``wanted``."""
    scales, softcaps = [s.scale for s in summands], [s.softcap for s in summands]
    smooth = label_smoothing > 0
    if weight is None or not wanted:
        rows = backend.cross_entropy_forward(
            values, target, scales, softcaps, V, ignore_index, smooth, want_stats
        )
        return rows, []
    if hasattr(backend, "cross_entropy_forward_gradient"):
        out = [values[i] if own else None for i, own in zip(wanted, in_place, strict=True)]
        settings = (scales, softcaps, V, ignore_index, label_smoothing, z_loss, want_stats, wanted)
        return backend.cross_entropy_forward_gradient(values, target, weight, *settings, out)
    rows = backend.cross_entropy_forward(
        values, target, scales, softcaps, V, ignore_index, smooth, want_stats
    )
    coefficients = gradient_coefficients(
        weight, rows.nll, rows.row_max, rows.log_sum, target != ignore_index, label_smoothing, z_loss, V
    )
    return rows, backend.cross_entropy_backward(
        values, target, rows.row_max, *coefficients, scales, softcaps, V, wanted
    )


def rows_and_gradients(
    kernel: Any,
    parts: Sequence[Part],
    target: Tensor,
    row_weight: Tensor | None,
    chunks: Sequence[Any],
    V: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_stats: bool,
    dtype: torch.dtype,
    gradients: dict[int, Tensor],
) -> list[tuple[Any, Rows]]:
    """(rows, what they hold) of each chunk; fills ``gradients`` if there is a weight.

    Args:
        kernel: a ``registry.Backend``.
        chunks: slices or indices of rows.
        dtype: of the buffers.
        gradients: by place in the flat list of tensors, 0 at the start.
    """
    summands = _summands(list(parts), separate=want_stats)
    asking = _asking(summands, gradients)
    in_place = [summands[i].logits is None for i in asking]
    buffers = _buffers(summands, target, chunks, V, dtype)
    settings = (summands, V, ignore_index, label_smoothing, z_loss, want_stats, asking, in_place)
    found = []
    for rows in chunks:
        y = target[rows]
        values = _values(summands, buffers, rows, y.shape[0], kernel)
        weight = None if row_weight is None else row_weight[rows]
        made, dz = _row_kernel(kernel, values, y, weight, *settings)
        found.append((rows, made))
        for i, d in zip(asking, dz, strict=False):
            _add_gradients(d[0], summands[i], rows, gradients)
    return found


def add_gradients(
    kernel: Any,
    parts: Sequence[Part],
    target: Tensor,
    coefficients: Sequence[Tensor],
    chunks: Sequence[Any],
    V: int,
    gradients: dict[int, Tensor],
) -> None:
    """Fills ``gradients`` from what the rows' logits add up to.

    Args:
        target: (N,) int64 in [0, V), or another id where the row's target is none of these.
        coefficients: (N,) row_max, exp_coefficient, constant and target_gradient, of the buffers' dtype.
        gradients: by place in the flat list of tensors, 0 at the start.
    """
    summands = _summands(list(parts), separate=False)
    asking = _asking(summands, gradients)
    buffers = _buffers(summands, target, chunks, V, coefficients[0].dtype)
    scales, softcaps = [s.scale for s in summands], [s.softcap for s in summands]
    for rows in chunks:
        y = target[rows].contiguous()
        values = _values(summands, buffers, rows, y.shape[0], kernel)
        of_rows = [c[rows].contiguous() for c in coefficients]
        dz = kernel.cross_entropy_backward(values, y, *of_rows, scales, softcaps, V, asking)
        for i, d in zip(asking, dz, strict=True):
            _add_gradients(d[0], summands[i], rows, gradients)


def _asking(summands: Sequence[_Summand], gradients: dict[int, Tensor]) -> list[int]:
    """The summands that have a tensor whose gradient is wanted."""
    return [
        i
        for i, s in enumerate(summands)
        if any(part.first + k in gradients for part, _ in s.parts for k in range(len(part.tensors)))
    ]


def _buffers(
    summands: Sequence[_Summand], target: Tensor, chunks: Sequence[Any], V: int, dtype: torch.dtype
) -> list[Tensor]:
    """Memory for the logits of the longest chunk, for each summand that has none."""
    shape = torch.Size((max((target[rows].shape[0] for rows in chunks), default=0), V))
    return [empty(shape, dtype, target.device) for s in summands if s.logits is None]


def _values(
    summands: Sequence[_Summand], buffers: Sequence[Tensor], rows: Any, C: int, kernel: Any
) -> list[Tensor]:
    """The summands' logits of a chunk of C rows, as a row kernel takes them."""
    unused = iter(buffers)
    values = []
    for summand in summands:
        logits = summand.logits
        if logits is None:
            z = next(unused)[:C]
            _fill(z, summand, rows, kernel)
            values.append(z[None])
        else:
            values.append(rows_of_logits(logits, rows))
    return values
