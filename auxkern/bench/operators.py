"""What the runner needs to know about an operator, and where each one's file is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from auxkern.bench.cases import OPERATORS, Case


@dataclass(frozen=True)
class Implementation:
    """One way to compute what an operator computes.

    Attributes:
        name: what tables call it; "eager" is the one that ratios refer to.
        description: the code that runs, for legends.
        ours: whether it belongs to auxkern.
        run: inputs -> 0-d loss, with a graph to ``inputs.leaves()`` where gradients are enabled; or
            inputs -> tokens (N,).
        release: drops the memory that it keeps from call to call. Called before peak memory is
            measured, so that what a call keeps is counted as the call's.
    """

    name: str
    description: str
    ours: bool
    run: Callable[[Any], Tensor]
    release: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Errors:
    """How far an implementation is from what is right, by what is compared; and how far it may be.

    Losses have the entries "loss" and "gradient", relative to float64, in both. Of what has no entry in
    ``tolerance`` any value may be.
    """

    values: dict[str, float]
    tolerance: dict[str, float]

    @property
    def passed(self) -> bool:
        # Written so that NaN does not pass.
        return all(self.values[name] <= allowed for name, allowed in self.tolerance.items())

    def __str__(self) -> str:
        return ", ".join(
            f"{_ERRORS[name]} {self.values[name]:.1e} ({allowed:.1e} is allowed)"
            for name, allowed in self.tolerance.items()
        )


_ERRORS = {
    "loss": "relative error of the loss",
    "gradient": "of the gradient",
    "miss": "share of tokens that may not come",
    "surprise": "mean surprise off by, in nats,",
}


@dataclass(frozen=True)
class Floor:
    """The least work that a pass can have, as a call that does nothing else.

    Attributes:
        run: the call.
        bytes: what it reads and writes, where that is what bounds the pass; else 0.
        flops: multiplications and additions, where those are what bounds the pass; else 0.
    """

    run: Callable[[], object]
    bytes: int = 0
    flops: int = 0


def reading(terms: Sequence[Tensor]) -> Floor:
    """A pass that reads every term once.

    It works on int32 views, because integer adds are never slowed by NaN or subnormal bit patterns.
    """
    words = [as_words(term.detach()) for term in terms]

    def run() -> None:
        for w in words:
            torch.sum(w, dtype=torch.int32)

    return Floor(run, sum(w.numel() * 4 for w in words))


def as_words(values: Tensor) -> Tensor:
    """1-d int32 view of the values' bytes, or of a copy where they are not contiguous."""
    flat = values.reshape(-1)
    return flat[: flat.numel() - flat.numel() % 2].view(torch.int32)


class Inputs(Protocol):
    """A case's tensors."""

    def leaves(self) -> Sequence[Tensor]:
        """The tensors whose gradients are asked for."""
        ...


class Operator(Protocol):
    """Everything about one operator that a benchmark must know.

    Attributes:
        name: one of ``auxkern.bench.cases.OPERATORS``.
        kernel: the method that a backend must have to run it.
    """

    name: str
    kernel: str

    def needed_bytes(self, case: Case) -> int:
        """Memory that the hungriest implementation takes, inputs included."""
        ...

    def inputs(self, case: Case, device: torch.device) -> Any:
        """Made-up tensors of the case's shape, the same in every run."""
        ...

    def implementations(
        self, device: torch.device, dtype: torch.dtype, backends: Sequence[str]
    ) -> list[Implementation]:
        """Ours on each of ``backends``, then every peer that is installed and runs there."""
        ...

    def exact(self, inputs: Any) -> Any:
        """The float64 result, computed once per case."""
        ...

    def step(self, inputs: Any, implementation: Implementation, name: str) -> Tensor:
        """Runs the pass called ``name`` as it is timed, and returns what came out, without a graph."""
        ...

    def check(
        self, inputs: Any, exact: Any, implementation: Implementation, made: Mapping[str, Tensor]
    ) -> Errors:
        """Errors of what the steps made, by pass name, and of the gradients that now lie in the leaves."""
        ...

    def floors(self, inputs: Any) -> dict[str, Floor]:
        """One floor by pass name."""
        ...


def load(name: str) -> Operator:
    """The operator called ``name``, one of ``auxkern.bench.cases.OPERATORS``."""
    if name not in OPERATORS:
        raise ValueError(f"op is {name!r}; choose one of {', '.join(OPERATORS)}")
    operator: Operator = importlib.import_module(f"auxkern.bench.{name}").OPERATOR
    return operator
