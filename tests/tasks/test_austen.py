"""The reader of Jane Austen's novels, on files made up in the format of R's packages."""

from __future__ import annotations

import struct
import zlib

import pytest

from auxkern.tasks.austen import DEBIAN_FOLDER, FILE, read_novels, read_sentences, split_sentences
from auxkern.tasks.keywords import contains_keyword
from auxkern.tasks.registry import load_task
from auxkern.tasks.task import condition_key

# R's flags of a character vector, and of an ASCII and a UTF-8 string.
_VECTOR, _ASCII, _UTF8 = 0x10, 0x40009, 0x8009


def _vector(lines: list[str], version: int = 3) -> bytes:
    """What R's serialize() makes of a character vector."""
    head = b"X\n" + struct.pack(">iii", version, 0x40201, 0x30500)
    if version == 3:
        head += struct.pack(">i", 5) + b"UTF-8"
    strings = (
        struct.pack(">ii", _ASCII if line.isascii() else _UTF8, len(line.encode())) + line.encode()
        for line in lines
    )
    return head + struct.pack(">ii", _VECTOR, len(lines)) + b"".join(strings)


def _record(vector: bytes) -> bytes:
    return struct.pack(">I", len(vector)) + zlib.compress(vector)


@pytest.fixture
def package(tmp_path):
    """Writes the file of a package; its folder."""

    def write(*records: bytes):
        path = tmp_path / FILE
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"".join(records))
        return tmp_path

    return write


@pytest.mark.parametrize("version", [2, 3])
def test_a_novel_is_a_vector_of_lines(version, package):
    novels = [["EMMA", "", "She had £20,000."], ["PERSUASION"]]
    folder = package(*(_record(_vector(lines, version)) for lines in novels))
    assert list(read_novels(folder)) == novels


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (_record(_vector(["a line"]))[:-8], "ends in the middle of a record"),
        (_record(_vector(["a line"])) + b"\0\0", "ends in the middle of a record"),
        (struct.pack(">I", 9) + b"Zno zlib", "incorrect header"),
        (_record(b"X\n"), "requires a buffer"),
        (_record(_vector(["a line"], version=4)), "a record begins with"),
        (_record(_vector(["a line"]).replace(b"\0\0\0\x10", b"\0\0\0\x13")), "a record begins with"),
        (_record(_vector([""]).removesuffix(bytes(4)) + b"\xff" * 4), "string 1 has the flags .* length -1"),
        (_record(_vector(["£"]).replace("£".encode(), b"\xa3\xa3")), "can't decode byte 0xa3"),
    ],
    ids=["cut", "more", "other compression", "short", "version", "no vector", "NA", "Latin-1"],
)
def test_another_format_is_refused(content, problem, package):
    with pytest.raises(ValueError, match=f"Rdata.rdb is no file of R's character vectors: .*{problem}"):
        list(read_novels(package(content)))


def test_a_missing_file_says_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt install r-cran-janeaustenr"):
        next(read_sentences(tmp_path))


@pytest.mark.parametrize(
    ("paragraph", "sentences"),
    [
        ("He met Mr.\nAmes.  Was _she_ there?", ["He met Mr. Ames.", "Was she there?"]),
        ("So did I. It was St. John, Esq. Of whom?", ["So did I.", "It was St. John, Esq. Of whom?"]),
        ("Miss A. B. Long wrote to F. C. Ames.", ["Miss A. B. Long wrote to F. C. Ames."]),
        ("Oh! said he. (It is so.) Oh!", ["Oh! said he.", "(It is so.)", "Oh!"]),
        ("CHAPTER I", []),
        ("Hartfield, June", []),
        ("and so to bed. It was 1803. He paid her bills, &c. Lord M---- did.", []),
        ("He said (as he often did. And so on.) Yes.", ["Yes."]),
        (
            "It is so--quite so.--Is it not? Well-known.",
            ["It is so -- quite so.", "Is it not?", "Well-known."],
        ),
    ],
)
def test_sentences_of_a_paragraph(paragraph, sentences):
    assert list(split_sentences(paragraph)) == sentences


@pytest.mark.parametrize(
    ("speech", "sentences"),
    [
        ('"It rains. It pours. It is cold."', ["It rains.", "It pours.", "It is cold."]),
        ('"It rains."', ["It rains."]),
        ('"It rains," said she. "Oh!" He saw.', ['"It rains," said she.', "Oh!", "He saw."]),
        ('He wrote "no" twice. She said, "Go."', ['He wrote "no" twice.', 'She said, "Go."']),
        # Neither begins with its own quotation: the speech goes on from, or into, another sentence.
        ('"I do. I like it," said he, "very much. It rains."', ["I do.", "It rains."]),
        ('"No," said she; "but see. I go."', ["I go."]),
        ("He cried, 'It rains.' It's cold.", ["It's cold."]),
    ],
)
def test_speech_is_whole_or_without_marks(speech, sentences):
    assert list(split_sentences(speech)) == sentences


def test_sentences_have_some_length_and_come_once(package):
    lines = ["One two three. One two", "three four. One two three four five.", "  ", '"One two three four."']
    folder = package(_record(_vector(lines)), _record(_vector(["One two three four. Two three four."])))
    assert list(read_sentences(folder, 3, 4)) == ["One two three.", "One two three four.", "Two three four."]
    assert list(read_sentences(folder)) == []


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="the novels are not installed")
def test_keywords_of_the_novels():
    sentences = list(read_sentences())
    assert len(sentences) == len(set(sentences)) == 17_195
    assert all(8 <= len(sentence.split()) <= 30 for sentence in sentences)
    sides = load_task("keyword", "austen").split()
    assert [len(side) for side in sides] == [13_623, 1_924, 1_641]
    assert all(contains_keyword(one.text, one.condition) for side in sides for one in side)
    for part in (lambda one: one.text, lambda one: condition_key(one.condition)):
        training, validation, test = (set(map(part, side)) for side in sides)
        assert training.isdisjoint(validation | test)
        assert validation.isdisjoint(test)
