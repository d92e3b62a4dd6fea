"""``python -m benchmarks.compose.page``: the study's page and pictures, from its JSON file alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from auxkern.training.progress import duration
from benchmarks.compose.plot import guided_rows, plot_guidance, plot_rows
from benchmarks.compose.presets import AUXILIARIES, BASE, COMPOSED, KEYWORD, LENGTH, ONE, ROWS, SHARED_ONCE
from benchmarks.compose.record import BOTH_HOLD, KIND, LONGEST, RUN_ON, SHARES, SLOR, WITHIN_1
from benchmarks.pages import Page, cell, interval, table

_HEAD = ("", *SHARES, SLOR, "words", "distinct-2", RUN_ON)
_CUT = 200  # characters of a text that are shown


def page(record: dict[str, Any], pictures: dict[str, str], command: str) -> str:
    """The page in Markdown.

    Args:
        record: of the study.
        pictures: paths from the page to the pictures "rows" and "guidance".
        command: what makes the page.
    """
    parts = [
        "# Two conditions at once: auxiliaries trained apart, composed when texts are written",
        f"<!-- Made by `{command}`; every number is the JSON file's. -->",
        _introduction(record),
        "## What came out",
        table(_HEAD, (_row(row) for row in _mixtures(record))),
        f"![shares of texts that satisfy their conditions, and SLOR]({pictures['rows']})",
        _compared(record),
        *_reading(record),
        "## Guidance on the pair",
        *_guidance(record, pictures["guidance"]),
        "## Texts",
        *_texts(record),
        "## What is the same for all",
        _fairness(record),
        "## How it is counted",
        _counting(record),
        "## Run it",
        _commands(record),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(record: dict[str, Any]) -> str:
    composed, once, one, keyword, length, base = (
        _named(record, name) for name in (COMPOSED, SHARED_ONCE, ONE, KEYWORD, LENGTH, BASE)
    )
    sizes = record["preset"]["keyword"]
    return (
        "Adding logits multiplies probabilities, so auxiliaries can be added that never saw each other. Here "
        "one has learnt to use a given keyword, another to write a given number of words, both on "
        f"{sizes['training']:,} example sentences of WordNet; a text of both is to satisfy both. Of "
        f"{composed['texts']:,} texts for held-out keywords, {_percent(composed, BOTH_HOLD)} do with the two "
        f"added, {_percent(once, BOTH_HOLD)} where what they have in common is counted once, "
        f"{_percent(one, BOTH_HOLD)} with one auxiliary that was trained on both conditions at once, "
        f"{_percent(keyword, BOTH_HOLD)} and {_percent(length, BOTH_HOLD)} with the keyword's and the "
        f"length's alone, {_percent(base, BOTH_HOLD)} with the language model alone. The base is "
        f"{sizes['base'].removeprefix('pip:llm-')}, an auxiliary trains "
        f"{record['auxiliaries'][0]['trainable']:,} parameters."
    )


def _named(record: dict[str, Any], name: str) -> dict[str, Any]:
    row: dict[str, Any] = next(row for row in record["rows"] if row["name"] == name)
    return row


def _mixtures(record: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows but those of guidance."""
    return [_named(record, name) for name in (*(row.name for row in ROWS), "references")]


