"""The benchmark of ``auxkern.cross_entropy`` on logits: inputs, peers, float64 check, floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from auxkern.bench.losses import Exact, LossOperator, counted_rows, d_logits, evenly_spaced, fused
from auxkern.bench.operators import (
    Floor,
    Implementation,
    Peer,
    as_words,
    imported,
    is_installed,
    normal_logits,
    reading,
)
from auxkern.bench.results import CaseResult

_CHUNK_ELEMENTS = 2**22  # of a term, taken to float64 at a time
_CHECKED_ELEMENTS = 2**23  # of the gradient; all of it if it is smaller


@dataclass(frozen=True)
class CrossEntropyInputs:
    """Terms (N, V) of one dtype, of which the last requires grad, and (N,) int64 targets.

    Targets of -100 do not count.
    """

    terms: list[Tensor]
    target: Tensor

    @property
    def V(self) -> int:
        return self.terms[0].shape[-1]

    @property
    def chunk(self) -> int:
        return max(1, _CHUNK_ELEMENTS // self.V)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"N": self.target.numel(), "V": self.V}

    def leaves(self) -> list[Tensor]:
        return [term for term in self.terms if term.requires_grad]

    def frozen(self) -> list[Tensor]:
        return self.terms[:-1]

    def arguments(self) -> tuple[list[Tensor], Tensor]:
        return self.terms, self.target

    def logits(self, rows: Tensor) -> Tensor:
        return reduce(add, (term.detach()[rows].double() for term in self.terms))


class CrossEntropy(LossOperator):
    call = "[lm, aux]"

    def needed_bytes(self, case: CaseResult) -> int:
        # Eager holds the sum, its float32 copy, the log-softmax, two gradients in float32 and
        # one in the term's dtype, at worst at one time.
        size: int = getattr(torch, case.dtype).itemsize
        return case.N * case.V * ((case.terms + 2) * size + 4 * 4)

    def inputs(self, case: CaseResult, device: torch.device) -> CrossEntropyInputs:
        """Frozen terms 3 N(0, 1), the trained one N(0, 1), targets uniform; no padding."""
        terms, generator = normal_logits(case, [3.0] * (case.terms - 1) + [1.0], device)
        terms[-1].requires_grad_()
        target = torch.randint(case.V, (case.N,), generator=generator, device=device)
        return CrossEntropyInputs(terms, target)

    def ours(self, device: torch.device, backends: Sequence[str]) -> list[Implementation]:
        every = super().ours(device, backends)
        if device.type == "cpu" and "cpu" in backends:
            memory = auxkern.GradientMemory()
            call = "the same with gradient_memory=auxkern.GradientMemory() kept over calls"
            run = partial(fused, gradient_memory=memory, backend="cpu")
            every.append(Implementation("auxkern cpu, memory kept", call, True, run, memory.release))
        return every

    def eager(self, dtype: torch.dtype) -> list[Peer]:
        logits = "lm + aux" if dtype == torch.float32 else "(lm + aux).float()"
        widened = _of_sum(lambda z, target: F.cross_entropy(z.float(), target))
        peers = [("eager", f"F.cross_entropy({logits}, y), as transformers' loss", widened)]
        if dtype != torch.float32:
            call = "F.cross_entropy(lm + aux, y): loss in the terms' dtype"
            peers.append(("eager half", call, _of_sum(F.cross_entropy)))
        return peers

    def peers(self, device: torch.device) -> list[Peer]:
        """On one tensor of logits; the sum is written for them, as a user would."""
        known = [
            ("Liger", "liger_kernel", "liger_kernel.transformers.functional", "liger_cross_entropy"),
            ("QuACK", "quack", "quack.cross_entropy", "cross_entropy"),
        ]
        return [
            (name, f"{module}.{call}(lm + aux, y)", _of_sum(imported(module, call, reduction="mean")))
            for name, package, module, call in known
            if device.type == "cuda" and is_installed(package)
        ]

    def exact(self, inputs: CrossEntropyInputs, everything: bool = False) -> Exact:
        N, V, counted = inputs.target.numel(), inputs.V, counted_rows(inputs)
        count, total, largest = max(1, counted.numel()), 0.0, 0.0
        for chunk in counted.split(inputs.chunk):
            z = inputs.logits(chunk)
            total += F.cross_entropy(z, inputs.target[chunk], reduction="sum").item()
            largest = max(largest, z.abs().max().item())
        rows = evenly_spaced(N, N if everything else max(2, _CHECKED_ELEMENTS // V), counted.device)
        gradient = torch.empty(rows.numel(), V, dtype=torch.float64, device=rows.device)
        for part, out in zip(rows.split(inputs.chunk), gradient.split(inputs.chunk), strict=True):
            torch.div(d_logits(inputs, part), count, out=out)
        return Exact(total / count, largest, V, rows, gradient)

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

        both = Floor(forward_backward, 2 * forward.bytes + out.numel() * 4)
        return {"forward": forward, "forward_backward": both}


def _of_sum(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda terms, target: function(reduce(add, terms), target)


OPERATOR = CrossEntropy()
