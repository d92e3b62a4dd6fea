"""``python -m benchmarks.keyword.page``: the study's page and pictures, from its JSON file alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from auxkern.training.progress import duration
from benchmarks.keyword.plot import plot_flops, plot_scales, plot_steps
from benchmarks.keyword.presets import BASELINE, HEADLINE, METHODS
from benchmarks.pages import Page, cell, interval, table

_ACCURACY, _MARGIN, _SHARE, _NEAR_0 = 0.80, 0.03, 1 / 3, 0.05  # what the study set out to show


def page(record: dict[str, Any], pictures: dict[str, str], command: str) -> str:
    """The page in Markdown.

    Args:
        record: of the study.
        pictures: paths from the page to the pictures "steps", "flops" and "scales".
        command: what makes the page.
    """
    preset = record["preset"]
    parts = [
        "# Auxiliary tuning and its alternatives: texts with a given keyword",
        f"<!-- Made by `{command}`; every number is the JSON file's. -->",
        _introduction(record),
        "## What was to be shown",
        table(("asked", "found", ""), _bars(record)),
        *_reading(record),
        "## At the end of training",
        _results(record, -1),
        f"The first {record['comparisons']['fifth']} of {preset['steps']} steps, a fifth:",
        _results(record, 0),
        "## Over the steps",
        f"![accuracy and SLOR over steps]({pictures['steps']})",
        "## Over the arithmetic",
        f"![accuracy and SLOR over training FLOPs]({pictures['flops']})",
        _reached(record),
        "## The mixing weight",
        f"![accuracy and SLOR over the mixing weight]({pictures['scales']})",
        "The last model of seed 0, drawn from softmax(LM + aux_scale · auxiliary). It was trained at 1, and "
        "everything else on this page is at 1.",
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


def _named(record: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(method for method in record["methods"] if method["name"] == name)
    return found


def _introduction(record: dict[str, Any]) -> str:
    preset, ours, theirs = record["preset"], _named(record, HEADLINE), _named(record, BASELINE)
    return (
        "A frozen language model is given a keyword through a small auxiliary model whose logits are "
        "added to its own (Zeldes et al. 2020); the text must contain the keyword. After "
        f"{preset['steps']} steps of {preset['sentences']} example sentences of WordNet, auxiliary tuning "
        f"writes {_share(ours, -1)} of its texts with a keyword that was never trained on, the same "
        f"architecture trained from scratch {_share(theirs, -1)}; their SLOR is {_slor(ours, -1)} and "
        f"{_slor(theirs, -1)}, that of the dictionary's sentences "
        f"{_slor(_named(record, 'references'), -1)}. "
        f"The base is {preset['base'].removeprefix('pip:llm-')}, the auxiliary trains "
        f"{ours['trainable']:,} parameters."
    )


def _bars(record: dict[str, Any]) -> Iterable[Sequence[str]]:
    compared = record["comparisons"]
    accuracy = _named(record, HEADLINE)["points"][-1]["accuracy"]
    difference = compared["accuracy_difference"]
    early, late = compared["slor_at_a_fifth"], compared["slor_from_scratch_at_the_end"]
    alone = _named(record, "lm")["points"][-1]["accuracy"]
    yield f"accuracy of auxiliary tuning ≥ {_ACCURACY:.2f}", f"{accuracy:.3f}", _met(accuracy >= _ACCURACY)
    yield (
        f"not below from scratch's less {_MARGIN:.2f}",
        f"difference {difference:+.3f} {interval(compared['accuracy_difference_interval'], 3)}",
        _met(difference >= -_MARGIN),
    )
    yield (
        f"SLOR after {compared['fifth']} steps above from scratch's at the end",
        f"{early:.2f} and {late:.2f}",
        _met(early > late),
    )
    yield "the LM alone near 0", f"{alone:.3f}", _met(alone <= _NEAR_0)
    for how, ratio in compared["reached"].get("ratios", {}).items():
        yield (
            f"FLOPs to from scratch's final nll ≤ 1/3 of its own, where {how}",
            f"{ratio:.3f}",
            _met(ratio <= _SHARE),
        )


def _met(is_met: bool) -> str:
    return "met" if is_met else "**not met**"


def _reading(record: dict[str, Any]) -> Iterable[str]:
    """What a reader should not have to find in the tables alone, where it is so."""
    ours, theirs = _named(record, HEADLINE), _named(record, BASELINE)
    early = [method["points"][0]["accuracy"] for method in (ours, theirs)]
    if early[1] >= early[0]:
        yield (
            f"From scratch has the keyword in its texts as early: accuracy {early[1]:.3f} after "
            f"{theirs['points'][0]['step']} steps, auxiliary tuning {early[0]:.3f}. With a pointer that "
            "copies, that needs no language model; what the LM gives is the sentence around the keyword "
            f"(SLOR {_slor(ours, 0)} and {_slor(theirs, 0)} then)."
        )
    known = {method["name"]: method for method in record["methods"]}
    end = str(ours["points"][-1]["step"])
    for method in (known[name] for name in ("full", "lora") if name in known):
        point = method["points"][-1]
        nll = method["nll"][str(point["step"])]
        if nll < ours["nll"][end]:
            yield (
                f"After {point['step']} steps {method['label']} has a lower nll than auxiliary tuning after "
                f"{end} ({nll:.3f}, {ours['nll'][end]:.3f}), and an accuracy of {point['accuracy']:.3f}."
            )
    for how, ratio in record["comparisons"]["reached"].get("ratios", {}).items():
        if ratio > _SHARE:
            yield (
                f"Where {how}, from scratch's nll costs {ratio:.2f} times its training: it pays where "
                "several runs, or several epochs, read them."
            )


def _results(record: dict[str, Any], which: int) -> str:
    """A table of all methods at their last measurement, or at their first."""
    rows = []
    for method in record["methods"]:
        point = method["points"][which]
        step = point.get("step")
        nll = method.get("nll", {}).get(str(step))
        flops = method.get("flops")
        done = None if flops is None else step / method["steps"]
        rows.append(
            (
                method["label"],
                "" if not step else str(step),
                f"{point['accuracy']:.3f} {interval(point['accuracy_interval'], 2)}",
                _spread(point["accuracy_of_seeds"]),
                f"{point['slor']:.2f} {interval(point['slor_interval'], 2)}",
                "" if nll is None else f"{nll:.3f}",
                f"{point['words']:.1f}",
                f"{point['distinct_2']:.2f}",
                f"{point['self_bleu_4']:.3f}",
                "" if flops is None else f"{(flops['trained'] + flops['lm_forward']) * done / 1e12:,.0f}",
            )
        )
    head = (
        "",
        "steps",
        "accuracy",
        "seeds",
        "SLOR",
        "nll",
        "words",
        "distinct-2",
        "self-BLEU-4",
        "training TFLOP",
    )
    return table(head, rows)


def _reached(record: dict[str, Any]) -> str:
    reached = record["comparisons"]["reached"]
    if reached["step"] is None:
        return (
            f"Training from scratch ends with a validation nll of {reached['nll']:.3f}, which auxiliary "
            "tuning did not reach."
        )
    rows = [
        (how, f"{flops / 1e12:,.1f}", f"{reached['ratios'][how]:.3f}")
        for how, flops in reached["flops"].items()
    ]
    rates = table(("auxiliary tuning, where", "TFLOP", "of from scratch's"), rows)
    return (
        f"Training from scratch ends with a validation nll of {reached['nll']:.3f} after {reached['steps']} "
        f"steps and {reached['flops_from_scratch'] / 1e12:,.1f} TFLOP. Auxiliary tuning is there by step "
        f"{reached['step']}:\n\n{rates}"
    )


def _texts(record: dict[str, Any]) -> Iterable[str]:
    shown = [HEADLINE, BASELINE, "full", "lora", "prompt", "lm"]
    known = {method["name"] for method in record["methods"]}
    keywords = list(_named(record, HEADLINE)["points"][0]["texts"])
    yield (
        "The first text that was drawn for each of the first held-out keywords, seed 0, after the first and "
        "the last measured step."
    )
    for keyword in keywords:
        rows = []
        for method in (_named(record, name) for name in shown if name in known):
            for point in method["points"] if len(method["points"]) == 1 else _ends(method["points"]):
                step = point["step"] or ""
                rows.append((method["label"], str(step), cell(point["texts"][keyword])))
        yield f"**{cell(keyword)}**\n\n{table(('', 'step', 'text'), rows)}"


def _ends(points: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    return points[0], points[-1]


def _fairness(record: dict[str, Any]) -> str:
    preset, tuning = record["preset"], record["tuning"]
    nll = tuning["trials"]["validation nll"]
    labels = {method.name: method.label for method in METHODS}
    rows = [
        (
            labels[name],
            ", ".join(f"{rate}: {value:.3f}" for rate, value in found.items()),
            f"{tuning['learning_rates'][name]:g}",
        )
        for name, found in nll.items()
    ]
    trials = table(("", "learning rate: validation nll", "taken"), rows)
    prompts = table(
        ("prompt", "accuracy on training keywords"),
        [
            (cell(one["prompt"]), f"{one['accuracy on training keywords']:.2f}")
            for one in tuning["trials"]["prompts"]
        ],
    )
    short = ""
    if preset["lm_steps"] < preset["steps"]:
        short = (
            f" Methods that train the LM itself take {preset['lm_steps']} steps, in a schedule of their own: "
            f"a step costs them several times as much, and {preset['steps']} would not fit the preset's hour."
        )
    return f"""\
