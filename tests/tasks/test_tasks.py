"""The rules of the tasks, their examples, and the table of names."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from auxkern.core.seeds import DATA_SEED
from auxkern.model.text import Example
from auxkern.tasks.definitions import Definition, content, other_word_rate, overlap
from auxkern.tasks.keywords import (
    Keyword,
    chosen_keyword,
    contains_keyword,
    keyword_examples,
    split_by_keyword,
)
from auxkern.tasks.lengths import Length, count_words
from auxkern.tasks.registry import TASKS, load_task
from auxkern.tasks.sources import JsonLines, TextFile, WordNet
from auxkern.tasks.wordnet import DEBIAN_FOLDER, FILES, read_synsets
from auxkern.tasks.words import split_words, stem
from auxkern.training.settings import TrainSettings

needs_wordnet = pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="WordNet is not installed")


@pytest.fixture
def wordnet(tmp_path):
    lines = {
        "data.noun": '1 03 n 03 lamp 0 Light 0 oil_lamp 0 000 | a device that gives light; "a lamp on it" \n',
        "data.verb": '1 29 v 01 light 0 000 | make bright with lamps or fires; "light the room"  \n',
        "data.adj": '1 00 a 01 bright 0 000 | giving much light; "a bright room in a house"  \n',
        "data.adv": "1 02 r 01 of_late 0 000 | recently  \n",
    }
    for name in FILES:
        (tmp_path / name).write_text(lines[name])
    return WordNet(tmp_path)


# ------------------------------------------------------------------------------------------ keyword


def test_a_keyword_is_a_content_word_of_its_text():
    text = "It was a fox, and the fox's den in 1984 is by the sea of Örö"
    drawn = Counter(chosen_keyword(text, seed) for seed in range(400))
    assert set(drawn) == {"fox", "fox's", "den", "sea", "örö"}
    # Binomial(400, 0.2) is within 4 standard deviations of 80.
    assert all(48 <= count <= 112 for count in drawn.values())
    assert chosen_keyword(text, 1) == chosen_keyword(text, 1)
    assert chosen_keyword("it is of the 12 or so, an ox") is None


def test_keywords_of_plain_texts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(
        "An orange cat slept\nwe were there then\nshort text\nThe dog barked\nAn orange cat slept\n"
    )
    examples = Keyword(source=TextFile(path)).examples()
    assert [example.text for example in examples] == ["An orange cat slept", "The dog barked"]
    assert examples[0].condition in ("orange", "cat", "slept")
    assert all(contains_keyword(example.text, example.condition) for example in examples)
    others = {tuple(Keyword(source=TextFile(path), seed=seed).examples()) for seed in range(60)}
    assert len(others) == 6


def test_keywords_that_a_source_gives(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [("the", "the cat sat"), ("cat", "two cats sat"), ("Cat", "the cat sat")]
    path.write_text("\n".join(json.dumps({"k": word, "text": text}) for word, text in rows))
    task = Keyword(source=JsonLines(path, condition="k"))
    assert task.examples() == [Example("the", "the cat sat"), Example("Cat", "the cat sat")]


def test_keywords_of_wordnet_are_those_of_its_synonym_sets(wordnet):
    expected = [Example("lamp", "a lamp on it"), Example("light", "light the room")]
    expected.append(Example("bright", "a bright room in a house"))
    assert Keyword(source=wordnet).examples() == keyword_examples(wordnet.folder) == expected
    assert Keyword(source=wordnet).satisfied("Lamp", "LAMP!")
    assert not Keyword(source=wordnet).satisfied("lamp", "lamps")


# --------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("cities", "city"),
        ("boxes", "boxe"),
        ("cats", "cat"),
        ("toes", "toe"),
        ("trees", "tree"),
        ("glass", "glass"),
        ("virus", "virus"),
        ("dog", "dog"),
    ],
)
def test_plurals_lose_their_ending_as_harman_wrote(word, expected):
    assert stem(word) == expected


def test_words_keep_single_hyphens_and_apostrophes():
    assert split_words("A well-known man--his dog's \uff21B_c (1984), e.g.") == [
        *("a", "well-known", "man", "his", "dog's", "ab", "c", "1984", "e", "g"),
    ]


def test_content_is_what_a_gloss_says_beyond_its_frame_and_the_word():
    assert content("of or relating to the Cats of a cat-house", "cats") == {"cat-house"}
    assert content("a person who makes boxes", "box") == {"boxe"} | {"make"}
    assert content("being in a state of", "state") == {"being", "in", "a", "state", "of"}
    assert content("?!", "word") == frozenset()


def test_overlap_is_dice():
    one, other = frozenset("abcd"), frozenset("cdef")
    assert overlap(one, other) == 0.5
    assert overlap(one, frozenset("z")) == overlap(frozenset(), frozenset()) == 0
    assert overlap(one, one) == 1


def test_definitions_of_wordnet(wordnet):
    task = Definition(source=wordnet)
    lamp, fire = "a device that gives light", "make bright with lamps or fires"
    assert task.examples() == [
        Example("lamp", lamp),
        Example("Light (noun)", lamp),
        Example("light (verb)", fire),
        Example("bright", "giving much light"),
    ]
    assert all(task.satisfied(example.condition, example.text) for example in task.examples())
    # A third of the overlap: {bright, lamp, fire} with one of two or three stems, not of four.
    assert task.satisfied("light (verb)", "a fire that is warm")
    assert task.satisfied("LIGHT (verb)", "the warm fires burn")
    assert not task.satisfied("light (verb)", "the warm fires burn wood")
    assert not task.satisfied("light (noun)", fire)
    assert task.satisfied("light", lamp)
    assert task.satisfied("light", fire)
    assert not task.satisfied("light (verb)", "light light light")
    assert not task.satisfied("light (verb)", "")
    with pytest.raises(ValueError, match="condition is 'dark', which WordNet"):
        task.satisfied("dark", lamp)


def test_definitions_that_a_source_gives(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [("a cat", "small furry animal"), ("ox (verb)", "to plough"), ("a cat", "small furry animal")]
    path.write_text("\n".join(json.dumps({"word": word, "text": text}) for word, text in rows))
    task = Definition(source=JsonLines(path, condition="word"))
    assert task.examples() == [Example(*rows[0]), Example(*rows[1])]
    assert task.satisfied("A  cat", "an animal")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 has no condition.*\?condition=FIELD"):
        Definition(source=JsonLines(path)).examples()


@pytest.mark.parametrize("value", [0, -0.1, 1.1, float("nan")])
def test_an_overlap_lies_above_none_and_reaches_all(value):
    with pytest.raises(ValueError, match="min_overlap is"):
        Definition(min_overlap=value)


def test_other_words_are_counted_by_the_rule(tmp_path):
    path = tmp_path / "a.jsonl"
    glosses = [
        ("cat", "furry animal"),
        ("dog", "furry animal"),
        ("fox", "furry animal too"),
        ("ox", "large beast"),
    ]
    path.write_text("\n".join(json.dumps({"word": word, "text": text}) for word, text in glosses))
    task = Definition(source=JsonLines(path, condition="word"))
    # 10 of 16 pairs hold another gloss: of cat and dog 2 each, of fox and ox 3 each; those with ox fail.
    # Binomial(4000, 0.4) has a standard deviation of 0.8%.
    assert other_word_rate(task, draws=4000) == pytest.approx(0.4, abs=0.032)
    with pytest.raises(ValueError, match="draws is 0"):
        other_word_rate(task, draws=0)
    with pytest.raises(ValueError, match="hold no two words with different glosses"):
        other_word_rate(task, task.examples()[:2])


@needs_wordnet
def test_glosses_of_other_words_seldom_pass():
    task = Definition()
    examples = task.examples()
    assert 138_000 < len(examples) < 140_000
    assert all(task.satisfied(example.condition, example.text) for example in examples[::20])
    # What the class says, within 4 standard deviations of 10,000 draws.
    assert other_word_rate(task) == pytest.approx(0.002, abs=0.0018)
    of_verbs = {synset.definition for synset in read_synsets(names=["data.verb"])}
    verbs = [example for example in examples if example.text in of_verbs]
    assert other_word_rate(task, verbs) == pytest.approx(0.018, abs=0.0053)
    passed = sum(task.satisfied(example.condition, "the characteristic") for example in examples[::20])
    assert passed < 0.02 * len(examples[::20])


# ------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("one", 1),
        (" two\u00a0words\n", 2),
        ("a\u3000b\tc", 3),
        ("a well-known o'clock", 3),
        ("stop - it & go ...", 3),
        ("he left\u2014she stayed", 4),
        ("a man--his dog", 4),
        ("soft\u00adhyphen zero\u200bwidth", 2),
        ("(twice) 'quoted,' 3.14 $5", 4),
        ("— ? !", 0),
        ("日本 語", 2),
        ("cafe\u0301", 1),
    ],
)
def test_punctuation_is_no_word(text, expected):
    assert count_words(text) == expected


def test_lengths_of_texts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo words\ntwo words\nthree - words here\n1 2 3 4\n")
    task = Length(source=TextFile(path), min_words=1, max_words=3)
    assert task.examples() == [
        Example("1 word", "one"),
        Example("2 words", "two words"),
        Example("3 words", "three - words here"),
    ]
    assert all(task.satisfied(example.condition, example.text) for example in task.examples())
    assert not task.satisfied("2 words", "one")
    assert not task.satisfied("2 words", "1 2 3")
    for condition in ("", "words", "two words", "-2 words", "2 words more", "2"):
        with pytest.raises(ValueError, match="write a number of words"):
            task.satisfied(condition, "two words")


@pytest.mark.parametrize(("low", "high"), [(0, 3), (4, 3)])
def test_a_range_of_lengths_is_in_order(low, high):
    with pytest.raises(ValueError, match=f"min_words is {low} and max_words is {high}"):
        Length(min_words=low, max_words=high)


# -------------------------------------------------------------------------------------------- names


def test_every_name_makes_its_task():
    assert TASKS == ("keyword", "definition", "length", "wordnet-keywords")
    assert [load_task(name).name for name in TASKS] == list(TASKS)
    assert load_task("length", "text:a.txt").source == TextFile(Path("a.txt"))


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("keywords", None, "there is no task 'keywords'; did you mean 'keyword'"),
        ("zzz", None, "known are keyword, definition"),
        ("wordnet-keywords", "text:a.txt", "has its own data; take the task keyword for source='text:a.txt'"),
        ("length", "a.txt", "source is 'a.txt'"),
    ],
)
def test_what_no_task_is_called_is_refused(name, source, message):
    with pytest.raises(ValueError, match=message):
        load_task(name, source)


@needs_wordnet
def test_the_old_name_has_its_old_data():
    training, validation = split_by_keyword(keyword_examples(), seed=DATA_SEED)
    assert load_task("wordnet-keywords").split() == (training, validation, [])
    keyword = load_task("keyword").split()
    assert keyword.validation == [one for one in validation if one.text not in {e.text for e in keyword.test}]


@needs_wordnet
@pytest.mark.parametrize("name", TASKS)
def test_reference_texts_satisfy_their_conditions(name):
    task = load_task(name)
    for side in task.split():
        assert all(task.satisfied(example.condition, example.text) for example in side[::40])


@pytest.mark.parametrize(
    ("given", "template"),
    [
        ({"task": "keyword"}, " {condition}"),
        ({"task": "length"}, "{condition}"),
        ({"task": "wordnet-keywords"}, "{condition}"),
        ({"task": "keyword", "condition_template": "{condition}:"}, "{condition}:"),
        ({"train_file": "a.jsonl", "validation_file": "b.jsonl"}, None),  # found from the data
    ],
)
def test_settings_take_the_template_of_their_task(given, template):
    assert TrainSettings(output="out", base="base", **given).condition_template == template


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "keywords"}, "task must be one of keyword, definition, length, wordnet-keywords"),
        ({"task": "length", "task_source": "a.txt"}, "source is 'a.txt'"),
        (
            {"train_file": "a", "validation_file": "b", "task_source": "wordnet"},
            "task_source is 'wordnet' but there is no task",
        ),
    ],
)
def test_settings_refuse_tasks_and_sources_that_do_not_exist(given, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(output="out", base="base", **given)
