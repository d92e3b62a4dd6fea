"""The benchmark of ``auxkern.cross_entropy`` on two output heads: inputs, peers, float64 check, floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from auxkern.bench.cases import DTYPES, Case
from auxkern.bench.losses import LossOperator
from auxkern.bench.operators import Errors, Floor, Implementation
from auxkern.bench.peers import compiled_peers, imported, is_installed

_CHUNK_BYTES = 2**29  # of float64 logits at a time
_CONVERTED_IDS = 8192  # rows of a weight taken to float64 at a time
_CHECKED_ROWS = 64  # of d_hidden
_CHECKED_IDS = 512  # of d_weight, beside the targets of the checked rows


@dataclass(frozen=True)
class LinearInputs:
    """A frozen head and one whose hidden states and weight require grad.

    Attributes:
        lm_hidden, lm_weight: (N, D_lm), (V, D_lm), frozen.
        aux_hidden, aux_weight: (N, D_aux), (V, D_aux) leaves that require grad.
        target: (N,) int64 ids; -100 does not count.
    """

    lm_hidden: Tensor
    lm_weight: Tensor
    aux_hidden: Tensor
    aux_weight: Tensor
    target: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.aux_hidden, self.aux_weight]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.lm_hidden, self.lm_weight, self.aux_hidden, self.aux_weight, self.target


@dataclass(frozen=True)
class Exact:
    """float64 results: the loss, d_hidden of some rows, d_weight of some ids, max |z|."""

    loss: float
    rows: Tensor
    d_hidden: Tensor
    ids: Tensor
    d_weight: Tensor
    largest_logit: float


class Linear(LossOperator):
    name = "linear"

    def needed_bytes(self, case: Case) -> int:
        return needed_bytes(case.N, case.V, case.widths, DTYPES[case.dtype])

    def inputs(self, case: Case, device: torch.device) -> LinearInputs:
        return made_inputs(case.N, case.V, case.widths, DTYPES[case.dtype], device)

    def implementations(
        self, device: torch.device, dtype: torch.dtype, backends: Sequence[str]
    ) -> list[Implementation]:
        return [_ours(backend) for backend in backends] + _peers(device, dtype)

    def exact(self, inputs: LinearInputs) -> Exact:
        """The float64 loss over all rows, and the gradients of evenly spaced rows and ids.

        All ids and rows of the gradients would take more time and memory than the measurement.
        The targets of the checked rows are among the ids: there d_weight is largest.
        """
        tensors = [t.detach() for t in inputs.tensors()]
        target, N, V = inputs.target, inputs.target.numel(), inputs.lm_weight.shape[0]
        counted = (target >= 0).nonzero()[:, 0]
        count = max(1, counted.numel())
        rows = _evenly_spaced(N, _CHECKED_ROWS, target.device)
        ids = torch.cat([_evenly_spaced(V, _CHECKED_IDS, target.device), target[rows].clamp(min=0)]).unique()

        total, largest = 0.0, 0.0
        d_weight = torch.zeros(ids.numel(), tensors[2].shape[1], dtype=torch.float64, device=target.device)
        d_hidden = torch.zeros(rows.numel(), tensors[2].shape[1], dtype=torch.float64, device=target.device)
        for chunk in counted.split(max(1, _CHUNK_BYTES // (8 * V))):
            z, y = _exact_logits(tensors, chunk), target[chunk]
            lse = z.logsumexp(-1)
            total += (lse - z.gather(1, y[:, None])[:, 0]).sum().item()
            largest = max(largest, z.abs().max().item())
            dz = (z[:, ids] - lse[:, None]).exp_() - (ids == y[:, None]).double()
            d_weight += dz.T @ tensors[2][chunk].double()
        scored = target[rows] >= 0
        for part in (rows[scored]).split(max(1, _CHUNK_BYTES // (8 * V))):
            dz = _exact_logits(tensors, part).softmax(-1)
            dz[torch.arange(part.numel(), device=part.device), target[part]] -= 1
            d_hidden[torch.isin(rows, part)] = _times_weight(dz, tensors[3])
        return Exact(total / count, rows, d_hidden / count, ids, d_weight / count, largest)

    def errors(self, inputs: LinearInputs, exact: Exact, loss: Tensor) -> Errors:
        """Relative errors, the gradient's being the larger of both leaves', and what is allowed.

        As for logits: rounding of float32 sums over V, N or D grows as in a random walk (Higham
        2002, section 4.2), and code that rounds logits, probabilities or the loss to the dtype of
        its inputs passes as what it is.
        """
        if any(leaf.grad is None for leaf in inputs.leaves()):
            raise RuntimeError("aux_hidden and aux_weight must have a gradient")
        if any(t.grad is not None for t in (inputs.lm_hidden, inputs.lm_weight)):
            raise RuntimeError("the LM is frozen, yet it has a gradient")
        V = inputs.aux_weight.shape[0]
        summation = 4 * 2**-24 * math.sqrt(max(V, inputs.target.numel()))
        eps = torch.finfo(inputs.aux_weight.dtype).eps  # 2 u
        gradient = _worse(
            _relative(inputs.aux_hidden.grad, exact.rows, exact.d_hidden),
            _relative(inputs.aux_weight.grad, exact.ids, exact.d_weight),
        )
        return Errors(
            {"loss": abs(loss.item() - exact.loss) / max(1.0, abs(exact.loss)), "gradient": gradient},
            tolerance={
                "loss": summation + 2 * eps,
                "gradient": summation + eps / 2 * (1 + exact.largest_logit),
            },
        )

    def floors(self, inputs: LinearInputs) -> dict[str, Floor]:
        """The bare matrix products over all rows that count, in one piece, in buffers that exist.

        Forward: both heads' logits. A backward adds d_hidden and d_weight of the auxiliary.
        """
        counted = inputs.target >= 0
        h_lm, W_lm, h_aux, W_aux, _ = (t.detach() for t in inputs.tensors())
        if not bool(counted.all()):
            h_lm, h_aux = h_lm[counted], h_aux[counted]
        N, V, D_lm, D_aux = h_lm.shape[0], W_lm.shape[0], W_lm.shape[1], W_aux.shape[1]
        z = torch.zeros((N, V), dtype=W_aux.dtype, device=W_aux.device)
        d_hidden, d_weight = torch.zeros_like(h_aux), torch.zeros_like(W_aux)

        def forward() -> None:
            torch.mm(h_lm, W_lm.T, out=z)
            z.addmm_(h_aux, W_aux.T)

        def forward_backward() -> None:
            forward()
            torch.mm(z, W_aux, out=d_hidden)
            torch.mm(z.T, h_aux, out=d_weight)

        return {
            "forward": Floor(forward, flops=2 * N * V * (D_lm + D_aux)),
            "forward_backward": Floor(forward_backward, flops=2 * N * V * (D_lm + 3 * D_aux)),
        }


OPERATOR = Linear()


def needed_bytes(N: int, V: int, widths: Sequence[int], dtype: torch.dtype) -> int:
    """Memory that the hungriest implementation takes, inputs included.

    Beside the inputs these are eager's two products, their sum, its float32 copy, the log-softmax
    and gradients; the concatenated weight of the peers, its gradient, and their float32 sums of it.
    """
    size = dtype.itemsize
    return N * V * (3 * size + 4 * 4) + (V + N) * sum(widths) * (3 * size + 4)


def made_inputs(
    N: int, V: int, widths: Sequence[int], dtype: torch.dtype, device: torch.device
) -> LinearInputs:
    """Logits of the LM 3 N(0, 1), of the auxiliary N(0, 1), targets uniform; no padding.

    Args:
        N, V: rows, vocabulary.
        widths: D of the LM's head and of the auxiliary's.
        dtype, device: of both heads.
    """
    generator = torch.Generator(device).manual_seed(0)
    D_lm, D_aux = widths

    def normal(rows: int, D: int, std: float) -> Tensor:
        return torch.empty((rows, D), dtype=dtype, device=device).normal_(0, std, generator=generator)

    return LinearInputs(
        normal(N, D_lm, 1.0),
        normal(V, D_lm, 3.0 / math.sqrt(D_lm)),
        normal(N, D_aux, 1.0).requires_grad_(),
        normal(V, D_aux, 1.0 / math.sqrt(D_aux)).requires_grad_(),
        torch.randint(V, (N,), generator=generator, device=device),
    )


def _evenly_spaced(size: int, count: int, device: torch.device) -> Tensor:
    ends = torch.linspace(0, size - 1, min(size, count), device=device, dtype=torch.float64)
    return ends.round().long().unique()


def _exact_logits(tensors: list[Tensor], rows: Tensor) -> Tensor:
    """(C, V) float64 logits of these rows, weights converted piece by piece."""
    lm_hidden, lm_weight, aux_hidden, aux_weight, _ = tensors
    hidden = torch.cat([lm_hidden[rows], aux_hidden[rows]], 1).double()
    z = torch.empty((rows.numel(), lm_weight.shape[0]), dtype=torch.float64, device=rows.device)
    for v in range(0, lm_weight.shape[0], _CONVERTED_IDS):
        ids = slice(v, v + _CONVERTED_IDS)
        z[:, ids] = hidden @ torch.cat([lm_weight[ids], aux_weight[ids]], 1).double().T
    return z


def _times_weight(dz: Tensor, weight: Tensor) -> Tensor:
    pieces = range(0, weight.shape[0], _CONVERTED_IDS)
    products = (dz[:, v : v + _CONVERTED_IDS] @ weight[v : v + _CONVERTED_IDS].double() for v in pieces)
    return torch.stack(list(products)).sum(0)


def _relative(gradient: Tensor | None, index: Tensor, exact: Tensor) -> float:
    if gradient is None:
        return math.nan
    largest = exact.abs().max().item() or 1.0
    return (gradient[index].double() - exact).abs().max().item() / largest


def _worse(first: float, second: float) -> float:
    # max() would lose a NaN that is not its first argument.
    return first if first != first or first > second else second


def _ours(backend: str) -> Implementation:
    def loss(inputs: LinearInputs) -> Tensor:
        h_lm, W_lm, h_aux, W_aux, target = inputs.tensors()
        terms = [auxkern.Head(h_lm, W_lm), auxkern.Head(h_aux, W_aux)]
        result: Tensor = auxkern.cross_entropy(terms, target, backend=backend)
        return result

    call = f'auxkern.cross_entropy([Head(h_lm, W_lm), Head(h_aux, W_aux)], y, backend="{backend}")'
    return Implementation(f"auxkern {backend}", call, True, loss)


def _two_heads(function: Callable[..., Tensor]) -> Callable[[LinearInputs], Tensor]:
    return lambda inputs: function(*inputs.tensors())


class _Concatenated(torch.autograd.Function):
    """(V, D_lm + D_aux) of a frozen (V, D_lm) and a trained (V, D_aux) weight.

    The frozen half is in ``whole`` already; only the trained half is copied in, and only it gets a
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, aux_weight: Tensor, whole: Tensor) -> Tensor:
        ctx.D_aux = aux_weight.shape[1]
        whole[:, -ctx.D_aux :] = aux_weight
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> tuple[Tensor, None]:
        return d_whole[:, -ctx.D_aux :], None


