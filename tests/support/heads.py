"""Sums of output heads against the textbook formula in float64, for tests of the kernels that make tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from auxkern import Head, Sparse
from auxkern.core.loss import Loss, RowLosses
from auxkern.core.sums import Sum
from auxkern.ops.torch_ops import Gradients
from tests.support.cases import IGNORE

if TYPE_CHECKING:
    from auxkern.backends.triton import Triton

H, B, D32 = torch.float16, torch.bfloat16, torch.float32


def heads(
    N: int, V: int, widths: Any, dtypes: Any, *, scales: Any = (), softcaps: Any = (), biases: Any = ()
) -> list[Head]:
    """Random heads; a missing scale is 1, a missing softcap and bias None.

    Args:
        dtypes: of each head, or a pair: of its hidden states, and of its weight and bias.
    """
    source = torch.Generator().manual_seed(N + V)

    def random(dtype: torch.dtype, *shape: int) -> Tensor:
        return (0.8 * torch.randn(shape, generator=source)).to(dtype)

    made = []
    for i, (D, dtype) in enumerate(zip(widths, dtypes, strict=True)):
        hidden_dtype, dtype = dtype if isinstance(dtype, tuple) else (dtype, dtype)
        bias = random(dtype, V) if i < len(biases) and biases[i] else None
        scale = scales[i] if i < len(scales) else 1.0
        softcap = softcaps[i] if i < len(softcaps) else None
        made.append(Head(random(hidden_dtype, N, D), random(dtype, V, D), bias, scale, softcap))
    return made


def targets(N: int, V: int) -> Tensor:
    y = torch.randint(V, (N,), generator=torch.Generator().manual_seed(N))
    y[1::4] = IGNORE
    return y


def exact(given: Sequence[Head | Sparse], y: Tensor, grad: Tensor | None = None, **options: Any) -> Any:
    """(loss, gradients, z, shares) by the textbook formula in float64."""
    z_loss, weight = options.pop("z_loss", 0.0), options.pop("token_weight", None)
    reduction, V = options.pop("reduction", "mean"), options.pop("vocab_size", None)
    leaves = [
        [t.detach().double().requires_grad_() for t in h.tensors.values() if t.is_floating_point()]
        for h in given
    ]
    shares = []
    for head, (hidden, *matrices) in zip(given, leaves, strict=True):
        if isinstance(head, Sparse):
            shares.append(_scattered(head.ids, hidden, V or _vocabulary(given)))
            continue
        matrix, *bias = matrices
        x = hidden @ matrix.T + (bias[0] if bias else 0.0)
        if head.softcap is not None:
            x = head.softcap * torch.tanh(x / head.softcap)
        scale = head.scale.double()[:, None] if isinstance(head.scale, Tensor) else head.scale
        shares.append(scale * x[:, :V])
    z = sum(shares)
    row = F.cross_entropy(z, y, reduction="none", ignore_index=IGNORE, **options)
    counts = (y != IGNORE).double()
    row = row + z_loss * z.logsumexp(-1) ** 2 * counts
    w = counts if weight is None else counts * weight.double()
    loss = row * w if reduction == "none" else (row * w).sum()
    loss = loss / w.sum() if reduction == "mean" else loss
    loss.backward(None if grad is None else grad.double())
    return loss.detach(), [x.grad for leaf in leaves for x in leaf], z.detach(), [s.detach() for s in shares]


def _vocabulary(given: Sequence[Head | Sparse]) -> int:
    return next(term.vocabulary for term in given if isinstance(term, Head))


def _scattered(ids: Tensor, values: Tensor, V: int) -> Tensor:
    """(N, V) a sparse term's logits; ids outside of the vocabulary count for nothing."""
    ids = ids.long()
    inside = (ids >= 0) & (ids < V)
    wider = torch.zeros(len(ids), V + 1, dtype=values.dtype)
    return wider.scatter_add(1, torch.where(inside, ids, V), values)[:, :V]


