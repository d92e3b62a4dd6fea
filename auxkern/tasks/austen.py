"""Sentences of Jane Austen's six novels (1811 to 1818), which are in the public domain.

Reads the R package ``janeaustenr`` (MIT), which has Project Gutenberg's texts; Debian ships it as
``r-cran-janeaustenr``. Its file is records of a length and a zlib stream, each a character vector with a
string for every line, as the chapter "Serialization formats" of "R Internals" describes. No R runs.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

DEBIAN_FOLDER = Path("/usr/lib/R/site-library/janeaustenr")
FILE = "data/Rdata.rdb"

_VECTOR, _STRING = 16, 9  # R's STRSXP and CHARSXP, in the low byte of an item's flags

# Where a sentence may end, if a space and a capital follow; not so '"Oh!" said he.'
_END = re.compile(r"""[.!?]["')]*(?=\s+["'(]*[A-Z])""")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Messrs|Dr|St|Esq|(?!I\b)[A-Z])\.$")
# No digits or other signs, which dates, notes and "&c." have; no "Lord M----"; an apostrophe stands between
# letters, so that no quotation in single marks is cut.
_SENTENCE = re.compile(r"""["(]*[A-Z](?:[A-Za-z ,;:.!?"()]|-(?!--)|(?<=[A-Za-z])'(?=[A-Za-z]))*[.!?][")]*""")


def read_sentences(folder: Path = DEBIAN_FOLDER, min_words: int = 8, max_words: int = 30) -> Iterator[str]:
    """Each sentence once, novel by novel; 17,195 of 8 to 30 words.

    Args:
        folder: of the R package.
        min_words, max_words: sentences with fewer or more words, split at spaces, are left out.

    Raises: as ``read_novels``.
    """
    seen = set()
    for lines in read_novels(folder):
        for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
            for sentence in split_sentences(paragraph):
                if min_words <= len(sentence.split()) <= max_words and sentence not in seen:
                    seen.add(sentence)
                    yield sentence


def split_sentences(paragraph: str) -> Iterator[str]:
    """The sentences of a paragraph, without its line ends and the underscores of emphasis.

    A sentence that is speech from end to end has no quotation marks. Left out are headings and signatures
    (no capital first, or no end mark last), dates and notes (digits and signs), and what holds a part of a
    quotation or of a bracket.
    """
    text = re.sub(r"""([.!?]["']?)--(?=[^-])""", r"\1 ", paragraph.replace("_", ""))
    text = " ".join(re.sub("(?<!-)--(?!-)", " -- ", text).split())
    start = 0
    ends = (match.end() for match in _END.finditer(text))
    for end in (*ends, len(text)):
        if _ABBREVIATION.search(text[start:end]):
            continue
        sentence, start = text[start:end].strip(), end
        bare = sentence.strip('"')
        sentence = sentence if '"' in bare else bare
        if _SENTENCE.fullmatch(sentence) and _balanced(sentence):
            yield sentence


def _balanced(sentence: str) -> bool:
    quoted = sentence.split('"')[1::2]
    return (
        sentence.count('"') % 2 == 0
        and all(part and part == part.strip() for part in quoted)
        and sentence.count("(") == sentence.count(")")
    )


def read_novels(folder: Path = DEBIAN_FOLDER) -> Iterator[list[str]]:
    """The lines of each novel, in the order of the novels' names.

    Raises:
        FileNotFoundError: the package's file is missing; the message says what to install.
        ValueError: it has another format.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; install the novels (Debian, Ubuntu: apt install r-cran-janeaustenr) "
            "or name the folder of the R package janeaustenr"
        )
    rest = path.read_bytes()
    while rest:
        stream = zlib.decompressobj()
        try:
            vector = stream.decompress(rest[4:])  # behind the vector's length
            if not stream.eof:
                raise ValueError("it ends in the middle of a record")
            lines = _strings(vector)
        except (zlib.error, struct.error, ValueError) as error:
            raise ValueError(f"{path} is no file of R's character vectors: {error}") from error
        rest = stream.unused_data
        yield lines


def _strings(vector: bytes) -> list[str]:
    """The strings of a character vector in R's binary serialisation, versions 2 and 3."""
    magic, version = struct.unpack_from(">2si", vector)
    at = 14  # behind R's version and the oldest that can read it
    if version == 3:
        at += 4 + struct.unpack_from(">i", vector, at)[0]  # the name of an encoding
    flags, count = struct.unpack_from(">ii", vector, at)
    if magic != b"X\n" or version not in (2, 3) or flags & 0xFF != _VECTOR:
        raise ValueError(f"a record begins with {vector[:18]!r}")
    at += 8
    strings: list[str] = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", vector, at)
        at += 8
        if flags & 0xFF != _STRING or size < 0:
            raise ValueError(f"string {len(strings) + 1} has the flags {flags} and the length {size}")
        strings.append(vector[at : at + size].decode())
        at += size
    return strings
