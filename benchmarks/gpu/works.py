"""What a choice of speed is measured by: calls of the Triton backend on tensors of typical shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auxkern import Head, Logits, SamplingParams, Sparse
from auxkern.backends.triton import Triton
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.launch import Launch
from auxkern.core.draws import ROW_NUMBERS, Draws
from auxkern.core.loss import Loss, RowSlopes, RowSums
from auxkern.core.sums import Sum, Wanted

SMOLLM2, LLAMA3 = 49152, 128256  # V
ROWS, BATCH = 8192, 64  # of a loss, of a decoding step
_SHOWN = 64  # rows of a gradient that are compared

Call = Callable[[Triton], list[Tensor]]
Prepare = Callable[[torch.device, int, int], Call]


class Trial(Triton):
    """The backend as it is with some choices, which keeps what it launches.

    Attributes:
        launches: so far.
        binaries: of these, if they ran.
    """

    def __init__(self, gpu: Gpu, *, only_plans: bool = False) -> None:
        self._chosen, self._only_plans = gpu, only_plans
        self.launches: list[Launch] = []
        self.binaries: list[Any] = []

    def gpu(self, device: torch.device) -> Gpu:
        return self._chosen

    def run(self, launches: Iterable[Launch], device: torch.device) -> list[Any]:
        launches = list(launches)
        self.launches += launches
        if self._only_plans:
            return [None] * len(launches)
        binaries = super().run(launches, device)
        self.binaries += binaries
        return list(binaries)


def plans(call: Call, gpu: Gpu) -> list[Launch]:
    """What a call would launch on a GPU; nothing is, and what it returns is nobody's."""
    trial = Trial(gpu, only_plans=True)
    call(trial)
    return trial.launches


@dataclass(frozen=True)
class Work:
    """One call of the backend.

    Attributes:
        name: what is called, and the shape.
        N, V: rows and ids.
        prepare: of a device, N and V: the call, on tensors that it makes; results come back as they are
            compared.
    """

    name: str
    N: int
    V: int
    prepare: Prepare


def _normal(
    device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0
) -> Tensor:
    return spread * torch.randn(shape, device=device, dtype=dtype)


def _logits(device: torch.device, N: int, V: int, dtypes: Sequence[torch.dtype]) -> Sum:
    return Sum(tuple(Logits(_normal(device, 1, N, V, dtype=dtype, spread=3.0)) for dtype in dtypes), V)


def _target(device: torch.device, N: int, V: int) -> Tensor:
    return torch.randint(V, (N,), device=device)


def _memory(sum: Sum, places: Sequence[int], *names: str) -> Wanted:
    """Of gradients of some terms; a weight's is float32, for chunks of rows add up in it."""
    return [
        {
            name: torch.zeros_like(
                term.tensors[name], dtype=torch.float32 if name == "weight" else term.tensors[name].dtype
            )
            for name in names
            if i in places
        }
        for i, term in enumerate(sum.terms)
    ]


