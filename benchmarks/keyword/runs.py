"""One run of the study: a method on some sentences, trained, and resumed where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Subset

from auxkern.model import load_base, load_tokenizer
from auxkern.model.fingerprints import fingerprint
from auxkern.model.prefix import BasePrefix
from auxkern.model.text import TextFormat
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import EncodedExamples, Items, data_fingerprint, encode
from auxkern.training.lm_states import LMStates, cache_lm_states, states_folder
from auxkern.training.log import LOG
from auxkern.training.loop import ExampleSet, train
from auxkern.training.progress import Progress
from auxkern.training.settings import LoopSettings
from benchmarks.keyword.data import StudyData, study_data
from benchmarks.keyword.flops import run_cost, token_cost
from benchmarks.keyword.measuring import Judge
from benchmarks.keyword.models import BASE_PROMPT, WORDING, new_fine_tuned, new_pair, trainable
from benchmarks.keyword.presets import LORA, PAIR, Method, Preset


@dataclass
class Workplace:
    """What all runs of a process share; read once.

    Attributes:
        preset: sizes.
        output: folder of the study.
        data: see ``study_data``.
        lm: the base, frozen, in the kernels that this machine has.
        lm_fingerprint: of its weights.
        tokenizer: its own.
        device: where everything runs.
    """

    preset: Preset
    output: Path
    data: StudyData
    lm: Any
    lm_fingerprint: str
    tokenizer: Any
    device: str | None

    @classmethod
    def open(cls, preset: Preset, output: Path) -> Workplace:
        """Reads data and base.

        Raises:
            OSError, ValueError, ModuleNotFoundError: data or base cannot be read.
        """
        device = "cuda" if torch.cuda.is_available() else None
        data = study_data(preset)
        lm = load_base(preset.base, device=device)
        return cls(preset, output, data, lm, fingerprint(lm), load_tokenizer(preset.base), device)

    @cached_property
    def judge(self) -> Judge:
        data = self.data
        return Judge(self.lm, self.tokenizer, data.unigram_texts, data.asked, self.lm_fingerprint)

    def text_format(self, told: bool) -> TextFormat:
        """How texts become ids: where the LM is told the keyword, and where it is told nothing."""
        return TextFormat(self.tokenizer, **WORDING, base_prompt=BASE_PROMPT if told else None)

    def prefix(self, told: bool) -> list[int]:
        """What the LM reads before every text: the prompt's examples, or nothing."""
        return self.text_format(told).base_prefix(self.data.shots) if told else []

    def pair_fields(self, method: Method) -> dict[str, Any]:
        """Of ``AuxTunedConfig``, with the layers that it reads."""
        given = self.preset.pairs[method.pair]
        if "lm_layers" in given:
            return given
        return {**given, "lm_layers": [self.lm.config.num_hidden_layers - given["last_layers"]]}

    def layers(self, told: bool) -> list[int]:
        """Of the LM whose states the preset's pairs read, of those that are told the keyword or not."""
        pairs = [one for one in self.preset.methods if one.kind == PAIR and one.told == told]
        return sorted({layer for one in pairs for layer in self.pair_fields(one)["lm_layers"]})

    def states(self, encoded: EncodedExamples, told: bool, progress: Progress | None = None) -> LMStates:
        """The base's states for the pairs' layers, computed where they are not on disk yet.

        Args:
            encoded: examples, by ``text_format(told)``.
            told: whether the base reads the prompt before them.
            progress: is told of what is computed.
        """
        prefix, layers, show = (
            BasePrefix(self.lm, self.prefix(told)),
            self.layers(told),
            progress or Progress(),
        )
        behind = prefix.fingerprint(self.lm_fingerprint)
        folder = states_folder(self.output / "states", data_fingerprint(encoded), behind, layers)
        try:
            return cache_lm_states(
                self.lm,
                encoded,
                folder,
                layers=layers,
                base_fingerprint=self.lm_fingerprint,
                prefix=prefix,
                progress=lambda done, _: show.advance(done),
            )
        finally:
            show.close()


def cache_states(place: Workplace, progress: Progress) -> float:
    """Computes the base's states that pairs read, once for all of them, and its own nll of the test side.

    Returns:
        Seconds that it took, next to none where they were on disk.
    """
    began = time.monotonic()
    for told in (True, False):
        rows = [one for one in place.preset.methods if one.told == told]
        for side, examples in place.data.sides.items():
            if any(one.kind == PAIR or (side == "test" and not one.trained) for one in rows):
                encoded = encode(examples, place.text_format(told))
                tokens = sum(len(encoded[i]["input_ids"]) for i in range(len(encoded)))
                progress.start(
                    0, tokens, f"{side} states {'behind the prompt' if told else 'of the bare text'}"
                )
                place.states(encoded, told, progress)
    return time.monotonic() - began


