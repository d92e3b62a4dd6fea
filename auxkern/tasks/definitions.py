"""The definition task: write the gloss of a given word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from auxkern.model.text import Example
from auxkern.tasks.sources import WordNet
from auxkern.tasks.task import Task, condition_key, condition_share
from auxkern.tasks.wordnet import FILES, PARTS_OF_SPEECH, read_synsets
from auxkern.tasks.words import is_content_word, split_words, stem

# What frames a gloss of any word: "of or relating to ...", "the act of ...", "a kind of ...".
_FRAME_WORDS = """
act characterized consisting especially family form genus kind made make making manner member often person
pertaining process quality related relating state type use used using usually way
"""
FRAME_WORDS = frozenset(_FRAME_WORDS.split())


def content(text: str, word: str = "") -> frozenset[str]:
    """The different stems that say what a gloss means.

    Words as in ``split_words`` without function words, ``FRAME_WORDS`` and the word itself, each as its
    ``stem``; if none is left, the stems of all its words.

    Args:
        text: a gloss, or what a model wrote for one.
        word: what it defines; a gloss that repeats it says nothing by that.
    """
    every = split_words(text)
    own = set(map(stem, split_words(word)))
    stems = {stem(one) for one in every if is_content_word(one) and one not in FRAME_WORDS} - own
    return frozenset(stems or map(stem, every))


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """Twice what two sets share over the sum of their sizes (Dice 1945), in [0, 1]; 0 for two empty sets."""
    size = len(one) + len(other)
    return 2 * len(one & other) / size if size else 0.0


@dataclass(frozen=True, kw_only=True)
class Definition(Task):
    """Write a gloss of the word in the condition.

    A text satisfies it if its ``content`` and that of one of the word's own glosses have an ``overlap`` of
    ``min_overlap`` or more. Own glosses are all that the source has for the condition, in any case of
    letters; one with a part of speech counts those of that part only.

    False positives on WordNet (``other_word_rate``): 0.2% of other words' glosses pass, 0.5% of those of
    the same part of speech (nouns 0.1%, verbs 1.8%), and no single word passes for more than 1.4% of the
    conditions. With a ``min_overlap`` of a quarter 0.5% pass, with a half 0.02%. The rule knows no synonyms:
    a right definition in other words fails.

    From WordNet, conditions are words without a space, and the part of speech follows in brackets where
    a word is of several: "aardvark", "light (verb)". Other sources must have conditions, and those are
    taken as they are. Words of one synonym set share a gloss, so the split drops it from training if one
    of them is held out; the parts of speech of a word stand on one side.

    Attributes:
        min_overlap: in (0, 1].

    Raises:
        ValueError: min_overlap is out of range.
    """

    name: str = "definition"
    min_overlap: float = 1 / 3

    def __post_init__(self) -> None:
        if not 0 < self.min_overlap <= 1:
            raise ValueError(f"min_overlap is {self.min_overlap}; it must be above 0 and at most 1")

    def examples(self) -> list[Example]:
        """See ``Task.examples``; about 139,000 of WordNet."""
        return list(self._examples)

    def satisfied(self, condition: str, text: str) -> bool:
        """Whether the text is close enough to one of the condition's glosses; see the class.

        Raises:
            ValueError: the source has no gloss for the condition.
        """
        key = condition_key(condition)
        if key not in self._glosses:
            raise ValueError(f"condition is {condition!r:.60}, which {self.source} does not define")
        written = content(text, _word(key))
        return any(overlap(written, gloss) >= self.min_overlap for gloss in self._glosses[key])

    def share(self, condition: str) -> float:
        """That of the word without its part of speech."""
        return condition_share(_word(condition_key(condition)), self.seed)

    @cached_property
    def _examples(self) -> tuple[Example, ...]:
        if not isinstance(self.source, WordNet):
            return tuple(dict.fromkeys(self._records()))
        glosses = list(_wordnet_glosses(self.source))
        parts: dict[str, set[str]] = {}
        for word, part, _ in glosses:
            parts.setdefault(condition_key(word), set()).add(part)
        return tuple(
            dict.fromkeys(
                Example(word if len(parts[condition_key(word)]) == 1 else f"{word} ({part})", gloss)
                for word, part, gloss in glosses
            )
        )

    @cached_property
    def _glosses(self) -> Mapping[str, set[frozenset[str]]]:
        """Content of the glosses under each condition, and under a word without its part of speech."""
        glosses: dict[str, set[frozenset[str]]] = {}
        for example in self._examples:
            key = condition_key(example.condition)
            word = _word(key)
            for name in (key, word):
                glosses.setdefault(name, set()).add(content(example.text, word))
        return glosses

    def _records(self) -> Iterator[Example]:
        for text, condition, place in self.source.records():
            if condition is None:
                raise ValueError(
                    f"{place} has no condition, and the task {self.name} needs the word that a text defines; "
                    "name its field with ?condition=FIELD, or take the source wordnet"
                )
            yield Example(condition, text)


def other_word_rate(
    task: Definition, examples: Sequence[Example] | None = None, draws: int = 10_000
) -> float:
    """How often the gloss of another word satisfies a condition: the false-positive rate of the rule.

    Args:
        task: gives the rule and the seed of the draws.
        examples: conditions are drawn from some of them and texts from others, the task's own when None.
            A text that is a gloss of the condition's word as well is drawn again.
        draws: pairs of a condition and a text.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: draws is below 1, or no text among 1,000 in a row was another word's.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}; draw 1 pair or more")
    some = task.examples() if examples is None else examples
    own = {(task.share(example.condition), example.text) for example in task.examples()}
    random = Random(task.seed)
    passed = 0
    for _ in range(draws):
        for _ in range(1000 if some else 0):
            condition, text = random.choice(some).condition, random.choice(some).text
            if (task.share(condition), text) not in own:
                break
        else:
            raise ValueError(f"{len(some)} examples hold no two words with different glosses; pass others")
        passed += task.satisfied(condition, text)
    return passed / draws


def _wordnet_glosses(source: WordNet) -> Iterator[tuple[str, str, str]]:
    """Word, part of speech and gloss, nouns first."""
    for name in FILES:
        for synset in read_synsets(source.folder, (name,)):
            for word in synset.words:
                if " " not in word and synset.definition:
                    yield word, PARTS_OF_SPEECH[name], synset.definition


def _word(key: str) -> str:
    """A condition's word: the condition without a part of speech."""
    for part in PARTS_OF_SPEECH.values():
        if key.endswith(f" ({part})"):
            return key.removesuffix(f" ({part})")
    return key