def ours(given: list[Head], y: Tensor, grad: Tensor | None = None, **options: Any) -> Any:
    """(loss, gradients, stats or None) of the Triton backend."""
    leaves = [{k: t.detach().clone().requires_grad_() for k, t in h.tensors.items()} for h in given]
    terms = [Head(**leaf, scale=h.scale, softcap=h.softcap) for leaf, h in zip(leaves, given, strict=True)]
    out = auxkern.cross_entropy(terms, y, backend="triton", **options)
    loss, stats = out if options.get("return_stats") else (out, None)
    loss.backward(grad)
    return loss.detach(), [x.grad for leaf in leaves for x in leaf.values()], stats


def rows_of(
    backend: Triton, sum: Sum, y: Tensor, loss: Loss, weight: Tensor
) -> tuple[RowLosses, list[Tensor]]:
    """What a backend's ``losses`` says of rows of these weights, and all gradients.

    It takes what ``cross_entropy`` refuses: scales of rows, entries outside of the vocabulary.
    """
    places = [i for i, x in enumerate(sum.tensors) if x.is_floating_point()]
    result = Gradients(sum, sum.tensors, places, float32=True)
    for gradient in result.flat.values():
        gradient.fill_(torch.nan)
    rows = backend.losses(sum, y, loss, weight, result.wanted)
    return rows, list(result.flat.values())


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest entry: sums of many entries have its rounding."""
    assert not bool(found.isnan().any())
    largest = max(expected.abs().amax().item() if expected.numel() else 0.0, 1e-3)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * largest)


# A gradient is rounded to 16 bits once as e, once as dz and once as the result.
TOLERANCE = {H: 3 * 2.0**-11, B: 3 * 2.0**-8, D32: 2e-6}


def run(
    given: list[Head],
    y: Tensor,
    grad: Tensor | None = None,
    *,
    tolerance: float | None = None,
    **options: Any,
) -> None:
    """Ours against the formula.

    Args:
        tolerance: of float32 products that are not exact.
    """
    loss, gradients, stats = ours(given, y, grad, **options)
    options = {k: v for k, v in options.items() if k not in ("return_stats", "chunk_rows")}
    expected, exact_gradients, z, shares = exact(given, y, grad, **options)
    close(loss, expected, tolerance or 1e-6)
    inputs = [x for head in given for x in head.tensors.values()]
    for x, gradient, right in zip(inputs, gradients, exact_gradients, strict=True):
        assert gradient.dtype == x.dtype
        close(gradient, right, tolerance or TOLERANCE[x.dtype])
    if stats is not None:
        counts = y != IGNORE
        close(stats.lse[counts], z.logsumexp(-1)[counts], 1e-6)
        assert torch.equal(stats.argmax, torch.where(counts, z.argmax(-1), -1))
        for found, share in zip(stats.term_nll, shares, strict=True):
            close(found, F.cross_entropy(share, y, ignore_index=IGNORE, reduction="none"), 2e-6)


def check_rows(backend: Triton, sum: Sum, y: Tensor, loss: Loss, weight: Tensor) -> None:
    """What ``rows_of`` says, rows, statistics and gradients, against the formula."""
    rows, gradients = rows_of(backend, sum, y, loss, weight)
    options = {"label_smoothing": loss.label_smoothing, "z_loss": loss.z_loss, "vocab_size": sum.V}
    expected, right, z, shares = exact(sum.terms, y, weight, reduction="none", **options)
    close(loss.of_rows(rows.nll, rows.lse, rows.smooth), expected, 1e-6)
    inputs = [(term, x) for term in sum.terms for x in term.tensors.values() if x.is_floating_point()]
    for (term, x), gradient, exact_gradient in zip(inputs, gradients, right, strict=True):
        # That of a sparse term's values is never rounded to 16 bits on its way.
        close(gradient, exact_gradient, TOLERANCE[D32 if isinstance(term, Sparse) else x.dtype])
    if loss.stats:
        counts = y != IGNORE
        assert torch.equal(rows.argmax, torch.where(counts, z.argmax(-1), -1))
        for its, share in zip(rows.term_nll, shares, strict=True):
            nll = F.cross_entropy(share, y, ignore_index=IGNORE, reduction="none")
            close(its, nll, 2e-6)