class Setup(NamedTuple):
    """An untrained model, and all that it is trained and scored on.

    Attributes:
        model: a pair or a ``FineTunedLM``.
        text_format: how its texts become ids.
        sides: "training", "validation" and "test".
    """

    model: Any
    text_format: TextFormat
    sides: dict[str, ExampleSet]


def set_up(place: Workplace, method: Method, size: int, seed: int) -> Setup:
    """What a run of a method begins with.

    Args:
        place: of the study.
        method: a trained one.
        size: training sentences; they are the same ones for all methods.
        seed: of the initial weights.
    """
    text_format, prefix, preset = place.text_format(method.told), place.prefix(method.told), place.preset
    if method.kind == PAIR:
        model: Any = new_pair(place.pair_fields(method), place.lm, prefix, seed)
    else:
        # The base's own copy: it is changed.
        lm = load_base(preset.base, dtype=torch.float32, device=place.device, native=False)
        model = new_fine_tuned(preset, lm, prefix, seed, lora=method.kind == LORA)
    sides = {}
    for side, examples in place.data.sides.items():
        encoded = encode(examples, text_format)
        chosen = place.data.some(size) if side == "training" else list(range(len(encoded)))
        if method.kind == PAIR:
            sides[side] = _with_states(place.states(encoded, method.told), encoded, model.config, chosen)
        else:
            sides[side] = ExampleSet(Subset(encoded, chosen))
    return Setup(model, text_format, sides)


def _with_states(
    states: LMStates, encoded: EncodedExamples, config: Any, chosen: Sequence[int]
) -> ExampleSet:
    """Some examples, with those of the cached states that a pair reads."""
    columns = [0, *(1 + states.layers.index(layer) for layer in config.lm_layers)]
    examples = Subset(_OfLayers(states.dataset(encoded), columns), chosen)
    return ExampleSet(examples, None, lambda index: states.lm_nll(chosen[index]))


class _OfLayers(torch.utils.data.Dataset[dict[str, Any]]):
    """Examples with some of their cached states, final ones and then the layers', by their places."""

    def __init__(self, examples: Items, columns: Sequence[int]) -> None:
        self._examples, self._columns = examples, columns

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example: Mapping[str, Any] = self._examples[index]
        return {**example, "lm_states": example["lm_states"][:, self._columns]}


def loop_settings(
    preset: Preset, method: Method, steps: int, seed: int, rate: float, output: Path
) -> LoopSettings:
    """The loop of a run; a fine-tuned LM reads the prompt once for all sentences of a step."""
    at_a_time = preset.micro_batch if method.kind == PAIR else preset.sentences
    every = -(-steps // preset.evaluations)
    return LoopSettings(
        output=str(output),
        steps=steps,
        batch_size=at_a_time,
        gradient_accumulation=preset.sentences // at_a_time,
        sort_by_length=True,
        learning_rate=rate,
        warmup_steps=round(preset.warmup * steps),
        weight_decay=0.01,
        betas=preset.betas,
        seed=seed,
        log_every=every,
        eval_every=every,
        patience=preset.patience,
        save_every=every,
        keep_checkpoints=1,
        resume=True,
    )


def train_run(
    place: Workplace, method: Method, size: int, seed: int, rate: float, output: Path, progress: Progress
) -> dict[str, Any]:
    """Trains a method, goes on where it was stopped, and says what it came to.

    The order of the data is the seed's, the same for all methods. ``output`` holds the weights of the step
    with the lowest validation nll afterwards.

    Args:
        place: of the study.
        method: a trained one.
        size: training sentences.
        seed: of initial weights, order and dropout.
        rate: learning rate.
        output: folder for the run.
        progress: is told of what goes on.

    Returns:
        method, size, seed, learning_rate; trainable parameters; steps at most, best_step, and the validation
        nll by step (curve); seconds; FLOPs of a step and of the base's states.

    Raises: as ``auxkern.training.loop.train``.
    """
    model, text_format, sides = set_up(place, method, size, seed)
    steps, training = place.preset.steps_of(method.name, size), sides["training"]
    settings = loop_settings(place.preset, method, steps, seed, rate, output)
    cost = run_cost(
        token_cost(model), training.examples, place.preset.sentences, len(place.prefix(method.told))
    )
    result = train(
        model,
        training,
        settings,
        collate=AuxCollator(text_format.pad_id),
        validation=sides["validation"],
        progress=progress,
    )
    return {
        "method": method.name,
        "size": size,
        "seed": seed,
        "learning_rate": rate,
        "trainable": trainable(model),
        "steps": steps,
        "best_step": result.state.best_step,
        "curve": [[one["step"], one["nll"]] for one in evaluations(output)],
        "seconds": result.state.seconds,
        "step_flops": cost.step,
        "state_flops": cost.states,
    }


def evaluations(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that are about the validation side."""
    records = map(json.loads, (output / LOG).read_text(encoding="utf-8").splitlines())
    return [record for record in records if record.get("evaluation")]
