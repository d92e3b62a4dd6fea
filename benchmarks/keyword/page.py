"""``python -m benchmarks.keyword.page``: the study's page and pictures, from its JSON files alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from auxkern.training.progress import duration
from benchmarks.keyword.measuring import PART
from benchmarks.keyword.plot import plot_data, plot_training
from benchmarks.keyword.presets import (
    ALL_LAYERS,
    DECODER,
    DEEP,
    HEADLINE,
    LAST_LAYERS,
    PAPER,
    PROMPTED,
    TUNED_LORA,
    TUNED_WHOLE,
)
from benchmarks.keyword.record import KIND
from benchmarks.keyword.scoring import NARROW, PLAIN
from benchmarks.pages import Page, cell, interval, table

_NLL, _SHARE, _FEW = 0.08, 1 / 2, 1_000  # what the study set out to show
_CUT = 300  # characters of a text that are shown
_KEYWORDS = 5  # of which texts are shown
_SOURCES = {None: "example sentences of WordNet", "austen": "sentences of Jane Austen's novels"}
_Record = dict[str, Any]


def page(record: _Record, pictures: dict[str, str], command: str) -> str:
    """The page in Markdown.

    Args:
        record: of the study, those on other sentences in its "others".
        pictures: paths from the page to the pictures "training" and "data".
        command: what makes the page.
    """
    parts = [
        "# Auxiliary tuning and its alternatives: texts with a given keyword",
        f"<!-- Made by `{command}`; every number is the JSON files'. -->",
        _introduction(record),
        "## What was to be shown",
        table(("asked", "found", ""), _bars(record)),
        *_reading(record),
        "## On the test side",
        _results(record, PLAIN),
        f"The same weights, their texts drawn at {NARROW}:",
        _results(record, NARROW),
        "## Over steps and arithmetic",
        f"![validation nll over steps and over training FLOPs]({pictures['training']})",
        _arithmetic(record),
        _shares(record),
        "## Over the amount of data",
        f"![test nll and accuracy over the number of training sentences]({pictures['data']})",
        _over_data(record),
        *_depth(record),
        "## Texts",
        *_texts(record),
        *(part for other in record["others"] for part in _other(other)),
        "## What is the same for all",
        _fairness(record),
        "## How it is counted",
        _counting(record),
        "## Run it",
        *_commands(record),
    ]
    return "\n\n".join(parts) + "\n"


def _row(record: _Record, name: str) -> _Record:
    row: _Record = next(one for one in record["rows"] if one["name"] == name)
    return row


def _has(record: _Record, *names: str) -> bool:
    return {*names} <= {row["name"] for row in record["rows"]}


def _whole(record: _Record) -> list[_Record]:
    """The rows with a point at the study's own size; those of methods for less data have none."""
    size = record["preset"]["sizes"][-1]
    return [row for row in record["rows"] if _last(row).get("size", size) == size]


def _last(row: _Record) -> _Record:
    """A row's point at its largest size."""
    point: _Record = row["points"][-1]
    return point


def _accuracy(row: _Record, way: str = PLAIN) -> float:
    value: float = _last(row)["samples"][way]["accuracy"]
    return value


def _source(record: _Record) -> str:
    source = record["preset"]["task_source"]
    return _SOURCES.get(source, f"texts of {source}")


def _introduction(record: _Record) -> str:
    ours, prompted, preset = _row(record, HEADLINE), _row(record, PROMPTED), record["preset"]
    point, layers = _last(ours), preset["pairs"][LAST_LAYERS]["last_layers"]
    return (
        "A language model is to write a text with a given keyword. Auxiliary tuning (Zeldes et al. 2020) "
        "keeps it frozen and adds the logits of an auxiliary model to its own. Here the LM reads "
        f"{preset['shots']} examples first, and is told the keyword; the auxiliary is LoRA inside a copy of "
        f"the LM's last {layers} layers, which goes on from the frozen LM's hidden states below them, made "
        f"once, and a pointer to the keyword. After {_steps(point)} steps of {preset['sentences']} "
        f"{_source(record)}, {point['size']:,} in all, sentences with keywords that were never seen have an "
        f"nll of {point['nll']:.3f} a token, with the prompted LM alone {_last(prompted)['nll']:.3f}; "
        f"{_accuracy(ours):.0%} of the texts hold their keyword, of the prompted LM's "
        f"{_accuracy(prompted):.0%}. The LM is {preset['base'].removeprefix('pip:llm-')}, and "
        f"{ours['trainable']:,} numbers are trained."
    )


# --------------------------------------------------------------------------------- what was to be shown


