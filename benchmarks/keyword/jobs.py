"""The study's jobs by name: what each does, and the file that says it is done.

"states", "references", "METHOD:SEED" of a run, "try:METHOD:RATE" of a trial, "try:prompts".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from auxkern.training.progress import Progress
from benchmarks.keyword.presets import BY_NAME, FULL, LORA, METHODS, Preset
from benchmarks.keyword.runs import (
    Workplace,
    cache_states,
    measure_references,
    measure_untrained,
    run_folder,
    train_method,
)
from benchmarks.keyword.tuning import PROMPTS_FOLDER, trial_folder, trials, try_prompts, try_rate
from benchmarks.studies import FACTS, write_facts

STATES, REFERENCES, TRY_PROMPTS = "states", "references", "try:prompts"


def study_jobs() -> list[str]:
    """All jobs of a study but the states, the longest first: at the end no core waits for one of them."""
    runs = [(method, f"{method.name}:{seed}") for method in METHODS for seed in range(method.seeds)]
    runs.sort(key=lambda run: run[0].kind not in (FULL, LORA))
    return [*(name for _, name in runs), REFERENCES]


def tuning_jobs(preset: Preset) -> list[str]:
    """All trials, likewise."""
    return [*(f"try:{name}:{rate:g}" for name, rate in reversed(trials(preset))), TRY_PROMPTS]


def facts_of(output: Path, job: str) -> Path:
    """What a job writes when it is complete.

    Args:
        output: folder of the study.
        job: its name.
    """
    if job in (STATES, REFERENCES):
        return (output if job == STATES else output / "runs") / job / FACTS
    if job == TRY_PROMPTS:
        return output / PROMPTS_FOLDER / FACTS
    if job.startswith("try:"):
        _, method, rate = job.split(":")
        return trial_folder(output, method, float(rate)) / FACTS
    method, seed = job.split(":")
    return run_folder(output, BY_NAME[method], int(seed)) / FACTS


def do_job(place: Workplace, job: str, tuning: Path, progress: Progress) -> None:
    """Does a job, or what is left of it.

    Args:
        place: of the study.
        job: its name.
        tuning: what the trials came to; runs read it.
        progress: is told of what goes on.

    Raises:
        OSError, ValueError: the tuning's file is missing or another one, or a run cannot go on.
    """
    path = facts_of(place.output, job)
    if not path.is_file():
        write_facts(path.parent, _facts(place, job, path.parent, tuning, progress))


def _facts(place: Workplace, job: str, folder: Path, tuning: Path, progress: Progress) -> dict[str, Any]:
    if job == STATES:
        return {"seconds": cache_states(place, progress)}
    if job == REFERENCES:
        return measure_references(place)
    if job == TRY_PROMPTS:
        return {"shares": try_prompts(place)}
    if job.startswith("try:"):
        _, name, rate = job.split(":")
        return try_rate(place, name, float(rate), folder, progress)
    name, seed = job.split(":")
    method, found = BY_NAME[name], json.loads(tuning.read_text(encoding="utf-8"))
    if not method.trained:
        return measure_untrained(place, method, found["prompt"])
    rate = found["learning_rates"][method.tuned_as]
    return train_method(place, method, int(seed), rate, folder, progress)
