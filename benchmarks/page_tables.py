"""``python -m benchmarks.page_tables``: every table on the pages, from the committed records.

A page has ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->`` around each; a test holds what stands between
them to the records.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from auxkern.bench import tables
from auxkern.bench.report import between_markers
from auxkern.bench.results import Run
from auxkern.core.files import replace_file
from benchmarks.front import front_table
from benchmarks.pages import RESULTS, committed, committed_run, interval, table, unfit

DOCS, README = Path("docs"), Path("README.md")
_MARKER = re.compile(r"<!-- bench:([a-z0-9_]+) -->")


def updated(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        ValueError: a marker names no table, or has no end.
        OSError: a record is missing.
    """
    for name in _MARKER.findall(text):
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; known are {', '.join(TABLES)}")
        text = between_markers(text, name, TABLES[name]())
    return text


def _run(name: str) -> str:
    """The tables of a run of auxkern.bench.

    Raises:
        ValueError: on a CPU, the machine was busy or times scattered. A GPU's runs keep such notes.
    """
    run = committed_run(name)
    if run.machine["device"] == "cpu":
        cases = run.cases if isinstance(run, Run) else []
        for note in [*run.notes, *(note for case in cases for note in case.notes)]:
            if note.startswith(("Busy", "Noisy")):
                raise unfit(name, note)
    return tables.markdown(run)


def _scaling() -> str:
    from benchmarks.scaling import page_part  # imports what it measures

    return page_part(committed("scaling_cpu"))


def _computes() -> str:
    """What each arithmetic of the CPU's kernels does to the keyword recipe's pair."""
    records = [committed(f"keywords_cpu_{compute}") for compute in ("float32", "bfloat16", "int8")]
    rows = [[record["model"]["compute"], *_quality(record["results"])] for record in records]
    head = ("Compute", "Nll of the LM", "Nll of the pair", "Samples with the keyword")
    return f"{table(head, rows)}\n\n{_counted(records[0])}"


def _recipe() -> str:
    """The keyword recipe's pair beside its base, its auxiliary and the reference sentences."""
    record = committed("keywords_cpu")
    names = {
        "plain": "LM alone, told nothing",
        "lm": "LM alone",
        "aux": "auxiliary alone",
        "pair": "pair",
        "reference": "reference sentences",
    }
    columns = ("nll", "perplexity", "contains_condition", "slor", "distinct_2")
    rows = [
        [label, *(_number(record["results"][name].get(column)) for column in columns)]
        for name, label in names.items()
    ]
    head = ("", "Nll", "Perplexity", "Texts with the keyword", "SLOR", "Distinct-2")
    return f"{table(head, rows)}\n\n{_counted(record)} {_made_by(record)}"


def _quality(models: dict[str, Any]) -> list[str]:
    pair = models["pair"]
    share = f"{pair['contains_condition']:.1%} {interval(pair['contains_condition_interval'], 3)}"
    return [f"{models['lm']['nll']:.3f}", f"{pair['nll']:.3f}", share]


def _counted(record: dict[str, Any]) -> str:
    samples = record["samples"]
    return (
        f"Nll over {record['data']['sequences']} held-out sentences, {samples['count']} samples at "
        f"temperature {samples['temperature']:g}; intervals of {samples['confidence']:.0%}."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.3f}" if value < 100 else f"{value:,.0f}"


