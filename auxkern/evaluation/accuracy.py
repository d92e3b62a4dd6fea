"""How often a sample does what its condition asks."""

from __future__ import annotations

from collections.abc import Sequence

from auxkern.tasks.keywords import contains_keyword


def keyword_accuracy(samples: Sequence[str], keywords: Sequence[str]) -> float:
    """Share of the samples that contain their keyword, as ``contains_keyword`` sees it; in [0, 1].

    Args:
        samples: texts.
        keywords: one for each sample.

    Raises:
        TypeError: a str stands where a sequence of them belongs.
        ValueError: there are no samples, not as many keywords, or a keyword is empty.
    """
    for name, value in (("samples", samples), ("keywords", keywords)):
        if isinstance(value, str):
            raise TypeError(f"{name} must be a sequence of str, got the str {value!r:.60}; put it in a list")
    if not samples or len(samples) != len(keywords):
        raise ValueError(
            f"there are {len(samples)} samples and {len(keywords)} keywords; pass as many, 1 at least"
        )
    return sum(map(contains_keyword, samples, keywords)) / len(samples)
