"""One run of the study: a method and a seed, trained, measured on the way, and resumed where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auxkern.model import AuxTunedForCausalLM, load_base, load_tokenizer
from auxkern.model.fingerprints import fingerprint
from auxkern.model.text import IGNORED, TextFormat
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import EncodedExamples, data_fingerprint, encode
from auxkern.training.lm_states import LMStates, cache_lm_states, states_folder
from auxkern.training.log import LOG
from auxkern.training.loop import ExampleSet, train
from auxkern.training.progress import Progress
from auxkern.training.settings import LoopSettings
from benchmarks.keyword.data import (
    StudyData,
    encoded_for_lm,
    lm_format,
    pair_format,
    prompt_ids,
    study_data,
)
from benchmarks.keyword.flops import TokenCost, token_cost
from benchmarks.keyword.measuring import Judge, texts_of_lm, texts_of_pair
from benchmarks.keyword.models import FineTunedLM, new_fine_tuned, new_pair, trainable
from benchmarks.keyword.presets import HEADLINE, PAIR, SCRATCH, Method, Preset

SCALES = (0.75, 1.25, 1.5)  # mixing weights that the headline's last model is sampled with, beside its own


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

    def judge(self) -> Judge:
        data = self.data
        return Judge(self.lm, self.tokenizer, data.unigram_texts, data.asked, self.lm_fingerprint)

    def states(self, encoded: EncodedExamples, progress: Progress | None = None) -> LMStates:
        """The base's states for the layers of the preset's pairs, computed where they are not on disk yet."""
        layers = self.preset.pair["lm_layers"]
        folder = states_folder(self.output / "states", data_fingerprint(encoded), self.lm_fingerprint, layers)
        show = progress or Progress()
        try:
            return cache_lm_states(
                self.lm,
                encoded,
                folder,
                layers=layers,
                base_fingerprint=self.lm_fingerprint,
                progress=lambda done, _: show.advance(done),
            )
        finally:
            show.close()


def run_folder(output: Path, method: Method, seed: int) -> Path:
    """Where a run's checkpoints, log and facts are."""
    return output / "runs" / f"{method.name}-{seed}"


def cache_states(place: Workplace, progress: Progress) -> float:
    """Computes the base's states that pairs read, once for all of them.

    Returns:
        Seconds that it took, 0 where they were on disk.
    """
    text_format = pair_format(place.preset, place.tokenizer)
    began = time.monotonic()
    for name, examples in (("training", place.data.training), ("validation", place.data.validation)):
        encoded = encode(examples, text_format)
        progress.start(0, sum(len(encoded[i]["input_ids"]) for i in range(len(encoded))), f"{name} states")
        place.states(encoded, progress)
    return time.monotonic() - began


