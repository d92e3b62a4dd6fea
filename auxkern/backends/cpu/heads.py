"""Sums of output heads on a CPU: native products by segments of the vocabulary."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auxkern.backends.cpu import library
from auxkern.ops.registry import Entries, HeadRows, SegmentGradients, Segments

IDS = 1024  # of a segment: AUXKERN_HEADS_IDS
MAX_HEADS = 8
_GRANULE = 16  # of the rows' stride


def refusal(heads: Sequence[HeadRows]) -> str | None:
    """Why no kernel takes this sum of heads; None if one does."""
    if len(heads) > MAX_HEADS:
        return f"there are {len(heads)} heads; kernels take {MAX_HEADS} at most"
    for head in heads:
        if head.softcap:
            return "a soft cap needs each head's logits apart"
        if head.weight.stride(1) != 1 or head.weight.shape[1] == 0:
            return "a weight's rows are not contiguous"
        if any(t.dtype not in library.DTYPES for t in (head.hidden, head.weight)):
            return f"there are no kernels for {head.hidden.dtype} and {head.weight.dtype}"
    return None


def e_size(C: int, V: int) -> int:
    """Elements of the (V, stride) exponentials of C rows."""
    return V * _stride(C)


def _stride(C: int) -> int:
    return -(-C // _GRANULE) * _GRANULE


@dataclass(frozen=True)
class _Kept:
    """What the kernels read again in a backward call."""

    heads: ctypes.Array[library.Head]
    rows: library.HeadRows
    V: int
    back: list[Tensor | None]  # (S, D, stride)
    weights: list[Tensor]
    scales: list[float]
    target: Tensor
    tensors: list[Tensor]  # whose memory the structures point to


def _float32(*shape: int) -> Tensor:
    # Said in full: the program's default dtype and device may be others.
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def forward(
    native: ctypes.CDLL,
    execution: library.Execution,
    heads: list[HeadRows],
    entries: Entries,
    target: Tensor,
    live: Tensor | None,
    V: int,
    want_back: list[bool],
    e: Tensor | None,
) -> Segments:
    """``BackendWithSegments.segments_forward``."""
    C, S = target.shape[0], -(-V // IDS)
    stride = _stride(C)
    maximum, total, z_target = _float32(S, stride), _float32(S, stride), _float32(C).fill_(-torch.inf)
    by_id, order = target.sort(stable=True)
    elsewhere = int(torch.searchsorted(by_id, 0))  # NO_TARGET comes first
    by_id, order = by_id[elsewhere:], order[elsewhere:]
    tensors = [by_id, order, entries.ids, entries.rows, entries.values]
    back: list[Tensor | None] = []
    listed = (library.Head * len(heads))()
    for given, head, wanted in zip(heads, listed, want_back, strict=True):
        hidden = given.hidden.float().contiguous()
        bias = None if given.bias is None else given.bias[:V].float().contiguous()
        back.append(_float32(S, given.hidden.shape[1], stride) if wanted else None)
        tensors += [hidden, given.weight, *(t for t in (bias, back[-1]) if t is not None)]
        head.hidden, head.weight = hidden.data_ptr(), given.weight.data_ptr()
        head.bias, head.back = _address(bias), _address(back[-1])
        head.weight_stride, head.D = given.weight.stride(0), given.weight.shape[1]
        head.dtype, head.scale = library.DTYPES[given.weight.dtype], given.scale
    rows = library.HeadRows(C=C, stride=stride)
    rows.targets = library.Entries(by_id.numel(), by_id.data_ptr(), order.data_ptr())
    rows.sparse = library.Entries(entries.ids.numel(), entries.ids.data_ptr(), entries.rows.data_ptr())
    rows.values, rows.live, rows.e = entries.values.data_ptr(), _address(live), _address(e)
    rows.segment_max, rows.segment_sum = maximum.data_ptr(), total.data_ptr()
    rows.z_target = z_target.data_ptr()
    tensors += [t for t in (live, e, maximum, total, z_target) if t is not None]
    library.check(native.auxkern_heads_forward(listed, len(listed), rows, V, execution))
    weights, scales = [head.weight for head in heads], [head.scale for head in heads]
    kept = _Kept(listed, rows, V, back, weights, scales, target, tensors)
    return Segments(maximum[:, :C], total[:, :C], z_target, kept)


def backward(
    native: ctypes.CDLL,
    execution: library.Execution,
    segments: Segments,
    row_max: Tensor,
    exp_coefficient: Tensor,
    target_gradient: Tensor,
    gradients: SegmentGradients,
) -> tuple[list[Tensor | None], Tensor | None]:
    """``BackendWithSegments.segments_backward``."""
    kept = segments.kept
    C, stride = kept.rows.C, kept.rows.stride
    coefficient = _float32(segments.maximum.shape[0], stride)
    coefficient[:, C:] = 0
    # A row without gradient may hold NaN, and NaN times 0 is not 0.
    shares = exp_coefficient * (segments.maximum.double() - row_max).exp()
    coefficient[:, :C] = torch.where(exp_coefficient == 0, 0.0, shares)
    at_target = target_gradient.float()
    d_values = _float32(kept.rows.sparse.count) if gradients.want_values else None
    for head, d_weight, d_bias in zip(kept.heads, gradients.d_weight, gradients.d_bias, strict=True):
        head.d_weight, head.d_bias = _address(d_weight), _address(d_bias)
    request = library.HeadsGradient(
        coefficient.data_ptr(), at_target.data_ptr(), _address(d_values), gradients.accumulate
    )
    if d_values is not None or any(d is not None for d in (*gradients.d_weight, *gradients.d_bias)):
        status = native.auxkern_heads_backward(
            kept.heads, len(kept.heads), kept.rows, kept.V, request, execution
        )
        library.check(status)
    found: list[Tensor | None] = []
    for back, weight, scale in zip(kept.back, kept.weights, kept.scales, strict=True):
        found.append(None if back is None else _d_hidden(back, coefficient, at_target, weight, scale, kept))
    return found, d_values


def _d_hidden(
    back: Tensor, coefficient: Tensor, at_target: Tensor, weight: Tensor, scale: float, kept: _Kept
) -> Tensor:
    """(C, D): the segments' shares, and the target's."""
    total = back[0] * coefficient[0]
    for share, factor in zip(back[1:], coefficient[1:], strict=True):
        total.addcmul_(share, factor)
    d_hidden = total[:, : kept.rows.C].T
    if kept.rows.targets.count < kept.rows.C:
        here = (kept.target >= 0).nonzero()[:, 0]
        d_hidden = d_hidden.contiguous()
        d_hidden[here] += at_target[here, None] * weight[kept.target[here]].float()
    else:
        d_hidden = d_hidden.addcmul(at_target[:, None], weight[kept.target].float())
    return d_hidden.mul_(scale)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
