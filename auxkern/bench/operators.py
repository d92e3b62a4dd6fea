"""What the runner needs to know about an operator, and what all operators' benchmarks have alike."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auxkern.bench.results import CaseResult

_WORDS = {
    "loss": "relative error of the loss",
    "gradient": "of the gradient",
    "miss": "share of tokens that may not come",
    "surprise": "mean surprise off by, in nats,",
}


@dataclass(frozen=True)
class Implementation:
    """One way to compute what an operator computes, with the code that runs as its description.

    Attributes:
        name: what tables call it; "eager" is the one that ratios refer to.
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


def step(inputs: Any, implementation: Implementation, name: str) -> Tensor:
    """Runs the pass called ``name`` as it is timed, and returns what came out, without a graph."""
    with torch.set_grad_enabled(name == "forward_backward"):
        result = implementation.run(inputs)
    if name == "forward_backward":
        result.backward()
    return result.detach()


Peer = tuple[str, str, Callable[..., Tensor]]  # name, description, function of ``inputs.arguments()``


def peers(device: torch.device, eager: list[Peer], others: list[Peer]) -> list[Implementation]:
    """What people write in PyTorch, if its packages are there, and compiled; then other libraries."""
    # torch.compile gives up on a function that it has compiled for many shapes.
    torch.compiler.reset()
    modes = {"torch.compile": "default"}
    if device.type == "cuda":
        # On a CPU the mode changes nothing here: it tunes GPU reductions and matrix products.
        modes["compile, tuned"] = "max-autotune-no-cudagraphs"
    for name, mode in modes.items() if eager else ():
        compiled = torch.compile(eager[0][2], mode=mode, fullgraph=True, dynamic=False)
        eager = [*eager, (name, f'torch.compile(eager, mode="{mode}")', compiled)]

    def peer(name: str, description: str, function: Callable[..., Tensor]) -> Implementation:
        return Implementation(name, description, False, lambda inputs: function(*inputs.arguments()))

    return [peer(*one) for one in [*eager, *others]]


@dataclass(frozen=True)
class Errors:
    """How far an implementation is from what is right, by what is compared; and how far it may be.

    Of what has no entry in ``tolerance`` any value may be.
    """

    values: dict[str, float]
    tolerance: dict[str, float]

    @property
    def passed(self) -> bool:
        # Written so that NaN does not pass.
        return all(self.values[name] <= allowed for name, allowed in self.tolerance.items())

    def __str__(self) -> str:
        each = self.tolerance.items()
        return ", ".join(f"{_WORDS[n]} {self.values[n]:.1e} ({most:.1e} is allowed)" for n, most in each)


@dataclass(frozen=True)
class Floor:
    """The least work that a pass can have, as a call that does nothing else.

    ``bytes`` are read and written where that bounds the pass; ``flops`` where multiplications do.
    """

    run: Callable[[], object]
    bytes: int = 0
    flops: int = 0


class Operator:
    """Everything about one operator that a benchmark must know.

    The inputs of a case have ``leaves()``, the tensors whose gradients are asked for; ``arguments()``, what
    peers are called with; and ``sizes``, of which a ``CaseResult`` is made.
    """

    # Memory that the hungriest implementation takes, inputs included.
    needed_bytes: Callable[[CaseResult], int]
    # Made-up tensors of the case's shape, the same in every run.
    inputs: Callable[[CaseResult, torch.device], Any]
    # Ours on each of the backends, then every peer that is installed and runs there.
    implementations: Callable[[torch.device, torch.dtype, Sequence[str]], list[Implementation]]
    # The float64 result of inputs, computed once per case.
    exact: Callable[[Any], Any]
    # (inputs, exact, implementation, outputs by pass) -> errors of those and of the leaves' gradients.
    check: Callable[[Any, Any, Implementation, Mapping[str, Tensor]], Errors]
    floors: Callable[[Any], dict[str, Floor]]  # one by pass name, for inputs


def reading(terms: Sequence[Tensor]) -> Floor:
    """A pass that reads every term once.

    It works on int32 views, because integer adds are never slowed by NaN or subnormal bit patterns.
    """
    words = [as_words(term.detach()) for term in terms]
    nbytes = sum(w.numel() * 4 for w in words)
    return Floor(lambda: [torch.sum(w, dtype=torch.int32) for w in words], nbytes)


def as_words(values: Tensor) -> Tensor:
    """1-d int32 view of the values' bytes, or of a copy where they are not contiguous."""
    flat = values.reshape(-1)
    return flat[: flat.numel() - flat.numel() % 2].view(torch.int32)


def normal(
    shapes: Sequence[tuple[tuple[int, int], float]], case: CaseResult, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Normal tensors of each (shape, standard deviation), and (N,) uniform ids; the same in every run."""
    generator = torch.Generator(device).manual_seed(0)
    kind: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "device": device}
    empty = [(torch.empty(shape, **kind), std) for shape, std in shapes]
    tensors = [tensor.normal_(0, std, generator=generator) for tensor, std in empty]
    return tensors, torch.randint(case.V, (case.N,), generator=generator, device=device)


def is_installed(package: str) -> bool:
    """Whether Python finds ``package``; it is not imported."""
    return importlib.util.find_spec(package) is not None


def imported(module: str, function: str, **options: Any) -> Callable[..., Tensor]:
    """``module.function`` with ``options``, imported at the first call.

    A package that cannot be imported is one failed row of the table that way.
    """

    def call(*arguments: Tensor) -> Tensor:
        result: Tensor = getattr(importlib.import_module(module), function)(*arguments, **options)
        return result

    return call


def warped(
    hf: Any, z: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Logits after those of Hugging Face's filters for one step that are on.

    Args:
        hf: ``transformers.generation.logits_process``; torch.compile of PyTorch 2.11 cannot import it.
    """
    none: Any = None  # token ids so far, which these warpers ignore
    z = hf.TemperatureLogitsWarper(temperature)(none, z)
    if top_k:
        z = hf.TopKLogitsWarper(top_k)(none, z)
    if top_p < 1:
        z = hf.TopPLogitsWarper(top_p)(none, z)
    return hf.MinPLogitsWarper(min_p)(none, z) if min_p else z