def loop_settings(
    preset: Preset, method: Method, seed: int, rate: float, output: Path, *, trial: bool = False
) -> LoopSettings:
    """The loop of a run, or of a trial of a learning rate, which is shorter and is scored at its end."""
    steps = preset.steps_of(method)
    steps = round(steps * preset.tuning_share) if trial else steps
    scores = preset.scores if method.kind in (PAIR, SCRATCH) else preset.measures
    return LoopSettings(
        output=str(output),
        steps=steps,
        batch_size=preset.micro_batch,
        gradient_accumulation=preset.sentences // preset.micro_batch,
        sort_by_length=True,
        learning_rate=rate,
        warmup_steps=round(preset.warmup * steps),
        weight_decay=0.01,
        betas=preset.betas,
        seed=seed,
        log_every=max(1, preset.steps // 20),
        eval_every=steps if trial else preset.steps // scores,
        save_every=steps if trial else preset.steps // preset.measures,
        patience=0,  # curves have the same steps for all
        keep_checkpoints=1,
        resume=True,
    )


def train_method(
    place: Workplace,
    method: Method,
    seed: int,
    rate: float,
    output: Path,
    progress: Progress,
    *,
    trial: bool = False,
) -> dict[str, Any]:
    """Trains a method, goes on where it was stopped, and says what it came to.

    The order of the data is the seed's, the same for all methods.

    Returns:
        parameters, tokens and flops of the whole run, seconds, and its evaluations: step, nll and, where
        texts were written, what ``Judge.measure`` says of them.

    Raises: as ``auxkern.training.loop.train``.
    """
    preset = place.preset
    settings = loop_settings(preset, method, seed, rate, output, trial=trial)
    if method.kind in (PAIR, SCRATCH):
        model, text_format, training, validation = _pair_run(place, method, seed)
    else:
        model, text_format, training, validation = _lm_run(place, method, seed)
    judge = None if trial else place.judge()
    every = preset.steps // preset.measures

    def measure(step: int) -> dict[str, Any]:
        if judge is None or step == 0 or step % every:
            return {}
        return judge.measure(_texts(place, method, model, text_format, seed))

    cost = token_cost(model, method)
    result = train(
        model,
        training,
        settings,
        collate=AuxCollator(text_format.pad_id),
        validation=validation,
        progress=progress,
        measure=measure,
    )
    records = [json.loads(line) for line in (output / LOG).read_text(encoding="utf-8").splitlines()]
    facts = {
        "method": method.name,
        "seed": seed,
        "learning_rate": rate,
        "trainable": trainable(model),
        "seconds": result.state.seconds,
        "flops": _flops(cost, training, settings.steps * preset.sentences),
        "evaluations": [
            {"step": r["step"], "nll": r["nll"], **r["measured"]}
            for r in records
            if r.get("evaluation") and r["step"]
        ],
    }
    if not trial and isinstance(model, AuxTunedForCausalLM):
        own = {"aux_scale": model.config.aux_scale, **facts["evaluations"][-1]}
        others = _scales(place, method, model, text_format, seed, judge)
        facts["scales"] = sorted([own, *others], key=lambda one: one["aux_scale"]) if others else []
    return facts


def _pair_run(place: Workplace, method: Method, seed: int) -> tuple[Any, TextFormat, ExampleSet, ExampleSet]:
    text_format = pair_format(place.preset, place.tokenizer)
    model = new_pair(place.preset, method, place.lm, seed)
    sets = []
    for examples in (place.data.training, place.data.validation):
        encoded = encode(examples, text_format)
        if method.kind == SCRATCH:
            sets.append(ExampleSet(encoded))
        else:
            states = place.states(encoded)
            sets.append(ExampleSet(_OfLayers(states.dataset(encoded), model.config), None, states.lm_nll))
    return model, text_format, sets[0], sets[1]


def _lm_run(place: Workplace, method: Method, seed: int) -> tuple[Any, TextFormat, ExampleSet, ExampleSet]:
    text_format = lm_format(place.preset, place.tokenizer)
    # The base's own copy: it is changed.
    lm = load_base(place.preset.base, dtype=torch.float32, device=place.device, native=False)
    model = new_fine_tuned(place.preset, method, lm, seed)
    training, validation = (
        ExampleSet(encoded_for_lm(examples, text_format))
        for examples in (place.data.training, place.data.validation)
    )
    return model, text_format, training, validation


class _OfLayers:
    """Examples with those of the cached states that a pair reads: all of them, or the final ones alone."""

    def __init__(self, examples: Any, config: Any) -> None:
        self._examples, self._count = examples, 1 + len(config.lm_layers)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        return {**example, "lm_states": example["lm_states"][:, : self._count]}


def _texts(place: Workplace, method: Method, model: Any, text_format: TextFormat, seed: int) -> list[str]:
    keywords = [example.condition for example in place.data.asked]
    most = place.preset.max_new_tokens
    if isinstance(model, FineTunedLM):
        prompts = [prompt_ids(text_format, method, keyword, 0) for keyword in keywords]
        return texts_of_lm(model.causal_lm, text_format, prompts, seed=seed, max_new_tokens=most)
    return texts_of_pair(model, text_format, keywords, seed=seed, max_new_tokens=most)


def _scales(
    place: Workplace,
    method: Method,
    model: AuxTunedForCausalLM,
    text_format: TextFormat,
    seed: int,
    judge: Judge,
) -> list[dict[str, Any]]:
    """The last model of the headline's seed 0 at other mixing weights."""
    if method.name != HEADLINE or seed:
        return []
    keywords = [example.condition for example in place.data.asked]
    most = place.preset.max_new_tokens
    return [
        {
            "aux_scale": scale,
            **judge.measure(
                texts_of_pair(model, text_format, keywords, seed=seed, max_new_tokens=most, aux_scale=scale)
            ),
        }
        for scale in SCALES
    ]


def _flops(cost: TokenCost, training: ExampleSet, sentences: int) -> dict[str, int]:
    """Of a run that takes so many sentences, and of the frozen LM's states, once for all of them."""
    text, condition, labels = 0, 0, 0
    for i in range(len(training.examples)):
        example = training.examples[i]
        text += len(example["input_ids"]) - 1  # the end is not read
        condition += len(example["condition_ids"])
        labels += sum(label != IGNORED for label in example["labels"][1:])
    share = sentences / len(training.examples)
    return {
        "trained": round(share * cost.of(text + condition, 0, labels)),
        "lm_forward": round(share * cost.lm * text),
        "lm_states": cost.lm * text,
    }


def measure_untrained(
    place: Workplace, method: Method, prompt: int, keywords: Sequence[str] | None = None
) -> dict[str, Any]:
    """Texts of the LM, alone or prompted, and what is measured of them.

    Args:
        place: of the study.
        method: "prompt" or "lm".
        prompt: index of the prompt.
        keywords: other ones than the held-out ones; then only texts come back.
    """
    text_format = lm_format(place.preset, place.tokenizer)
    asked = keywords or [example.condition for example in place.data.asked]
    prompts = [prompt_ids(text_format, method, keyword, prompt) for keyword in asked]
    most = place.preset.max_new_tokens
    texts = texts_of_lm(place.lm, text_format, prompts, seed=0, max_new_tokens=most)
    if keywords is not None:
        return {"texts": texts}
    facts = {"method": method.name, "seed": 0, "trainable": 0}
    return {**facts, "evaluations": [{"step": 0, "nll": None, **place.judge().measure(texts)}]}


def measure_references(place: Workplace) -> dict[str, Any]:
    """The test side's own sentences for the same keywords."""
    measured = place.judge().measure([example.text for example in place.data.asked])
    return {"method": "references", "seed": 0, "evaluations": [{"step": 0, "nll": None, **measured}]}
