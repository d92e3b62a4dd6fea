"""What the benchmarks of losses have in common: their two passes, and how both are checked."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import auxkern
from auxkern.bench.operators import Errors, Implementation, Operator


@dataclass
class Exact:
    """float64 results.

    Attributes:
        loss: mean over the rows that count.
        largest_logit: max |z| of those.
        summed: the longest sum that an element of a gradient or the loss of a row is.
        rows: (R,) that have their ``gradient`` (R, V) of logits or ``d_hidden`` (R, D) of a head here.
        ids: (I,) that have their ``d_weight`` (I, D) here.
    """

    loss: float
    largest_logit: float
    summed: int
    rows: Tensor
    gradient: Tensor | None = None
    d_hidden: Tensor | None = None
    ids: Tensor | None = None
    d_weight: Tensor | None = None

    def by_leaf(self) -> list[tuple[Tensor | None, Tensor]]:
        """(index, values) for each leaf."""
        pairs = ((self.rows, self.gradient), (self.rows, self.d_hidden), (self.ids, self.d_weight))
        return [(index, values) for index, values in pairs if values is not None]


class LossOperator(Operator):
    """An operator whose implementations return a 0-d loss, measured forward and with its backward.

    Its inputs also have ``terms``, the last of which is trained; ``target`` (N,), -100 is ignored;
    ``frozen()``, what gets no gradient; ``V``; ``logits(rows)``, (C, V) in float64; and ``chunk``, how many
    of these are made at a time.
    """

    kernel = "cross_entropy_forward"
    call: str  # the terms of a call, for legends

    def ours(self, device: torch.device, backends: Sequence[str]) -> list[Implementation]:
        return [
            Implementation(
                f"auxkern {backend}",
                f'auxkern.cross_entropy({self.call}, y, backend="{backend}")',
                True,
                partial(fused, backend=backend),
            )
            for backend in backends
        ]

    def step(self, inputs: Any, implementation: Implementation, name: str) -> Tensor:
        if name == "forward":
            with torch.no_grad():
                return implementation.run(inputs)
        loss = implementation.run(inputs)
        loss.backward()
        return loss.detach()

    @abstractmethod
    def exact(self, inputs: Any, everything: bool = False) -> Exact:
        """The float64 loss over all rows, and gradients of evenly spaced rows (and ids), or of all.

        A check of every gradient element in float64 would take longer than the measurement.
        """

    def check(
        self, inputs: Any, exact: Any, implementation: Implementation, outputs: Mapping[str, Tensor]
    ) -> Errors:
        # A forward without gradients may take another path; it must say the same.
        each = [self.errors(inputs, exact, loss) for loss in outputs.values()]
        worst = {name: _worst(errors.values[name] for errors in each) for name in each[0].values}
        return Errors(worst, each[0].tolerance)

    def errors(self, inputs: Any, exact: Exact, loss: Tensor) -> Errors:
        """Relative errors of ``loss`` and of the leaves' gradients, the largest; and what is allowed.

        A float32 sum of n values, term by term, is off by about u sqrt(n), u = 2**-24 (Higham 2002,
        section 4.2: rounding errors grow as in a random walk); four times that passes. Code that sums the
        terms in their own dtype before it widens them moves a logit by up to u |z| of that dtype, and a
        probability by that share; code that returns the loss in it rounds each row and their mean. Both
        are common, so they pass, as what they are: the error column shows them.
        """
        leaves = inputs.leaves()
        if any(leaf.grad is None for leaf in leaves):
            raise RuntimeError("the last term, in all its tensors, must have a gradient")
        if any(tensor.grad is not None for tensor in inputs.frozen()):
            raise RuntimeError("the last term, and only it, must have a gradient; the others are frozen")
        gradient = _worst(
            _relative(leaf.grad, index, values)
            for leaf, (index, values) in zip(leaves, exact.by_leaf(), strict=True)
        )
        summation = 4 * 2**-24 * math.sqrt(exact.summed)
        eps = torch.finfo(leaves[0].dtype).eps  # 2 u
        return Errors(
            {"loss": abs(loss.item() - exact.loss) / max(1.0, abs(exact.loss)), "gradient": gradient},
            {"loss": summation + 2 * eps, "gradient": summation + eps / 2 * (1 + exact.largest_logit)},
        )


def fused(inputs: Any, **options: Any) -> Tensor:
    """Ours."""
    loss: Tensor = auxkern.cross_entropy(inputs.terms, inputs.target, **options)
    return loss


def counted_rows(inputs: Any) -> Tensor:
    """Whose target is not -100."""
    return (inputs.target >= 0).nonzero()[:, 0]


def d_logits(inputs: Any, rows: Tensor) -> Tensor:
    """(C, V) float64 gradient of the sum of the losses for some rows' logits; 0 where a row is ignored."""
    target = inputs.target[rows]
    dz = inputs.logits(rows).softmax(-1)
    dz[torch.arange(rows.numel(), device=rows.device), target.clamp(min=0)] -= 1
    return dz.mul_((target >= 0)[:, None])


def evenly_spaced(size: int, count: int, device: torch.device) -> Tensor:
    """At most ``count`` of the integers below ``size``, in order."""
    ends = torch.linspace(0, size - 1, min(size, count), device=device, dtype=torch.float64)
    return ends.round().long().unique()


def _relative(gradient: Tensor | None, index: Tensor | None, exact: Tensor) -> float:
    if gradient is None:
        return math.nan
    largest = exact.abs().max().item() or 1.0
    return (gradient[index].double() - exact).abs().max().item() / largest


def _worst(errors: Any) -> float:
    # max() would lose a NaN that is not its first argument.
    return float(torch.tensor(list(errors), dtype=torch.float64).max())
