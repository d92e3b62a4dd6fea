"""Cross-entropy of sums with output heads and sparse terms: the logits are never whole.

Three ways to it, by what a backend takes: by segments of the vocabulary (``head_segments``), with
logits made by the backend (``head_chunks``), or by chunks of logits in a buffer (``logit_chunks``).
The gradient is made in the forward pass for the incoming gradient that is expected. If another one
comes, the first two, whose gradients are float32, multiply them: whatever comes is a multiple of
what was expected. The third computes the chunks again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from auxkern.core.checks import check_sparse_ids
from auxkern.core.loss import row_dtype, row_loss
from auxkern.ops import head_chunks, head_segments, logit_chunks
from auxkern.ops.derivatives import refuse_second_derivatives
from auxkern.ops.library import check_target_range, loaded
from auxkern.ops.parts import HEAD, HEAD_WITH_BIAS, LOGITS, SPARSE, TENSORS, Part, empty, flat_parts
from auxkern.ops.registry import HeadRows, Rows
from auxkern.ops.torch_ops import implements


def _empty_gradients(
    tensors: list[Tensor], parts: list[Part], wanted: list[int], float32: bool
) -> dict[int, Tensor]:
    """Where gradients are collected: weights and biases in float32, over all chunks; the rest by row.

    Weights and biases are not filled, see ``_clear``; the rest is 0, which ignored rows stay.
    """
    dtype = row_dtype(tensors)
    gradients: dict[int, Tensor] = {}
    for part in parts:
        for i in range(len(part.tensors)):
            index = part.first + i
            if index not in wanted:
                continue
            whole = part.kind in (HEAD, HEAD_WITH_BIAS) and i > 0
            like = tensors[index]
            shape = like.shape if whole else (like.shape[:-1].numel(), like.shape[-1])
            made = empty(like.shape, dtype if whole or float32 else like.dtype, like.device)
            gradients[index] = (made if whole else made.zero_()).view(shape)
    return gradients


def _clear(parts: list[Part], gradients: dict[int, Tensor], first_id: int) -> None:
    """0 in the gradients of weights and biases, from ``first_id`` on."""
    for part in parts:
        for i in range(1, len(part.tensors)):
            if part.kind in (HEAD, HEAD_WITH_BIAS) and part.first + i in gradients:
                gradients[part.first + i][first_id:].zero_()


torch.library.define(
    "auxkern::linear_cross_entropy",
    "(Tensor[] tensors, int[] kinds, Tensor target, Tensor? row_weight, float[] scales, float[] softcaps, "
    "SymInt vocab_size, int ignore_index, float label_smoothing, float z_loss, bool want_stats, "
    "int[] wanted, int chunk_rows, str backend, bool float32_gradients=False) "
    "-> (Tensor nll, Tensor lse, Tensor smooth, Tensor argmax, Tensor term_nll, Tensor[] gradients)",
)


@implements("auxkern::linear_cross_entropy")
def _linear_cross_entropy(
    tensors: list[Tensor],
    kinds: list[int],
    target: Tensor,
    row_weight: Tensor | None,
    scales: list[float],
    softcaps: list[float],
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_stats: bool,
    wanted: list[int],
    chunk_rows: int,
    backend: str,
    float32_gradients: bool = False,
) -> tuple[Any, ...]:
    parts = flat_parts(tensors, kinds, scales, softcaps)
    gradients = _empty_gradients(tensors, parts, wanted, float32_gradients)
    outputs = _empty_outputs(tensors, kinds, target, label_smoothing > 0, want_stats)
    for output in outputs:
        output.zero_()
    outputs[3].fill_(-1)
    floats = [t for t in tensors if t.is_floating_point()]
    kernel = loaded(backend, floats) if target.numel() else None
    options = (vocab_size, ignore_index, label_smoothing, z_loss, want_stats)
    inputs = head_inputs(kernel, parts, gradients)
    if inputs:
        _clear(parts, gradients, 0)
        size = chunk_rows or head_chunks.chunk_rows(vocab_size, [head.head for head in inputs])
        chunks = _chunks(tensors, kinds, target, vocab_size, ignore_index, size)
        for rows, found in head_chunks.rows_and_gradients(
            kernel, inputs, target, row_weight, chunks, *options
        ):
            _store(outputs, rows, found)
        return *outputs, _as_inputs(tensors, wanted, gradients, float32_gradients)
    separate = want_stats or label_smoothing > 0
    segmented = None if separate else segment_inputs(kernel, parts, gradients)
    rows_at_a_time = chunk_rows or (head_segments.chunk_rows(vocab_size) if segmented else None)
    chunks = _chunks(tensors, kinds, target, vocab_size, ignore_index, rows_at_a_time)
    # The first chunk of segments writes, later ones add.
    _clear(parts, gradients, vocab_size if segmented and chunks else 0)
    if segmented:
        longest = max((target[rows].shape[0] for rows in chunks), default=0)
        weight = row_weight if gradients else None
        needed = 0 if weight is None else segmented.backend.segments_e_size(longest, vocab_size)
        e = empty(torch.Size((needed,)), torch.float32, target.device)
        for rows, found in segmented.rows_and_gradients(target, weight, chunks, vocab_size, z_loss, e):
            _store(outputs, rows, found)
        return *outputs, _as_inputs(tensors, wanted, gradients, float32_gradients)
    for rows, found in logit_chunks.rows_and_gradients(
        kernel, parts, target, row_weight, chunks, *options, row_dtype(tensors), gradients
    ):
        _store(outputs, rows, found)
    return *outputs, _as_inputs(tensors, wanted, gradients, float32_gradients)


def _as_inputs(
    tensors: list[Tensor], wanted: list[int], gradients: dict[int, Tensor], float32: bool
) -> list[Tensor]:
    """The gradients shaped like their inputs, and of their dtype unless ``float32``."""
    shaped = [gradients[i].view(tensors[i].shape) for i in wanted]
    return shaped if float32 else [d.to(tensors[i].dtype) for i, d in zip(wanted, shaped, strict=True)]


def _store(outputs: tuple[Tensor, ...], rows: Any, found: Rows) -> None:
    """Put what a backend found of some rows where it belongs."""
    made = (found.nll, found.row_max + found.log_sum, found.smooth, found.argmax, found.term_nll)
    for output, chunk in zip(outputs, made, strict=True):
        if chunk.numel():
            output[..., rows] = chunk.to(output.dtype)


def head_inputs(
    backend: Any, parts: list[Part], gradients: dict[int, Tensor]
) -> list[head_chunks.HeadInputs]:
    """The heads for a backend that makes logits itself; none if it does not, or there are other terms."""
    if not hasattr(backend, "heads_refusal") or any(p.kind not in (HEAD, HEAD_WITH_BIAS) for p in parts):
        return []
    inputs = [_head_of(part, gradients) for part in parts]
    return [] if backend.heads_refusal([i.head for i in inputs]) else inputs


def _head_of(part: Part, gradients: dict[int, Tensor]) -> head_chunks.HeadInputs:
    hidden, weight, *bias = part.tensors
    head = HeadRows(hidden, weight, bias[0] if bias else None, part.scale, part.softcap)
    d_bias = gradients.get(part.first + 2) if bias else None
    return head_chunks.HeadInputs(head, gradients.get(part.first), gradients.get(part.first + 1), d_bias)


def segment_inputs(
    backend: Any, parts: list[Part], gradients: dict[int, Tensor]
) -> head_segments.SegmentInputs | None:
    """Heads and sparse terms for a backend that works by segments; None if it does not take them."""
    if not hasattr(backend, "segments_refusal") or any(p.kind == LOGITS for p in parts):
        return None
    heads = [_head_of(p, gradients) for p in parts if p.kind != SPARSE]
    if not heads or backend.segments_refusal([i.head for i in heads]):
        return None
    sparse = [
        head_segments.SparseInputs(p.tensors[0], p.tensors[1], gradients.get(p.first + 1))
        for p in parts
        if p.kind == SPARSE and p.tensors[0].numel()
    ]
    return head_segments.SegmentInputs(backend, heads, sparse)


def _chunks(
    tensors: list[Tensor],
    kinds: list[int],
    target: Tensor,
    V: int,
    ignore_index: int,
    chunk_rows: int | None,
) -> list[Any]:
    """``logit_chunks.chunks_of_rows``; checks ids where looking at them stops no device."""
    C = chunk_rows or logit_chunks.default_chunk_rows(V, target.device)
    if target.device.type == "cpu":
        check_target_range(target, V, ignore_index)
        _check_sparse_ids(tensors, kinds, V)
    return logit_chunks.chunks_of_rows(target, ignore_index, C)


def _check_sparse_ids(tensors: list[Tensor], kinds: list[int], V: int) -> None:
    first = 0
    for index, kind in enumerate(kinds):
        if kind == SPARSE:
            check_sparse_ids(f"terms[{index}].ids", tensors[first], V)
        first += TENSORS[kind]


@torch.library.register_fake("auxkern::linear_cross_entropy")
def _linear_cross_entropy_fake(
    tensors: list[Tensor],
    kinds: list[int],
    target: Tensor,
    row_weight: Tensor | None,
    scales: list[float],
    softcaps: list[float],
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_stats: bool,
    wanted: list[int],
    chunk_rows: int,
    backend: str,
    float32_gradients: bool = False,
) -> tuple[Any, ...]:
    outputs = _empty_outputs(tensors, kinds, target, label_smoothing > 0, want_stats)
    dtype = row_dtype(tensors) if float32_gradients else None
    return *outputs, [tensors[i].new_empty(tensors[i].shape, dtype=dtype) for i in wanted]


def _empty_outputs(
    tensors: list[Tensor], kinds: list[int], target: Tensor, want_smooth: bool, want_stats: bool
) -> tuple[Tensor, ...]:
    N, dtype = target.shape[0], row_dtype(tensors)
    return (
        target.new_empty(N, dtype=dtype),
        target.new_empty(N, dtype=dtype),
        target.new_empty(N if want_smooth else 0, dtype=dtype),
        target.new_empty(N if want_stats else 0),
        target.new_empty((len(kinds), N) if want_stats else (0, 0), dtype=dtype),
    )


def linear_rows(
    tensors: list[Tensor],
    kinds: list[int],
    scales: list[float],
    softcaps: list[float],
    target: Tensor,
    expected: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_stats: bool,
    chunk_rows: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row, nll, lse, argmax, term_nll) of each row from ``flat_inputs``; row is differentiable.

    ``expected`` (N,), or None: the gradient of row that a backward will bring, but for a common factor.
    """
    formula = (scales, softcaps, vocab_size, ignore_index, label_smoothing, z_loss)
    separate = want_stats or label_smoothing > 0
    rescaled = expected is not None and _makes_logits(backend, tensors, kinds, scales, softcaps, separate)
    if not rescaled and target.device.type != "cpu":
        expected = None  # comparing it with what comes would stop the device
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        settings = (*formula, want_stats, chunk_rows or 0, backend)
        return _LinearCrossEntropyRows.apply(target, expected, rescaled, kinds, *settings, *tensors)
    nll, lse, smooth, argmax, term_nll, _ = torch.ops.auxkern.linear_cross_entropy(
        tensors, kinds, target, None, *formula, want_stats, [], chunk_rows or 0, backend
    )
    return row_loss(nll, lse, smooth, label_smoothing, z_loss), nll, lse, argmax, term_nll


