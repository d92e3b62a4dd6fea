"""The benchmarks of ``auxkern.cross_entropy``: on logits, and on two output heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from auxkern.bench import operators
from auxkern.bench.operators import Errors, Floor, Implementation, Operator, Peer, is_installed
from auxkern.bench.results import CaseResult

_CHECKED_ELEMENTS = 2**23  # of the logits' gradient; all of it if it is smaller
_CHECKED_ROWS = 64  # of d_hidden
_CHECKED_IDS = 512  # of d_weight, beside the targets of the checked rows
_CONVERTED_IDS = 8192  # rows of a weight taken to float64 at a time


@dataclass(frozen=True)
class LossInputs:
    """Logits (N, V) or heads of one dtype, the last of which is trained, and (N,) int64 targets.

    Targets of -100 do not count.
    """

    terms: list[Any]
    target: Tensor

    @property
    def sizes(self) -> dict[str, Any]:
        widths = [term.weight.shape[1] for term in self.terms if isinstance(term, auxkern.Head)]
        last = self.tensors()[-2]
        V = last.shape[0] if widths else last.shape[1]
        return {"N": self.target.numel(), "V": V, **({"widths": widths} if widths else {})}

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors() if tensor.requires_grad]

    def tensors(self) -> list[Tensor]:
        """All of them, of a head its hidden states and its weight; the target is the last."""
        each = [[term] if isinstance(term, Tensor) else [term.hidden, term.weight] for term in self.terms]
        return [*chain(*each), self.target]

    arguments = tensors

    def logits(self, rows: Tensor) -> Tensor:
        """(C, V) sums in float64; weights are converted piece by piece."""
        z = torch.zeros((rows.numel(), self.sizes["V"]), dtype=torch.float64, device=rows.device)
        for term in self.terms:
            if isinstance(term, Tensor):
                z += term.detach()[rows]
                continue
            hidden, weight = term.hidden.detach()[rows].double(), term.weight.detach()
            for part, out in zip(weight.split(_CONVERTED_IDS), z.split(_CONVERTED_IDS, 1), strict=True):
                out.addmm_(hidden, part.double().T)
        return z


@dataclass
class Exact:
    """float64 results: the mean loss over the rows that count, and gradients of some rows and ids."""

    loss: float
    largest_logit: float  # |z| in the rows that count
    summed: int  # the longest sum that the loss of a row or an element of a gradient is
    rows: Tensor  # (R,)
    gradient: Tensor | None = None  # (R, V) of logits
    d_hidden: Tensor | None = None  # (R, D) of a head
    ids: Tensor | None = None  # (I,)
    d_weight: Tensor | None = None  # (I, D)


class LossOperator(Operator):
    """An operator whose implementations return a 0-d loss, measured forward and with its backward."""

    call: str  # the terms of a call, for legends
    chunk: int  # elements of float64 logits that are made at a time

    def ours(self, backends: Sequence[str]) -> list[Implementation]:
        calls = {name: f'auxkern.cross_entropy({self.call}, y, backend="{name}")' for name in backends}
        return [
            Implementation(f"auxkern {name}", call, True, partial(_fused, backend=name))
            for name, call in calls.items()
        ]

    def exact(self, inputs: LossInputs, everything: bool = False) -> Exact:
        """The float64 loss over all rows, and gradients of evenly spaced rows and ids, or of all.

        A check of every gradient element in float64 would take longer than the measurement. The
        targets of the checked rows are among the ids: there d_weight is largest.
        """
        target, N, V = inputs.target, inputs.sizes["N"], inputs.sizes["V"]
        head = [leaf.detach() for leaf in inputs.leaves()] if "widths" in inputs.sizes else []
        checked = _CHECKED_ROWS if head else max(2, _CHECKED_ELEMENTS // V)
        rows = _evenly_spaced(N, N if everything else checked, target.device)
        ids = torch.cat([_evenly_spaced(V, V if everything else _CHECKED_IDS, target.device), target[rows]])
        ids, count = ids[ids >= 0].unique(), max(1, int((target >= 0).sum()))

        total, largest, gradients = 0.0, 0.0, []
        d_weight = torch.zeros((), dtype=torch.float64, device=target.device)
        for part in torch.arange(N, device=target.device).split(max(1, self.chunk // V)):
            z, y = inputs.logits(part), target[part]
            counted = (y >= 0)[:, None]
            total += F.cross_entropy(z, y, reduction="sum").item() / count
            largest = max(largest, (z * counted).abs().max().item())
            dz = z.softmax(-1)
            dz[torch.arange(part.numel(), device=part.device), y.clamp(min=0)] -= 1
            dz.mul_(counted).div_(count)
            gradient = dz[torch.isin(part, rows)]
            if head:
                d_weight = d_weight + dz[:, ids].T @ head[0][part].double()
                pairs = zip(gradient.split(_CONVERTED_IDS, 1), head[1].split(_CONVERTED_IDS), strict=True)
                gradient = reduce(add, (columns @ piece.double() for columns, piece in pairs))
            gradients.append(gradient)
        gradient = torch.cat(gradients)
        if not head:
            return Exact(total, largest, V, rows, gradient)
        return Exact(total, largest, max(V, N), rows, d_hidden=gradient, ids=ids, d_weight=d_weight)

    def check(
        self, inputs: LossInputs, exact: Any, implementation: Implementation, outputs: Mapping[str, Tensor]
    ) -> Errors:
        # A forward without gradients may take another path; it must say the same.
        each = [self.errors(inputs, exact, loss) for loss in outputs.values()]
        worst = {name: _worst(errors.values[name] for errors in each) for name in each[0].values}
        return Errors(worst, each[0].tolerance)

    def errors(self, inputs: LossInputs, exact: Exact, loss: Tensor) -> Errors:
        """Relative errors of ``loss`` and of the leaves' gradients, the largest; and what is allowed.

        A float32 sum of n values, term by term, is off by about u sqrt(n), u = 2**-24 (Higham 2002,
        section 4.2: rounding errors grow as in a random walk); four times that passes. Code that sums the
        terms in their own dtype before it widens them moves a logit by up to u |z| of that dtype, and a
        probability by that share; code that returns the loss in it rounds each row and their mean. Both
        are common, so they pass, as what they are: the error column shows them.
        """
        leaves, gradients = inputs.leaves(), []
        if any(t.grad is not None for t in inputs.tensors() if not t.requires_grad):
            raise RuntimeError("the last term, and only it, must have a gradient; the others are frozen")
        places = ((exact.rows, exact.gradient), (exact.rows, exact.d_hidden), (exact.ids, exact.d_weight))
        given = [(index, values) for index, values in places if values is not None]
        for leaf, (index, values) in zip(leaves, given, strict=True):
            if leaf.grad is None:
                raise RuntimeError("the last term, in all its tensors, must have a gradient")
            difference = (leaf.grad[index].double() - values).abs().max().item()
            gradients.append(difference / (values.abs().max().item() or 1.0))
        summation = 4 * 2**-24 * math.sqrt(exact.summed)
        eps = torch.finfo(leaves[0].dtype).eps  # 2 u
        relative = abs(loss.item() - exact.loss) / max(1.0, abs(exact.loss))
        return Errors(
            {"loss": relative, "gradient": _worst(gradients)},
            {"loss": summation + 2 * eps, "gradient": summation + eps / 2 * (1 + exact.largest_logit)},
        )


class CrossEntropy(LossOperator):
    call = "[lm, aux]"
    chunk = 2**22

    def needed_bytes(self, case: CaseResult) -> int:
        # Eager holds the sum, its float32 copy, the log-softmax, two gradients in float32 and
        # one in the term's dtype, at worst at one time.
        return case.N * case.V * ((case.terms + 2) * getattr(torch, case.dtype).itemsize + 4 * 4)

    def inputs(self, case: CaseResult, device: torch.device) -> LossInputs:
        """Frozen terms 3 N(0, 1), the trained one N(0, 1), targets uniform; no padding."""
        shapes = [((case.N, case.V), std) for std in [3.0] * (case.terms - 1) + [1.0]]
        terms, target = operators.normal(shapes, case, device)
        terms[-1].requires_grad_()
        return LossInputs(terms, target)

    def implementations(
        self, device: torch.device, dtype: torch.dtype, backends: Sequence[str]
    ) -> list[Implementation]:
        """Libraries have one tensor of logits; the sum is written for them, as a user would."""
        ours = self.ours(backends)
        if device.type == "cpu" and "cpu" in backends:
            memory = auxkern.GradientMemory()
            call = "the same with gradient_memory=auxkern.GradientMemory() kept over calls"
            run = partial(_fused, gradient_memory=memory, backend="cpu")
            ours.append(Implementation("auxkern cpu, memory kept", call, True, run, memory.release))
        logits = "lm + aux" if dtype == torch.float32 else "(lm + aux).float()"
        widened = _of_sum(lambda z, target: F.cross_entropy(z.float(), target))
        eager = [("eager", f"F.cross_entropy({logits}, y), as transformers' loss", widened)]
        if dtype != torch.float32:
            call = "F.cross_entropy(lm + aux, y): loss in the terms' dtype"
            eager.append(("eager half", call, _of_sum(F.cross_entropy)))
        module = "liger_kernel.transformers.functional"
        liger: _Known = ("Liger", module, "liger_cross_entropy", {"reduction": "mean"}, "")
        quack: _Known = ("QuACK", "quack.cross_entropy", "cross_entropy", {"reduction": "none"}, ', "none"')
        others = _installed([liger], "lm + aux, y", _of_sum) + _installed(
            [quack], "lm + aux, y", _mean_of_rows
        )
        return ours + operators.peers(device, eager, others if device.type == "cuda" else [])

    def floors(self, inputs: LossInputs) -> dict[str, Floor]:
        """Forward reads every term once; a backward reads them again and writes one gradient.

        Rows that are ignored are not read, but their gradient is written. The calls below move
        these bytes and no others, in buffers that exist already.
        """
        counted = inputs.target >= 0
        every_row = bool(counted.all())
        terms = [t.detach() if every_row else t.detach()[counted] for t in inputs.terms]
        words, forward = [operators.as_words(t) for t in terms], operators.reading(terms)
        out = torch.zeros_like(operators.as_words(inputs.terms[-1].detach()))
        total, rest = out[: words[-1].numel()], out[words[-1].numel() :]

        def forward_backward() -> None:
            forward.run()
            for w in words[:-2]:
                torch.sum(w, dtype=torch.int32)
            torch.add(words[-1], words[-2] if len(words) > 1 else 1, out=total)
            rest.zero_()

        both = Floor(forward_backward, 2 * forward.bytes + out.numel() * 4)
        return {"forward": forward, "forward_backward": both}


class Linear(LossOperator):
    call = "[Head(h_lm, W_lm), Head(h_aux, W_aux)]"
    chunk = 2**26

    def needed_bytes(self, case: CaseResult) -> int:
        # Beside the inputs these are eager's two products, their sum, its float32 copy, the log-softmax and
        # gradients; the concatenated weight of the peers, its gradient, and their float32 sums of it.
        size = getattr(torch, case.dtype).itemsize
        return case.N * case.V * (3 * size + 4 * 4) + (case.V + case.N) * sum(case.widths) * (3 * size + 4)

    def inputs(self, case: CaseResult, device: torch.device) -> LossInputs:
        """Logits of the LM 3 N(0, 1), of the auxiliary N(0, 1), targets uniform; no padding."""
        scales = zip(case.widths, (3.0, 1.0), strict=True)
        shapes = [
            shape for D, std in scales for shape in (((case.N, D), 1.0), ((case.V, D), std / math.sqrt(D)))
        ]
        tensors, target = operators.normal(shapes, case, device)
        trained = [tensor.requires_grad_() for tensor in tensors[2:]]
        return LossInputs(
            [auxkern.Head(tensors[0], tensors[1]), auxkern.Head(trained[0], trained[1])], target
        )

    def implementations(
        self, device: torch.device, dtype: torch.dtype, backends: Sequence[str]
    ) -> list[Implementation]:
        """Libraries have a fused loss of one head; they make all D columns of both gradients."""

        def eager(h_lm: Tensor, W_lm: Tensor, h_aux: Tensor, W_aux: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy((h_lm @ W_lm.T + h_aux @ W_aux.T).float(), target)

        logits = "h_lm @ W_lm.T + h_aux @ W_aux.T"
        call = logits if dtype == torch.float32 else f"({logits}).float()"
        known: list[_Known] = []
        linear, cce = "linear_cross_entropy", "cce" if device.type == "cuda" else "torch_compile"
        # Younger than the oldest torch that is supported.
        if hasattr(F, linear) and hasattr(torch.nn, "LinearCrossEntropyOptions"):
            # On a CPU its own choice is chunks of a few rows, five times slower than 256 (N 512, D 832,
            # V 49,152, torch 2.13: 4.1 s and 0.86 s; in one piece 1.04 s). On a GPU its choice stands.
            rows: dict[str, Any] = {"batch_chunk_size": 256, "chunking_method": None}
            rows = rows if device.type == "cpu" else {}
            options = {"options": torch.nn.LinearCrossEntropyOptions(**rows)}
            words = ", ".join(f"{name}={value}" for name, value in rows.items())
            words = f", options=LinearCrossEntropyOptions({words})"
            known.append(("F.linear_cross_entropy", "torch.nn.functional", linear, options, words))
        known.append(("Cut Cross-Entropy", "cut_cross_entropy", linear, {"impl": cce}, f', impl="{cce}"'))
        if device.type == "cuda":
            liger = ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
            quack = ("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
            known += [("Liger", *liger, {}, ""), ("QuACK", *quack, {}, "")]
        arguments, adapt = "cat(h_lm, h_aux), cat(W_lm, W_aux), y", partial(one_head, wholes=[])
        mine = [("eager", f"F.cross_entropy({call}, y)", eager)]
        return self.ours(backends) + operators.peers(device, mine, _installed(known, arguments, adapt))

    def floors(self, inputs: LossInputs) -> dict[str, Floor]:
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


CROSS_ENTROPY, LINEAR = CrossEntropy(), Linear()


def _fused(inputs: LossInputs, **options: Any) -> Tensor:
    loss: Tensor = auxkern.cross_entropy(inputs.terms, inputs.target, **options)
    return loss


# Of a peer: name, module, function, its options, and how they are written.
_Known = tuple[str, str, str, dict[str, Any], str]


def _installed(known: Iterable[_Known], arguments: str, adapt: Callable[..., Any]) -> list[Peer]:
    """Those that can be imported; ``adapt`` makes their functions ones of ``inputs.arguments()``."""
    return [
        (
            name,
            f"{module.replace('torch.nn.functional', 'F')}.{function}({arguments}{words})",
            adapt(operators.imported(module, function, **options)),
        )
        for name, module, function, options, words in known
        if is_installed(module.partition(".")[0])
    ]


def _of_sum(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: function(reduce(add, tensors[:-1]), tensors[-1])


def _mean_of_rows(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of a loss of each row, 0 where it is ignored; the gradient that it gets has a stride, as QuACK asks."""

    def mean(*tensors: Tensor) -> Tensor:
        counted = tensors[-1] >= 0
        return function(reduce(add, tensors[:-1]), tensors[-1]) @ (counted / counted.sum())

    return mean


def _evenly_spaced(size: int, count: int, device: torch.device) -> Tensor:
    ends = torch.linspace(0, size - 1, min(size, count), device=device, dtype=torch.float64)
    return ends.round().long().unique()


def _worst(errors: Iterable[float]) -> float:
    # max() would lose a NaN that is not its first argument.
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


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


def one_head(function: Callable[..., Tensor], wholes: list[tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """``function(hidden, weight, target)`` of a library with one head, on the concatenated heads.

    ``wholes`` keeps the concatenated weights of a case, made once, as one would who trains with such a
    library. All peers share them, since they run in turns and each has ended its backward before the next.
    """

    def loss(h_lm: Tensor, W_lm: Tensor, h_aux: Tensor, W_aux: Tensor, target: Tensor) -> Tensor:
        if not wholes or wholes[0][0] is not W_lm:
            wholes[:] = [(W_lm, torch.cat([W_lm, W_aux.detach()], 1))]
        weight: Tensor = _Concatenated.apply(W_aux, wholes[0][1])
        return function(torch.cat([h_lm, h_aux], 1), weight, target)

    return loss
