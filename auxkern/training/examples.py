"""Training examples: read from JSON lines or any sequence of mappings, and encoded as token ids."""

from __future__ import annotations

import hashlib
import json
import operator
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from auxkern.core.files import replace_file
from auxkern.core.seeds import drawn
from auxkern.core.unicode import check_unicode
from auxkern.model.text import IGNORED, Example, TextFormat

_IDENTIFYING = ("input_ids", "labels", "condition_ids")
_KNOWN = tuple(field.name for field in fields(Example))
_SHAPE = "an example has condition, text and, if you like, prompt and conditions"
_AT_ONCE = 1024  # examples that a tokenizer gets in one call


class Items(Protocol):
    """Encoded examples: anything with a length whose items are mappings with "input_ids" (T)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Records(Protocol):
    """A sequence of ``Example`` or of mappings with its fields, such as a Hugging Face dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class ExampleSet:
    """Examples, and what is known of them without reading them all.

    Attributes:
        examples: encoded, with input_ids and labels, as the collator takes them.
        fingerprint: names their content; ``fingerprint_of(examples)`` if None. One who knows it has read
            them, and has looked whether the model can take them (``check_fit``).
        lm_nll: gives for the index of an example the LM-alone nll (T,) of the token after each
            position; computed with the LM where it is wanted if None.
    """

    examples: Items
    fingerprint: str | None = None
    lm_nll: Callable[[int], Tensor] | None = None


@dataclass(frozen=True)
class PlacedExamples:
    """Examples, and what a message calls each of them.

    Attributes:
        examples: what they are.
        place: gives for the index of one where it was found.
    """

    examples: list[Example]
    place: Callable[[int], str]

    @classmethod
    def of_file(cls, path: str | Path) -> PlacedExamples:
        """A file's.

        Raises: as ``read_jsonl``, and
            ValueError: there are none.
        """
        lines = list(_numbered_examples(path))
        if not lines:
            raise ValueError(f"{path} has no examples")
        return cls([example for _, example in lines], lambda i: f"{path}, line {lines[i][0]}")

    @classmethod
    def of(cls, examples: list[Example], name: str) -> PlacedExamples:
        """Examples that have no lines; ``name`` says of what they are."""
        return cls(examples, lambda i: f"{name}, example {i}")

    def drawn(self, limit: int | None) -> PlacedExamples:
        """At most ``limit`` of them, drawn at random but always the same."""
        return self.some(drawn(range(len(self.examples)), limit))

    def some(self, chosen: Sequence[int]) -> PlacedExamples:
        """Those of some indices."""
        return PlacedExamples([self.examples[i] for i in chosen], lambda i: self.place(chosen[i]))


def shared_examples(training: PlacedExamples, validation: PlacedExamples) -> list[int]:
    """Indices of the validation examples that also stand in the training set, every part the same."""
    known = {frozenset(example.parts().items()) for example in training.examples}
    return [i for i, one in enumerate(validation.examples) if frozenset(one.parts().items()) in known]


def read_jsonl(path: str | Path) -> list[Example]:
    """The examples of a file with one JSON object a line, with the fields of ``Example``.

    Empty lines count for nothing, a prompt of null is an empty one, conditions of null are none, and U+FEFF
    may begin the file.

    Raises:
        OSError: there is no such file.
        ValueError: a line is not UTF-8, not JSON, or not an example; the message names file and line.
    """
    return [example for _, example in _numbered_examples(path)]