def _some_rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows[:: max(1, rows.shape[0] // _SHOWN)]


def _gradients(wanted: Wanted) -> list[Tensor]:
    return [_some_rows(x) for its in wanted for x in its.values()]


def forward(*dtypes: torch.dtype, stats: bool = False) -> Prepare:
    """Losses of logits alone."""

    def prepare(device: torch.device, N: int, V: int) -> Call:
        summed, target, loss = _logits(device, N, V, dtypes), _target(device, N, V), Loss(stats=stats)
        return lambda backend: [
            x for x in backend.logits_losses(summed, target, loss, None, [{}] * len(dtypes)) if x.numel()
        ]

    return prepare


def backward(*dtypes: torch.dtype) -> Prepare:
    """The gradient of the last term, of rows whose sums are made up."""

    def prepare(device: torch.device, N: int, V: int) -> Call:
        summed, target = _logits(device, N, V, dtypes), _target(device, N, V)
        wanted = _memory(summed, [len(dtypes) - 1], "values")
        ones = torch.ones(N, device=device)
        # About the largest of these logits: no exponential overflows.
        sums = RowSums(nll=3 * ones, row_max=12 * ones, log_sum=ones)
        slopes = RowSlopes(ones / N, sums, target >= 0, Loss(), V)

        def call(backend: Triton) -> list[Tensor]:
            backend.logits_gradients(summed, target, slopes, wanted)
            return _gradients(wanted)

        return call

    return prepare


def fused(*dtypes: torch.dtype, stats: bool = False) -> Prepare:
    """Losses and the gradient of the last term in one pass."""

    def prepare(device: torch.device, N: int, V: int) -> Call:
        summed, target, loss = _logits(device, N, V, dtypes), _target(device, N, V), Loss(stats=stats)
        wanted, weight = (
            _memory(summed, [len(dtypes) - 1], "values"),
            torch.full((N,), 1 / N, device=device),
        )

        def call(backend: Triton) -> list[Tensor]:
            rows = backend.logits_losses(summed, target, loss, weight, wanted)
            return [*(x for x in rows if x.numel()), *_gradients(wanted)]

        return call

    return prepare


def step(*dtypes: torch.dtype) -> Prepare:
    """Losses of logits and the gradient of the last term, in as many passes as the route says."""

    def prepare(device: torch.device, N: int, V: int) -> Call:
        summed, target, loss = _logits(device, N, V, dtypes), _target(device, N, V), Loss()
        wanted, weight = (
            _memory(summed, [len(dtypes) - 1], "values"),
            torch.full((N,), 1 / N, device=device),
        )
        counts, nothing = target >= 0, [{}] * len(dtypes)

        def call(backend: Triton) -> list[Tensor]:
            if backend.logits_route(summed, loss).fused:
                rows = backend.logits_losses(summed, target, loss, weight, wanted)
            else:
                rows = backend.logits_losses(summed, target, loss, None, nothing)
                backend.logits_gradients(
                    summed, target, RowSlopes(weight, rows.sums, counts, loss, V), wanted
                )
            return [rows.nll, *_gradients(wanted)]

        return call

    return prepare


@dataclass(frozen=True)
class Heads:
    """Output heads.

    Attributes:
        widths: D of each.
        dtypes: of each one's weight.
        hidden: of all hidden states; as the weight's where None.
        pointer: whether a sparse term stands beside them.
        softcap: of each.
    """

    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    hidden: torch.dtype | None = None
    pointer: bool = False
    softcap: float | None = None

    def sum(self, device: torch.device, N: int, V: int) -> Sum:
        """Random ones, whose logits have a spread of about 2."""
        terms: list[Any] = [
            Head(
                _normal(device, N, D, dtype=self.hidden or dtype),
                _normal(device, V, D, dtype=dtype, spread=2 * D**-0.5),
                softcap=self.softcap,
            )
            for D, dtype in zip(self.widths, self.dtypes, strict=True)
        ]
        if self.pointer:
            ids = torch.randint(V, (N, 40), device=device)
            terms.append(Sparse(ids, _normal(device, N, 40)))
        return Sum(tuple(terms), V)


def heads_loss(heads: Heads, *, stats: bool = False, trained: bool = False) -> Prepare:
    """Losses of heads; ``trained`` with the gradients of the last head."""

    def prepare(device: torch.device, N: int, V: int) -> Call:
        summed, target, loss = heads.sum(device, N, V), _target(device, N, V), Loss(stats=stats)
        last = len(heads.widths) - 1
        wanted = _memory(summed, [last] if trained else [], "hidden", "weight")
        weight = torch.full((N,), 1 / N, device=device) if trained else None

        def call(backend: Triton) -> list[Tensor]:
            rows = backend.heads_losses(summed, target, loss, weight, wanted)
            return [*(x for x in rows if x.numel()), *_gradients(wanted)]

        return call

    return prepare


def _draws(device: torch.device, N: int, V: int, params: SamplingParams) -> Draws:
    ids, rows = torch.empty(N, 0, dtype=torch.int64, device=device), torch.arange(N, device=device)
    return Draws(
        numbers={number.name: number.taken(getattr(params, number.param), V) for number in ROW_NUMBERS},
        seed=rows,
        position=torch.zeros_like(rows),
        prompt=ids,
        history=ids,
        bias_ids=ids,
        bias=torch.empty(N, 0, device=device),
        plain=params.is_plain,
    )


def draw(params: SamplingParams, *dtypes: torch.dtype) -> Prepare:
    """Tokens from logits."""

    def prepare(device: torch.device, N: int, V: int) -> Call:
        summed, draws = _logits(device, N, V, dtypes), _draws(device, N, V, params)
        return lambda backend: list(backend.logits_draw(summed, draws, False)[:2])

    return prepare


def heads_draw(params: SamplingParams, heads: Heads) -> Prepare:
    """Tokens from heads."""

    def prepare(device: torch.device, N: int, V: int) -> Call:
        summed, draws = heads.sum(device, N, V), _draws(device, N, V, params)
        return lambda backend: list(backend.heads_draw(summed, draws, False)[:2])

    return prepare
