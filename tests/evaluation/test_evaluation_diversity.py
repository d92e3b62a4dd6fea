"""distinct-n and self-BLEU against hand-computed values and a BLEU written from its definition."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest

from auxkern.evaluation.diversity import distinct_n, self_bleu

EXACT = 1e-12  # float64, a few dozen operations
# The example of NLTK's documentation of sentence_bleu.
HYPOTHESIS, *REFERENCES = (
    line.split()
    for line in (
        "It is a guide to action which ensures that the military always obeys the commands of the party",
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the guiding principle which guarantees the military forces always "
        "being under the command of the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    )
)


def textbook_bleu(hypothesis: list[Any], references: list[list[Any]], n: int) -> float:
    """BLEU of one text by comparing it with every reference in turn (Papineni et al. 2002)."""

    def count(row: list[Any], k: int) -> Counter[Any]:
        return Counter(zip(*(row[i:] for i in range(k)), strict=False))

    product = 1.0
    for k in range(1, n + 1):
        own = count(hypothesis, k)
        others = [count(reference, k) for reference in references]
        matches = sum(min(c, max(other[gram] for other in others)) for gram, c in own.items())
        if matches == 0:
            if k == 1:
                return 0.0
            matches = 0.1
        product *= matches / max(1, sum(own.values()))
    c = len(hypothesis)
    r = sorted((abs(len(reference) - c), len(reference)) for reference in references)[0][1]
    return (1.0 if c > r else math.exp(1 - r / c)) * product ** (1 / n)


def textbook_self_bleu(rows: list[list[Any]], n: int) -> float:
    each = [textbook_bleu(row, rows[:i] + rows[i + 1 :], n) for i, row in enumerate(rows)]
    return sum(each) / len(each)


def random_rows(seed: int, count: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4) for _ in range(draw.randrange(1, 9))] for _ in range(count)]


def test_the_textbook_has_the_value_that_nltk_documents() -> None:
    assert textbook_bleu(HYPOTHESIS, REFERENCES, 4) == pytest.approx(0.5045, abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [2, 3, 12])
def test_self_bleu_is_the_textbooks(n: int, count: int) -> None:
    for seed in range(20):
        rows = random_rows(seed, count)
        assert self_bleu(rows, n) == pytest.approx(textbook_self_bleu(rows, n), abs=EXACT)
    rows = [HYPOTHESIS, *REFERENCES]
    assert self_bleu(rows, n) == pytest.approx(textbook_self_bleu(rows, n), abs=EXACT)


def test_self_bleu_by_hand() -> None:
    # "a b c" against "a b d e": p1 2/3, p2 1/2, exp(1 - 4/3); the other way p1 2/4, p2 1/3, no penalty.
    expected = (math.exp(-1 / 3) * math.sqrt(2 / 3 * 1 / 2) + math.sqrt(2 / 4 * 1 / 3)) / 2
    assert self_bleu(["a b c", "a b d e"], 2) == pytest.approx(expected, abs=EXACT)
    # No 2-gram in common: 0.1 matches of 1 in both.
    assert self_bleu(["a b", "a c"], 2) == pytest.approx(math.sqrt(1 / 2 * 0.1), abs=EXACT)
    # Too short for a 2-gram: 0.1 of 1.
    assert self_bleu(["a", "a"], 2) == pytest.approx(math.sqrt(0.1), abs=EXACT)
    # Clipped: "a a a" has one "a" in common with "a", which is shorter; back, exp(1 - 3) of all.
    assert self_bleu(["a a a", "a"], 1) == pytest.approx((1 / 3 + math.exp(-2)) / 2, abs=EXACT)


def test_self_bleu_of_equal_and_of_foreign_texts() -> None:
    assert self_bleu(["one two three four"] * 5, 4) == pytest.approx(1.0, abs=EXACT)
    assert self_bleu(["one two three four", "five six seven eight"], 4) == 0.0


def test_texts_without_tokens_are_left_out_of_self_bleu() -> None:
    assert self_bleu(["a b c", "", "a b d e", " \n"], 2) == self_bleu(["a b c", "a b d e"], 2)


def test_strings_are_split_at_white_space_and_case_counts() -> None:
    texts = ["The cat sat.", "the\tcat  sat"]
    assert self_bleu(texts, 2) == self_bleu([["The", "cat", "sat."], ["the", "cat", "sat"]], 2)
    assert distinct_n(texts, 1) == 5 / 6


def test_fewer_references_are_a_set_that_the_seed_draws() -> None:
    rows = random_rows(1, 30)
    some = [self_bleu(rows, 2, references=4, seed=seed) for seed in range(200)]
    assert self_bleu(rows, 2, references=4, seed=7) == some[7]
    assert len(set(some)) > 100
    # Its mean is that of sets of 5 texts drawn otherwise.
    draw = random.Random(0)
    expected = [textbook_self_bleu(draw.sample(rows, 5), 2) for _ in range(2000)]
    mean, spread = sum(expected) / len(expected), 0.2  # standard deviation of one set, rounded up
    assert sum(some) / len(some) == pytest.approx(mean, abs=4 * spread / math.sqrt(len(some)))
    assert mean + 0.1 < self_bleu(rows, 2)
    for all_of_them in (29, 30, 1000):
        assert self_bleu(rows, 2, references=all_of_them) == self_bleu(rows, 2)


def test_distinct_n_by_hand() -> None:
    texts = ["a b a b", "b a"]
    # 6 tokens; 2-grams: ab, ba, ab, ba. The published denominator is the tokens for every n.
    assert distinct_n(texts, 1) == pytest.approx(2 / 6)
    assert distinct_n(texts, 2) == pytest.approx(2 / 6)
    assert distinct_n(texts, 3) == pytest.approx(2 / 6)
    assert distinct_n(texts, 4) == pytest.approx(1 / 6)
    assert distinct_n(texts, 5) == 0.0
    # No n-gram spans two texts.
    assert distinct_n(["a", "b"], 2) == 0.0
    assert distinct_n([[1, 2], [], [3]], 1) == 1.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: distinct_n("a b", 1), TypeError, "texts must be a sequence of texts"),
        (lambda: distinct_n(["a"], 0), ValueError, "n is 0"),
        (lambda: distinct_n(["", " "], 2), ValueError, "none of the 2 texts has a token"),
        (lambda: distinct_n([], 1), ValueError, "none of the 0 texts"),
        (lambda: self_bleu("a b", 1), TypeError, "texts must be a sequence of texts"),
        (lambda: self_bleu(["a", "b"], 0), ValueError, "n is 0"),
        (lambda: self_bleu(["a", "", ""]), ValueError, "1 of the 3 texts have tokens"),
        (lambda: self_bleu(["a", "b"], references=0), ValueError, "references is 0"),
    ],
)
def test_what_has_no_value_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
