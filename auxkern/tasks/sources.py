"""Where a task's texts come from: WordNet, novels, a text file, JSON lines, or Hugging Face's datasets."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qsl

from auxkern.core.unicode import check_unicode
from auxkern.tasks import austen
from auxkern.tasks.wordnet import DEBIAN_FOLDER, read_synsets

SPELLINGS = (
    "wordnet, wordnet:FOLDER, austen, austen:FOLDER, text:FILE, jsonl:FILE?text=FIELD&condition=FIELD or "
    "datasets:NAME?text=FIELD&condition=FIELD&split=SPLIT&config=CONFIG"
)


class Record(NamedTuple):
    """A text, the condition that stands beside it if the source has one, and where both were found."""

    text: str
    condition: str | None
    place: str


class Source(Protocol):
    """Gives records, the same ones in the same order each time; blank texts are left out."""

    def records(self) -> Iterator[Record]: ...


@dataclass(frozen=True)
class WordNet:
    """WordNet's data files. As plain texts they are the sentences that show how its words are used.

    Attributes:
        folder: where data.noun, data.verb, data.adj and data.adv lie.
    """

    folder: Path = DEBIAN_FOLDER

    def records(self) -> Iterator[Record]:
        """Each usage example once, about 48,000, without a condition.

        Raises:
            FileNotFoundError: a file is missing; the message says what to install.
            ValueError: a line has another format.
        """
        sentences = (sentence for synset in read_synsets(self.folder) for sentence in synset.examples)
        for number, sentence in enumerate(dict.fromkeys(sentences), start=1):
            yield Record(sentence, None, f"{self.folder}, example {number}")


@dataclass(frozen=True)
class Austen:
    """Jane Austen's novels, sentence by sentence.

    Attributes:
        folder: of the R package janeaustenr.
    """

    folder: Path = austen.DEBIAN_FOLDER

    def records(self) -> Iterator[Record]:
        """Each sentence of ``austen.read_sentences``, without a condition.

        Raises:
            FileNotFoundError: the package's file is missing; the message says what to install.
            ValueError: it has another format.
        """
        for number, sentence in enumerate(austen.read_sentences(self.folder), start=1):
            yield Record(sentence, None, f"{self.folder}, sentence {number}")


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 file with one text a line, and no conditions."""

    path: Path

    def records(self) -> Iterator[Record]:
        """The lines without the space around them.

        Raises:
            OSError: there is no such file.
            ValueError: a line is not UTF-8; the message names file and line.
        """
        for place, line in _placed_lines(self.path):
            yield Record(line, None, place)