def _percent(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def _row(row: dict[str, Any]) -> Sequence[str]:
    shares = (f"{row[name]:.3f} {interval(row[f'{name}_interval'], 3)}" for name in SHARES)
    slor = f"{row['slor']:.2f} {interval(row['slor_interval'], 2)}"
    return (row["label"], *shares, slor, *_plain(row))


def _plain(row: dict[str, Any]) -> Sequence[str]:
    """What has no interval in the tables."""
    return f"{row['words']:.1f}", f"{row['distinct_2']:.2f}", f"{row[RUN_ON]:.3f}"


def _compared(record: dict[str, Any]) -> str:
    """Differences over the same conditions."""
    labels = {row["name"]: row["label"] for row in record["rows"]}
    names = [name for name in (*SHARES, SLOR) if name != WITHIN_1]
    rows = (
        (f"{labels[one['first']]}, less {labels[one['second']]}", *(_change(one, name) for name in names))
        for one in record["comparisons"]
    )
    return table(("difference, over the same conditions", *names), rows)


def _change(difference: dict[str, Any], name: str) -> str:
    digits = 2 if name == SLOR else 3
    return f"{difference[name]:+.{digits}f} {interval(difference[f'{name}_interval'], digits)}"


def _sign(difference: dict[str, Any], name: str) -> int:
    """1 or -1 where the interval says so, else 0."""
    low, high = difference[f"{name}_interval"]
    return int(low > 0) - int(high < 0)


def _reading(record: dict[str, Any]) -> Iterable[str]:
    """What the table says, in words."""
    differences = {(one["first"], one["second"]): one for one in record["comparisons"]}
    beside_one = differences[COMPOSED, ONE]
    yield {
        1: "The sum of two auxiliaries, trained apart, satisfies both conditions more often than the one "
        "that was trained on both.",
        0: "How often both conditions are satisfied does not differ, as far as these texts tell, between the "
        "sum of two auxiliaries, trained apart, and one that was trained on both.",
        -1: "One auxiliary that was trained on both conditions satisfies them more often than the plain sum "
        "of two that were trained apart.",
    }[_sign(beside_one, BOTH_HOLD)]
    own = {KEYWORD: "the keyword", LENGTH: "the number of words"}
    lost = [what for name, what in own.items() if _sign(differences[COMPOSED, name], name) < 0]
    if lost:
        less = " and ".join(f"{what} less often than with its auxiliary alone" for what in lost)
        yield f"The texts of the plain sum have {less}."
    else:
        yield (
            "In the plain sum, neither auxiliary does less for its own condition than alone, as far as these "
            "texts tell."
        )
    once = differences[SHARED_ONCE, COMPOSED]
    moves = {1: "rises", 0: "stays, as far as these texts tell", -1: "falls"}
    yield (
        "Each auxiliary has learnt the dictionary's style besides its condition, so their sum has it twice. "
        "The keyword's auxiliary without its condition, taken away, leaves it once: if the conditions are "
        "independent given a text, p(text | both) is p(text | keyword) p(text | length) / p(text). With it, "
        f"the share of texts with both {moves[_sign(once, BOTH_HOLD)]}, {_change(once, BOTH_HOLD)}, and SLOR "
        f"{moves[_sign(once, SLOR)]}, {_change(once, SLOR)}."
    )
    beside_one = differences[SHARED_ONCE, ONE]
    often = {1: "more often than", 0: "as often, as far as these texts tell, as", -1: "less often than"}
    yield (
        f"Composed so, auxiliaries that never saw each other satisfy both conditions "
        f"{often[_sign(beside_one, BOTH_HOLD)]} the one that was trained on both "
        f"({_change(beside_one, BOTH_HOLD)}), which had to be trained for the pair of conditions."
    )


def _guidance(record: dict[str, Any], picture: str) -> Iterable[str]:
    yield (
        "The keyword pair with its condition, led away from itself without one, as classifier-free guidance "
        "does with a prompt (Sanchez et al. 2023):\n\n"
        "    z = z(no condition) + scale · (z(condition) - z(no condition)),  z = LM + auxiliary"
    )
    head = (
        "scale",
        KEYWORD,
        SLOR,
        "words",
        "distinct-2",
        RUN_ON,
        "keyword, less scale 1",
        "SLOR, less scale 1",
    )
    changes = {one["scale"]: (_change(one, KEYWORD), _change(one, SLOR)) for one in record["guidance"]}
    rows = (
        (
            f"{scale:g}",
            f"{row[KEYWORD]:.3f} {interval(row[f'{KEYWORD}_interval'], 3)}",
            f"{row['slor']:.2f} {interval(row['slor_interval'], 2)}",
            *_plain(row),
            *changes.get(scale, ("", "")),
        )
        for scale, row in guided_rows(record)
    )
    yield table(head, rows)
    yield f"![share of texts with their keyword, and SLOR, over guidance's scale]({picture})"
    for name, what in ((KEYWORD, "the share of texts with their keyword"), (SLOR, "SLOR")):
        for sign, verb in ((1, "is above"), (-1, "is below"), (0, "cannot be told from")):
            if scales := _scales(record, name, sign):
                yield f"At {_listed(scales)} {what} {verb} that of scale 1."
    if scales := _scales(record, RUN_ON, 1):
        yield (
            f"At {_listed(scales)} more texts fall apart, as some of those below: they hold a word of more "
            f"than {LONGEST} characters. SLOR is no measure of that: the base expects a repetition once "
            "it has begun."
        )


def _scales(record: dict[str, Any], name: str, sign: int) -> list[str]:
    """Those of guidance at which a figure differs from scale 1's in a direction; 0: in none."""
    return [f"{one['scale']:g}" for one in record["guidance"] if _sign(one, name) == sign]


def _listed(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _texts(record: dict[str, Any]) -> Iterable[str]:
    yield "The texts for the first conditions of seed 0, as they were drawn; long ones are cut."
    guided = [row for _, row in guided_rows(record)[1:]]
    for place, condition in enumerate(record["shown"]):
        rows = [
            (row["label"], cell(_beginning(row["shown"][place]))) for row in (*_mixtures(record), *guided)
        ]
        yield f"**{cell(condition)}**\n\n{table(('', 'text'), rows)}"


def _beginning(text: str) -> str:
    return text if len(text) <= _CUT else f"{text[:_CUT]} ..."


def _fairness(record: dict[str, Any]) -> str:
    preset = record["preset"]
    sizes = preset["keyword"]
    nll = [
        (name, ", ".join(f"{_last(one):.3f}" for one in record["auxiliaries"] if one["auxiliary"] == name))
        for name in AUXILIARIES
    ]
    return f"""\
- Every auxiliary is the keyword study's small decoder on an LM that is told nothing
  ([keyword.md](keyword.md)), trained by itself for {sizes["steps"]} steps of the same {sizes["sentences"]}
  sentences in the same order, at the best learning rate of that study's first edition for keywords,
  {preset["learning_rate"]:g}: nothing was tuned here, neither for the length nor for both. The condition is
  the keyword, the number of words ("7 words"), or both ("glacier, 7 words").
- One training sentence in {preset["without_condition"]} has no condition, for each auxiliary, so that it
  knows how to write without one.
- All weights are 1, the one that each auxiliary was trained with, but for guidance's.
- Trainings of each: {preset["seeds"]}, with seeds of their own for initial weights, order and dropout; the
  conditions are shared out among them, so each is asked once. A condition has the same seed, and so the
  same noise, in every row.

{table(("auxiliary", "validation nll of each training"), nll)}"""


def _last(trained: dict[str, Any]) -> float:
    """The validation nll of the weights that write."""
    nll: float = trained["nll"][str(trained["best_step"])]
    return nll


def _counting(record: dict[str, Any]) -> str:
    sizes = record["preset"]["keyword"]
    return f"""\
- Conditions: {sizes["samples"]:,} keywords of the test side, which share neither keyword nor sentence with
  training or validation, each with the number of words of one of its own sentences. Numbers of words are
  those of training: they are not held out.
- Texts: drawn at temperature 1 from the whole distribution, {sizes["max_new_tokens"]} tokens at most.
- keyword: the text contains it, whole, in any case of letters; length: exactly so many words
  (`auxkern.tasks.lengths`), in the next column one more or less; both: the keyword and exactly so many words.
  Most sentences are short, so a text that is told nothing of its length may have it: see keyword alone.
- SLOR: (log p_LM - log p_unigram) / tokens (Kann et al. 2018), in nats, as in the keyword study: the base
  finds its own samples the most probable, and reference sentences are no ceiling.
- run-on: the text holds a word, between spaces, of more than {LONGEST} characters, a mark of texts that fall
  apart, beyond what a condition asks.
- Shares have Wilson's 95% intervals, means and differences 95% bootstrap intervals over the conditions. They
  do not say how much another training would differ; the trainings apart: {_of_seeds(record)}."""


def _of_seeds(record: dict[str, Any]) -> str:
    rows = (_named(record, name) for name in (COMPOSED, ONE))
    return "; ".join(
        f"{row['label']}, both conditions {', '.join(f'{share:.3f}' for share in row['both_of_seeds'])}"
        for row in rows
    )


def _commands(record: dict[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    trained = sum(one["seconds"] for one in record["auxiliaries"])
    return (
        f"    {record['command']}\n\n"
        f"That command took {duration(record['seconds of this command'])}, of which the base's states "
        f"{duration(record['states']['seconds'])}; the {len(record['auxiliaries'])} trainings took "
        f"{duration(trained / len(record['auxiliaries']))} each on average, two at a time. "
        f"{record['date']}; {machine}."
    )


PAGE = Page(
    "benchmarks.compose.page",
    KIND,
    Path("docs/compose.md"),
    {"rows": plot_rows, "guidance": plot_guidance},
    page,
)

if __name__ == "__main__":
    sys.exit(PAGE.main())