def _made_by(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return (
        f"Measured {record['date'][:10]} with `{record['command']}`; {machine['processor']}, threads "
        f"{machine['threads']}, torch {machine['torch']}."
    )


def _cached_states() -> str:
    record = committed("cached_states_cpu")
    rows = [
        [name, f"{one['seconds']:.1f}", str(one["forward passes of the base"])]
        for name, one in record["results"].items()
    ]
    batches = f"{record['settings']['batches']} batches of {record['settings']['batch_size']} sentences"
    return f"{table((batches, 'Seconds', 'Forward passes of the base'), rows)}\n\n{_made_by(record)}"


def _h100_right() -> str:
    """What tests and sanitizer said on an H100."""
    rows = [
        [stage["name"], stage["summary"], f"[{name}.json](../{RESULTS}/{name}.json)"]
        for name in ("h100_tests", "h100_memcheck", "h100_racecheck")
        for stage in committed(name)["stages"]
    ]
    return table(("Stage of `python3 -m benchmarks.gpu`", "Result", "Record"), rows)


# Of the calls that are measured: bytes of a column of logits that have to move, bfloat16 beside float32 or
# another bfloat16.
_BYTES = {"forward 2": 6, "backward 2": 10}
_SIZES = re.compile(r"N ([\d,]+), V ([\d,]+)")
_WIDTHS = re.compile(r"(\d+)\+(\d+)")


def _h100_calls() -> str:
    """The device's time of every call that tuning measured, with what was the default before."""
    record = committed("h100_tuning")
    rows = [
        [work, f"{1e3 * seconds:.3f}", _rate(work, seconds)]
        for choice in record["measured"].values()
        for work, seconds in zip(choice["works"], choice["seconds"], strict=True)
    ]
    figures = next(s["figures"] for s in committed("h100")["stages"] if s["name"] == "ceilings")
    ceilings = ", ".join(
        f"{name} {_per_second(one['rate'], '' if 'product' in name else 'B')}"
        for name, one in figures.items()
    )
    return (
        f"{table(('Call', 'Milliseconds', 'Rate'), rows)}\n\n"
        f"Of the device alone, with the L2 cache cleared before. The same device's ceilings: {ceilings}. "
        f"`{record['command']}`, {record['device']}, torch {record['versions']['torch']}, triton "
        f"{record['versions']['triton']}."
    )


def _rate(work: str, seconds: float) -> str:
    sizes = _SIZES.search(work)
    assert sizes is not None
    N, V = (int(one.replace(",", "")) for one in sizes.groups())
    if (bytes_of := _BYTES.get(work.partition(",")[0])) is not None:
        return _per_second(N * V * bytes_of / seconds, "B")
    if work.startswith("loss of") and (widths := _WIDTHS.search(work)):
        return _per_second(2 * N * V * sum(map(int, widths.groups())) / seconds, "")
    return ""


def _per_second(rate: float, unit: str) -> str:
    return f"{rate / 1e12:.2f} TB/s" if unit else f"{rate / 1e12:.0f} TFLOP/s"


def _h100_tuned() -> str:
    """What tuning chose in place of defaults, and how long calls then take."""
    record = committed("h100_tuning")
    rows = []
    for name, choice in record["measured"].items():
        if choice["chosen"] is None:
            continue
        tried = next(one for one in choice["tried"] if one["value"] == choice["chosen"])
        changed = [
            f"{key} {before} to {choice['chosen'][key]}"
            for key, before in choice["default"].items()
            if choice["chosen"][key] != before
        ]
        shares = ", ".join(f"{share:.0%}" for share in tried["shares"])
        rows.append([f"`{name}`", "; ".join(changed), shares])
    kept = len(record["measured"]) - len(rows)
    head = ("Choice", "Changed", "Time of its calls, of the default's")
    return f"{table(head, rows)}\n\n{kept} other choices were measured and stay."


_RUNS = {
    "cpu": "cpu",
    "linear": "linear_cpu",
    "sample": "sample_cpu",
    "generate": "generate_cpu",
    "real": "real",
    "engine": "engine_cpu",
    "mixtures": "mixtures_cpu",
    "h100": "h100",
    "h100_loss": "h100_loss",
    "h100_linear": "h100_linear",
    "h100_linear_llama3": "h100_linear_llama3",
    "h100_sample": "h100_sample",
}
TABLES: dict[str, Callable[[], str]] = {
    "front": front_table,
    **{name: partial(_run, file) for name, file in _RUNS.items()},
    "scaling": _scaling,
    "computes": _computes,
    "recipe": _recipe,
    "cached_states": _cached_states,
    "h100_right": _h100_right,
    "h100_calls": _h100_calls,
    "h100_tuned": _h100_tuned,
}


def main(argv: list[str] | None = None) -> int:
    """Writes the pages whose tables have changed.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0. A marker that names no table, and a record that is missing or of a machine that was not quiet,
        exit with 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page_tables",
        description="Every table on the pages of docs/ and in the README, from the committed records.",
        allow_abbrev=False,
    )
    parser.parse_args(argv)
    try:
        for path in _changed([*sorted(DOCS.glob("*.md")), README]):
            print(f"wrote {path}")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


def _changed(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if (now := updated(text)) != text:
            replace_file(path, now)
            yield path


if __name__ == "__main__":
    sys.exit(main())
