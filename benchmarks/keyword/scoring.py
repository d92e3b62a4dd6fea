"""What is reported of a run: the nll of its best weights on the test side, and texts for test keywords."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import load_model

from auxkern.model.native import native_refusal
from auxkern.model.text import TextFormat
from auxkern.ops.sampling_params import SamplingParams
from auxkern.training.checkpoint import WEIGHTS
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import encode
from benchmarks.keyword.measuring import nll_parts, nll_parts_of_lm, texts_of
from benchmarks.keyword.models import silent_pair
from benchmarks.keyword.presets import PAIR, Method
from benchmarks.keyword.runs import Workplace, set_up

# How texts are drawn, in a reader's words; the first is what the methods are compared by.
SAMPLINGS = MappingProxyType(
    {
        "temperature 1": SamplingParams(),
        "temperature 0.7, top-p 0.9": SamplingParams(temperature=0.7, top_p=0.9),
    }
)
PLAIN, NARROW = SAMPLINGS


def score_run(place: Workplace, method: Method, size: int, seed: int, weights: Path) -> dict[str, Any]:
    """Scores the weights of a run's best step, and writes texts with them.

    Args:
        place: of the study.
        method, size, seed: of the run.
        weights: its folder.

    Returns:
        parts, see ``nll_parts``, and samples: by the ways of drawing, what ``Judge.measure`` says. Smaller
        sizes than the study's are drawn in the first way only.
    """
    model, text_format, sides = set_up(place, method, size, seed)
    device = next(model.parameters()).device
    load_model(model, weights / WEIGHTS, device=str(device))
    parts = nll_parts(model, sides["test"].examples, AuxCollator(text_format.pad_id), device)
    ways = list(SAMPLINGS) if size == place.preset.size else [PLAIN]
    if method.kind != PAIR:
        samples = _samples_of_lm(place, model.merged(), method, seed, ways)
    else:
        if device.type == "cpu" and native_refusal() is None:
            model.use_native_kernels()
        samples = _samples(place, model.eval(), text_format, "default", seed, ways)
    return {"parts": parts, "samples": samples}


def score_untrained(place: Workplace, method: Method) -> dict[str, Any]:
    """The same of the LM as it is, prompted or alone."""
    encoded = encode(place.data.test, place.text_format(method.told))
    parts = nll_parts_of_lm(encoded, place.states(encoded, method.told).lm_nll)
    samples = _samples_of_lm(place, place.lm, method, 0, list(SAMPLINGS))
    return {"method": method.name, "seed": 0, "parts": parts, "samples": samples}


def measure_references(place: Workplace) -> dict[str, Any]:
    """The test side's own sentences for the same keywords."""
    return {"samples": {PLAIN: place.judge.measure([example.text for example in place.data.asked])}}


def _samples_of_lm(
    place: Workplace, lm: Any, method: Method, seed: int, ways: Sequence[str]
) -> dict[str, Any]:
    pair = silent_pair(lm, place.prefix(method.told)).eval()
    return _samples(place, pair, place.text_format(method.told), None, seed, ways)


def _samples(
    place: Workplace,
    model: Any,
    text_format: TextFormat,
    auxiliary: str | None,
    seed: int,
    ways: Sequence[str],
) -> dict[str, Any]:
    def written(params: SamplingParams) -> list[str]:
        return texts_of(
            model,
            text_format,
            place.judge.keywords,
            auxiliary=auxiliary,
            params=params,
            seed=seed,
            max_new_tokens=place.preset.max_new_tokens,
        )

    return {way: place.judge.measure(written(SAMPLINGS[way])) for way in ways}
