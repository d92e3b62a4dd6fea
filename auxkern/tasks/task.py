"""What every conditional-generation task has: examples, a rule, and sides that share no condition."""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from auxkern.core.seeds import DATA_SEED
from auxkern.model.text import Example
from auxkern.tasks.sources import Source, WordNet


class Splits(NamedTuple):
    """Three sides of a task's examples; no condition and no text of one stands in another."""

    training: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A conditional-generation task over one source of texts.

    Attributes:
        source: where its texts come from.
        name: what it is called in tables and messages.
        condition_template: how a condition is written before it is tokenised, unless the user says
            otherwise.
        seed: of the split, and of what else a task draws.
        validation_share, test_share: share of the conditions that is held out for each.
    """

    source: Source = field(default_factory=WordNet)
    name: str
    condition_template: str = "{condition}"
    seed: int = DATA_SEED
    validation_share: float = 0.1
    test_share: float = 0.1

    @abstractmethod
    def examples(self) -> list[Example]:
        """All examples in the source's order, each once; every one of them is satisfied.

        Raises:
            OSError, ValueError, ModuleNotFoundError: the source cannot be read, or lacks what the task
                needs.
        """

    @abstractmethod
    def satisfied(self, condition: str, text: str) -> bool:
        """Whether the text does what the condition asks: the rule behind the task's accuracy.

        Raises:
            ValueError: the task has no such condition.
        """

    def share(self, condition: str) -> float:
        """A number in [0, 1) that puts a condition on a side; conditions that count as one have the same."""
        return condition_share(condition, self.seed)

    def split(self) -> Splits:
        """The task's examples, as ``split_by_condition`` splits them.

        Raises: as ``examples`` and ``split_by_condition``.
        """
        examples = self.examples()
        if not examples:
            raise ValueError(f"the task {self.name} found no examples in {self.source}; name another source")
        try:
            return split_by_condition(
                examples, validation=self.validation_share, test=self.test_share, share=self.share
            )
        except ValueError as error:
            raise ValueError(f"the task {self.name} on {self.source}: {error}") from error


def condition_key(condition: str) -> str:
    """What stays when case of letters, width of spaces and the coding of accents count for nothing."""
    folded = unicodedata.normalize("NFD", condition).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def condition_share(condition: str, seed: int) -> float:
    """A number in [0, 1) from a hash of seed and ``condition_key``: it depends on no other example."""
    digest = hashlib.sha256(f"{seed} {condition_key(condition)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_condition(
    examples: Sequence[Example],
    *,
    validation: float = 0.1,
    test: float = 0.1,
    share: Callable[[str], float] | None = None,
) -> Splits:
    """Three sides that share no condition and no text, each in the order of the examples.

    A condition is of validation if its share is below ``validation``, of test if it is 1 - ``test`` or
    more. A text that stands on two sides stays in test rather than validation, and there rather than in
    training, where it is dropped.

    Args:
        examples: of any order; the same one may come twice.
        validation, test: share of the conditions for each side; 0 leaves it empty.
        share: a condition's number in [0, 1); ``condition_share`` with ``DATA_SEED`` when None.

    Raises:
        ValueError: there are no examples, the shares are out of range, or a side that was asked for is
            empty.
    """
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise ValueError(
            f"validation is {validation} and test is {test}; both must be 0 or more and below 1 in sum"
        )
    if not examples:
        raise ValueError("examples is empty; there is nothing to split")
    of = share or (lambda condition: condition_share(condition, DATA_SEED))
    shares = {condition: of(condition) for condition in dict.fromkeys(one.condition for one in examples)}
    splits = sides(examples, validation, test, shares.__getitem__)
    asked = (1 - validation - test, validation, test)
    for name, side, wanted in zip(Splits._fields, splits, asked, strict=True):
        if wanted > 0 and not side:
            raise ValueError(
                f"{len(examples)} examples of {len(set(shares.values()))} conditions leave none for {name} "
                f"(share {wanted:.3g}) that stands on no other side; take more conditions, another share or "
                "another seed"
            )
    return splits


def sides(
    examples: Sequence[Example], validation: float, test: float, share: Callable[[str], float]
) -> Splits:
    """``split_by_condition`` of any number of examples; a side may come out empty."""
    splits = Splits([], [], [])
    for example in examples:
        number = share(example.condition)
        held = splits.validation if number < validation else splits.training
        (splits.test if number >= 1 - test else held).append(example)
    held_out = {example.text for example in splits.test}
    kept = [example for example in splits.validation if example.text not in held_out]
    held_out.update(example.text for example in kept)
    return Splits([example for example in splits.training if example.text not in held_out], kept, splits.test)
