"""The reader of WordNet's data files, on lines made up in their format (wndb(5WN))."""

from __future__ import annotations

import pytest

from auxkern.tasks.wordnet import FILES, Synset, parse_line, read_synsets

_LICENCE = "  1 This line stands for the licence, which begins every file.  \n"
_NOUN = (
    '00001740 03 n 02 tool_box 0 kit 1 001 @ 00001930 n 0000 | a case for tools; "she shut the tool box"; '
    '"his kit lay open"  \n'
)
_VERB = "00002000 29 v 01 hum 0 000 01 + 02 00 | make a low sound  \n"
_ADJECTIVE = '00003000 00 s 01 aplenty(ip) 0 000 | in plenty; "apples aplenty"- A. Poet; ";"  \n'
_ADVERB = '00004000 02 r 0b a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 k 0 000 | in "quotes"  \n'


def test_words_definition_and_examples():
    assert parse_line(_NOUN) == Synset(
        words=("tool box", "kit"),
        definition="a case for tools",
        examples=("she shut the tool box", "his kit lay open"),
    )


def test_a_gloss_without_examples():
    assert parse_line(_VERB) == Synset(("hum",), "make a low sound", ())


def test_markers_authors_and_empty_quotations_are_left_out():
    assert parse_line(_ADJECTIVE) == Synset(("aplenty",), "in plenty", ("apples aplenty",))


def test_the_word_count_is_hexadecimal():
    synset = parse_line(_ADVERB)
    assert synset is not None
    assert synset.words == tuple("abcdefghijk")


def test_licence_lines_are_no_synsets():
    assert parse_line(_LICENCE) is None


@pytest.mark.parametrize("line", ["", "words without a bar\n", "00001740 03 n zz word 0 | a gloss\n"])
def test_other_lines_are_refused(line):
    with pytest.raises(ValueError, match="not a line of a WordNet data file"):
        parse_line(line)


def test_reads_all_files_in_order(tmp_path):
    for name, line in zip(FILES, (_NOUN, _VERB, _ADJECTIVE, _ADVERB), strict=True):
        (tmp_path / name).write_text(_LICENCE + line, encoding="utf-8")
    assert [synset.words[0] for synset in read_synsets(tmp_path)] == ["tool box", "hum", "aplenty", "a"]


def test_a_missing_file_says_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt install wordnet-base"):
        next(read_synsets(tmp_path))
