"""What the running sequences are drawn with, in device memory, by slots.

A step reads it and brings it up to date itself: the drawn token is the next one to be read, and the
last of the history. So the host has nothing to send while the same sequences run.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auxkern.core.draws import ROW_NUMBERS
from auxkern.generation.request import Sequences
from auxkern.generation.transfers import send

# Requests with more biases are drawn without a graph.
BIASES = 32
_COUNTED = slice(0, 2)  # position and written: one more with each token
_OWN = ("position", "written", "last", "seed", "live")
_WIDE = ("prompt", "history", "bias_ids", "bias")
_INTEGERS = tuple(number.param for number in ROW_NUMBERS if number.dtype == torch.int64)
_NUMBERS = tuple(number.param for number in ROW_NUMBERS if number.dtype != torch.int64)


@dataclass(frozen=True)
class _Columns:
    """Which columns of the two tensors are whose."""

    integers: dict[str, slice]
    numbers: dict[str, slice]

    @classmethod
    def of(cls, length: int) -> _Columns:
        wide = {"prompt": length, "history": length, "bias_ids": BIASES}
        return cls(
            _consecutive({**dict.fromkeys((*_OWN, *_INTEGERS), 1), **wide}),
            _consecutive({**dict.fromkeys((*_NUMBERS, "scale"), 1), "bias": BIASES}),
        )


class Rows:
    """Numbers of sequences in slots 0, 1, ...; slots that are not taken hold harmless ones.

    They stand in two tensors, so that newcomers take two copies and a move two more.

    Args:
        slots: most sequences.
        length: L, most tokens of a sequence.
        device: of the model.
    """

    def __init__(self, slots: int, length: int, device: torch.device) -> None:
        self._columns = _Columns.of(length)
        width = max(columns.stop for columns in self._columns.integers.values())
        self._integers = torch.zeros(slots, width, dtype=torch.int64, device=device)
        width = max(columns.stop for columns in self._columns.numbers.values())
        self._numbers = torch.zeros(slots, width, dtype=torch.float64, device=device)
        self.clear()

    def __getitem__(self, name: str) -> Tensor:
        """A view of one number of each slot, (slots,); (slots, L) ``prompt`` and ``history``.

        int64: "position" of the token that is drawn next; "written", tokens of the history; "last", the token
        that is read next; "seed"; "live", 1 where a sequence runs; "top_k"; "prompt" and "history", -1 behind
        their ends; "bias_ids" (slots, BIASES). float64: the other fields of ``SamplingParams``; "scale", the
        mixing weight; "bias" (slots, BIASES).
        """
        integer = name in self._columns.integers
        columns = (self._columns.integers if integer else self._columns.numbers)[name]
        view = (self._integers if integer else self._numbers)[:, columns]
        return view if name in _WIDE else view[:, 0]

    def clear(self) -> None:
        """All sequences leave."""
        self._integers.zero_()
        self._numbers.zero_()
        for name in ("prompt", "history"):
            self[name].fill_(-1)
        for name in ("temperature", "top_p", "repetition_penalty"):
            self[name].fill_(1.0)

    def join(self, start: int, sequences: Sequences, scales: AnySequence[float]) -> None:
        """Newcomers take slots from ``start`` on, each with its mixing weight."""
        n, columns = len(sequences), self._columns
        integers = torch.zeros(n, self._integers.shape[1], dtype=torch.int64)
        numbers = torch.zeros(n, self._numbers.shape[1], dtype=torch.float64)
        for name in ("prompt", "history"):
            integers[:, columns.integers[name]] = -1
        for row, (sequence, scale) in enumerate(zip(sequences, scales, strict=True)):
            params = sequence.request.params
            biases: dict[int, float] = dict(params.logit_bias or {})  # type: ignore[arg-type]
            listed: dict[str, AnySequence[int]] = {
                **{name: [getattr(params, name)] for name in _INTEGERS},
                "seed": [sequence.seed],
                "live": [1],
                "position": [sequence.length],
                "written": [len(sequence.generated)],
                # What tells the base the condition is no text that a penalty counts.
                "prompt": sequence.prompt_ids[sequence.told :],
                "history": sequence.generated,
                "bias_ids": [*biases][:BIASES],
            }
            _fill(integers[row], columns.integers, listed)
            each: dict[str, AnySequence[float]] = {name: [getattr(params, name)] for name in _NUMBERS}
            _fill(
                numbers[row], columns.numbers, {**each, "scale": [scale], "bias": [*biases.values()][:BIASES]}
            )
        send(integers, self._integers[start : start + n])
        send(numbers, self._numbers[start : start + n])

    def leave(self, moves: AnySequence[tuple[int, int]], left: int) -> None:
        """Sequences have ended; ``left`` go on, after these moves of (source, destination)."""
        for source, destination in moves:
            self._integers[destination] = self._integers[source]
            self._numbers[destination] = self._numbers[source]
        self["live"][left:].zero_()

    def feed(self, rows: slice, tokens: Tensor) -> None:
        """The tokens (n,) that these slots have drawn are read next; -1, of a failed row, as 0."""
        tokens = tokens.clamp_min(0)
        self["last"][rows].copy_(tokens)
        self["history"][rows].scatter_(1, self["written"][rows, None], tokens[:, None])
        self._integers[rows, _COUNTED].add_(self["live"][rows, None])


def _consecutive(widths: dict[str, int]) -> dict[str, slice]:
    columns, start = {}, 0
    for name, width in widths.items():
        columns[name] = slice(start, start + width)
        start += width
    return columns


def _fill(row: Tensor, columns: dict[str, slice], listed: Mapping[str, AnySequence[float]]) -> None:
    for name, values in listed.items():
        start = columns[name].start
        row[start : start + len(values)] = torch.tensor(values, dtype=row.dtype)
