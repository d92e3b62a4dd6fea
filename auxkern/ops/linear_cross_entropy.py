"""Cross-entropy of sums with output heads and sparse terms: the logits are never whole.

For each chunk of C rows the heads' products are added up in one float32 buffer (C, V), a backend's
row kernel turns the buffer into the rows' losses and, in place, into its own gradient, and two
products per head bring that back to hidden states and weights. Nothing else has V columns. The
gradient is made in the forward pass for the incoming gradient that is expected; if another one
comes, the chunks are computed again. A backend that makes the logits of heads itself leaves its
gradients in float32: whatever comes is a multiple of what was expected, and they are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from auxkern.ops import head_chunks, head_segments
from auxkern.ops.library import as_rows, check_target_range, loaded
from auxkern.ops.memory import GradientMemory
from auxkern.ops.registry import HeadRows, Rows
from auxkern.ops.rows import gradient_coefficients, refuse_second_derivatives, row_dtype, row_loss
from auxkern.terms import Logits, Sparse, Term

# How a term's tensors stand in the flat list that the operator takes, and how many there are.
LOGITS, HEAD, HEAD_WITH_BIAS, SPARSE = range(4)
_TENSORS = {LOGITS: 1, HEAD: 2, HEAD_WITH_BIAS: 3, SPARSE: 2}
_CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}
_CONVERTED_IDS = 8192  # rows of a half-precision weight that are converted at a time on a CPU


def flat_inputs(terms: Sequence[Term]) -> tuple[list[Tensor], list[int], list[float], list[float]]:
    """The terms as the operator takes them: tensors, kinds, scales, softcaps (0 for none)."""
    tensors: list[Tensor] = []
    kinds, scales, softcaps = [], [], []
    for term in terms:
        tensors.extend(term.tensors.values())
        if isinstance(term, Sparse):
            kinds.append(SPARSE)
            scales.append(1.0)
            softcaps.append(0.0)
            continue
        if isinstance(term, Logits):
            kinds.append(LOGITS)
        else:
            kinds.append(HEAD if term.bias is None else HEAD_WITH_BIAS)
        scales.append(term.scale)
        softcaps.append(term.softcap or 0.0)
    return tensors, kinds, scales, softcaps


def default_chunk_rows(V: int, device: torch.device) -> int:
    """Rows of a (C, V) float32 buffer of about 48 MiB on a CPU and 512 MiB on a GPU, 16 at least.

    Large enough for the products to run near their full rate: a library repacks the weight for every
    chunk, and every chunk reads and writes the weight's gradient once.
    """
    budget = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"])
    return max(16, budget // (4 * V) // 16 * 16)


@dataclass
class _Part:
    """One term's tensors, flattened to rows, and where they stand in the flat list."""

    kind: int
    first: int
    tensors: list[Tensor]
    scale: float
    softcap: float


@dataclass
class _Summand:
    """What the row kernel takes for one term: ``scale * softcap(sum of factor * part)``."""

    scale: float
    softcap: float
    parts: list[tuple[_Part, float]] = field(default_factory=list)

    @property
    def logits(self) -> Tensor | None:
        """The logits themselves where they exist already."""
        part = self.parts[0][0]
        return part.tensors[0] if part.kind == LOGITS else None


def _parts(
    tensors: list[Tensor], kinds: list[int], scales: list[float], softcaps: list[float]
) -> list[_Part]:
    parts = []
    first = 0
    for index, (kind, scale, softcap) in enumerate(zip(kinds, scales, softcaps, strict=True)):
        own = list(tensors[first : first + _TENSORS[kind]])
        if kind == LOGITS:
            own[0] = as_rows(index, own[0])
        elif kind == SPARSE:
            own = [t.reshape(-1, t.shape[-1]) for t in own]
        else:
            own[0] = own[0].reshape(-1, own[0].shape[-1])
        parts.append(_Part(kind, first, own, scale, softcap))
        first += _TENSORS[kind]
    return parts


def _summands(parts: list[_Part], separate: bool) -> list[_Summand]:
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


def _add_product(z: Tensor, a: Tensor, b: Tensor, factor: float, keep: bool) -> None:
    """z (C, V) = factor * a (C, D) @ b (V, D).T, plus what z held if ``keep``; rounded to z's dtype only."""
    beta = 1 if keep else 0
    if a.dtype == b.dtype == z.dtype:
        z.addmm_(a, b.T, beta=beta, alpha=factor)
    elif a.is_cuda and a.dtype == b.dtype:
        product = torch.mm(a, b.T, out_dtype=z.dtype)
        torch.add(z if keep else 0, product, alpha=factor, out=z)
    else:
        a = a.to(z.dtype)
        for v in range(0, b.shape[0], _CONVERTED_IDS):
            block = b[v : v + _CONVERTED_IDS].to(z.dtype)
            z[:, v : v + _CONVERTED_IDS].addmm_(a, block.T, beta=beta, alpha=factor)


