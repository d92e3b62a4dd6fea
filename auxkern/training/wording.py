"""How conditions and texts are written so that a pointer can copy: ids depend on what precedes a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from auxkern.core.seeds import drawn
from auxkern.model.text import Example, TextFormat

PLAIN, SPACED = "{condition}", " {condition}"
_LOOKED_AT = 2000  # examples: the share is known to a percent


class Wording(NamedTuple):
    """A condition's template and a text's prefix, and what they give.

    Attributes:
        condition_template, text_prefix: as ``TextFormat`` takes them.
        copied: share of the conditions whose ids stand in their text's in a row.
        held: share of the conditions that stand in their text as they are written.
    """

    condition_template: str
    text_prefix: str
    copied: float
    held: float


def wording_of(
    tokenizer: Any, examples: Sequence[Example], template: str | None, prefix: str | None
) -> list[Wording]:
    """The ways to write conditions and texts, the one that lets a pointer copy most first.

    A tokenizer that marks the beginning of words gives a word after a space, as most are in a text, other
    ids than the word alone, as a condition is.

    Args:
        tokenizer: the base's.
        examples: what is trained on; at most 2,000 of them are looked at.
        template, prefix: fixed by the user; None where the tokenizer may decide.

    Returns:
        The choice, then the others; the plainer one first where they copy as much.
    """
    templates = [PLAIN, SPACED] if template is None else [template]
    prefixes = ["", " "] if prefix is None else [prefix]
    some = drawn(examples, _LOOKED_AT)
    held = sum(bool(one.condition) and one.condition in one.text for one in some) / len(some)
    wordings = [
        Wording(template, prefix, _copied(TextFormat(tokenizer, template, None, prefix), some), held)
        for template in templates
        for prefix in prefixes
        if len(templates) * len(prefixes) < 4 or (template == SPACED) == (prefix == " ")
    ]
    return sorted(wordings, key=lambda wording: -wording.copied)


def _copied(text_format: TextFormat, examples: Sequence[Example]) -> float:
    count = 0
    for ids in text_format.examples(examples):
        condition = ids["condition_ids"]
        learnt = [label for label in ids["labels"] if label >= 0]
        count += bool(condition) and any(
            learnt[start : start + len(condition)] == condition
            for start in range(len(learnt) - len(condition) + 1)
        )
    return count / len(examples)
