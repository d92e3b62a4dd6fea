"""The keyword task, on made-up data files and, where it is installed, on WordNet."""

from __future__ import annotations

import pytest

from auxkern.model.text import Example
from auxkern.tasks.keywords import contains_keyword, keyword_examples, split_by_keyword
from auxkern.tasks.wordnet import DEBIAN_FOLDER, FILES

_NOUN = (
    '00001740 03 n 02 tool_box 0 Kit 1 001 @ 00001930 n 0000 | a case; "she shut the Tool box"; '
    '"his kit, or tool box, lay open"; "a kit"; "many kits lay open"  \n'
)
_AGAIN = '00001800 03 n 01 tool_box 0 000 | another case; "she shut the Tool box"  \n'


@pytest.fixture
def wordnet(tmp_path):
    for name in FILES:
        (tmp_path / name).write_text("  1 licence\n", encoding="utf-8")
    (tmp_path / "data.noun").write_text(_NOUN + _AGAIN, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "keyword", "expected"),
    [
        ("the cat sat", "cat", True),
        ("The CAT sat", "cat", True),
        ("the cat sat", "Cat", True),
        ("concatenate", "cat", False),
        ("two cats", "cat", False),
        ("cat_2", "cat", False),
        ("concatenate a cat", "cat", True),
        ("a well-known man", "well", True),
        ("'cat'", "cat", True),
        ("a tool  box", "tool box", True),
        ("a tool\nbox", " tool box ", True),
        ("a toolbox", "tool box", False),
        ("a stool box", "tool box", False),
        ("Straße", "STRASSE", True),
        ("naïveté", "na", False),
        ("5.5 a.m. sharp", "a.m.", True),
        ("c++ code", "c++", True),
        ("", "cat", False),
    ],
)
def test_whole_words_count(text, keyword, expected):
    assert contains_keyword(text, keyword) is expected


def test_an_empty_keyword_is_refused():
    with pytest.raises(ValueError, match="keyword is ' '"):
        contains_keyword("a text", " ")


def test_each_word_with_each_sentence_that_has_it(wordnet):
    shut, lay = "she shut the Tool box", "his kit, or tool box, lay open"
    assert keyword_examples(wordnet) == [
        Example("tool box", shut),
        Example("tool box", lay),
        Example("Kit", lay),
    ]
    assert Example("Kit", "a kit") in keyword_examples(wordnet, min_words=2)


def _many() -> list[Example]:
    """400 keywords in two spellings, neighbours share a text."""
    return [
        Example(word, f"text {(n + shift) % 400}")
        for n in range(400)
        for shift in (0, 1)
        for word in (f"word{n}", f"Word{n}")
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sides_share_no_keyword_and_no_text(seed):
    examples = _many()
    train, validation = split_by_keyword(examples, held_out=0.1, seed=seed)
    assert not {e.condition.lower() for e in train} & {e.condition.lower() for e in validation}
    assert not {e.text for e in train} & {e.text for e in validation}
    # Binomial(400, 0.1) is within 4 standard deviations of 40.
    assert 16 <= len({e.condition.lower() for e in validation}) <= 64
    # What was dropped had a text of the other side, and the order is kept.
    texts = {e.text for e in validation}
    dropped = [e for e in examples if e not in train and e not in validation]
    assert all(e.text in texts for e in dropped)
    assert train == [e for e in examples if e in set(train)]


def test_a_keyword_stays_on_its_side():
    examples = _many()
    _, validation = split_by_keyword(examples)
    _, of_half = split_by_keyword(examples[::2])
    assert of_half == [e for e in examples[::2] if e in set(validation)]
    assert validation != split_by_keyword(examples, seed=1)[1]


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1])
def test_a_share_lies_between_none_and_all(held_out):
    with pytest.raises(ValueError, match=f"held_out is {held_out}"):
        split_by_keyword(_many(), held_out)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="WordNet is not installed")
def test_wordnet_has_some_thirty_thousand():
    examples = keyword_examples()
    assert 33_000 < len(examples) < 35_000
    assert len(set(examples)) == len(examples)
    assert all(contains_keyword(e.text, e.condition) for e in examples)
