"""The benchmark of ``auxkern.cross_entropy`` on two output heads: inputs, peers, float64 check, floor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from auxkern.bench.losses import Exact, LossOperator, counted_rows, d_logits, evenly_spaced
from auxkern.bench.operators import Floor, Peer, imported, is_installed
from auxkern.bench.results import CaseResult

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

    @property
    def terms(self) -> list[auxkern.Head]:
        return [auxkern.Head(self.lm_hidden, self.lm_weight), auxkern.Head(self.aux_hidden, self.aux_weight)]

    @property
    def V(self) -> int:
        return self.lm_weight.shape[0]

    @property
    def chunk(self) -> int:
        return max(1, _CHUNK_BYTES // (8 * self.V))

    @property
    def sizes(self) -> dict[str, Any]:
        widths = [self.lm_weight.shape[1], self.aux_weight.shape[1]]
        return {"N": self.target.numel(), "V": self.V, "widths": widths}

    def leaves(self) -> list[Tensor]:
        return [self.aux_hidden, self.aux_weight]

    def frozen(self) -> list[Tensor]:
        return [self.lm_hidden, self.lm_weight]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.lm_hidden, self.lm_weight, self.aux_hidden, self.aux_weight, self.target

    arguments = tensors

    def logits(self, rows: Tensor) -> Tensor:
        """Weights are converted piece by piece."""
        lm_hidden, lm_weight, aux_hidden, aux_weight, _ = (t.detach() for t in self.tensors())
        hidden = torch.cat([lm_hidden[rows], aux_hidden[rows]], 1).double()
        z = torch.empty((rows.numel(), self.V), dtype=torch.float64, device=rows.device)
        for v in range(0, self.V, _CONVERTED_IDS):
            ids = slice(v, v + _CONVERTED_IDS)
            z[:, ids] = hidden @ torch.cat([lm_weight[ids], aux_weight[ids]], 1).double().T
        return z


class Linear(LossOperator):
    call = "[Head(h_lm, W_lm), Head(h_aux, W_aux)]"

    def needed_bytes(self, case: CaseResult) -> int:
        # Beside the inputs these are eager's two products, their sum, its float32 copy, the log-softmax and
        # gradients; the concatenated weight of the peers, its gradient, and their float32 sums of it.
        size: int = getattr(torch, case.dtype).itemsize
        return case.N * case.V * (3 * size + 4 * 4) + (case.V + case.N) * sum(case.widths) * (3 * size + 4)

    def inputs(self, case: CaseResult, device: torch.device) -> LinearInputs:
        """Logits of the LM 3 N(0, 1), of the auxiliary N(0, 1), targets uniform; no padding."""
        generator = torch.Generator(device).manual_seed(0)
        dtype, (D_lm, D_aux) = getattr(torch, case.dtype), case.widths

        def normal(rows: int, D: int, std: float) -> Tensor:
            return torch.empty((rows, D), dtype=dtype, device=device).normal_(0, std, generator=generator)

        return LinearInputs(
            normal(case.N, D_lm, 1.0),
            normal(case.V, D_lm, 3.0 / math.sqrt(D_lm)),
            normal(case.N, D_aux, 1.0).requires_grad_(),
            normal(case.V, D_aux, 1.0 / math.sqrt(D_aux)).requires_grad_(),
            torch.randint(case.V, (case.N,), generator=generator, device=device),
        )

    def eager(self, dtype: torch.dtype) -> list[Peer]:
        def eager(h_lm: Tensor, W_lm: Tensor, h_aux: Tensor, W_aux: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy((h_lm @ W_lm.T + h_aux @ W_aux.T).float(), target)

        logits = "h_lm @ W_lm.T + h_aux @ W_aux.T"
        call = logits if dtype == torch.float32 else f"({logits}).float()"
        return [("eager", f"F.cross_entropy({call}, y)", eager)]

    def peers(self, device: torch.device) -> list[Peer]:
        """Libraries whose fused loss has one head; they make all D columns of both gradients."""
        heads, whole, peers = "cat(h_lm, h_aux), cat(W_lm, W_aux), y", _WholeWeight(), []
        # Younger than the oldest torch that is supported.
        if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
            # On a CPU its own choice is chunks of a few rows, five times slower than 256 (N 512, D 832,
            # V 49,152, torch 2.13: 4.1 s and 0.86 s; in one piece 1.04 s). On a GPU its choice stands.
            rows: dict[str, Any] = {"batch_chunk_size": 256, "chunking_method": None}
            rows = rows if device.type == "cpu" else {}
            words = ", ".join(f"{name}={value}" for name, value in rows.items())
            call = f"F.linear_cross_entropy({heads}, options=LinearCrossEntropyOptions({words}))"
            options = torch.nn.LinearCrossEntropyOptions(**rows)
            torchs = imported("torch.nn.functional", "linear_cross_entropy", options=options)
            peers.append(("F.linear_cross_entropy", call, _one_head(torchs, whole)))
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
                peers.append((title, f"{module}.{function}({heads}{words})", loss))
        return peers

    def exact(self, inputs: LinearInputs, everything: bool = False) -> Exact:
        """The targets of the checked rows are among the ids: there d_weight is largest."""
        target, V, counted = inputs.target, inputs.V, counted_rows(inputs)
        hidden, weight = inputs.aux_hidden.detach(), inputs.aux_weight.detach()
        count, N = max(1, counted.numel()), target.numel()
        rows = evenly_spaced(N, N if everything else _CHECKED_ROWS, target.device)
        ids = evenly_spaced(V, V if everything else _CHECKED_IDS, target.device)
        ids = torch.cat([ids, target[rows].clamp(min=0)]).unique()

        total, largest = 0.0, 0.0
        d_weight = torch.zeros(ids.numel(), hidden.shape[1], dtype=torch.float64, device=target.device)
        for chunk in counted.split(inputs.chunk):
            z, y = inputs.logits(chunk), target[chunk]
            lse = z.logsumexp(-1)
            total += (lse - z.gather(1, y[:, None])[:, 0]).sum().item()
            largest = max(largest, z.abs().max().item())
            dz = (z[:, ids] - lse[:, None]).exp_() - (ids == y[:, None]).double()
            d_weight += dz.T @ hidden[chunk].double()
        d_hidden = [_times_weight(d_logits(inputs, part), weight) for part in rows.split(inputs.chunk)]
        return Exact(
            total / count,
            largest,
            max(V, N),
            rows,
            d_hidden=torch.cat(d_hidden) / count,
            ids=ids,
            d_weight=d_weight / count,
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


def _times_weight(dz: Tensor, weight: Tensor) -> Tensor:
    pieces = range(0, weight.shape[0], _CONVERTED_IDS)
    products = (dz[:, v : v + _CONVERTED_IDS] @ weight[v : v + _CONVERTED_IDS].double() for v in pieces)
    return torch.stack(list(products)).sum(0)


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

    def of(self, lm_weight: Tensor, aux_weight: Tensor) -> Tensor:
        """(V, D_lm + D_aux), connected to ``aux_weight``."""
        if self._whole is None or self._lm_weight is not lm_weight:
            self._lm_weight = lm_weight
            self._whole = torch.cat([lm_weight, aux_weight.detach()], 1)
        weight: Tensor = _Concatenated.apply(aux_weight, self._whole)
        return weight


def _one_head(function: Callable[..., Tensor], whole: _WholeWeight) -> Callable[..., Tensor]:
    """``function(hidden, weight, target)`` of a library with one head, on the concatenated heads."""

    def loss(h_lm: Tensor, W_lm: Tensor, h_aux: Tensor, W_aux: Tensor, target: Tensor) -> Tensor:
        return function(torch.cat([h_lm, h_aux], 1), whole.of(W_lm, W_aux), target)

    return loss