def _bars(record: _Record) -> Iterable[Sequence[str]]:
    compared = record["comparisons"]
    if "lora" in compared:
        ours, theirs = _row(record, HEADLINE), _row(record, TUNED_LORA)
        nll, accuracy, flops = (compared["lora"][name] for name in ("nll", "accuracy", "flops"))
        yield (
            f"the auxiliary's nll on the test side within {_NLL} of LoRA's best",
            f"{_last(ours)['nll']:.3f} and {_last(theirs)['nll']:.3f}: {_signed(nll)}",
            _holds(nll["difference"] <= _NLL),
        )
        for name, how in (("shared", "with its share of the LM's states"), ("apart", "the states apart")):
            yield (
                f"at half of LoRA's training FLOPs or less, {how}",
                f"{flops[name]:.2f} of them",
                _holds(flops[name] <= _SHARE),
            )
        yield (
            "accuracy not below LoRA's",
            f"{_accuracy(ours):.3f} and {_accuracy(theirs):.3f}: {_signed(accuracy)}",
            _holds(accuracy["difference"] >= 0),
        )
    for label, one in _with_few(record):
        yield (f"{label}, nll below fine-tuning's", _signed(one), _holds(one["difference"] < 0))


def _with_few(record: _Record) -> Iterable[tuple[str, _Record]]:
    """What is compared with fine-tuning where data is little, and how."""
    layers = record["preset"]["pairs"]
    for name, pair in ((HEADLINE, LAST_LAYERS), (DEEP, ALL_LAYERS)):
        for one in record["comparisons"].get("full", {}).get(name, []):
            if one["size"] <= _FEW:
                yield f"{one['size']:,} sentences, {layers[pair]['last_layers']} layers", one


def _holds(does: bool) -> str:
    return "holds" if does else "**does not hold**"


def _signed(found: _Record) -> str:
    return f"{found['difference']:+.3f} {interval(found['interval'], 3)}"


def _reading(record: _Record) -> Iterable[str]:
    """What a reader should not have to find in the tables alone, where it is so."""
    compared, ours = record["comparisons"], _last(_row(record, HEADLINE))
    near = [name for name, found, bar in _compared(record) if found[0] <= bar <= found[1]]
    if near:
        yield (
            "The bar lies within the interval, so that another test side could say otherwise, of "
            f"{'; '.join(near)}."
        )
    lower = [
        f"{row['label']} ({_last(row)['nll']:.3f})"
        for row in _whole(record)
        if row["name"] != HEADLINE and _last(row)["nll"] < ours["nll"]
    ]
    if lower:
        yield f"A lower nll than the auxiliary's {ours['nll']:.3f} has: {', '.join(lower)}."
    if "lora" in compared and compared["lora"]["flops"]["all"] > _SHARE:
        yield (
            "An auxiliary that is trained once and makes all of its LM's states for that takes "
            f"{compared['lora']['flops']['all']:.2f} of LoRA's FLOPs: states pay where several runs, or "
            "several epochs, read them."
        )
    if _has(record, DECODER, PAPER):
        told, paper = (_last(_row(record, name))["nll"] for name in (DECODER, PAPER))
        yield (
            f"The same small decoder has a test nll of {paper:.3f} on an LM that is told nothing, as in the "
            f"paper, and of {told:.3f} behind the prompt; the last layers have {ours['nll']:.3f} there."
        )
    late = [
        row["label"]
        for row in record["rows"]
        if row["name"] in (HEADLINE, TUNED_LORA, TUNED_WHOLE)
        and min(_last(row)["best_steps"]) == _last(row)["steps"]
    ]
    if late:
        yield (
            "The validation nll was lowest at the last step, so that more steps could lower it, with "
            f"{', '.join(late)}."
        )


def _compared(record: _Record) -> Iterable[tuple[str, Sequence[float], float]]:
    """The differences that are set against a bar: what of, interval and bar."""
    compared = record["comparisons"]
    if "lora" in compared:
        yield "the nll's difference from LoRA's", compared["lora"]["nll"]["interval"], _NLL
        yield "the accuracy's from LoRA's", compared["lora"]["accuracy"]["interval"], 0.0
    for label, one in _with_few(record):
        yield f"the nll's from fine-tuning's with {label}", one["interval"], 0.0


# -------------------------------------------------------------------------------------------- tables


