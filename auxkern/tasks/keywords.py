"""The keyword task: write a text that contains a given word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from auxkern.core.seeds import DATA_SEED, mixed_seed
from auxkern.model.text import Example
from auxkern.tasks.sources import WordNet
from auxkern.tasks.task import Task, condition_share, sides
from auxkern.tasks.wordnet import DEBIAN_FOLDER, read_synsets
from auxkern.tasks.words import is_content_word, split_words


def contains_keyword(text: str, keyword: str) -> bool:
    """Whether the keyword's words stand in the text, whole and in a row, in any case of letters.

    A letter, digit or underscore beside it makes it part of a longer word, a hyphen does not:
    "well-known" contains "well", "wells" does not. Spaces between words may be of any width.

    Raises:
        ValueError: the keyword is empty.
    """
    wanted, searched = (" ".join(part.casefold().split()) for part in (keyword, text))
    if not wanted:
        raise ValueError(f"keyword is {keyword!r}; it must hold a word")
    at = searched.find(wanted)
    while at >= 0:
        if not _in_word(searched, at - 1) and not _in_word(searched, at + len(wanted)):
            return True
        at = searched.find(wanted, at + 1)
    return False


def _in_word(text: str, i: int) -> bool:
    return 0 <= i < len(text) and (text[i].isalnum() or text[i] == "_")


def keyword_examples(folder: Path = DEBIAN_FOLDER, min_words: int = 3) -> list[Example]:
    """An example for each word of a synonym set and each of the set's sentences that contains it.

    Inflected forms do not count. About 34,000 with three words or more, in the order of the files; the
    same word with the same sentence comes once.

    Args:
        folder: where WordNet's data files lie.
        min_words: sentences with fewer words, split at spaces, are left out.

    Returns:
        Examples whose condition is the word and whose text is the sentence.

    Raises:
        FileNotFoundError: a file is missing; the message says what to install.
        ValueError: a line has another format.
    """
    pairs = (
        (word, sentence)
        for synset in read_synsets(folder)
        for sentence in synset.examples
        if len(sentence.split()) >= min_words
        for word in synset.words
        if contains_keyword(sentence, word)
    )
    return [Example(condition=word, text=sentence) for word, sentence in dict.fromkeys(pairs)]


def split_by_keyword(
    examples: Sequence[Example], held_out: float = 0.1, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples that share no keyword and no text.

    A hash decides for each keyword, in any case of letters, so that a side does not depend on the other
    examples. What would train on a validation text is dropped. ``split_by_condition`` refuses empty
    sides, this does not.

    Args:
        examples: in the order that both lists keep.
        held_out: share of the keywords for validation, in (0, 1).
        seed: another seed makes another split.

    Raises:
        ValueError: held_out is out of range.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; it must be between 0 and 1")
    splits = sides(examples, held_out, 0.0, lambda keyword: condition_share(keyword, seed))
    return splits.training, splits.validation


@dataclass(frozen=True, kw_only=True)
class Keyword(Task):
    """Write a text that contains a given word: satisfied as ``contains_keyword`` says.

    From WordNet, the words are a synonym set's and the texts its example sentences. From records with a
    condition, that is the word, and records whose text lacks it are left out. From plain texts,
    ``chosen_keyword`` picks a word of each; a text without candidates is left out.

    Attributes:
        min_words: texts with fewer words, split at spaces, are left out.
    """

    name: str = "keyword"
    condition_template: str = " {condition}"  # a word within a sentence has a space before it
    min_words: int = 3

    def examples(self) -> list[Example]:
        """See ``Task.examples``; of WordNet those of ``keyword_examples``."""
        if isinstance(self.source, WordNet):
            return keyword_examples(self.source.folder, self.min_words)
        examples: dict[Example, None] = {}
        for text, condition, _ in self.source.records():
            if len(text.split()) < self.min_words:
                continue
            keyword = chosen_keyword(text, self.seed) if condition is None else condition
            if keyword is not None and contains_keyword(text, keyword):
                examples[Example(keyword, text)] = None
        return list(examples)

    def satisfied(self, condition: str, text: str) -> bool:
        """Whether the text contains the condition, as ``contains_keyword`` says.

        Raises:
            ValueError: the condition is blank.
        """
        return contains_keyword(text, condition)


def chosen_keyword(text: str, seed: int = DATA_SEED) -> str | None:
    """A word of the text, drawn with equal chances among those that could be its keyword.

    They are its different content words (``auxkern.tasks.words``) of three letters or more, lower case.
    The draw depends on the seed and the text, on nothing else.

    Args:
        text: any text.
        seed: another seed draws another word.

    Returns:
        The word in lower case, or None if there is no candidate.
    """
    words = dict.fromkeys(
        word
        for word in split_words(text)
        if is_content_word(word) and sum(map(str.isalpha, word)) >= 3 and contains_keyword(text, word)
    )
    if not words:
        return None
    return list(words)[mixed_seed(seed, f"keyword of {text}") % len(words)]
