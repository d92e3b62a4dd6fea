"""Learning rates and the prompt, chosen with the same effort for every method, on no held-out keyword."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from auxkern.core.seeds import drawn
from auxkern.tasks.keywords import contains_keyword
from auxkern.training.progress import Progress
from benchmarks.keyword.data import PROMPTS
from benchmarks.keyword.presets import BY_NAME, METHODS, PROMPT, Preset
from benchmarks.keyword.runs import Workplace, measure_untrained, train_method
from benchmarks.studies import read_facts

PROMPT_KEYWORDS = 100
PROMPTS_FOLDER = Path("tuning") / "prompts"


def trial_folder(output: Path, name: str, rate: float) -> Path:
    """Where a trial of a learning rate is."""
    return output / "tuning" / f"{name}-{rate:g}"


def trials(preset: Preset) -> list[tuple[str, float]]:
    """What is tried: methods by name, and learning rates."""
    return [(name, rate) for name, rates in preset.rates.items() for rate in rates]


def try_rate(place: Workplace, name: str, rate: float, folder: Path, progress: Progress) -> dict[str, Any]:
    """A short run from seed 0, and its validation nll; arguments as in ``train_method``."""
    return train_method(place, BY_NAME[name], 0, rate, folder, progress, trial=True)


def try_prompts(place: Workplace) -> list[float]:
    """Share of training keywords that a text contains, for each of the prompts."""
    method = next(method for method in METHODS if method.kind == PROMPT)
    keywords = list(dict.fromkeys(example.condition for example in place.data.training))
    keywords = drawn(keywords, PROMPT_KEYWORDS)
    shares = []
    for prompt in range(len(PROMPTS)):
        texts = measure_untrained(place, method, prompt, keywords)["texts"]
        shares.append(sum(map(contains_keyword, texts, keywords)) / len(keywords))
    return shares


def chosen(preset: Preset, output: Path) -> dict[str, Any]:
    """The outcome of the trials: validation nll by learning rate, and the best one of each method."""
    nll = {
        name: {
            f"{rate:g}": read_facts(trial_folder(output, name, rate))["evaluations"][-1]["nll"]
            for rate in rates
        }
        for name, rates in preset.rates.items()
    }
    shares = read_facts(output / PROMPTS_FOLDER)["shares"]
    return {
        "learning_rates": {name: float(min(found, key=found.__getitem__)) for name, found in nll.items()},
        "prompt": max(range(len(shares)), key=shares.__getitem__),
        "trials": {
            "share of a method's steps": preset.tuning_share,
            "validation nll": nll,
            "prompts": [
                {"prompt": text, "accuracy on training keywords": share}
                for text, share in zip(PROMPTS, shares, strict=True)
            ],
        },
    }
