"""The keyword recipe's pair and data, for benchmarks that measure them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auxkern.model import AuxTunedForCausalLM, TextFormat
from auxkern.model.text import Example
from auxkern.tasks.keywords import keyword_examples, split_by_keyword
from auxkern.training.settings import TrainSettings, read_yaml

RECIPE = Path(__file__).parent.parent / "auxkern" / "recipes" / "wordnet_keywords_untold.yaml"


def recipe() -> TrainSettings:
    """The recipe's settings."""
    return TrainSettings.from_mapping(read_yaml(RECIPE))


def recipe_format(settings: TrainSettings, tokenizer: Any) -> TextFormat:
    """How the recipe's pair reads texts and conditions."""
    prefix = settings.pair.get("text_prefix", "")
    return TextFormat(tokenizer, settings.condition_template, text_prefix=prefix)


def recipe_examples(count: int) -> list[Example]:
    """So many training examples of the keyword task.

    Raises:
        OSError: there is no WordNet here.
    """
    training, _ = split_by_keyword(keyword_examples())
    # Evenly spaced: the files are in the order of parts of speech.
    return [training[i * len(training) // count] for i in range(count)]


def recipe_pair(settings: TrainSettings, lm: Any) -> AuxTunedForCausalLM:
    """The recipe's pair, with the same weights each time.

    Args:
        settings: of the recipe.
        lm: its base, loaded.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AuxTunedForCausalLM.from_lm(
            lm, condition_template=settings.condition_template, **settings.pair
        )


class NoLMLosses:
    """For ``ExampleSet``: zeros in place of the base's own losses, which a log's lines would run it for.

    Args:
        encoded: examples.
    """

    def __init__(self, encoded: Any) -> None:
        self._encoded = encoded

    def __call__(self, index: int) -> Tensor:
        return torch.zeros(len(self._encoded[index]["input_ids"]))