def _fill(z: Tensor, summand: _Summand, rows: Any) -> None:
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
            _add_product(z, hidden[rows], weight[:V], factor, keep)
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


def _empty_gradients(
    tensors: list[Tensor], parts: list[_Part], wanted: list[int], float32: bool
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
            shape = tensors[index].shape if whole else (-1, tensors[index].shape[-1])
            like = tensors[index]
            made = _empty(like.shape, dtype if whole or float32 else like.dtype, like.device)
            gradients[index] = (made if whole else made.zero_()).view(shape)
    return gradients


def _clear(parts: list[_Part], gradients: dict[int, Tensor], first_id: int) -> None:
    """0 in the gradients of weights and biases, from ``first_id`` on."""
    for part in parts:
        for i in range(1, len(part.tensors)):
            if part.kind in (HEAD, HEAD_WITH_BIAS) and part.first + i in gradients:
                gradients[part.first + i][first_id:].zero_()


def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one call, in large pages on a CPU."""
    if device.type == "cpu":
        return GradientMemory().empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def _chunk_of_logits(values: Tensor, rows: Any) -> Tensor:
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


torch.library.define(
    "auxkern::linear_cross_entropy",
    "(Tensor[] tensors, int[] kinds, Tensor target, Tensor? row_weight, float[] scales, float[] softcaps, "
    "SymInt vocab_size, int ignore_index, float label_smoothing, float z_loss, bool want_stats, "
    "int[] wanted, int chunk_rows, str backend, bool float32_gradients=False) "
    "-> (Tensor nll, Tensor lse, Tensor smooth, Tensor argmax, Tensor term_nll, Tensor[] gradients)",
)


@torch.library.impl("auxkern::linear_cross_entropy", "default")
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
    parts = _parts(tensors, kinds, scales, softcaps)
    summands = _summands(parts, separate=want_stats)
    gradients = _empty_gradients(tensors, parts, wanted, float32_gradients)
    outputs = _empty_outputs(tensors, kinds, target, label_smoothing > 0, want_stats)
    for output in outputs:
        output.zero_()
    outputs[3].fill_(-1)
    floats = [t for t in tensors if t.is_floating_point()]
    # Who wants a gradient, as positions among the summands.
    asking = [
        i
        for i, s in enumerate(summands)
        if any(part.first + k in gradients for part, _ in s.parts for k in range(len(part.tensors)))
    ]
    kernel = loaded(backend, floats) if target.numel() else None
    inputs = _head_inputs(kernel, parts, gradients)
    if inputs:
        _clear(parts, gradients, 0)
        size = chunk_rows or head_chunks.chunk_rows(vocab_size, [head.head for head in inputs])
        chunks = _chunks(tensors, kinds, target, vocab_size, ignore_index, size)
        options = (vocab_size, ignore_index, label_smoothing, z_loss, want_stats)
        for rows, found in head_chunks.rows_and_gradients(
            kernel, inputs, target, row_weight, chunks, *options
        ):
            _store(outputs, rows, found)
        return *outputs, _as_inputs(tensors, wanted, gradients, float32_gradients)
    separate = want_stats or label_smoothing > 0
    segmented = None if separate else _segment_inputs(kernel, parts, gradients)
    rows_at_a_time = chunk_rows or (head_segments.chunk_rows(vocab_size) if segmented else None)
    chunks = _chunks(tensors, kinds, target, vocab_size, ignore_index, rows_at_a_time)
    # The first chunk of segments writes, later ones add.
    _clear(parts, gradients, vocab_size if segmented and chunks else 0)
    longest = max((target[rows].shape[0] for rows in chunks), default=0)
    if segmented:
        weight = row_weight if gradients else None
        needed = 0 if weight is None else segmented.backend.segments_e_size(longest, vocab_size)
        e = _empty(torch.Size((needed,)), torch.float32, target.device)
        for rows, found in segmented.rows_and_gradients(target, weight, chunks, vocab_size, z_loss, e):
            _store(outputs, rows, found)
        return *outputs, _as_inputs(tensors, wanted, gradients, float32_gradients)
    shape = torch.Size((longest, vocab_size))
    buffers = [_empty(shape, row_dtype(tensors), target.device) for s in summands if s.logits is None]
    for rows in chunks:
        y = target[rows]
        values, unused = [], iter(buffers)
        for summand in summands:
            logits = summand.logits
            if logits is None:
                z = next(unused)[: y.shape[0]]
                _fill(z, summand, rows)
                values.append(z[None])
            else:
                values.append(_chunk_of_logits(logits, rows))
        weight = None if row_weight is None else row_weight[rows]
        in_place = [summands[i].logits is None for i in asking]
        found, dz = _row_kernel(
            kernel,
            values,
            y,
            weight,
            summands,
            vocab_size,
            ignore_index,
            label_smoothing,
            z_loss,
            want_stats,
            asking,
            in_place,
        )
        _store(outputs, rows, found)
        for i, d in zip(asking, dz, strict=False):
            _add_gradients(d[0], summands[i], rows, gradients)
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


def _head_inputs(
    backend: Any, parts: list[_Part], gradients: dict[int, Tensor]
) -> list[head_chunks.HeadInputs]:
    """The heads for a backend that makes logits itself; none if it does not, or there are other terms."""
    if not hasattr(backend, "heads_refusal") or any(p.kind not in (HEAD, HEAD_WITH_BIAS) for p in parts):
        return []
    inputs = [_head_of(part, gradients) for part in parts]
    return [] if backend.heads_refusal([i.head for i in inputs]) else inputs


def _head_of(part: _Part, gradients: dict[int, Tensor]) -> head_chunks.HeadInputs:
    hidden, weight, *bias = part.tensors
    head = HeadRows(hidden, weight, bias[0] if bias else None, part.scale, part.softcap)
    d_bias = gradients.get(part.first + 2) if bias else None
    return head_chunks.HeadInputs(head, gradients.get(part.first), gradients.get(part.first + 1), d_bias)


def _segment_inputs(
    backend: Any, parts: list[_Part], gradients: dict[int, Tensor]
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
        if p.kind == SPARSE
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
    """The rows of each chunk: slices, or indices where ignored rows are left out.

    Finding the ignored rows would stop a GPU, so there they pass through, with zero gradients.
    """
    N = target.shape[0]
    C = chunk_rows or default_chunk_rows(V, target.device)
    if target.device.type != "cpu":
        return [slice(n, min(n + C, N)) for n in range(0, N, C)]
    check_target_range(target, V, ignore_index)
    _check_sparse_ids(tensors, kinds, V)
    counts = (target != ignore_index).nonzero()[:, 0]
    if counts.shape[0] < N:
        return list(counts.split(C)) if counts.numel() else []
    return [slice(n, min(n + C, N)) for n in range(0, N, C)]


def _check_sparse_ids(tensors: list[Tensor], kinds: list[int], V: int) -> None:
    first = 0
    for index, kind in enumerate(kinds):
        ids = tensors[first]
        if kind == SPARSE and ids.numel():
            low, high = (int(x) for x in torch.aminmax(ids))
            if low < 0 or high >= V:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"terms[{index}].ids holds {wrong}, outside [0, {V}); give padding id 0 and value 0"
                )
        first += _TENSORS[kind]


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
    parts = _parts(tensors, kinds, scales, softcaps)
    return bool(_head_inputs(kernel, parts, {}) or (not separate and _segment_inputs(kernel, parts, {})))


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
        target, *tensors = ctx.saved_tensors
        kinds, formula, chunk_rows, backend = ctx.settings
        gradients, ctx.ready = ctx.ready, None
        if gradients is not None and ctx.rescaled:
            # Comparing would stop a GPU, whose memory multiplies 20 times as fast as a CPU's.
            if g.device.type != "cpu" or not torch.equal(g, ctx.expected):
                factor = _common_factor(g, ctx.expected)
                gradients = [d.mul_(factor) for d in gradients]
            gradients = [d.to(tensors[i].dtype) for i, d in zip(ctx.wanted, gradients, strict=True)]
        elif gradients is not None and not torch.equal(g, ctx.expected):
            gradients = None  # freed before others are made
        if gradients is None:
            with torch.no_grad():
                *_rows, gradients = torch.ops.auxkern.linear_cross_entropy(
                    tensors, kinds, target, g, *formula, False, ctx.wanted, chunk_rows, backend
                )
        by_index = dict(zip(ctx.wanted, gradients, strict=True))
        found = tuple(by_index.get(i) for i in range(len(tensors)))
        return (None,) * ctx.before + refuse_second_derivatives(found, tensors)
