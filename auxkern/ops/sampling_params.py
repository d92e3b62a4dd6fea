"""How a next token is chosen from a row of logits."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from auxkern.core.draws import ROW_NUMBERS, RowNumber
from auxkern.core.terms import INTEGER_DTYPES, Sparse, as_number
from auxkern.ops.generation_config import settings_of


@dataclass(frozen=True, eq=False)
class SamplingParams:
    """How a token is drawn from z, the sum of the terms; each field one number, or one for each row.

    In Hugging Face's order: ``logit_bias``, the penalties, temperature, top-k, top-p, min-p.

    Which ids are kept is exact, and the same on every backend: ids come by falling logit, equal ones by
    rising id, and top-p keeps an id while the mass of those before it has not reached p. Mass is an integer
    (``auxkern.core.mass``); p is a double, of which 2**-20 is taken first, so that probabilities that sum to
    p on paper reach it in float32. So k of V equal logits are kept with p = k/V, up to a V of 2**20. min-p
    keeps an id whose logit lies no more than 2**-19 below where its share would be min_p.

    Args:
        temperature: what z is divided by; 0 takes the largest logit, the lowest id among equals, whatever
            the filters are.
        top_k: keeps the k largest logits, and all that equal the last of them; 0 and -1 keep all.
        top_p: keeps the fewest tokens, by falling probability and rising id, whose probabilities
            reach p, in [0, 1] (Holtzman et al. 2020); 0 keeps the first alone.
        min_p: keeps tokens with at least this share of the largest probability, in [0, 1] (Nguyen
            et al. 2024).
        repetition_penalty: of ids in the prompt or the history: a positive logit is divided by it,
            another one multiplied (Keskar et al. 2019); 1 is none.
        presence_penalty: subtracted from logits of ids in the history; 0 is none.
        frequency_penalty: subtracted once for each time that an id is in the history; 0 is none.
        logit_bias: {id: bias}, or ``Sparse(ids (N, K), values (N, K))``, added first; -inf forbids
            an id.

    Numbers are Python's, NumPy's, 0-d arrays, or tensors (N,): int64 or another integer for top_k, of any
    floating-point or integer dtype for the rest. A tensor on a GPU is not looked at, which would stop the
    GPU; what it holds must be in range.

    Raises:
        TypeError: a field is neither a number nor a tensor.
        ValueError: a number is out of range, or two tensors are of different numbers of rows.
    """

    temperature: float | Tensor = 1.0
    top_k: int | Tensor = 0
    top_p: float | Tensor = 1.0
    min_p: float | Tensor = 0.0
    repetition_penalty: float | Tensor = 1.0
    presence_penalty: float | Tensor = 0.0
    frequency_penalty: float | Tensor = 0.0
    logit_bias: Mapping[int, float] | Sparse | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, as_number(getattr(self, field.name)))
        for number in ROW_NUMBERS:
            self._check(number)
        self._check_bias()

    @classmethod
    def from_generation_config(cls, config: object) -> SamplingParams:
        """The same as a transformers ``GenerationConfig`` says; see ``auxkern.ops.generation_config``.

        Args:
            config: where ``do_sample`` is not true, temperature 0. What it leaves open is as in
                ``generate``: top_k 50. How long a text is, where it stops, how many are returned and with
                what (lengths, times, special tokens, ``stop_strings``, ``num_return_sequences``,
                ``output_*``), and how fast it is made (caches, assistants, compilation) is the caller's.

        Raises:
            TypeError: it is no ``GenerationConfig``.
            ValueError: it asks for something that has no counterpart here, such as beams, or has a field
                that is not known.
        """
        return cls(**settings_of(config))

    @cached_property
    def is_plain(self) -> bool:
        """Whether no filter acts on a row; numbers in tensors are not looked at, and may be filters."""
        greedy = not isinstance(self.temperature, Tensor) and self.temperature == 0
        return greedy or not any(self._acts(number) for number in ROW_NUMBERS if number.filters)

    @cached_property
    def facts(self) -> Hashable:
        """The numbers, None for those that are tensors."""
        values = [getattr(self, number.param) for number in ROW_NUMBERS]
        return tuple([None if isinstance(value, Tensor) else value for value in values])

    @cached_property
    def row_tensors(self) -> list[Tensor]:
        """Those that are."""
        values = [getattr(self, number.param) for number in ROW_NUMBERS]
        return [value for value in values if isinstance(value, Tensor)]

    @property
    def penalises(self) -> bool:
        """Whether a penalty acts on a row; numbers in tensors are not looked at, and may be penalties."""
        return any(self._acts(number) for number in ROW_NUMBERS if number.penalises)

    def _acts(self, number: RowNumber) -> bool:
        value = getattr(self, number.param)
        return isinstance(value, Tensor) or value not in number.off

    def _check(self, number: RowNumber) -> None:
        name, low, high, closed = number.param, number.low, number.high, number.closed
        value, integer = getattr(self, name), number.dtype == torch.int64
        allowed = f"{'[' if closed[0] else '('}{low}, {high}{']' if closed[1] else ')'}"
        if isinstance(value, Tensor):
            self._check_tensor(name, value, integer)
            if value.device.type != "cpu" or value.numel() == 0:
                return
            outside = (value < low if closed[0] else value <= low) | (
                value > high if closed[1] else value >= high
            )
            worst = value[outside | value.isnan()]
            if worst.numel():
                raise ValueError(f"{name} holds {worst[0].item()}; it must lie in {allowed}")
            return
        if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
            kind = "an int" if integer else "a number"
            raise TypeError(f"{name} must be {kind} or a tensor (N,), got {type(value).__name__}")
        size = float(value)
        above = size >= low if closed[0] else size > low
        if not (above and (size <= high if closed[1] else size < high)):
            raise ValueError(f"{name} is {value}; it must lie in {allowed}")

    def _check_tensor(self, name: str, value: Tensor, integer: bool) -> None:
        if value.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; give one number, or a tensor (N,)")
        if value.dtype not in INTEGER_DTYPES and (integer or not value.is_floating_point()):
            kind = "integers" if integer else "floating-point or integers"
            raise TypeError(f"{name} has dtype {value.dtype}; it must be {kind}")
        for field in fields(self):
            other = getattr(self, field.name)
            if isinstance(other, Tensor) and other.dim() == 1 and other.shape != value.shape:
                raise ValueError(
                    f"{name} has {value.shape[0]} entries but {field.name} has {other.shape[0]}; "
                    "give each row one of both"
                )

    def _check_bias(self) -> None:
        bias = self.logit_bias
        if bias is None or isinstance(bias, Sparse):
            return
        if not isinstance(bias, Mapping):
            raise TypeError(
                f"logit_bias must be a dict {{id: bias}}, auxkern.Sparse or None, got {type(bias).__name__}"
            )
        listed = {as_number(token): as_number(value) for token, value in bias.items()}
        for token, value in listed.items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ValueError(f"logit_bias has the key {token!r}; keys are token ids")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value < math.inf:
                raise ValueError(f"logit_bias[{token}] is {value!r}; it must be a number below infinity")
        object.__setattr__(self, "logit_bias", listed)
