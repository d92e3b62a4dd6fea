"""What a draw is given for each row, and its noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from auxkern.core.mass import SLACK

# Why a row has no token.
ROW_OK, ROW_NAN, ROW_EMPTY, ROW_INFINITE = range(4)


def _kept_count(top_k: float | Tensor, V: int) -> float | Tensor:
    """From 1 on; V or more where all are kept."""
    if isinstance(top_k, Tensor):
        return torch.where(top_k <= 0, V, top_k.long())
    return V if top_k <= 0 else min(top_k, V)


def _reached_share(top_p: float | Tensor, V: int) -> float | Tensor:
    if isinstance(top_p, Tensor):
        return torch.where(top_p < 1, top_p.double() - SLACK, 1.0)
    return top_p - SLACK if top_p < 1 else 1.0


def _least_distance(min_p: float | Tensor, V: int) -> float | Tensor:
    """log(min_p), less the slack of a ratio of two probabilities, which is twice that of one."""
    if isinstance(min_p, Tensor):
        return min_p.double().log() - 2 * SLACK
    return math.log(min_p) - 2 * SLACK if min_p else -math.inf


class RowNumber(NamedTuple):
    """A number that every row of a draw has: a field of ``SamplingParams``, and what kernels take of it.

    Attributes:
        name: that kernels know it by.
        param: the field of ``SamplingParams``.
        off: values of the field that do nothing; such a row's kernel number does nothing either.
        low, high, closed: the range of the field, and whether its ends belong to it.
        filters: whether it keeps some ids and drops the others.
        penalises: whether it acts on ids in the prompt or the history.
        dtype: of the kernel's number; None for that of the logits.
        taken: the kernel's number, of the field and V.
    """

    name: str
    param: str
    off: tuple[float, ...] = ()
    low: float = 0.0
    high: float = math.inf
    closed: tuple[bool, bool] = (True, True)
    filters: bool = False
    penalises: bool = False
    dtype: torch.dtype | None = None
    taken: Callable[[float | Tensor, int], float | Tensor] = lambda value, V: value


_OPEN = (False, False)
# In the order of ``auxkern_sampling`` in kernels/include/auxkern.h; a kernel applies filters in this order.
ROW_NUMBERS = (
    RowNumber("temperature", "temperature", closed=(True, False)),
    RowNumber("top_k", "top_k", (0, -1), -1, filters=True, dtype=torch.int64, taken=_kept_count),
    RowNumber("top_p", "top_p", (1,), 0.0, 1.0, filters=True, dtype=torch.float64, taken=_reached_share),
    RowNumber("log_min_p", "min_p", (0,), 0.0, 1.0, filters=True, taken=_least_distance),
    RowNumber("repetition", "repetition_penalty", (1,), closed=_OPEN, penalises=True),
    RowNumber("presence", "presence_penalty", (0,), -math.inf, closed=_OPEN, penalises=True),
    RowNumber("frequency", "frequency_penalty", (0,), -math.inf, closed=_OPEN, penalises=True),
)

_DTYPES = {number.name: number.dtype for number in ROW_NUMBERS}


@dataclass(frozen=True)
class Draws:
    """What a draw needs beside the terms; one entry per row, every tensor contiguous.

    Ids outside [0, V) stand for nothing. ``top_k`` is V or more, ``top_p`` 1, ``log_min_p`` -inf,
    ``repetition`` 1, the penalties 0 where a row has no such filter. Elsewhere the slack of
    ``auxkern.core.mass`` has been taken from ``top_p``, which may be below 0 then, and from ``log_min_p``.
    """

    numbers: dict[str, float | Tensor]  # by the names of ``ROW_NUMBERS``: of all rows, or (N,)
    seed: Tensor  # (N,) int64, its bits taken as unsigned
    position: Tensor  # (N,) int64
    prompt: Tensor  # (N, P) int64
    history: Tensor  # (N, H) int64
    bias_ids: Tensor  # (N, B) int64: a bias, which is no term
    bias: Tensor  # (N, B) of the logits' dtype
    plain: bool  # known without looking at a tensor: no row has a filter

    def __getitem__(self, name: str) -> Tensor:
        """(N,) the number called ``name`` of every row."""
        number = self.numbers[name]
        if isinstance(number, Tensor):
            return number
        dtype = _DTYPES[name] or self.bias.dtype
        return torch.full(self.seed.shape, number, dtype=dtype, device=self.seed.device)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor."""
        numbers = [x for x in self.numbers.values() if isinstance(x, Tensor)]
        return [*numbers, self.seed, self.position, self.prompt, self.history, self.bias_ids, self.bias]

    @property
    def facts(self) -> Hashable:
        """All but the tensors."""
        shared = [(name, x) for name, x in self.numbers.items() if not isinstance(x, Tensor)]
        return self.plain, tuple(shared)

    def filled(self, name: str) -> Draws:
        """The same with a tensor in place of the number called ``name``."""
        return replace(self, numbers={**self.numbers, name: self[name]})

    def rows(self, rows: slice) -> Draws:
        """The same for some rows."""
        return Draws(
            numbers={name: x[rows] if isinstance(x, Tensor) else x for name, x in self.numbers.items()},
            seed=self.seed[rows],
            position=self.position[rows],
            prompt=self.prompt[rows],
            history=self.history[rows],
            bias_ids=self.bias_ids[rows],
            bias=self.bias[rows],
            plain=self.plain,
        )


class RowTokens(NamedTuple):
    """The token of each row."""

    token: Tensor  # (N,) int64; -1 where the status is not ``ROW_OK``
    status: Tensor  # (N,) int32
    logprob: Tensor  # (N,) among what the filters left, NaN without a token; no elements if not wanted


_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x * factor, both below 2**32, in int64."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _LOW


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011) on int64 tensors that hold 32-bit words.

    Args:
        counter: four words, of shapes that broadcast.
        key: two words.

    Returns:
        Four random words for each counter, int64 below 2**32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, _M0), _product(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [c0, c1, c2, c3]


def random_bits(seed: Tensor, position: Tensor, V: int, first: int = 0) -> Tensor:
    """(N, V) int64 below 2**32 for the ids from ``first``: word id % 4 of counter (id // 4, 0, position).

    Args:
        seed: (N,) int64, the key.
        position: (N,) int64.
    """
    begin = first // 4
    block = torch.arange(begin, -(-(first + V) // 4), device=seed.device)[None]
    seed, position = seed[:, None], position[:, None]
    counter = [block, torch.zeros_like(block), position & _LOW, (position >> 32) & _LOW]
    words = philox(counter, [seed & _LOW, (seed >> 32) & _LOW])
    bits = torch.stack(torch.broadcast_tensors(*words), -1).flatten(1)
    return bits[:, first - 4 * begin :][:, :V]


def gumbel(bits: Tensor) -> Tensor:
    """float64 -log(-log1p(-u)), u = (bits + 0.5) 2**-32, shaped like ``bits``: int64 below 2**32."""
    u = (bits.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u))


def first_largest(x: Tensor) -> Tensor:
    """(N,) int64 lowest id of the largest entry of each row of x (N, V)."""
    V = x.shape[1]
    ids = torch.arange(V, device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), ids, V).amin(-1)
