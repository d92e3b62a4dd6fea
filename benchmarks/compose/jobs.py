"""The study's jobs by name: "states", "train:AUXILIARY:SEED", "texts:SEED"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from auxkern.training.progress import Progress
from benchmarks.compose.presets import AUXILIARIES, REFERENCES, Preset
from benchmarks.compose.training import train_auxiliary
from benchmarks.compose.writing import Writer
from benchmarks.keyword.runs import Workplace, cache_states
from benchmarks.studies import FACTS, write_facts

STATES, TRAIN, TEXTS = "states", "train", "texts"


def training_jobs(preset: Preset) -> list[str]:
    """An auxiliary and a seed each."""
    return [f"{TRAIN}:{name}:{seed}" for seed in range(preset.seeds) for name in AUXILIARIES]


def writing_jobs(preset: Preset) -> list[str]:
    """All rows of a seed each."""
    return [f"{TEXTS}:{seed}" for seed in range(preset.seeds)]


def facts_of(output: Path, job: str) -> Path:
    """What a job writes when it is complete.

    Args:
        output: folder of the study.
        job: its name.
    """
    return output / job.replace(":", "-") / FACTS


def row_folder(output: Path, row: str, seed: int) -> Path:
    """Where a row's texts of a seed are."""
    return facts_of(output, f"{TEXTS}:{seed}").parent / row


def do_job(preset: Preset, place: Workplace, job: str, progress: Progress) -> None:
    """Does a job, or what is left of it.

    Args:
        preset, place: of the study.
        job: its name.
        progress: is told of what goes on.

    Raises:
        OSError, ValueError: a run cannot go on.
    """
    path = facts_of(place.output, job)
    if not path.is_file():
        write_facts(path.parent, _facts(preset, place, job, progress))


def _facts(preset: Preset, place: Workplace, job: str, progress: Progress) -> dict[str, Any]:
    kind, *rest = job.split(":")
    if kind == STATES:
        return {"seconds": cache_states(place, progress)}
    seed = int(rest[-1])
    if kind == TRAIN:
        folder = facts_of(place.output, job).parent
        return train_auxiliary(preset, place, rest[0], seed, folder, progress)
    return _write_rows(preset, place, seed, progress)


def _write_rows(preset: Preset, place: Workplace, seed: int, progress: Progress) -> dict[str, Any]:
    """Texts and measures of every row that has none yet, each in a file of its own."""
    folders = {name: facts_of(place.output, f"{TRAIN}:{name}:{seed}").parent for name in AUXILIARIES}
    rows = (*preset.rows, REFERENCES)
    waiting = [row for row in rows if not (row_folder(place.output, row.name, seed) / FACTS).is_file()]
    writer = Writer(preset, place, folders, seed)
    progress.start(len(rows) - len(waiting), len(rows), "rows of texts")
    for done, row in enumerate(waiting, len(rows) - len(waiting) + 1):
        write_facts(row_folder(place.output, row.name, seed), writer.facts(row))
        progress.say(f"{row.label}: written, {done} of {len(rows)}")
        progress.advance(done)
    progress.close()
    return {"rows": [row.name for row in rows]}
