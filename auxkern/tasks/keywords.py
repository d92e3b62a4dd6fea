"""The keyword task: write a sentence that contains a given word, learned from WordNet's examples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from auxkern.model.text import Example
from auxkern.tasks.wordnet import DEBIAN_FOLDER, read_synsets


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
    examples. What would train on a validation text is dropped.

    Args:
        examples: in the order that both lists keep.
        held_out: share of the keywords for validation, in (0, 1).
        seed: another seed makes another split.

    Raises:
        ValueError: held_out is out of range.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; it must be between 0 and 1")
    sides = [_share(example.condition, seed) < held_out for example in examples]
    validation = [example for example, held in zip(examples, sides, strict=True) if held]
    texts = {example.text for example in validation}
    train = [
        example
        for example, held in zip(examples, sides, strict=True)
        if not held and example.text not in texts
    ]
    return train, validation


def _share(keyword: str, seed: int) -> float:
    """A number in [0, 1) that stays with a keyword."""
    digest = hashlib.sha256(f"{seed} {keyword.casefold()}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
