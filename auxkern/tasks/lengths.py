"""The length task: write a text with a given number of words."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass

from auxkern.model.text import Example
from auxkern.tasks.task import Task, condition_share

_BETWEEN = re.compile(r"\s+|--+|[—―]")  # a dash may stand between two words without a space
_CONDITION = re.compile(r"([0-9]+) words?")
_GOLDEN = (math.sqrt(5) - 1) / 2


def count_words(text: str) -> int:
    """How many words a text has.

    The text is put in Unicode's form NFKC and split at white space, at em dashes and at two or more
    hyphens; each piece with a letter or digit is a word: "well-known" and "o'clock" are one, "&" and
    "..." none.
    """
    pieces = _BETWEEN.split(unicodedata.normalize("NFKC", text))
    return sum(any(map(str.isalnum, piece)) for piece in pieces)


def length_condition(words: int) -> str:
    """How a number of words is asked for: "7 words"."""
    return "1 word" if words == 1 else f"{words} words"


@dataclass(frozen=True, kw_only=True)
class Length(Task):
    """Write a text with exactly as many words as the condition says, "7 words": see ``count_words``.

    Any source has texts for it; conditions that a source gives count for nothing. There are few lengths,
    so more of them are held out than of other tasks' conditions, and they lie spread among those that are
    trained on: see ``share``. The numeral of a held-out length is one that was never trained on.

    Attributes:
        min_words, max_words: texts with fewer or more words are left out.

    Raises:
        ValueError: they are not 1 <= min_words <= max_words.
    """

    name: str = "length"
    min_words: int = 3
    max_words: int = 30
    validation_share: float = 0.2
    test_share: float = 0.2

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(
                f"min_words is {self.min_words} and max_words is {self.max_words}; "
                "the first must be 1 or more, and the second no smaller"
            )

    def examples(self) -> list[Example]:
        """See ``Task.examples``."""
        examples: dict[Example, None] = {}
        for text, _, _ in self.source.records():
            count = count_words(text)
            if self.min_words <= count <= self.max_words:
                examples[Example(length_condition(count), text)] = None
        return list(examples)

    def satisfied(self, condition: str, text: str) -> bool:
        """Whether the text has exactly the condition's number of words.

        Raises:
            ValueError: the condition is no number of words.
        """
        return count_words(text) == _number_of_words(condition)

    def share(self, condition: str) -> float:
        """Multiples of the golden ratio, from a start that the seed gives.

        They fill [0, 1) evenly (Weyl 1916): of any eight lengths in a row, one at least falls on a side
        that holds a fifth of them.
        """
        return (condition_share("length", self.seed) + _number_of_words(condition) * _GOLDEN) % 1


def _number_of_words(condition: str) -> int:
    match = _CONDITION.fullmatch(condition.strip())
    if match is None:
        raise ValueError(f'condition is {condition!r:.60}; write a number of words, such as "7 words"')
    return int(match[1])
