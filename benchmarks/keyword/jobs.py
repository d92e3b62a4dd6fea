"""The study's jobs by name: what each does, and the file that says it is done.

"states", "references", "untrained:METHOD", "try:METHOD:RATE" of a run at one of several learning rates, and
"run:METHOD:SIZE:SEED" of one whose weights are tested: the best rate's where its size and seed are those that
rates were tried at, elsewhere one that it trains itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from auxkern.training.checkpoint import checkpoint_folder, checkpoint_steps
from auxkern.training.progress import Progress
from benchmarks.keyword.presets import BY_NAME, FULL, LORA, Preset
from benchmarks.keyword.runs import Workplace, cache_states, train_run
from benchmarks.keyword.scoring import measure_references, score_run, score_untrained
from benchmarks.studies import FACTS, read_facts, write_facts

STATES, REFERENCES, UNTRAINED, TRY, RUN = "states", "references", "untrained", "try", "run"
TRIAL_SEED = 0


def stages(preset: Preset) -> tuple[tuple[list[str], bool], ...]:
    """What is done after what, the longest jobs first: at the end no core waits for one of them.

    Returns:
        Jobs, and whether some of them may run at a time, for each stage.
    """

    def longest(name: str, size: int) -> int:
        cost = {LORA: 3, FULL: 4}.get(BY_NAME[name].kind, 1)
        return -cost * preset.steps_of(name, size)

    trials = sorted(preset.trials(), key=lambda trial: longest(trial[0], preset.tried_at))
    runs = sorted(preset.runs(), key=lambda run: longest(run[0].name, run[1]))
    return (
        ([STATES], False),
        ([trial_job(name, rate) for name, rate in trials], True),
        (
            [
                *(run_job(method.name, size, seed) for method, size, seed in runs),
                *(untrained_job(name) for name in preset.untrained),
                REFERENCES,
            ],
            True,
        ),
    )


def trial_job(name: str, rate: float) -> str:
    """Of a learning rate."""
    return f"{TRY}:{name}:{rate:g}"


def run_job(name: str, size: int, seed: int) -> str:
    """Of a run that is tested."""
    return f"{RUN}:{name}:{size}:{seed}"


def untrained_job(name: str) -> str:
    """Of a row that is only measured."""
    return f"{UNTRAINED}:{name}"


def facts_of(output: Path, job: str) -> Path:
    """What a job writes when it is complete.

    Args:
        output: folder of the study.
        job: its name.
    """
    return output / "jobs" / job.replace(":", "-") / FACTS


def trial_facts(preset: Preset, output: Path, name: str) -> dict[float, dict[str, Any]]:
    """What the runs of a method's learning rates came to; empty where none were tried.

    Raises:
        OSError: one is not complete.
    """
    return {
        rate: read_facts(facts_of(output, trial_job(name, rate)).parent)
        for tried, rate in preset.trials()
        if tried == name
    }


def best_nll(facts: dict[str, Any]) -> float:
    """The validation nll of a run's best step."""
    return min(nll for _, nll in facts["curve"])


def chosen_rate(preset: Preset, output: Path, name: str) -> float:
    """The learning rate whose run has the lowest validation nll; the only one where none were tried.

    Raises:
        OSError: a trial is not complete.
    """
    tried = trial_facts(preset, output, name)
    return min(tried, key=lambda rate: best_nll(tried[rate])) if tried else preset.rates[name][0]


class _Trained(NamedTuple):
    folder: Path
    facts: dict[str, Any]


def do_job(place: Workplace, job: str, progress: Progress) -> None:
    """Does a job, or what is left of it.

    Args:
        place: of the study.
        job: its name.
        progress: is told of what goes on.

    Raises:
        OSError, ValueError: what it reads is not there, or a run cannot go on.
    """
    path = facts_of(place.output, job)
    if not path.is_file():
        write_facts(path.parent, _facts(place, job, path.parent, progress))
    for step in checkpoint_steps(path.parent):  # of fine-tuning 1.6 GB each
        shutil.rmtree(checkpoint_folder(path.parent, step))


def _facts(place: Workplace, job: str, folder: Path, progress: Progress) -> dict[str, Any]:
    preset = place.preset
    kind, *rest = job.split(":")
    if kind == STATES:
        return {"seconds": cache_states(place, progress)}
    if kind == REFERENCES:
        return measure_references(place)
    method = BY_NAME[rest[0]]
    if kind == UNTRAINED:
        return score_untrained(place, method)
    if kind == TRY:
        rate = float(rest[1])
        return train_run(place, method, preset.tried_at, TRIAL_SEED, rate, folder, progress)
    size, seed = map(int, rest[1:])
    trained = _trained(place, job, size, seed, folder, progress)
    return {**trained.facts, **score_run(place, method, size, seed, trained.folder)}


def _trained(place: Workplace, job: str, size: int, seed: int, folder: Path, progress: Progress) -> _Trained:
    """A run's weights: those of the trial that is the same run, or of one that is made now."""
    preset, name = place.preset, job.split(":")[1]
    tried, rate = trial_facts(preset, place.output, name), chosen_rate(preset, place.output, name)
    if tried and size == preset.tried_at and seed == TRIAL_SEED:
        return _Trained(facts_of(place.output, trial_job(name, rate)).parent, tried[rate])
    return _Trained(folder, train_run(place, BY_NAME[name], size, seed, rate, folder, progress))
