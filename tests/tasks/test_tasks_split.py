"""Splits by condition, on made-up and hostile examples; and that every task is split that way."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auxkern.model.text import Example
from auxkern.tasks.definitions import Definition
from auxkern.tasks.keywords import Keyword, split_by_keyword
from auxkern.tasks.lengths import Length
from auxkern.tasks.sources import TextFile
from auxkern.tasks.task import condition_key, condition_share, split_by_condition

_SPELLINGS = (
    str,
    str.upper,
    str.title,
    lambda word: f"  {word}\t",
    lambda word: unicodedata.normalize("NFD", word),
)
_WORDS = st.sampled_from([f"wörd {n}" for n in range(40)])
_CONDITIONS = st.builds(lambda word, spell: spell(word), _WORDS, st.sampled_from(_SPELLINGS))
# Few texts, so that many conditions share one and the same pair comes often.
_EXAMPLES = st.lists(st.builds(Example, _CONDITIONS, st.sampled_from("abcdefgh")), max_size=80)
_SHARES = st.floats(0, 0.6)


def _same(condition: str) -> str:
    """What makes two spellings above one condition, written without the code under test."""
    return unicodedata.normalize("NFC", condition.strip()).lower()


@given(_EXAMPLES, _SHARES, st.floats(0, 0.39))
def test_no_condition_and_no_text_stands_on_two_sides(examples, validation, test):
    try:
        splits = split_by_condition(examples, validation=validation, test=test)
    except ValueError as error:
        assert "examples is empty" in str(error) or "leave none for" in str(error)  # noqa: PT017
        return
    for one in range(3):
        assert splits[one] == [example for example in examples if example in set(splits[one])]
        for other in range(one):
            for part in (lambda example: _same(example.condition), lambda example: example.text):
                assert not set(map(part, splits[one])) & set(map(part, splits[other]))
    assert bool(splits.training)
    assert bool(splits.validation) == (validation > 0)
    assert bool(splits.test) == (test > 0)
    # Only an example whose text is on a side that goes first may be missing.
    held = {example.text for example in (*splits.validation, *splits.test)}
    kept = {example for side in splits for example in side}
    assert all(example.text in held for example in examples if example not in kept)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "examples is empty"),
        ([Example("cat", str(n)) for n in range(50)], "50 examples of 1 conditions leave none for"),
        ([Example(str(n), "the same text") for n in range(50)], "leave none for"),
        ([Example("Cat", "a"), Example("cat ", "b")], "2 examples of 1 conditions"),
    ],
)
def test_what_cannot_be_split_is_refused(examples, message):
    with pytest.raises(ValueError, match=message):
        split_by_condition(examples)


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.1), (0.1, 1.0), (0.5, 0.5), (float("nan"), 0.1)])
def test_shares_leave_something_to_train_on(validation, test):
    with pytest.raises(ValueError, match=f"validation is {validation} and test is {test}"):
        split_by_condition([Example("a", "b")], validation=validation, test=test)


def test_a_test_side_takes_from_training_only_and_validation_is_that_of_keywords():
    examples = [Example(f"w{n}", f"text {n}") for n in range(1000)]
    training, validation = split_by_keyword(examples, 0.1)
    splits = split_by_condition(examples, validation=0.1, test=0.1)
    assert splits.validation == validation
    assert set(splits.training) | set(splits.test) == set(training)
    # Binomial(1000, 0.1) is within 4 standard deviations of 100.
    assert 62 <= len(splits.test) <= 138


def test_a_text_of_two_sides_stays_in_test_before_validation_before_training():
    shares = {"train": 0.5, "validate": 0.05, "try": 0.95}
    everywhere = [Example(name, "shared") for name in shares]
    alone = [Example(name, f"of {name}") for name in shares]
    two = [Example("train", "both"), Example("validate", "both")]
    splits = split_by_condition([*everywhere, *alone, *two], share=shares.__getitem__)
    assert splits.training == [alone[0]]
    assert splits.validation == [alone[1], two[1]]
    assert splits.test == [everywhere[2], alone[2]]


def test_spellings_of_a_condition_have_one_share_and_seeds_others():
    assert condition_key(" Café\u00a0 NOIR ") == condition_key("cafe\u0301 noir") == "café noir"
    assert condition_share("Café", 0) == condition_share("cafe\u0301 ", 0) != condition_share("café", 1)


def test_the_parts_of_speech_of_a_word_stand_on_one_side():
    task = Definition()
    assert task.share("light (verb)") == task.share("Light (noun)") == task.share("light")
    assert task.share("light (verb)") != task.share("dark (verb)")


@pytest.mark.parametrize("seed", range(5))
def test_held_out_lengths_lie_spread_and_are_a_fifth(seed):
    task = Length(seed=seed)
    shares = [task.share(f"{n} words") for n in range(1, 401)]
    for low, high in ((0.0, 0.2), (0.8, 1.0)):
        held = [n for n, share in enumerate(shares, start=1) if low <= share < high]
        assert 75 <= len(held) <= 85
        assert max(after - n for n, after in pairwise(held)) <= 8
    assert all(0 <= share < 1 for share in shares)
    assert task.share("7 words") != Length(seed=seed + 1).share("7 words")


@pytest.mark.parametrize("task", [Keyword, Length])
def test_an_empty_source_is_named(task, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"found no examples in TextFile.*empty\.txt"):
        task(source=TextFile(tmp_path / "empty.txt")).split()


def test_one_condition_with_everything_is_named_with_its_source(tmp_path):
    path = tmp_path / "same.txt"
    path.write_text("".join(f"four words and {n}\n" for n in range(30)))
    with pytest.raises(ValueError, match=r"the task length on .*same\.txt.*30 examples of 1 conditions"):
        Length(source=TextFile(path)).split()
