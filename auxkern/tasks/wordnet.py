"""Synonym sets of WordNet 3.0: words, definition, example sentences (Fellbaum 1998).

Reads the files data.noun, data.verb, data.adj and data.adv in the format of wndb(5WN); Debian
ships them as ``wordnet-base`` in /usr/share/wordnet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DEBIAN_FOLDER = Path("/usr/share/wordnet")
FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
PARTS_OF_SPEECH = dict(zip(FILES, ("noun", "verb", "adjective", "adverb"), strict=True))

_EXAMPLE = re.compile(r'"([^"]*\w[^"]*)"')
_SYNTACTIC_MARKER = re.compile(r"\((?:a|p|ip)\)$")  # adjectives: "galore(ip)"


@dataclass(frozen=True)
class Synset:
    """One meaning and the words for it.

    Attributes:
        words: lemmas in the file's case, spaces for underscores.
        definition: the gloss without its examples.
        examples: sentences and phrases that use one of the words.
    """

    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]


def parse_line(line: str) -> Synset | None:
    """The synset in one line of a data file; None for a line of the licence.

    Raises:
        ValueError: the line is neither.
    """
    if line.startswith("  "):
        return None
    fields, bar, gloss = line.partition(" | ")
    columns = fields.split(" ")
    try:
        # offset, file number, part of speech, word count in hexadecimal, then word and id in turns
        count = int(columns[3], 16)
        words = columns[4 : 4 + 2 * count : 2]
    except (IndexError, ValueError):
        count, words = 0, []
    if not bar or not words or len(words) != count:
        raise ValueError(f"not a line of a WordNet data file: {line[:60]!r}")
    return Synset(
        words=tuple(_SYNTACTIC_MARKER.sub("", word).replace("_", " ") for word in words),
        # What follows the first quotation mark is examples, and the authors of some of them.
        definition=gloss.partition('"')[0].strip(" ;\n"),
        examples=tuple(example.strip() for example in _EXAMPLE.findall(gloss)),
    )


def read_synsets(folder: Path = DEBIAN_FOLDER, names: Sequence[str] = FILES) -> Iterator[Synset]:
    """All synsets, nouns first, in the files' order.

    Args:
        folder: where the data files lie.
        names: those that are read.

    Raises:
        FileNotFoundError: one of them is missing; the message says what to install.
        ValueError: a line has another format.
    """
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; install WordNet (Debian, Ubuntu: apt install wordnet-base) "
                "or name the folder that holds its data files"
            )
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            yield from filter(None, map(parse_line, lines))