def _results(record: _Record, way: str) -> str:
    """A table of all methods at the study's own size."""
    rows = []
    for row in [*_whole(record), None]:
        label = "reference sentences" if row is None else row["label"]
        samples = record["references"] if row is None else _last(row)["samples"]
        if way not in samples:
            continue
        sample = samples[way]
        cells = [label]
        if way == PLAIN:
            cells += ["", ""] if row is None else [_steps(_last(row)), _nll(_last(row))]
        cells += [
            _with_interval(sample, "accuracy", 3),
            _with_interval(sample, "slor", 2),
            f"{sample['words']:.1f}",
            *(
                "" if sample[name] is None else f"{sample[name]:.3f}"
                for name in ("distinct_2", "self_bleu_4")
            ),
        ]
        rows.append(cells)
    head = ["", *(["best step", "test nll"] if way == PLAIN else [])]
    return table([*head, "accuracy", "SLOR", "words", "distinct-2", "self-BLEU-4"], rows)


def _steps(point: _Record) -> str:
    if "best_steps" not in point:
        return ""
    return f"{', '.join(map(str, point['best_steps']))} of {point['steps']}"


def _nll(point: _Record) -> str:
    return _with_interval(point, "nll", 3)


def _with_interval(found: _Record, name: str, digits: int) -> str:
    value = found[name]
    return "" if value is None else f"{value:.{digits}f} {interval(found[f'{name}_interval'], digits)}"


def _arithmetic(record: _Record) -> str:
    rows = []
    for row in _whole(record):
        if "trainable" not in row:
            continue
        flops = _last(row)["flops"]
        trained, states, shared = (flops[name] / 1e12 for name in ("trained", "states", "shared"))
        rows.append(
            (
                row["label"],
                f"{row['trainable']:,}",
                f"{trained:.1f}",
                f"{shared:.1f}" if states else "",
                f"{trained + shared:.1f}",
                f"{states:.1f}" if states else "",
                f"{trained + states:.1f}",
            )
        )
    head = (
        "",
        "numbers trained",
        "TFLOP trained",
        "its share of states",
        "together",
        "all states",
        "together",
    )
    return table(head, rows)


def _shares(record: _Record) -> str:
    return (
        "Up to the step whose weights are taken. The frozen LM's hidden states of a sentence do not change: "
        "they are computed once and kept. *All states* are those of all sentences of a run, and of the "
        "prompt; *its share* divides each sentence's equally among the runs of this study that read them: "
        "those at another learning rate, on fewer sentences, and of the other auxiliary behind the prompt."
    )


def _over_data(record: _Record) -> str:
    sizes = record["preset"]["sizes"]
    rows = []
    for row in record["rows"]:
        by_size = {point.get("size"): point for point in row["points"]}
        found = [by_size.get(size, by_size.get(None)) for size in sizes]
        cells = [
            "" if one is None else f"{_nll(one)}; {one['samples'][PLAIN]['accuracy']:.2f}" for one in found
        ]
        rows.append((row["label"], *cells))
    head = ("test nll; accuracy", *(f"{size:,} sentences" for size in sizes))
    return table(head, rows)


def _depth(record: _Record) -> Iterable[str]:
    """Why there are auxiliaries of two depths."""
    if _has(record, DEEP):
        pairs = record["preset"]["pairs"]
        few, every = (pairs[name]["last_layers"] for name in (LAST_LAYERS, ALL_LAYERS))
        yield (
            f"With few sentences there are few steps, and training a copy of all {every} layers is cheap: "
            f"what the layers below the last {few} could learn is worth more nll than their arithmetic. The "
            "logits of such a copy take the place of the LM's own: it is LoRA in a second LM, with a "
            "pointer, and the frozen one is there for other auxiliaries."
        )


# ---------------------------------------------------------------------------------------------- texts


def _texts(record: _Record) -> Iterable[str]:
    shots = "; ".join(f"*{cell(keyword)}*: {cell(text)}" for keyword, text in record["data"]["shots"])
    yield (
        f"The texts for the first of the test keywords, as they were drawn with seed 0, at {PLAIN} and at "
        f"{NARROW}; long ones are cut. The prompt's examples are: {shots}."
    )
    for keyword in record["data"]["keywords"][:_KEYWORDS]:
        rows = [
            (
                row["label"],
                *(_beginning(_last(row)["samples"][way]["texts"][keyword]) for way in (PLAIN, NARROW)),
            )
            for row in _whole(record)
        ]
        yield f"**{cell(keyword)}**\n\n{table(('', PLAIN, NARROW), rows)}"


def _beginning(text: str) -> str:
    return cell(text if len(text) <= _CUT else f"{text[:_CUT]} ...")