def _numbered_examples(path: str | Path) -> Iterator[tuple[int, Example]]:
    """The number of each line that is not empty, and its example."""
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                # Editors begin a file with U+FEFF, which is no part of its first line.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, _as_example(json.loads(text))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON: {error.msg} at character {error.pos + 1}; write an "
                    'object such as {"condition": "rain", "text": "It rained."}'
                ) from error
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def write_jsonl(path: str | Path, examples: Iterable[Example]) -> None:
    """Writes what ``read_jsonl`` reads, whole or not at all; an empty prompt and no conditions are left out.

    Raises:
        OSError: the folder does not exist or cannot be written.
        TypeError: one of them is not an ``Example``.
    """
    lines = []
    for example in examples:
        if not isinstance(example, Example):
            raise TypeError(f"examples holds a {type(example).__name__}; make it an Example")
        record: dict[str, Any] = {"condition": example.condition, "text": example.text}
        if example.prompt:
            record["prompt"] = example.prompt
        if example.conditions:
            record["conditions"] = dict(example.conditions)
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    replace_file(Path(path), "".join(lines))


def _as_example(record: Any) -> Example:
    example = record if isinstance(record, Example) else _example_of(record)
    for name, part in example.parts().items():
        check_unicode(name, part)
    return example


def _example_of(record: Any) -> Example:
    if not isinstance(record, Mapping):
        raise TypeError(f"an example is a mapping with {', '.join(_KNOWN)}, got a {type(record).__name__}")
    unknown = [name for name in record if name not in _KNOWN]
    if unknown:
        raise ValueError(
            f"the field {unknown[0]!r} is unknown; {_SHAPE}, "
            "and no others: take them out (of a dataset: select_columns)"
        )
    missing = [name for name in ("condition", "text") if name not in record]
    if missing:
        raise ValueError(f"the field {missing[0]!r} is missing; {_SHAPE}")
    # Tables fill what is missing with None.
    prompt, conditions = record.get("prompt"), record.get("conditions")
    return Example(
        record["condition"],
        record["text"],
        "" if prompt is None else prompt,
        {} if conditions is None else conditions,
    )


class EncodedExamples(Dataset[dict[str, Any]]):
    """Encoded examples in a few flat tensors: small, and cheap to hand to a loader's processes.

    ``encoded[i]`` is what ``TextFormat.example`` returned: lists of int input_ids (T), labels (T),
    where -100 stands before the text only, and condition_ids (K); told, where there is a base prompt; and
    "frozen", the condition_ids (K) of auxiliaries held frozen by their names, if there are any.

    Args:
        items: what ``TextFormat.examples`` returned, each with the same names in "frozen", or without it.

    Raises:
        ValueError: an item has -100 after its first label.
    """

    def __init__(self, items: Iterable[Mapping[str, Any]]) -> None:
        sequences, conditions, starts, told = [], [], [], []
        frozen: dict[str, list[list[int]]] = {}
        for i, item in enumerate(items):
            ids, labels = item["input_ids"], item["labels"]
            start = sum(label == IGNORED for label in labels)
            if labels != [IGNORED] * start + ids[start:]:
                raise ValueError(f"item {i} has labels that are not {IGNORED} and then its input_ids")
            sequences.append(ids)
            conditions.append(item["condition_ids"])
            starts.append(start)
            told.append(item.get("told", 0))
            for name, given in item.get("frozen", {}).items():
                frozen.setdefault(name, []).append(given["condition_ids"])
        self._sequences = _Ragged(sequences)
        self._conditions = _Ragged(conditions)
        self._frozen = {name: _Ragged(rows) for name, rows in frozen.items()}
        self._starts = torch.tensor(starts, dtype=torch.int64)
        self._told = torch.tensor(told, dtype=torch.int64) if any(told) else None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"there is no example {index} among {len(self)}")
        i %= len(self)
        ids = self._sequences.row(i)
        start = int(self._starts[i])
        frozen = {name: {"condition_ids": rows.row(i)} for name, rows in self._frozen.items()}
        return {
            "input_ids": ids,
            "labels": [IGNORED] * start + ids[start:],
            "condition_ids": self._conditions.row(i),
            **({} if self._told is None else {"told": int(self._told[i])}),
            **({"frozen": frozen} if frozen else {}),
        }


