"""The study's data: sentences of three sides, examples for the prompt, and keywords that were never seen."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from auxkern.core.seeds import DATA_SEED, drawn, mixed_seed
from auxkern.model.text import Example
from auxkern.tasks.registry import load_task
from benchmarks.keyword.presets import Preset


@dataclass(frozen=True)
class StudyData:
    """Examples whose conditions are keywords and whose texts contain them; sides share neither.

    Examples are shown, trained and scored on only if ``written_alike``.

    Attributes:
        shots: what the prompt shows, from the task's training side; not among ``training``.
        training: drawn from the rest of it, in the file's order.
        validation: for the nll by which rates, steps and weights are chosen.
        test: for the nll that is reported.
        asked: an example of each of the test side's keywords that texts are written for.
        unigram_texts: every different sentence of the training side, to count words in.
    """

    shots: list[Example]
    training: list[Example]
    validation: list[Example]
    test: list[Example]
    asked: list[Example]
    unigram_texts: list[str]

    def some(self, size: int) -> list[int]:
        """Indices of so many training sentences, among which are those of every smaller size."""
        return drawn(range(len(self.training)), size)

    @property
    def sides(self) -> dict[str, list[Example]]:
        """What is trained and scored on, by name; a side that a preset does without is left out."""
        every = {"training": self.training, "validation": self.validation, "test": self.test}
        return {name: examples for name, examples in every.items() if examples}


def study_data(preset: Preset) -> StudyData:
    """The data of a preset.

    Raises:
        OSError, ValueError: the task's source cannot be read, or has too few sentences or keywords.
    """
    sides = load_task("keyword", preset.task_source).split()
    training, validation, test = ([one for one in side if written_alike(one)] for side in sides)
    of = {example.condition.casefold(): example for example in reversed(sides.test)}
    wanted = {"training": preset.shots + preset.size, "test keywords": preset.samples}
    for (name, number), there in zip(wanted.items(), (training, of), strict=True):
        if len(there) < number:
            raise ValueError(f"the preset {preset.name} needs {number} {name}, but there are {len(there)}")
    chosen = random.Random(mixed_seed(DATA_SEED, "shots")).sample(range(len(training)), preset.shots)
    return StudyData(
        [training[i] for i in chosen],
        drawn([one for i, one in enumerate(training) if i not in chosen], preset.size),
        drawn(validation, preset.validation),
        drawn(test, preset.test),
        drawn(list(of.values()), preset.samples),
        list(dict.fromkeys(example.text for example in sides.training)),
    )


def written_alike(example: Example) -> bool:
    """Whether the keyword stands in the sentence as it is given: in its case, after a space, whole.

    Otherwise its tokens are others ("Figure 2", "`score'"), which nothing in the keyword's own tells; such
    sentences, one in fifty, would teach that a text may end without them.
    """
    return re.search(rf"(?<!\S){re.escape(example.condition)}(?!\w)", example.text) is not None