class _WholeWeight:
    """The concatenated weights of a case, made once, as one would who trains with such a library.

    All peers share it, since they run in turns and each has ended its backward before the next.
    """

    def __init__(self) -> None:
        self._lm_weight: Tensor | None = None
        self._whole: Tensor | None = None

    def of(self, inputs: LinearInputs) -> Tensor:
        """(V, D_lm + D_aux), connected to ``aux_weight``."""
        if self._whole is None or self._lm_weight is not inputs.lm_weight:
            self._lm_weight = inputs.lm_weight
            self._whole = torch.cat([inputs.lm_weight, inputs.aux_weight.detach()], 1)
        weight: Tensor = _Concatenated.apply(inputs.aux_weight, self._whole)
        return weight


def _one_head(function: Callable[..., Tensor], whole: _WholeWeight) -> Callable[[LinearInputs], Tensor]:
    """``function(hidden, weight, target)`` of a library with one head, on the concatenated heads."""

    def loss(inputs: LinearInputs) -> Tensor:
        hidden = torch.cat([inputs.lm_hidden, inputs.aux_hidden], 1)
        return function(hidden, whole.of(inputs), inputs.target)

    return loss


def _peers(device: torch.device, dtype: torch.dtype) -> list[Implementation]:
    # Fresh functions: torch.compile gives up on one that it has compiled for many shapes.
    torch.compiler.reset()

    def eager(h_lm: Tensor, W_lm: Tensor, h_aux: Tensor, W_aux: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy((h_lm @ W_lm.T + h_aux @ W_aux.T).float(), target)

    logits = "h_lm @ W_lm.T + h_aux @ W_aux.T"
    code = (
        f"F.cross_entropy({logits}, y)"
        if dtype == torch.float32
        else f"F.cross_entropy(({logits}).float(), y)"
    )
    peers = [Implementation("eager", code, False, _two_heads(eager))]
    peers += compiled_peers(eager, device, _two_heads)
    return peers + _one_head_peers(device)


def _one_head_peers(device: torch.device) -> list[Implementation]:
    """Libraries whose fused loss has one head; they make all D columns of both gradients."""
    heads, whole = "cat(h_lm, h_aux), cat(W_lm, W_aux), y", _WholeWeight()
    peers = []
    # Younger than the oldest torch that is supported.
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        peers.append(_torchs(device, heads, whole))
    cce = {"impl": "cce" if device.type == "cuda" else "torch_compile"}
    known: list[tuple[str, str, str, str, dict[str, str]]] = [
        # (package, table name, module, function, options)
        ("cut_cross_entropy", "Cut Cross-Entropy", "cut_cross_entropy", "linear_cross_entropy", cce)
    ]
    if device.type == "cuda":
        liger = ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
        quack = ("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
        known += [("liger_kernel", "Liger", *liger, {}), ("quack", "QuACK", *quack, {})]
    for package, title, module, function, named in known:
        if is_installed(package):
            words = "".join(f', {name}="{value}"' for name, value in named.items())
            loss = _one_head(imported(module, function, **named), whole)
            peers.append(Implementation(title, f"{module}.{function}({heads}{words})", False, loss))
    return peers


def _torchs(device: torch.device, heads: str, whole: _WholeWeight) -> Implementation:
    # On a CPU its own choice is chunks of a few rows, five times slower than 256 (N 512, D 832,
    # V 49,152, torch 2.13: 4.1 s and 0.86 s; in one piece 1.04 s). On a GPU its choice stands.
    rows: dict[str, Any] = {"batch_chunk_size": 256, "chunking_method": None} if device.type == "cpu" else {}
    words = ", ".join(f"{name}={value}" for name, value in rows.items())
    options = torch.nn.LinearCrossEntropyOptions(**rows)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = F.linear_cross_entropy(hidden, weight, target, options=options)
        return result

    call = f"F.linear_cross_entropy({heads}, options=LinearCrossEntropyOptions({words}))"
    return Implementation("F.linear_cross_entropy", call, False, _one_head(loss, whole))
