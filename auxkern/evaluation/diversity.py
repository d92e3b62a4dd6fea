"""How different the texts of one set are from each other: distinct-n and self-BLEU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from auxkern.core.seeds import DATA_SEED, mixed_seed

_EPSILON = 0.1  # matches that a smoothed precision has in place of none, NLTK's default

Tokens = Sequence[Hashable]
_Gram = tuple[Hashable, ...]


def distinct_n(texts: Sequence[str | Tokens], n: int) -> float:
    """Different n-grams of all texts together, over their tokens (Li et al. 2016); higher is more diverse.

        distinct-n = |{n-grams of the texts}| / tokens of the texts

    The published denominator is the number of tokens for every n. Others divide by the number of n-grams,
    which is the same for n = 1 and gives more for n > 1. It falls with the number of tokens: compare sets
    of like size only. No n-gram spans two texts.

    Args:
        texts: each a str, split at white space, case and punctuation as they are; or its tokens. One
            without tokens adds nothing.
        n: 1 or more.

    Returns:
        In [0, 1].

    Raises:
        TypeError: texts is a str.
        ValueError: n is below 1, or no text has a token.
    """
    _check_texts(texts, n)
    rows = [_tokens(text) for text in texts]
    total = sum(len(row) for row in rows)
    if not total:
        raise ValueError(f"none of the {len(rows)} texts has a token; distinct-{n} of nothing is undefined")
    return len({gram for row in rows for gram in _grams(row, n)}) / total


def self_bleu(
    texts: Sequence[str | Tokens], n: int = 4, *, references: int | None = None, seed: int = DATA_SEED
) -> float:
    """Mean BLEU-n of each text with all the others as its references (Zhu et al. 2018).

    Lower is more diverse.

        BLEU-n = BP * (p_1 * ... * p_n) ** (1 / n)                         (Papineni et al. 2002)
        p_k    = clipped matches of k-grams / k-grams of the text
        BP     = min(1, exp(1 - r / c)), c tokens of the text, r of the reference closest in length,
                 the shorter of two

    Smoothed as in the published program, which calls NLTK with its method 1 (Chen & Cherry 2014): a k-gram
    order without a match counts 0.1 matches, one that the text is too short for 0.1 of 1, and a text
    without a matching 1-gram has BLEU 0. Deviations: tokens are split at white space where theirs come
    from NLTK's ``word_tokenize``, and texts without tokens are left out, as text and as reference, where
    they would count as most diverse.

    The value grows with the number of references: compare sets of like size, or draw one with
    ``references``. The cost grows with the tokens of all texts, not with the square of their number,
    since the largest and second-largest count of an n-gram in any text say by what others clip it.

    Args:
        texts: each a str, split at white space, case and punctuation as they are; or its tokens.
        n: longest n-gram; all orders weigh 1 / n.
        references: at most so many for each text: ``references + 1`` texts are drawn, and each is held
            against the others, as the published program does with the first 500. None: all.
        seed: of that draw.

    Returns:
        In [0, 1].

    Raises:
        TypeError: texts is a str.
        ValueError: n or references is below 1, or fewer than two texts have tokens.
    """
    _check_texts(texts, n)
    if references is not None and references < 1:
        raise ValueError(f"references is {references}; a text needs 1 other at least, or None for all")
    rows = [row for row in map(_tokens, texts) if len(row)]
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} of the {len(texts)} texts have tokens; self-BLEU compares 2 or more")
    if references is not None and references + 1 < len(rows):
        order = sorted(range(len(rows)), key=lambda i: mixed_seed(seed, "self-BLEU", i))
        rows = [rows[i] for i in sorted(order[: references + 1])]
    counts = [[Counter(_grams(row, k)) for row in rows] for k in range(1, n + 1)]
    tops = [_tops(some) for some in counts]
    lengths = Counter(len(row) for row in rows)
    total = 0.0
    for i, row in enumerate(rows):
        matches = [_clipped(i, counts[k][i], tops[k]) for k in range(n)]
        total += _bleu(matches, len(row), _closest(lengths, len(row)))
    return total / len(rows)


def _check_texts(texts: Sequence[str | Tokens], n: int) -> None:
    if isinstance(texts, str):
        raise TypeError(f"texts must be a sequence of texts, got the str {texts!r:.60}; put it in a list")
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has 1 token or more")


def _tokens(text: str | Tokens) -> Tokens:
    return text.split() if isinstance(text, str) else text


def _grams(row: Tokens, n: int) -> list[_Gram]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


class _Top(NamedTuple):
    """How often an n-gram stands in the text that has most of it, and in the best of all others."""

    owner: int
    most: int
    second: int


def _tops(counts: list[Counter[_Gram]]) -> dict[_Gram, _Top]:
    tops: dict[_Gram, _Top] = {}
    for i, count in enumerate(counts):
        for gram, number in count.items():
            top = tops.get(gram)
            if top is None:
                tops[gram] = _Top(i, number, 0)
            elif number > top.most:
                tops[gram] = _Top(i, number, top.most)
            elif number > top.second:
                tops[gram] = top._replace(second=number)
    return tops


def _clipped(i: int, count: Counter[_Gram], tops: dict[_Gram, _Top]) -> int:
    """Matches of text i in the others, each n-gram as often as one of them has it at most."""
    known = ((number, tops[gram]) for gram, number in count.items())
    return sum(min(number, top.second if top.owner == i else top.most) for number, top in known)


def _closest(lengths: Counter[int], own: int) -> int:
    """Length of another text that is nearest to ``own``, the shorter of two."""
    if lengths[own] > 1:
        return own
    return min(lengths.keys() - {own}, key=lambda length: (abs(length - own), length))


def _bleu(matches: list[int], length: int, closest: int) -> float:
    if not matches[0]:
        return 0.0
    logs = 0.0
    for k, matched in enumerate(matches):
        logs += math.log((matched or _EPSILON) / max(1, length - k))
    return min(1.0, math.exp(1 - closest / length)) * math.exp(logs / len(matches))
