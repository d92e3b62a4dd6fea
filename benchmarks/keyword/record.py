"""What the runs of a study come to: one record, with an interval for every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from auxkern.evaluation.bootstrap import Interval, bootstrap_difference, bootstrap_mean
from benchmarks.keyword.data import StudyData, study_data
from benchmarks.keyword.jobs import (
    REFERENCES,
    STATES,
    best_nll,
    facts_of,
    run_job,
    trial_facts,
    untrained_job,
)
from benchmarks.keyword.presets import DEEP, HEADLINE, PAIR, TUNED_LORA, TUNED_WHOLE, Method, Preset
from benchmarks.keyword.scoring import PLAIN
from benchmarks.studies import read_facts

KIND = "keyword study, second edition"
SHOWN = 8  # keywords whose texts stand in the record
_SINGLE = ("distinct_1", "distinct_2", "self_bleu_4")
_Facts = dict[str, Any]


def study_record(preset: Preset, output: Path) -> dict[str, Any]:
    """The study's results from what its jobs wrote.

    Args:
        preset: of the study.
        output: its folder.

    Returns:
        preset, data, states, rows (one for each method, with a point for each size), references and
        comparisons, in JSON's types.

    Raises:
        FileNotFoundError: a job is not complete.
    """
    data = study_data(preset)
    keywords = [example.condition for example in data.asked]
    runs: dict[str, dict[int, list[_Facts]]] = {}
    for method, size, seed in preset.runs():
        facts = _read(output, run_job(method.name, size, seed))
        runs.setdefault(method.name, {}).setdefault(size, []).append(facts)
    shares = state_shares(preset, runs)
    rows = []
    for method in preset.methods:
        row: dict[str, Any] = {
            "name": method.name,
            "label": method.label,
            "kind": method.kind,
            "told": method.told,
        }
        if method.trained:
            tried = trial_facts(preset, output, method.name)
            some = runs[method.name]
            row |= {
                "trainable": some[max(some)][0]["trainable"],
                "learning_rate": some[max(some)][0]["learning_rate"],
                "tried": {f"{rate:g}": best_nll(facts) for rate, facts in tried.items()},
                "points": [
                    _trained_point(found, keywords, shares.get((method.name, size), 0.0))
                    for size, found in some.items()
                ],
            }
        else:
            row["points"] = [_point([_read(output, untrained_job(method.name))], keywords)]
        rows.append(row)
    references = _read(output, REFERENCES)
    return {
        "preset": asdict(preset),
        "data": _data(data),
        "states": _read(output, STATES),
        "rows": rows,
        "references": {way: sample_point([one], keywords) for way, one in references["samples"].items()},
        "comparisons": comparisons(preset, rows, runs),
    }


def _read(output: Path, job: str) -> _Facts:
    return read_facts(facts_of(output, job).parent)


def _data(data: StudyData) -> dict[str, Any]:
    return {
        "shots": [[one.condition, one.text] for one in data.shots],
        "validation": len(data.validation),
        "test": len(data.test),
        "keywords": [one.condition for one in data.asked],
        "training words": sum(len(one.text.split()) for one in data.training) / len(data.training),
    }


# ------------------------------------------------------------------------------------------------ one method


def _trained_point(found: Sequence[_Facts], keywords: Sequence[str], share: float) -> dict[str, Any]:
    """A method at one size, its seeds together."""
    first = found[0]
    trained = _mean([one["step_flops"] * one["best_step"] for one in found])
    return {
        "size": first["size"],
        "steps": first["steps"],
        "best_steps": [one["best_step"] for one in found],
        "seconds": [round(one["seconds"], 1) for one in found],
        "curve": _curve([one["curve"] for one in found]),
        "flops": {
            "step": _mean([one["step_flops"] for one in found]),
            "trained": trained,
            "states": first["state_flops"],
            "shared": share,
        },
        **_point(found, keywords),
    }


def _curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Steps and the mean validation nll of the seeds, where all have one."""
    by_step = [dict(map(tuple, curve)) for curve in curves]
    common = [step for step in by_step[0] if all(step in other for other in by_step)]
    return [[step, _mean([other[step] for other in by_step])] for step in common]


def _point(found: Sequence[_Facts], keywords: Sequence[str]) -> dict[str, Any]:
    nll = nll_of(found)
    return {
        "nll": nll.mean,
        "nll_interval": [nll.low, nll.high],
        "nll_of_seeds": [sum(nll for nll, _ in one["parts"]) / _labels(one) for one in found],
        "samples": {
            way: sample_point([one["samples"][way] for one in found], keywords) for way in found[0]["samples"]
        },
    }


def sample_point(measured: Sequence[_Facts], keywords: Sequence[str]) -> dict[str, Any]:
    """Texts for the keywords, those of all seeds together; intervals are over the keywords."""
    point: dict[str, Any] = {}
    for name, key in (("accuracy", "contains"), ("slor", "slor")):
        values, clusters = _pooled(measured, key, keywords)
        if not values:  # nothing but empty texts has no SLOR
            point |= {name: None, f"{name}_interval": None, f"{name}_of_seeds": [None] * len(measured)}
            continue
        interval = bootstrap_mean(values, clusters=clusters)
        point[name] = interval.mean
        point[f"{name}_interval"] = [interval.low, interval.high]
        point[f"{name}_of_seeds"] = [_known_mean(one[key]) for one in measured]
    for name in _SINGLE:
        point[name] = _known_mean([one[name] for one in measured])
    point["words"] = _mean([len(text.split()) for one in measured for text in one["texts"]])
    point["texts"] = dict(zip(keywords[:SHOWN], measured[0]["texts"], strict=False))
    return point


