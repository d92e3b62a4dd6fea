"""What the runs of a study come to: one record, with an interval for every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from auxkern.evaluation.bootstrap import bootstrap_difference, bootstrap_mean
from benchmarks.keyword.data import study_data
from benchmarks.keyword.presets import BASELINE, HEADLINE, METHODS, Method, Preset
from benchmarks.keyword.runs import run_folder
from benchmarks.studies import FACTS, read_facts

SHOWN = 6  # keywords whose texts stand in the record
_SINGLE = ("distinct_1", "distinct_2", "self_bleu_4")


def study_record(
    preset: Preset, output: Path, tuning: dict[str, Any], *, partial: bool = False
) -> dict[str, Any]:
    """The study's results from what its runs wrote.

    Args:
        preset: of the study.
        output: its folder.
        tuning: what ``--tune`` wrote.
        partial: whether runs that are not complete are left out, instead of an error. States, references
            and one run of auxiliary tuning, of training from scratch and of the LM alone there must be.

    Returns:
        preset, tuning, data, states, methods (one for each, in ``METHODS``' order, then the references)
        and comparisons, in JSON's types.

    Raises:
        FileNotFoundError: a run is missing.
    """
    keywords = [example.condition for example in study_data(preset).asked]
    found = {
        method.name: [
            read_facts(run_folder(output, method, seed))
            for seed in range(method.seeds)
            if not partial or (run_folder(output, method, seed) / FACTS).is_file()
        ]
        for method in METHODS
    }
    runs = {name: some for name, some in found.items() if some}
    references = read_facts(output / "runs" / "references")
    return {
        "preset": asdict(preset),
        "tuning": tuning,
        "keywords": keywords,
        "states": read_facts(output / "states"),
        "methods": [
            *(
                {"steps": preset.steps_of(method), **_method(method, runs[method.name], keywords)}
                for method in METHODS
                if method.name in runs
            ),
            {
                "name": "references",
                "label": "reference sentences",
                "points": [_point([references["evaluations"][0]], keywords)],
            },
        ],
        "comparisons": comparisons(runs, keywords),
    }


def _method(method: Method, runs: Sequence[dict[str, Any]], keywords: Sequence[str]) -> dict[str, Any]:
    first = runs[0]
    by_step: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        for evaluation in run["evaluations"]:
            by_step.setdefault(evaluation["step"], []).append(evaluation)
    row: dict[str, Any] = {
        "name": method.name,
        "label": method.label,
        "kind": method.kind,
        "seeds": [run["seed"] for run in runs],
        "trainable": first["trainable"],
        "learning_rate": first.get("learning_rate"),
        "flops": first.get("flops"),
        "seconds": [round(run["seconds"], 1) for run in runs if "seconds" in run],
        "nll": {str(step): _mean([one["nll"] for one in found]) for step, found in by_step.items()},
        "points": [
            {"step": step, **_point(found, keywords)}
            for step, found in by_step.items()
            if "texts" in found[0]
        ],
    }
    if first.get("scales"):
        row["scales"] = [
            {"aux_scale": one["aux_scale"], **_point([one], keywords)} for one in first["scales"]
        ]
    return row


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _point(measured: Sequence[dict[str, Any]], keywords: Sequence[str]) -> dict[str, Any]:
    """One method at one step, its seeds together; intervals over the keywords."""
    point: dict[str, Any] = {}
    for name, key in (("accuracy", "contains"), ("slor", "slor")):
        values, clusters = _pooled(measured, key, keywords)
        interval = bootstrap_mean(values, clusters=clusters)
        point[name] = interval.mean
        point[f"{name}_interval"] = [interval.low, interval.high]
        point[f"{name}_of_seeds"] = [_mean(one[key]) for one in measured]
    for name in _SINGLE:
        point[name] = _mean([one[name] for one in measured])
    point["words"] = _mean([len(text.split()) for one in measured for text in one["texts"]])
    point["texts"] = dict(zip(keywords[:SHOWN], measured[0]["texts"], strict=False))
    return point


def _pooled(
    measured: Sequence[dict[str, Any]], key: str, keywords: Sequence[str]
) -> tuple[list[float], list[str]]:
    pairs = [
        (float(value), keyword)
        for one in measured
        for value, keyword in zip(one[key], keywords, strict=True)
        if value is not None
    ]
    return [value for value, _ in pairs], [keyword for _, keyword in pairs]


def comparisons(runs: dict[str, list[dict[str, Any]]], keywords: Sequence[str]) -> dict[str, Any]:
    """What is asked of auxiliary tuning beside the same architecture from scratch.

    Returns:
        accuracy_difference: at the end, the first's less the second's, with a 95% interval over the
            keywords; slor_at_a_fifth and slor_from_scratch_at_the_end; reached: the first step at which
            auxiliary tuning's validation nll is what training from scratch ends with, and the FLOPs up
            to there by how the frozen LM is counted, over those of the whole run from scratch.
    """
    ours, theirs = runs[HEADLINE], runs[BASELINE]
    ends = [[_measured(run)[-1] for run in some] for some in (ours, theirs)]
    pooled = [_per_keyword(some, "contains", keywords) for some in ends]
    difference = bootstrap_difference(*pooled, clusters=list(keywords))
    fifths = [_measured(run)[0] for run in ours]
    early, late = (_pooled(some, "slor", keywords)[0] for some in (fifths, ends[1]))
    return {
        "accuracy_difference": difference.mean,
        "accuracy_difference_interval": [difference.low, difference.high],
        "slor_at_a_fifth": _mean(early),
        "slor_from_scratch_at_the_end": _mean(late),
        "fifth": fifths[0]["step"],
        "reached": _reached(ours, theirs),
    }


def _measured(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in run["evaluations"] if "texts" in one]


def _per_keyword(measured: Sequence[dict[str, Any]], key: str, keywords: Sequence[str]) -> list[float]:
    """The mean over the seeds, for each keyword."""
    return [sum(float(one[key][i]) for one in measured) / len(measured) for i in range(len(keywords))]


def _reached(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    target = _mean([run["evaluations"][-1]["nll"] for run in theirs])
    by_step = {
        one["step"]: _mean([other["evaluations"][i]["nll"] for other in ours])
        for i, one in enumerate(ours[0]["evaluations"])
    }
    steps = max(by_step)
    step = next((step for step, nll in by_step.items() if nll is not None and nll <= target), None)
    found: dict[str, Any] = {"nll": target, "step": step, "steps": steps}
    if step is None:
        return found
    ours_flops, whole = ours[0]["flops"], theirs[0]["flops"]["trained"]
    trained = ours_flops["trained"] * step / steps
    read = ours_flops["lm_forward"] * step / steps
    return {
        **found,
        "flops_from_scratch": whole,
        "flops": {
            "the LM runs at each step": trained + read,
            "its states are made first, for all sentences": trained + ours_flops["lm_states"],
            "its states are there": trained,
        },
        "ratios": {
            "the LM runs at each step": (trained + read) / whole,
            "its states are made first, for all sentences": (trained + ours_flops["lm_states"]) / whole,
            "its states are there": trained / whole,
        },
    }
