"""Which backend runs an operator, which way it goes there, and why.

The table below is the only place that names the backends; each is imported when first asked for, so a
machine without Triton or without the native library still imports auxkern.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from auxkern.core.backend import Backend
from auxkern.core.loss import Loss
from auxkern.core.sums import Sum, check_rows, checked_vocabulary, one_device, tensors_of, vocabulary_of
from auxkern.core.terms import Term, as_terms

_MODULES = {
    "triton": "auxkern.backends.triton",
    "cpu": "auxkern.backends.cpu",
    "reference": "auxkern.backends.reference",
}
BACKENDS = tuple(_MODULES)  # in order of preference


@cache
def _import(name: str) -> Backend | str:
    try:
        backend: Backend = importlib.import_module(_MODULES[name]).BACKEND
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return backend


def refusal(name: str, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
    """Why the backend called ``name`` cannot run on these inputs; None if it can.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in _MODULES:
        raise ValueError(f"backend is {name!r}; choose one of {', '.join(map(repr, BACKENDS))}, or None")
    backend = _import(name)
    return backend if isinstance(backend, str) else backend.refusal(device, dtypes)


def load(name: str) -> Backend:
    """The backend called ``name``, which ``choose`` has accepted.

    Raises:
        RuntimeError: it cannot be imported.
    """
    backend = _import(name)
    if isinstance(backend, str):
        raise RuntimeError(f"backend {name!r} cannot run: {backend}")
    return backend


@dataclass(frozen=True)
class Explanation:
    """Which backend runs and why the others do not; of terms, which way they go there too. ``print`` it.

    Attributes:
        backend: name of the backend that runs.
        device: torch device the question was asked for.
        dtypes: dtypes of the terms.
        refusals: reason of every backend that was preferred but cannot run.
        route: how the backend goes about the sum, such as "segments"; None if no terms were given.
        route_refusals: reason of every faster way of the backend that is not taken.
    """

    backend: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    refusals: dict[str, str]
    route: str | None = None
    route_refusals: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
        route = "" if self.route is None else f", route {self.route!r}"
        lines = [f"{self.device} [{dtypes}]: backend {self.backend!r}{route}"]
        refusals = [*self.refusals.items(), *self.route_refusals.items()]
        return "\n".join([*lines, *(f"  not {name!r}: {reason}" for name, reason in refusals)])


def explain(
    device: torch.device | str | Sequence[Term | Tensor] | Term | Tensor,
    *dtypes: torch.dtype,
    backend: str | None = None,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    return_stats: bool = False,
) -> Explanation:
    """Which backend runs, and why; for terms also which way their ``cross_entropy`` goes, and why no faster.

    Args:
        device: torch device or its name, or the terms of a sum, as in ``cross_entropy``.
        dtypes: of the terms, beside a device; float32 when none is given.
        backend, vocab_size, label_smoothing, return_stats: as in ``cross_entropy``, with terms.

    Raises:
        TypeError: dtypes stand beside terms, or options of ``cross_entropy`` beside a device.
        ValueError: the terms do not fit each other, or there is no backend of that name.
        RuntimeError: the backend asked for cannot run on the terms.
    """
    if isinstance(device, (torch.device, str)):
        if (backend, vocab_size, label_smoothing, return_stats) != (None, None, 0.0, False):
            raise TypeError(
                "backend, vocab_size, label_smoothing and return_stats go with terms; pass the terms in "
                "place of a device"
            )
        return _explained(torch.device(device), dtypes or (torch.float32,))
    if dtypes:
        raise TypeError("dtypes go with a device; terms have their own")
    terms = as_terms(device)
    where, present = one_device(terms), _float_dtypes(tensors_of(terms))
    check_rows(terms)
    V = vocabulary_of(terms, checked_vocabulary(terms, vocab_size))
    chosen = choose(backend, where, present)
    explanation = _explained(where, present) if backend is None else Explanation(backend, where, present, {})
    loss = Loss(label_smoothing=label_smoothing, stats=return_stats)
    route = chosen.route(Sum.of(terms, V), loss)
    return replace(explanation, route=route.name, route_refusals=route.refusals)


def _float_dtypes(tensors: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    return tuple([t.dtype for t in tensors if t.is_floating_point()])


@cache
def _explained(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Explanation:
    refusals: dict[str, str] = {}
    for name in BACKENDS:
        reason = refusal(name, device, dtypes)
        if reason is None and name == "triton" and device.type == "cpu":
            # Reached under TRITON_INTERPRET=1 only: it proves kernels, it does not serve users.
            reason = "the Triton interpreter runs on the CPU only when it is asked for by name"
        if reason is None:
            return Explanation(name, device, dtypes, refusals)
        refusals[name] = reason
    raise RuntimeError(f"no backend can run on {device}: {refusals}")


def choose(backend: str | None, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Backend:
    """The backend to run: the one asked for, or the first that can.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend asked for cannot run on these inputs.
    """
    if backend is None:
        return load(_explained(device, dtypes).backend)
    reason = refusal(backend, device, dtypes)
    if reason is not None:
        raise RuntimeError(
            f"backend={backend!r} cannot run: {reason}. Pass backend=None to choose one that can"
        )
    return load(backend)


def backend_of(backend: str | None, tensors: Sequence[Tensor]) -> Backend:
    """``choose`` for the tensors of a sum."""
    return choose(backend, tensors[0].device, _float_dtypes(tensors))