- The same sentences in the same order, {preset["sentences"]} a step, one epoch or less; seeds change
  initial weights, order, dropout and what is drawn.{short}
- Sentences that write their keyword in another way than it is given, in capitals or in quotes, are left out
  of training and validation: about one in fifty.
- The same tuning: three learning rates each, tried for {tuning["trials"][_TRIAL_SHARE]:.0%} of a method's
  steps with seed 0, by validation nll on other keywords than those asked for; variants of auxiliary
  tuning take its rate. AdamW, betas {tuple(preset["betas"])}, a tenth of the steps to warm up, cosine
  decay, gradients clipped to 1.
- From scratch: the auxiliary's transformer and its pointer with embeddings and an output head of its own,
  and no language model; the part of the pointer that reads the LM's logits has nothing to read.
- LoRA: rank {preset["lora_rank"]} in every linear layer but the head (PEFT). Fine-tuned models train their
  layers in bfloat16 mixed precision, and read the keyword and a colon before the text.

{trials}

For prompting, three prompts were tried on training keywords:

{prompts}"""


_TRIAL_SHARE = "share of a method's steps"


def _counting(record: dict[str, Any]) -> str:
    preset = record["preset"]
    return f"""\
- Texts: one for each of {preset["samples"]} keywords of the test side, which share neither keyword nor
  sentence with training or validation; drawn at temperature 1 from the whole distribution,
  {preset["max_new_tokens"]} tokens at most.
