"""What the texts of the study come to: one record, with an interval for every figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from auxkern.evaluation.bootstrap import bootstrap_difference, bootstrap_mean
from benchmarks.compose.jobs import STATES, facts_of, row_folder, training_jobs
from benchmarks.compose.presets import (
    COMPOSED,
    KEYWORD,
    LENGTH,
    ONE,
    REFERENCES,
    SHARED_ONCE,
    Preset,
    Row,
    guidance_row,
)
from benchmarks.studies import read_facts

KIND = "study of composed auxiliaries"
SHARES = (BOTH_HOLD, KEYWORD, LENGTH, WITHIN_1) = ("both", KEYWORD, LENGTH, "length within 1")
RUN_ON = "run-on"  # of texts that fall apart: a word of more than so many characters
LONGEST = 25
SLOR = "SLOR"
SHOWN = 5  # conditions whose texts stand in the record
# Rows that are set against each other: the first's figure less the second's.
COMPARED = (
    (COMPOSED, ONE),
    (COMPOSED, KEYWORD),
    (COMPOSED, LENGTH),
    (SHARED_ONCE, COMPOSED),
    (SHARED_ONCE, ONE),
)
_Z = 1.959963984540054  # of a normal distribution, 95% lie within so many standard deviations


def wilson(successes: int, count: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927), which has a width where none or all succeed.

    Args:
        successes: of ``count`` independent trials.
        count: 1 or more.
    """
    share, z2 = successes / count, _Z**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / count / 4) / (1 + z2)
    # At 0 and at 1 an end is the share itself, but for rounding.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _sizes(preset: Preset) -> dict[str, Any]:
    """The keyword study's preset with the one size and number of steps that there are here."""
    return {**asdict(preset.keyword), "training": preset.keyword.size, "steps": preset.steps}


def study_record(preset: Preset, output: Path) -> dict[str, Any]:
    """The study's results from what its jobs wrote.

    Args:
        preset: of the study.
        output: its folder.

    Returns:
        preset, states, auxiliaries (each training), shown (conditions whose texts stand in the rows), rows
        (in the preset's order, then the references), comparisons and guidance, in JSON's types.

    Raises:
        FileNotFoundError: a job is not complete.
    """
    measured = {
        row.name: [read_facts(row_folder(output, row.name, seed)) for seed in range(preset.seeds)]
        for row in (*preset.rows, REFERENCES)
    }
    guided = [guidance_row(scale).name for scale in preset.scales]
    return {
        "preset": {**asdict(preset), "keyword": _sizes(preset)},
        "states": read_facts(facts_of(output, STATES).parent),
        "auxiliaries": [read_facts(facts_of(output, job).parent) for job in training_jobs(preset)],
        "shown": measured[REFERENCES.name][0]["conditions"][:SHOWN],
        "rows": [_row(row, measured[row.name]) for row in (*preset.rows, REFERENCES)],
        "comparisons": [_difference(measured, first, second) for first, second in COMPARED],
        "guidance": [
            {"scale": scale, **_difference(measured, name, KEYWORD)}
            for scale, name in zip(preset.scales, guided, strict=True)
        ],
    }


def _row(row: Row, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    texts = _joined(measured, "texts")
    slor = bootstrap_mean([value for value in _joined(measured, "slor") if value is not None])
    record: dict[str, Any] = {
        "name": row.name,
        "label": row.label,
        "addends": [one._asdict() for one in row.addends],
        "texts": len(texts),
        "slor": slor.mean,
        "slor_interval": [slor.low, slor.high],
        "words": sum(_joined(measured, "words")) / len(texts),
        "distinct_2": sum(one["distinct_2"] for one in measured) / len(measured),
        "seconds": [round(one["seconds"], 1) for one in measured],
        "shown": measured[0]["texts"][:SHOWN],
    }
    for name in (*SHARES, RUN_ON):
        each = [_holds(one)[name] for one in measured]
        count = sum(map(sum, each))
        record[name] = count / len(texts)
        record[f"{name}_interval"] = list(wilson(count, len(texts)))
        record[f"{name}_of_seeds"] = [sum(some) / len(some) for some in each]
    return record


def _joined(measured: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """One value for each condition: every seed has its own ones."""
    return [value for one in measured for value in one[key]]


def _holds(measured: dict[str, Any]) -> dict[str, list[int]]:
    """Whether each text does what it should, 0 or 1, for each of ``SHARES``; and whether it is ``RUN_ON``."""
    off = [abs(a - b) for a, b in zip(measured["words"], measured["words_asked"], strict=True)]
    exact = [int(value == 0) for value in off]
    keyword = measured["contains"]
    return {
        BOTH_HOLD: [a * b for a, b in zip(keyword, exact, strict=True)],
        KEYWORD: keyword,
        LENGTH: exact,
        WITHIN_1: [int(value <= 1) for value in off],
        RUN_ON: [int(any(len(word) > LONGEST for word in text.split())) for text in measured["texts"]],
    }


def _difference(measured: dict[str, list[dict[str, Any]]], first: str, second: str) -> dict[str, Any]:
    """What the first row has more than the second, over the same conditions."""
    record: dict[str, Any] = {"first": first, "second": second}
    holds = [[_holds(one) for one in measured[name]] for name in (first, second)]
    slor = zip(_joined(measured[first], "slor"), _joined(measured[second], "slor"), strict=True)
    known = [pair for pair in slor if None not in pair]
    pairs = {name: [_joined(one, name) for one in holds] for name in (*SHARES, RUN_ON)}
    pairs[SLOR] = [[pair[side] for pair in known] for side in (0, 1)]
    for name, (ours, theirs) in pairs.items():
        difference = bootstrap_difference(ours, theirs)
        record[name] = difference.mean
        record[f"{name}_interval"] = [difference.low, difference.high]
    return record