@dataclass(frozen=True)
class JsonLines:
    """A UTF-8 file with one JSON object a line.

    Attributes:
        path: the file.
        text: field that holds the text.
        condition: field that holds the condition; None if none does. Other fields count for nothing.
    """

    path: Path
    text: str = "text"
    condition: str | None = None

    def records(self) -> Iterator[Record]:
        """The objects' fields, without the space around them.

        Raises:
            OSError: there is no such file.
            ValueError: a line is not UTF-8, not a JSON object, or lacks a field; or a field is not text.
        """
        for place, line in _placed_lines(self.path):
            try:
                values = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place} is not JSON: {error}") from error
            yield from _records_of(self, values, place)


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the package ``datasets``, which is imported when records are asked for.

    Attributes:
        name: on the Hub, or a local path; what ``save_to_disk`` wrote is recognised.
        config: the dataset's configuration, if it has several.
        split: one of its splits.
        text, condition: columns, as in ``JsonLines``.
    """

    name: str
    config: str | None = None
    split: str = "train"
    text: str = "text"
    condition: str | None = None

    def records(self) -> Iterator[Record]:
        """The rows' columns, without the space around them.

        Raises:
            ModuleNotFoundError: ``datasets`` is not installed.
            OSError: it cannot be found or loaded.
            ValueError: there is no such split or column, or a value is not text.
        """
        if importlib.util.find_spec("datasets") is None:
            raise ModuleNotFoundError(
                f"the source datasets:{self.name} needs the package datasets; pip install datasets"
            )
        rows = self._loaded(importlib.import_module("datasets"))
        for number, row in enumerate(rows):
            yield from _records_of(self, row, f"{self.name}, split {self.split}, row {number}")

    def _loaded(self, datasets: Any) -> Any:
        folder = Path(self.name)
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(self.name)
        if not (folder / "dataset_dict.json").is_file():
            return datasets.load_dataset(self.name, self.config, split=self.split)
        splits = datasets.load_from_disk(self.name)
        if self.split not in splits:
            raise ValueError(f"{self.name} has the splits {', '.join(splits)}, not {self.split!r}")
        return splits[self.split]


_FOLDERS: dict[str, type[WordNet] | type[Austen]] = {"wordnet": WordNet, "austen": Austen}


def source_from(spelling: str) -> Source:
    """The source that a string names.

    Args:
        spelling: wordnet, wordnet:FOLDER, austen, austen:FOLDER, text:FILE, jsonl:FILE or datasets:NAME;
            options follow a question mark as in ``jsonl:words.jsonl?text=gloss&condition=word``,
            percent-encoded. They are the attributes of ``JsonLines`` and ``HubDataset``.

    Raises:
        TypeError: it is not a str.
        ValueError: another kind, no file, or an unknown option.
    """
    if not isinstance(spelling, str):
        raise TypeError(f"source must be a str, got {type(spelling).__name__}; write {SPELLINGS}")
    kind, _, rest = spelling.partition(":")
    if kind in _FOLDERS and (rest or spelling == kind):
        return _FOLDERS[kind](Path(rest)) if rest else _FOLDERS[kind]()
    if kind == "text" and rest:
        return TextFile(Path(rest))
    place, _, query = rest.partition("?")
    if kind not in ("jsonl", "datasets") or not place:
        raise ValueError(f"source is {spelling!r}; write {SPELLINGS}")
    options = _options(spelling, query, JsonLines if kind == "jsonl" else HubDataset)
    return JsonLines(Path(place), **options) if kind == "jsonl" else HubDataset(place, **options)


def _options(spelling: str, query: str, kind: type[JsonLines] | type[HubDataset]) -> dict[str, str]:
    known = [one.name for one in fields(kind)][1:]
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ValueError(f"source is {spelling!r}: {error}; write ?NAME=VALUE&NAME=VALUE") from error
    for name, value in pairs:
        if name not in known or not value:
            problem = "has no value" if name in known else f"is unknown; known are {', '.join(known)}"
            raise ValueError(f"source is {spelling!r}: the option {name!r} {problem}")
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"source is {spelling!r}: an option stands twice; keep one")
    return dict(pairs)


def _placed_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and content of each line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            try:
                # Editors begin a file with U+FEFF, which is no part of its first text.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{place} is not UTF-8: {error}") from error
            if text:
                yield place, text


def _records_of(source: JsonLines | HubDataset, values: Any, place: str) -> Iterator[Record]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{place} holds a {type(values).__name__}; it must be an object with fields")
    fields: dict[str, str] = {}
    for role, name in (("text", source.text), ("condition", source.condition)):
        if name is None:
            continue
        if name not in values:
            raise ValueError(
                f"{place} has no field {name!r} but {', '.join(map(repr, values)) or 'none'}; "
                f"name the field with ?{role}=FIELD"
            )
        if not isinstance(values[name], str):
            raise ValueError(
                f"{place}: the field {name!r} holds {values[name]!r:.60}; {role} must be a string"
            )
        check_unicode(f"{place}: the field {name!r}", values[name])
        fields[role] = values[name].strip()
    if not fields["text"]:
        return
    if fields.get("condition") == "":
        raise ValueError(f"{place}: the field {source.condition!r} is blank; a condition must say something")
    yield Record(fields["text"], fields.get("condition"), place)