def _makes_logits(
    backend: str,
    tensors: list[Tensor],
    kinds: list[int],
    scales: list[float],
    softcaps: list[float],
    separate: bool,
) -> bool:
    """Whether the backend makes the logits of these terms itself, and gradients that can be rescaled."""
    kernel = loaded(backend, [t for t in tensors if t.is_floating_point()])
    parts = flat_parts(tensors, kinds, scales, softcaps)
    return bool(head_inputs(kernel, parts, {}) or (not separate and segment_inputs(kernel, parts, {})))


def _common_factor(g: Tensor, expected: Tensor) -> Tensor:
    """(1,) f with g = f * expected, found where that is largest; 0 where nothing is expected."""
    if expected.numel() == 0:
        return expected.new_zeros(1)
    row = expected.abs().argmax(keepdim=True)
    largest = expected.gather(0, row)
    return torch.where(largest == 0, 0.0, g.gather(0, row) / largest)


class _LinearCrossEntropyRows(torch.autograd.Function):
    """The loss of each row, and its gradient with respect to hidden states, weights and values."""

    @staticmethod
    def forward(
        ctx: Any,
        target: Tensor,
        expected: Tensor | None,
        rescaled: bool,
        kinds: list[int],
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        want_stats: bool,
        chunk_rows: int,
        backend: str,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        before = len(ctx.needs_input_grad) - len(tensors)
        ctx.wanted = [i for i in range(len(tensors)) if ctx.needs_input_grad[before + i]]
        ctx.before = before
        formula = (scales, softcaps, vocab_size, ignore_index, label_smoothing, z_loss)
        ctx.settings = (kinds, formula, chunk_rows, backend)
        ctx.expected, ctx.rescaled, ctx.ready = expected, rescaled, None
        wanted = [] if expected is None else ctx.wanted
        *rows, gradients = torch.ops.auxkern.linear_cross_entropy(
            tensors, kinds, target, expected, *formula, want_stats, wanted, chunk_rows, backend, rescaled
        )
        ctx.ready = None if expected is None else gradients
        nll, lse, smooth, argmax, term_nll = rows
        row = row_loss(nll, lse, smooth, label_smoothing, z_loss)
        if row is nll:
            row = nll.clone()
        ctx.save_for_backward(target, *tensors)
        ctx.mark_non_differentiable(nll, lse, argmax, term_nll)
        return row, nll, lse, argmax, term_nll

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors[1:]
        with torch.no_grad():
            gradients = _gradients(ctx, g)
        by_index = dict(zip(ctx.wanted, gradients, strict=True))
        found = tuple(by_index.get(i) for i in range(len(tensors)))
        return (None,) * ctx.before + refuse_second_derivatives(found, (g, *tensors))


def _gradients(ctx: Any, g: Tensor) -> list[Tensor]:
    """Of the wanted tensors, for the incoming gradient g (N,)."""
    target, *tensors = ctx.saved_tensors
    kinds, formula, chunk_rows, backend = ctx.settings
    gradients, ctx.ready = ctx.ready, None
    if gradients is not None and ctx.rescaled:
        # Comparing would stop a GPU, whose memory multiplies 20 times as fast as a CPU's.
        if g.device.type != "cpu" or not torch.equal(g, ctx.expected):
            factor = _common_factor(g, ctx.expected)
            gradients = [d.mul_(factor) for d in gradients]
        return [d.to(tensors[i].dtype) for i, d in zip(ctx.wanted, gradients, strict=True)]
    if gradients is not None:
        if torch.equal(g, ctx.expected):
            return gradients
        gradients = None  # freed before others are made
    *_, gradients = torch.ops.auxkern.linear_cross_entropy(
        tensors, kinds, target, g, *formula, False, ctx.wanted, chunk_rows, backend
    )
    return gradients