def _other(record: _Record) -> Iterable[str]:
    """A section about the same on other sentences."""
    size = record["preset"]["sizes"][-1]
    yield f"## On {_source(record)}"
    yield (
        f"The same with {size:,} {_source(record)}, of {record['data']['training words']:.0f} words each, "
        f"and {record['data']['test']} on the test side."
    )
    bars = list(_bars(record))
    if bars:
        yield table(("the same bars", "found", ""), bars)
    yield _results(record, PLAIN)
    yield f"At {NARROW}:"
    yield _results(record, NARROW)
    yield _arithmetic(record)
    yield from _texts(record)


# ------------------------------------------------------------------------------------------- the rules


def _fairness(record: _Record) -> str:
    preset, data, rows = record["preset"], record["data"], record["rows"]
    tried = [
        (
            row["label"],
            ", ".join(f"{rate}: {value:.3f}" for rate, value in row["tried"].items()),
            f"{row['learning_rate']:g}",
        )
        for row in rows
        if "tried" in row
    ]
    most = "; ".join(
        f"{row['label']} {', '.join(str(point['steps']) for point in row['points'])}"
        for row in rows
        if "trainable" in row
    )
    rates = max(len(row.get("tried", {})) for row in rows)
    return f"""\
- Three sides share neither keyword nor sentence: training; validation ({data["validation"]} sentences), by
  which learning rates, the end of a run and the step whose weights are taken are chosen; and test, on which
  nothing was chosen ({data["test"]} sentences for the nll, {preset["samples"]} keywords for texts).
- The same sentences in the same order, {preset["sentences"]} a step, and the same {preset["shots"]} examples
  in the prompt, which nothing is trained on. LoRA and fine-tuning read the prompt too, once a step, and train
  on what it does to them. Seeds ({preset["seeds"]}) change initial weights, order, dropout and draws.
- The same tuning: {rates} learning rates for each method, each a whole run on {preset["tried_at"]:,}
  sentences; other sizes take the best one's. AdamW, betas {tuple(preset["betas"])}, a tenth of the steps to
  warm up, cosine decay, gradients clipped to 1.
- The same early stopping: {preset["evaluations"]} evaluations of the validation side in a run, which ends
  after {preset["patience"]} in a row without a new best; the best one's weights are taken.
- Most steps, at each size: {most}. What a step costs is in the table above.
- LoRA: rank {preset["lora_rank"]} in every linear layer but the head (PEFT). LoRA and fine-tuned models train
  their layers in bfloat16 mixed precision, auxiliaries in float32.
- Sentences that write their keyword in another way than it is given, in capitals or in quotes, are neither
  trained nor scored on.

{table(("", "learning rate: validation nll", "taken"), tried)}"""


def _counting(record: _Record) -> str:
    preset = record["preset"]
    return f"""\
- nll: nats per token of held-out sentences and their ends. *LM alone* is told nothing, and reads no example.
- Texts end with the end token, at the end of a line, which separates the prompt's examples, or after
  {preset["max_new_tokens"]} tokens. A keyword has the same seed in every row.
- Accuracy: the share of texts that contain the keyword's words, whole and in a row, in any case of
  letters; an inflected form does not count.
- SLOR: (log p_LM - log p_unigram) / tokens (Kann et al. 2018), in nats. p_LM is the frozen base's after
  its start token, unigrams are counted in all sentences of the training side. The base finds its own
  samples the most probable and a dictionary's fragments odd, so reference sentences are no ceiling.
- Brackets and bands: 95% bootstrap intervals, of the nll over groups of {PART} test sentences, of texts over
  the keywords, seeds together. Differences are of the same sentences and keywords. Intervals do not say how
  much another training would differ.
- FLOPs: products of linear layers and output heads for real tokens: 2 for each number of a weight and token
  forward, as many for the gradient of the input, and as many for that of a weight that is trained. Frozen
  weights that a gradient goes through (LoRA's, and the last layers') take 4, trained ones 6, those of the
  frozen LM 2, once. Attention's own products, embeddings, the optimizer and evaluations are left out."""


def _commands(record: _Record) -> Iterable[str]:
    for one in (record, *record["others"]):
        machine = ", ".join(f"{name} {value}" for name, value in one["machine"].items())
        yield (
            f"    {one['command']}\n\n"
            f"That command took {duration(one['seconds of this command'])}, of which the base's states "
            f"{duration(one['states']['seconds'])}, where they were not there yet. {one['date']}; {machine}."
        )


PAGE = Page(
    "benchmarks.keyword.page",
    KIND,
    Path("docs/keyword.md"),
    {"training": plot_training, "data": plot_data},
    page,
    "records of the same on other sentences, for sections of their own",
)

if __name__ == "__main__":
    sys.exit(PAGE.main())