def _pooled(measured: Sequence[_Facts], key: str, keywords: Sequence[str]) -> tuple[list[float], list[str]]:
    pairs = [
        (float(value), keyword)
        for one in measured
        for value, keyword in zip(one[key], keywords, strict=True)
        if value is not None
    ]
    return [value for value, _ in pairs], [keyword for _, keyword in pairs]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


# --------------------------------------------------------------------------------------- what states cost


def state_shares(preset: Preset, runs: dict[str, dict[int, list[_Facts]]]) -> dict[tuple[str, int], float]:
    """What of the base's states' FLOPs is a run's, by method and size.

    A sentence's states are counted once in the study: in equal parts among the runs that read them, which
    are the pairs' whose base reads the same, on sets that hold the sentence, those that tried rates among
    them.

    Args:
        preset: of the study.
        runs: facts by method and size.
    """
    shares: dict[tuple[str, int], float] = {}
    for told in (True, False):
        methods = [one for one in preset.methods if one.kind == PAIR and one.told == told]
        sizes = sorted({size for one in methods for size in runs[one.name]})
        read = [size for one in methods for size in _sizes_read(preset, one)]
        flops = {size: _state_flops(methods, size, runs) for size in sizes}
        before, total = 0.0, 0.0
        for size in sizes:
            # Of the sentences that this set adds to the one before it.
            total += (flops[size] - before) / sum(other >= size for other in read)
            before = flops[size]
            shares |= {(one.name, size): total for one in methods if size in runs[one.name]}
    return shares


def _sizes_read(preset: Preset, method: Method) -> list[int]:
    """The size of each run of a method; of those at different rates one is the run that is tested."""
    tested = [size for one, size, _ in preset.runs() if one == method]
    trials = [preset.tried_at for name, _ in preset.trials() if name == method.name]
    return [*tested, *trials[1:]]


def _state_flops(methods: Sequence[Method], size: int, runs: dict[str, dict[int, list[_Facts]]]) -> float:
    flops: float = next(runs[one.name][size][0]["state_flops"] for one in methods if size in runs[one.name])
    return flops


# ------------------------------------------------------------------------------------------- comparisons


def nll_of(found: Sequence[_Facts], less: Sequence[_Facts] = ()) -> Interval:
    """Mean nll of a label on the test side, seeds together, or its difference from another method's.

    Args:
        found: runs, of which each has the same parts.
        less: those whose nll is taken off.

    Returns:
        With an interval over the parts: what is common to both methods falls out.
    """
    labels = [int(count) for _, count in found[0]["parts"]]
    values: list[float] = []
    clusters: list[int] = []
    for i, count in enumerate(labels):
        sums = [_mean([one["parts"][i][0] for one in some]) for some in (found, less) if some]
        value = (sums[0] - (sums[1] if less else 0.0)) / count
        values += [value] * count  # a part weighs as much as it has labels
        clusters += [i] * count
    return bootstrap_mean(values, clusters=clusters)


def _labels(facts: _Facts) -> float:
    return float(sum(count for _, count in facts["parts"]))


def comparisons(
    preset: Preset, rows: Sequence[dict[str, Any]], runs: dict[str, dict[int, list[_Facts]]]
) -> dict[str, Any]:
    """What is asked of auxiliary tuning beside LoRA and fine-tuning, as far as the preset has both.

    Returns:
        "lora": at the study's size the difference of the nll and of the accuracy, the auxiliary's less
        LoRA's, with 95% intervals over the test side, and the auxiliary's training FLOPs over LoRA's: without
        its base's states, with its share of them, and with all of them. "full": by the name of each
        auxiliary of the LM's own layers, the difference of the nll from fine-tuning's at every size that both
        have.
    """
    found: dict[str, Any] = {}
    if {HEADLINE, TUNED_LORA} <= runs.keys():
        ours, theirs = (runs[name][preset.size] for name in (HEADLINE, TUNED_LORA))
        accuracies = [_per_keyword(some) for some in (ours, theirs)]
        mine, other = (_flops(rows, name) for name in (HEADLINE, TUNED_LORA))
        found["lora"] = {
            "nll": _difference(nll_of(ours, theirs)),
            "accuracy": _difference(bootstrap_difference(*accuracies)),
            "flops": {
                "apart": mine["trained"] / other["trained"],
                "shared": (mine["trained"] + mine["shared"]) / other["trained"],
                "all": (mine["trained"] + mine["states"]) / other["trained"],
            }
            if other["trained"]
            else {},
        }
    if TUNED_WHOLE in runs:
        whole = runs[TUNED_WHOLE]
        found["full"] = {
            name: [
                {"size": size, **_difference(nll_of(runs[name][size], whole[size]))}
                for size in preset.sizes
                if size in runs[name] and size in whole
            ]
            for name in (HEADLINE, DEEP)
            if name in runs
        }
    return found


def _flops(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    flops: dict[str, float] = next(row for row in rows if row["name"] == name)["points"][-1]["flops"]
    return flops


def _difference(interval: Interval) -> dict[str, Any]:
    return {"difference": interval.mean, "interval": [interval.low, interval.high]}


def _per_keyword(found: Sequence[_Facts]) -> list[float]:
    """Whether a text has its keyword, the mean over the seeds."""
    each = [one["samples"][PLAIN]["contains"] for one in found]
    return [_mean(list(map(float, values))) for values in zip(*each, strict=True)]
