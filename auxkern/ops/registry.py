"""Which backend runs an operator, and why.

A backend is one object that says whether it can run (``refusal``) and does the arithmetic of
every operator it knows. The table below is the only place that names them; each is imported
when first asked for, so a machine without Triton or without the native library still imports
auxkern.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from auxkern.core.loss import RowSlopes

# The target of a row whose target is not among these ids but among those of another shard.
NO_TARGET = -(2**63)


@dataclass(frozen=True)
class Rows:
    """What a backend's ``cross_entropy_forward`` returns, one entry per row.

    Float fields are float32 (float64 if any term is float64); a field that was not asked for
    has no elements. Rows whose target is ``ignore_index`` are not read: they hold 0 (argmax -1).
    Rows whose target lies outside [0, V) hold NaN in ``nll`` and ``row_max``; but a row whose target is
    ``NO_TARGET`` is one whose target has a logit of -inf: its ``nll`` is infinite, the rest is what its
    V ids add up to. A row of nothing but -inf has -inf in ``row_max`` and ``log_sum``, NaN in ``nll``.

    z is the sum of the terms over the first V ids, y the target.
    """

    nll: Tensor  # (N,)   lse - z[y], precise also when p[y] is close to 1
    row_max: Tensor  # (N,)   max_v z[v]
    log_sum: Tensor  # (N,)   log sum_v exp(z[v] - row_max); lse = row_max + log_sum
    smooth: Tensor  # (N,)   mean_v (lse - z[v])
    argmax: Tensor  # (N,)   int64, lowest id among equals
    term_nll: Tensor  # (I, N) nll of the target under softmax(term i alone)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.nll, self.row_max, self.log_sum, self.smooth, self.argmax, self.term_nll


class Backend(Protocol):
    """The arithmetic of every operator, on checked inputs.

    Logits arrive as (outer, inner, V or more) strided views with outer * inner = N; row n of a
    term is [n // inner, n % inner]. Each term has its own split.
    """

    name: str

    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        """Why this backend cannot run on these inputs; None if it can."""
        ...

    def cross_entropy_forward(
        self,
        values: list[Tensor],  # I terms of (outer_i, inner_i, >= V)
        target: Tensor,  # (N,) int64, contiguous
        scales: list[float],
        softcaps: list[float],  # 0 means none
        vocab_size: int,
        ignore_index: int,
        want_smooth: bool,
        want_stats: bool,  # argmax and term_nll
    ) -> Rows: ...

    def cross_entropy_backward(
        self,
        values: list[Tensor],
        target: Tensor,  # (N,) int64, contiguous
        row_max: Tensor,  # (N,)
        exp_coefficient: Tensor,  # (N,)
        constant: Tensor,  # (N,)
        target_gradient: Tensor,  # (N,)
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        wanted: list[int],
    ) -> list[Tensor]:
        """Gradients of the terms in ``wanted``, contiguous, shaped and typed like their values.

            dz[n, v] = target_gradient[n]                              v = target[n], if that is in [0, V)
            dz[n, v] = exp_coefficient[n] * exp(z[n, v] - row_max[n]) - constant[n]   other v < V
            dz[n, v] = 0                                                          v >= V
            d_values = dz * scale * (1 - tanh(values / softcap)**2)

        A row whose three coefficients are all 0 is 0 whatever its logits hold.
        """
        ...


class BackendWithFusedGradient(Backend, Protocol):
    """A backend that can also make the gradient during the forward pass."""

    def cross_entropy_forward_gradient(
        self,
        values: list[Tensor],
        target: Tensor,
        row_weight: Tensor,  # (N,)
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        want_stats: bool,
        wanted: list[int],
        out: list[Tensor | None] | None = None,
    ) -> tuple[Rows, list[Tensor]]:
        """The rows, with ``smooth`` if label_smoothing > 0, and d/d values of

            sum_n row_weight[n] * ((1 - label_smoothing) nll[n] + label_smoothing smooth[n]
                                   + z_loss lse[n]**2)

        for the terms in ``wanted``, as ``cross_entropy_backward`` would return them; written to
        ``out`` where that holds a contiguous tensor, which may be the term's own values.
        """
        ...


@dataclass(frozen=True)
class HeadRows:
    """A head of some rows: ``scale * softcap(hidden @ weight[:V].T + bias[:V])``."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (>= V, D)
    bias: Tensor | None  # (>= V,)
    scale: float
    softcap: float  # 0 means none


@dataclass(frozen=True)
class HeadGradients:
    """The gradient of a sum of heads with respect to their products, for one unit of each row's loss.

    d row[n] / d (hidden[n] @ weight[v] + bias[v]) of a head is
    ``scale * unit[n] * products[i][n, v] / magnified``.
    """

    products: list[Tensor]  # of each wanted head (N, V), 16-bit or float32; one tensor may stand for several
    unit: Tensor  # (N,) float32, finite; 1 without z-loss
    magnified: float  # a power of 2 that keeps the products above underflow


class BackendWithHeads(Backend, Protocol):
    """A backend that makes logits from hidden states itself, and never holds them as a whole."""

    def heads_refusal(self, heads: list[HeadRows]) -> str | None:
        """Why it leaves this sum to library products; None if it takes it."""
        ...

    def heads_forward(
        self,
        heads: list[HeadRows],
        target: Tensor,  # (N,) int64, contiguous
        vocab_size: int,
        ignore_index: int,
        want_smooth: bool,
        want_stats: bool,
    ) -> Rows: ...

    def heads_forward_gradient(
        self,
        heads: list[HeadRows],
        target: Tensor,
        counts: Tensor,  # (N,) bool: not ignored, and of a weight that is not 0
        vocab_size: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        want_stats: bool,
        wanted: list[int],
    ) -> tuple[Rows, HeadGradients]:
        """The rows, with ``smooth`` if label_smoothing > 0, and gradients for the heads in ``wanted``.

        They are those of ``(1 - label_smoothing) nll + label_smoothing smooth + z_loss lse**2``; of a
        row that does not count 0, whatever its hidden state holds.
        """
        ...

    def heads_gradient(
        self,
        heads: list[HeadRows],
        target: Tensor,  # (N,) int64, contiguous; outside [0, vocab_size) for a row without a target here
        slopes: RowSlopes,
        vocab_size: int,
        wanted: list[int],
    ) -> HeadGradients:
        """The gradients of ``heads_forward_gradient`` for rows whose sums are known: ids of more shards."""
        ...


@dataclass(frozen=True)
class Entries:
    """Sparse values of some rows, by rising id."""

    ids: Tensor  # (E,) int64
    rows: Tensor  # (E,) int64
    values: Tensor  # (E,) float32, contiguous
    order: Tensor  # (E,) their places in the order given


@dataclass(frozen=True)
class Segments:
    """What ``BackendWithSegments.segments_forward`` leaves of C rows; S segments of the vocabulary."""

    maximum: Tensor  # (S, C) float32, close to the segment's maximum
    total: Tensor  # (S, C) float32, sum of exp(z - maximum) over all ids but the target
    z_target: Tensor  # (C,) float32; -inf without a target
    kept: Any  # the backend's own


@dataclass(frozen=True)
class SegmentGradients:
    """What ``BackendWithSegments.segments_backward`` has to make beside the hidden states' gradients."""

    d_weight: list[Tensor | None]  # of each head (>= V, D) float32, contiguous
    d_bias: list[Tensor | None]  # of each head (>= V,) float32
    want_values: bool
    accumulate: bool  # add to what the weights' and biases' gradients hold


class BackendWithSegments(Backend, Protocol):
    """A backend that makes logits of heads and sparse terms by segments of the vocabulary."""

    def segments_refusal(self, heads: list[HeadRows]) -> str | None:
        """Why it leaves this sum to library products; None if it takes it."""
        ...

    def segments_e_size(self, C: int, V: int) -> int:
        """Elements of the float32 memory that C rows need if a gradient is wanted."""
        ...

    def segments_forward(
        self,
        heads: list[HeadRows],
        entries: Entries,
        target: Tensor,  # (C,) int64 in [0, V) or NO_TARGET, contiguous
        live: Tensor | None,  # (C,) bool: False where the gradient is 0 whatever the row holds
        vocab_size: int,
        want_back: list[bool],
        e: Tensor | None,  # float32 memory for the exponentials, kept until the gradients are made
    ) -> Segments: ...

    def segments_backward(
        self,
        segments: Segments,
        row_max: Tensor,  # (C,) float64
        exp_coefficient: Tensor,  # (C,) float64
        target_gradient: Tensor,  # (C,) float64
        gradients: SegmentGradients,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """d_hidden (C, D) float32 of the heads that want it, and d_values (E,) by rising id.

        dz[n, v] = exp_coefficient[n] * exp(z[n, v] - row_max[n]); target_gradient[n] at the target.
        """
        ...


@dataclass(frozen=True)
class Draws:
    """What ``BackendWithSample.sample`` needs beside the terms; one entry per row.

    Ids outside [0, V) stand for nothing. ``top_k`` is V or more, ``top_p`` 1, ``log_min_p`` -inf,
    ``repetition`` 1, the penalties 0 where a row has no such filter. Elsewhere the slack of
    ``auxkern.core.mass`` has been taken from ``top_p``, which may be below 0 then, and from ``log_min_p``.
    """

    temperature: Tensor  # (N,) float32, or float64 beside float64 terms
    top_k: Tensor  # (N,) int64, at least 1
    top_p: Tensor  # (N,) float64
    log_min_p: Tensor  # (N,) as temperature
    repetition: Tensor  # (N,) as temperature
    presence: Tensor  # (N,) as temperature
    frequency: Tensor  # (N,) as temperature
    seed: Tensor  # (N,) int64, its bits taken as unsigned
    position: Tensor  # (N,) int64
    prompt: Tensor  # (N, P) int64
    history: Tensor  # (N, H) int64
    added_ids: Tensor  # (N, K) int64: sparse terms
    added: Tensor  # (N, K) as temperature
    bias_ids: Tensor  # (N, B) int64: a bias, which is no term
    bias: Tensor  # (N, B) as temperature
    row_scales: list[Tensor | None]  # for each term (N,) as temperature
    plain: bool  # known without looking at a tensor: no row has a filter


# Why a row has no token.
ROW_OK, ROW_NAN, ROW_EMPTY, ROW_INFINITE = range(4)


class BackendWithSample(Backend, Protocol):
    """A backend that draws tokens."""

    def sample(
        self,
        values: list[Tensor],  # as for ``cross_entropy_forward``
        scales: list[float],
        softcaps: list[float],
        vocab_size: int,
        draws: Draws,
        want_logprob: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token (N,) int64, status (N,) int32, and log-probability (N,) among what the filters left.

        As ``auxkern_sample`` in kernels/include/auxkern.h says. No token is -1, its log-probability NaN;
        the latter has no elements if it is not wanted.
        """
        ...


class BackendWithHeadSample(BackendWithHeads, BackendWithSample, Protocol):
    """A backend that draws tokens from output heads without writing their logits."""

    def sample_heads(
        self, heads: list[HeadRows], vocab_size: int, draws: Draws, want_logprob: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``sample``, from heads that ``heads_refusal`` takes; ``draws.row_scales`` is not looked at."""
        ...


class BackendWithLinear(Backend, Protocol):
    """A backend with products of its own for layers that are not trained."""

    def linear_refusal(self, x: Tensor, weight: Tensor) -> str | None:
        """Why it leaves this product to torch; None if it takes it."""
        ...

    def linear(
        self,
        x: Tensor,  # (M, K) float32
        weight: Tensor,  # (N, K) float32, float16 or bfloat16, rows contiguous
        bias: Tensor | None,  # (N,)
        y: Tensor,  # (M, N) float32, rows contiguous, written
        accumulate: bool,
    ) -> None:
        """``y = x @ weight.T + bias``, plus what y held if ``accumulate``, summed in float32.

        A row of y does not depend on the other rows.
        """
        ...


class BackendWithAttention(Backend, Protocol):
    """A backend with attention of its own over a cache that is not trained."""

    def attention_refusal(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
        """Why it leaves these to torch; None if it takes them."""
        ...

    def attention(
        self,
        query: Tensor,  # (B, H, T, D) float32
        key: Tensor,  # (B, G, P, D) float32
        value: Tensor,  # (B, G, P, D) float32
        mask: Tensor | None,  # (B or 1, 1, T or 1, P or 1) bool; None: position t sees P - T + t + 1 columns
        scale: float,
        out: Tensor,  # (B, T, H, D) float32, contiguous, written
    ) -> None:
        """As ``auxkern.ops.attention.attention``. A row does not depend on the others, nor on what it
        does not see.
        """
        ...


_MODULES = {
    "triton": "auxkern.backends.triton",
    "cpu": "auxkern.backends.cpu",
    "reference": "auxkern.backends.reference",
}
BACKENDS = tuple(_MODULES)  # in order of preference


@cache
def _import(name: str) -> Backend | str:
    try:
        return importlib.import_module(_MODULES[name]).BACKEND
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def refusal(name: str, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
    """Why the backend called ``name`` cannot run on these inputs; None if it can.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in _MODULES:
        raise ValueError(f"backend is {name!r}; choose one of {', '.join(map(repr, BACKENDS))}, or None")
    backend = _import(name)
    return backend if isinstance(backend, str) else backend.refusal(device, dtypes)


def makes_gradient_with_forward(name: str) -> bool:
    """Whether the backend called ``name`` is a ``BackendWithFusedGradient``."""
    return hasattr(_import(name), "cross_entropy_forward_gradient")


def makes_logits_of_heads(name: str) -> bool:
    """Whether the backend called ``name`` is a ``BackendWithHeads``."""
    return hasattr(_import(name), "heads_refusal")


def load(name: str) -> Any:
    """The backend called ``name``, which ``choose`` has accepted."""
    backend = _import(name)
    if isinstance(backend, str):
        raise RuntimeError(f"backend {name!r} cannot run: {backend}")
    return backend


@dataclass(frozen=True)
class Explanation:
    """Which backend runs and why the others do not; ``print`` it.

    Attributes:
        backend: name of the backend that runs.
        device: torch device the question was asked for.
        dtypes: dtypes of the terms.
        refusals: reason of every backend that was preferred but cannot run.
    """

    backend: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    refusals: dict[str, str]

    def __str__(self) -> str:
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
        lines = [f"{self.device} [{dtypes}]: backend {self.backend!r}"]
        lines += [f"  not {name!r}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


@cache
def explain(device: torch.device | str, *dtypes: torch.dtype) -> Explanation:
    """Which backend ``backend=None`` chooses for terms on ``device``, and why.

    Args:
        device: torch device or its name.
        dtypes: dtypes of the terms; float32 when none is given.
    """
    device = torch.device(device)
    asked = dtypes or (torch.float32,)
    refusals: dict[str, str] = {}
    for name in BACKENDS:
        reason = refusal(name, device, asked)
        if reason is None and name == "triton" and device.type == "cpu":
            # Reached under TRITON_INTERPRET=1 only: it proves kernels, it does not serve users.
            reason = "the Triton interpreter runs on the CPU only when it is asked for by name"
        if reason is None:
            return Explanation(name, device, asked, refusals)
        refusals[name] = reason
    raise RuntimeError(f"no backend can run on {device}: {refusals}")


def choose(backend: str | None, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """The name of the backend to run: the one asked for, or the first that can.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend asked for cannot run on these inputs.
    """
    if backend is None:
        return explain(device, *dtypes).backend
    reason = refusal(backend, device, dtypes)
    if reason is not None:
        raise RuntimeError(
            f"backend={backend!r} cannot run: {reason}. Pass backend=None to choose one that can"
        )
    return backend