class _Ragged:
    """Rows of ids of different lengths, end to end."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.ids: Tensor = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
        self.ends: Tensor = torch.tensor([0, *accumulate(len(row) for row in rows)], dtype=torch.int64)

    def row(self, i: int) -> list[int]:
        first, last = self.ends[i : i + 2].tolist()
        return self.ids[first:last].tolist()


def encode(
    examples: Records,
    text_format: TextFormat,
    *,
    place: Callable[[int], str] = "example {}".format,
    frozen: Mapping[str, TextFormat] | None = None,
) -> EncodedExamples:
    """All examples as ids.

    Args:
        examples: a sequence of ``Example``, or of mappings with condition, text and optional prompt and
            conditions (None counts as empty), such as a Hugging Face dataset.
        text_format: how they become ids.
        place: what a message calls the example of an index.
        frozen: how the conditions of auxiliaries that are held frozen become ids, by name; see
            ``auxkern.training.frozen.hold_frozen``. Conditions of others are passed over.

    Raises:
        TypeError: a field is not a str.
        ValueError: there are no examples, a field is unknown or missing, the condition of an auxiliary that
            is held frozen among them, or under max_length a prompt leaves no room for text; the message names
            the example.
    """
    if len(examples) == 0:
        raise ValueError("examples is empty; there is nothing to learn from")

    formats = frozen or {}

    def with_frozen(some: list[Example]) -> Iterable[dict[str, Any]]:
        ids = {
            name: one.condition_ids([example.conditions[name] for example in some])
            for name, one in formats.items()
        }
        for i, item in enumerate(text_format.examples(some)):
            of_frozen = {name: {"condition_ids": rows[i]} for name, rows in ids.items()}
            yield {**item, "frozen": of_frozen} if of_frozen else item

    def items() -> Iterable[dict[str, Any]]:
        for first in range(0, len(examples), _AT_ONCE):
            indices = range(first, min(first + _AT_ONCE, len(examples)))
            some = []
            for i in indices:
                with _naming_example(place, i):
                    some.append(_as_example(examples[i]))
                    _check_conditions(some[-1], formats)
            try:
                yield from with_frozen(some)
            except (ValueError, TypeError):
                # One of them is to blame, and the error does not say which.
                for i, example in zip(indices, some, strict=True):
                    with _naming_example(place, i):
                        text_format.examples([example])
                raise

    return EncodedExamples(items())


def _check_conditions(example: Example, frozen: Iterable[str]) -> None:
    for name in frozen:
        if name not in example.conditions:
            raise ValueError(
                f"there is no condition for {name!r}, which is held frozen, among its conditions "
                f"{dict(example.conditions)!r:.60}; give it one, if it is an empty one"
            )


@contextmanager
def _naming_example(place: Callable[[int], str], i: int) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{place(i)}: {error}") from error


def fingerprint_of(examples: Items) -> str:
    """64 hexadecimal digits that name encoded examples: SHA-256 over ids, labels and conditions in order."""
    digest = hashlib.sha256()
    for index in range(len(examples)):
        example = examples[index]
        for name in _IDENTIFYING:
            if name in example:
                digest.update(f"{name} {[int(one) for one in example[name]]} ".encode())
        for name, given in example.get("frozen", {}).items():
            digest.update(f"{name!r} {[int(one) for one in given['condition_ids']]} ".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def data_fingerprint(encoded: Items) -> str:
    """64 hexadecimal digits that name the sequences of a data set and their order.

    SHA-256 over the input_ids only: the states of the language model depend on nothing else, so other
    conditions or labels on the same sequences have the same fingerprint.
    """
    digest = hashlib.sha256()
    for i in range(len(encoded)):
        digest.update(packed_ids(encoded[i]["input_ids"]))
    return digest.hexdigest()


def packed_ids(ids: Any) -> bytes:
    """One sequence of ids, a list or a (T,) tensor, as bytes: its length, then the ids."""
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    return struct.pack(f"<{len(ids) + 1}q", len(ids), *ids)