- Accuracy: the share of texts that contain the keyword's words, whole and in a row, in any case of
  letters; an inflected form does not count.
- SLOR: (log p_LM - log p_unigram) / tokens (Kann et al. 2018), in nats. p_LM is the frozen base's after
  its start token, unigrams are counted in all sentences of the training side. The base finds its own
  samples the most probable and a dictionary's fragments odd, so reference sentences are no ceiling.
- nll: nats per token of held-out sentences and their ends.
- Brackets and bands: 95% bootstrap intervals over the keywords, seeds together. Rows with one seed say
  less than their intervals.
- FLOPs: products of linear layers and output heads for real tokens, forward and backward; attention's own
  products (below 1% here), embeddings and the optimizer are left out. The frozen LM's forward passes are
  in, at every step, in tables and pictures, unless it is said that its states are read from disk."""


def _commands(record: dict[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    seconds = record["seconds of this command"]
    missing = [
        f"{method.label} (seed {seed})"
        for method in METHODS
        for seed in range(method.seeds)
        if seed not in next((m["seeds"] for m in record["methods"] if m["name"] == method.name), [])
    ]
    took = "" if seconds is None else f"That command took {duration(seconds)}. "
    left = f"\n\nNot finished, and left out: {', '.join(missing)}." if missing else ""
    return (
        f"    python -m benchmarks.keyword --preset {record['preset']['name']} --tune\n"
        f"    {record['command']}\n\n"
        f"{took}The base's states took {duration(record['states']['seconds'])}, within it where they were "
        f"not there yet. {record['date']}; {machine}.{left}"
    )


def _share(method: dict[str, Any], which: int) -> str:
    return f"{method['points'][which]['accuracy']:.0%}"


def _slor(method: dict[str, Any], which: int) -> str:
    return f"{method['points'][which]['slor']:.2f}"


def _spread(values: Sequence[float]) -> str:
    return "" if len(values) == 1 else ", ".join(f"{value:.2f}" for value in values)


PAGE = Page(
    "benchmarks.keyword.page",
    "keyword study",
    Path("docs/keyword.md"),
    {"steps": plot_steps, "flops": plot_flops, "scales": plot_scales},
    page,
)

if __name__ == "__main__":
    sys.exit(PAGE.main())
