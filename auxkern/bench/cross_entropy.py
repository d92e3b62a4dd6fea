"""The benchmark of ``auxkern.cross_entropy`` on logits: inputs, peers, float64 check, floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from auxkern.bench.cases import DTYPES, Case
from auxkern.bench.losses import LossOperator
from auxkern.bench.operators import Errors, Floor, Implementation, as_words, reading
from auxkern.bench.peers import compiled_peers, imported, is_installed

_CHUNK_ELEMENTS = 2**22  # of a term, taken to float64 at a time
_CHECKED_ELEMENTS = 2**23  # of the gradient; all of it if it is smaller


@dataclass(frozen=True)
class CrossEntropyInputs:
    """Terms (N, V) of one dtype, of which the last requires grad, and (N,) int64 targets.

    Targets of -100 do not count.
    """

    terms: list[Tensor]
    target: Tensor

    def leaves(self) -> list[Tensor]:
        return [term for term in self.terms if term.requires_grad]


@dataclass(frozen=True)
class Exact:
    """float64 results: the loss, the gradient (R, V) of some rows, max |z| of counted rows."""

    loss: float
    rows: Tensor
    gradient: Tensor
    largest_logit: float


class CrossEntropy(LossOperator):
    name = "cross_entropy"

    def needed_bytes(self, case: Case) -> int:
        # Eager holds the sum, its float32 copy, the log-softmax, two gradients in float32 and
        # one in the term's dtype, at worst at one time.
        float32 = case.N * case.V * 4
        return (case.terms + 2) * case.term_bytes + 4 * float32

    def inputs(self, case: Case, device: torch.device) -> CrossEntropyInputs:
        """Frozen terms 3 N(0, 1), the trained one N(0, 1), targets uniform; no padding."""
        generator = torch.Generator(device).manual_seed(0)
        dtype, shape = DTYPES[case.dtype], (case.N, case.V)

        def normal(std: float) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=generator)

        terms = [normal(3.0) for _ in range(case.terms - 1)]
        terms.append(normal(1.0).requires_grad_())
        target = torch.randint(case.V, (case.N,), generator=generator, device=device)
        return CrossEntropyInputs(terms, target)

    def implementations(
        self, device: torch.device, dtype: torch.dtype, backends: Sequence[str]
    ) -> list[Implementation]:
        ours = [_ours(backend) for backend in backends]
        if device.type == "cpu" and "cpu" in backends:
            ours.append(_ours_with_memory_kept())
        return ours + _peers(device, dtype)

    def exact(self, inputs: CrossEntropyInputs) -> Exact:
        """The float64 loss over all rows, and the gradient of evenly spaced rows.

        A check of every gradient element in float64 would take longer than the measurement.
        """
        terms = [term.detach() for term in inputs.terms]
        counted = (inputs.target >= 0).nonzero()[:, 0]
        V, total, largest = terms[0].shape[-1], 0.0, 0.0
        for chunk in counted.split(max(1, _CHUNK_ELEMENTS // V)):
            z = _exact_logits(terms, chunk)
            total += F.cross_entropy(z, inputs.target[chunk], reduction="sum").item()
            largest = max(largest, z.abs().max().item())

        N = inputs.target.numel()
        checked = min(N, max(2, _CHECKED_ELEMENTS // V))
        rows = torch.linspace(0, N - 1, checked, device=counted.device, dtype=torch.float64).round().long()
        gradient = torch.softmax(_exact_logits(terms, rows), dim=-1)
        ignored = inputs.target[rows] < 0
        gradient[torch.arange(checked, device=rows.device), inputs.target[rows].clamp(min=0)] -= 1
        gradient[ignored] = 0
        count = max(1, counted.numel())
        return Exact(total / count, rows, gradient.div_(count), largest)

    def errors(self, inputs: CrossEntropyInputs, exact: Exact, loss: Tensor) -> Errors:
        """Relative errors, and what is allowed.

        A float32 sum of V exponentials, term by term, is off by about u sqrt(V), u = 2**-24
        (Higham 2002, section 4.2: rounding errors grow as in a random walk); four times that
        passes. Code that sums the terms in their own dtype before it widens them moves a logit
        by up to u |z| of that dtype, and a probability by that share; code that returns the loss
        in it rounds each row and their mean. Both are common, so they pass, as what they are:
        the error column shows them.
        """
        (leaf,) = inputs.leaves()
        if leaf.grad is None or any(t.grad is not None for t in inputs.terms[:-1]):
            raise RuntimeError("the last term, and only it, must have a gradient")
        largest = exact.gradient.abs().max().item() or 1.0
        difference = (leaf.grad[exact.rows].double() - exact.gradient).abs().max().item()
        summation = 4 * 2**-24 * math.sqrt(leaf.shape[-1])
        eps = torch.finfo(leaf.dtype).eps  # 2 u
        return Errors(
            {
                "loss": abs(loss.item() - exact.loss) / max(1.0, abs(exact.loss)),
                "gradient": difference / largest,
            },
            tolerance={
                "loss": summation + 2 * eps,
                "gradient": summation + eps / 2 * (1 + exact.largest_logit),
            },
        )

    def floors(self, inputs: CrossEntropyInputs) -> dict[str, Floor]:
        """Forward reads every term once; a backward reads them again and writes one gradient.

        Rows that are ignored are not read, but their gradient is written. The calls below move
        these bytes and no others, in buffers that exist already.
        """
        counted = inputs.target >= 0
        every_row = bool(counted.all())
        terms = [t.detach() if every_row else t.detach()[counted] for t in inputs.terms]
        words, forward = [as_words(t) for t in terms], reading(terms)
        out = torch.zeros_like(as_words(inputs.terms[-1].detach()))
        total, rest = out[: words[-1].numel()], out[words[-1].numel() :]

        def forward_backward() -> None:
            forward.run()
            for w in words[:-2]:
                torch.sum(w, dtype=torch.int32)
            torch.add(words[-1], words[-2] if len(words) > 1 else 1, out=total)
            rest.zero_()

        return {
            "forward": forward,
            "forward_backward": Floor(forward_backward, 2 * forward.bytes + out.numel() * 4),
        }


OPERATOR = CrossEntropy()


def _exact_logits(terms: list[Tensor], rows: Tensor) -> Tensor:
    return reduce(add, (term[rows].double() for term in terms))


def _ours(backend: str) -> Implementation:
    def loss(inputs: CrossEntropyInputs) -> Tensor:
        result: Tensor = auxkern.cross_entropy(inputs.terms, inputs.target, backend=backend)
        return result

    return Implementation(
        f"auxkern {backend}", f'auxkern.cross_entropy([lm, aux], y, backend="{backend}")', True, loss
    )


def _ours_with_memory_kept() -> Implementation:
    memory = auxkern.GradientMemory()

    def loss(inputs: CrossEntropyInputs) -> Tensor:
        result: Tensor = auxkern.cross_entropy(
            inputs.terms, inputs.target, gradient_memory=memory, backend="cpu"
        )
        return result

    call = "the same with gradient_memory=auxkern.GradientMemory() kept over calls"
    return Implementation("auxkern cpu, memory kept", call, True, loss, release=memory.release)


def _summed(function: Callable[..., Tensor]) -> Callable[[CrossEntropyInputs], Tensor]:
    return lambda inputs: function(inputs.terms, inputs.target)


def _peers(device: torch.device, dtype: torch.dtype) -> list[Implementation]:
    # Fresh functions: torch.compile gives up on one that it has compiled for many shapes.
    torch.compiler.reset()

    def eager(terms: list[Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(reduce(add, terms).float(), target)

    def eager_half(terms: list[Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(reduce(add, terms), target)

    half = dtype != torch.float32
    code = "F.cross_entropy((lm + aux).float(), y)" if half else "F.cross_entropy(lm + aux, y)"
    peers = [Implementation("eager", f"{code}, as transformers' loss", False, _summed(eager))]
    if half:
        peers.append(
            Implementation(
                "eager half",
                "F.cross_entropy(lm + aux, y): loss in the terms' dtype",
                False,
                _summed(eager_half),
            )
        )
    peers += compiled_peers(eager, device, _summed)
    if device.type == "cuda":
        peers += _installed_gpu_peers()
    return peers


def _installed_gpu_peers() -> list[Implementation]:
    """Peers for one tensor of logits; the sum is written for them, as a user would."""
    known = [
        # (package, module, function, table name)
        ("liger_kernel", "liger_kernel.transformers.functional", "liger_cross_entropy", "Liger"),
        ("quack", "quack.cross_entropy", "cross_entropy", "QuACK"),
    ]
    return [
        Implementation(
            title,
            f"{module}.{function}(lm + aux, y)",
            False,
            _of_sum(imported(module, function, reduction="mean")),
        )
        for package, module, function, title in known
        if is_installed(package)
    ]


def _of_sum(function: Callable[..., Tensor]) -> Callable[[CrossEntropyInputs], Tensor]:
    return _summed(lambda terms, target: function(reduce(add, terms), target))
