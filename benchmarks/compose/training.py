"""The auxiliaries of the study: each learns its own condition, on the same sentences in the same order."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from auxkern.core.seeds import DATA_SEED, mixed_seed
from auxkern.model.text import Example
from auxkern.tasks.lengths import count_words, length_condition
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import encode
from auxkern.training.log import LOG
from auxkern.training.loop import ExampleSet, train
from auxkern.training.progress import Progress
from benchmarks.compose.presets import BOTH, KEYWORD, LENGTH, Preset
from benchmarks.keyword.models import new_pair, trainable
from benchmarks.keyword.presets import BY_NAME, PAPER
from benchmarks.keyword.runs import Workplace, loop_settings


def conditions_of(example: Example) -> dict[str, str]:
    """What each auxiliary is told of an example of the keyword task.

    Args:
        example: its condition is a keyword; the number of words is that of its text.
    """
    words = length_condition(count_words(example.text))
    return {KEYWORD: example.condition, LENGTH: words, BOTH: f"{example.condition}, {words}"}


def examples_for(auxiliary: str, examples: list[Example], without_condition: int) -> list[Example]:
    """The same sentences with an auxiliary's conditions.

    Args:
        auxiliary: one of ``AUXILIARIES``.
        examples: of the keyword task.
        without_condition: one in so many is left without, always the same ones; 0 for none.
    """

    def condition(index: int, example: Example) -> str:
        if without_condition and not mixed_seed(DATA_SEED, "without condition", index) % without_condition:
            return ""
        return conditions_of(example)[auxiliary]

    return [
        dataclasses.replace(example, condition=condition(index, example))
        for index, example in enumerate(examples)
    ]


def train_auxiliary(
    preset: Preset, place: Workplace, auxiliary: str, seed: int, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Trains one auxiliary into a folder, and goes on where it was stopped.

    Args:
        preset, place: of the study.
        auxiliary: one of ``AUXILIARIES``.
        seed: of initial weights, order and dropout.
        folder: for the run; holds the best model at the end.
        progress: is told of what goes on.

    Returns:
        auxiliary, seed, trainable parameters, seconds, and the validation nll by step.

    Raises: as ``auxkern.training.loop.train``.
    """
    method, text_format = BY_NAME[PAPER], place.text_format(told=False)
    model = new_pair(place.pair_fields(method), place.lm, seed=seed)
    sets = []
    for examples, left_out in ((place.data.training, preset.without_condition), (place.data.validation, 0)):
        encoded = encode(examples_for(auxiliary, examples, left_out), text_format)
        states = place.states(encoded, told=False)
        sets.append(ExampleSet(states.dataset(encoded), None, states.lm_nll))
    result = train(
        model,
        sets[0],
        loop_settings(preset.keyword, method, preset.steps, seed, preset.learning_rate, folder),
        collate=AuxCollator(text_format.pad_id),
        validation=sets[1],
        progress=progress,
    )
    records = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    return {
        "auxiliary": auxiliary,
        "seed": seed,
        "trainable": trainable(model),
        "seconds": result.state.seconds,
        "best_step": result.state.best_step,
        "nll": {str(record["step"]): record["nll"] for record in records if record.get("evaluation")},
        "lm_nll": result.state.lm_nll,
    }
