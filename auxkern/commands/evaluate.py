"""``auxkern evaluate``: how much better a trained pair does than the language model alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auxkern.bench.machine import now
from auxkern.bench.session import INTERRUPTED, positive
from auxkern.commands import pair
from auxkern.commands.pair import Request
from auxkern.evaluation.accuracy import keyword_accuracy
from auxkern.evaluation.perplexity import NllReport, evaluate_nll
from auxkern.files import replace_file
from auxkern.model.text import Example
from auxkern.seeds import DATA_SEED, drawn, mixed_seed
from auxkern.training.examples import encode, read_jsonl
from auxkern.training.progress import Progress, progress_for
from auxkern.training.settings import TASKS

_EPILOG = """\
nll is in nats per token of the texts and their ends; perplexity is exp(nll). The auxiliary alone is
softmax(aux_scale * logits_aux).
--task takes the side of the data that auxkern train holds out: no keyword and no text of it was trained on.
--samples M writes a text for M of the conditions, each another one, at temperature 1 with fixed seeds, by
the pair and by the language model alone, and counts those that contain their condition as a word.
Exit status: 0; 2 for bad options, missing data or a model that cannot be loaded; 130 after Ctrl-C.
"""
_TASK_SAMPLES = 100
_NAMES = {"lm": "LM alone", "aux": "auxiliary alone", "pair": "pair"}
_SAMPLERS = {"pair": "default", "lm": None}  # which auxiliary writes the samples


def main(argv: list[str] | None = None) -> int:
    """Prints nll and perplexity of the models, and writes them as JSON if asked.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0; 2 if data or a model cannot be loaded; 130 after Ctrl-C. Bad options exit with 2
        (``SystemExit``, as argparse does).
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(arguments)
    pair.check_json_option(parser, options.json)
    command = shlex.join([*parser.prog.split(), *arguments])
    return pair.run(parser.prog, lambda: _evaluate(parser, options, command))


def _evaluate(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    examples = _read_examples(options)
    requests = _requests(examples, options)
    chosen = drawn(examples, options.examples)
    seconds: dict[str, float] = {}
    date = now()
    with _timed(seconds, "loading"):
        model, text_format = pair.load_pair(parser, options, options.max_length)
    progress = progress_for()
    try:
        with _timed(seconds, "nll"):
            report = _nll(model, encode(chosen, text_format), options, progress)
        samples: dict[str, list[str]] = {}
        interrupted = False
        with _timed(seconds, "samples"):
            try:
                for who in _SAMPLERS if requests else ():
                    samples[who] = _sample(model, text_format, requests, who, options, progress)
            except KeyboardInterrupt:
                interrupted = True  # the nll took minutes, and is complete
    finally:
        progress.close()
    found = _figures(report, samples, requests)
    _print_table(found, len(requests))
    _print_facts(report, seconds, options)
    if options.json is not None:
        record = {
            "kind": "evaluation",
            "command": command,
            "date": date,
            "machine": pair.versions(model.device),
            "model": _described(model, options),
            "data": {**_source(options), "sequences": report.sequences, "tokens": report.tokens},
            "results": found,
            "samples": _sampling(options, len(requests)) if requests else None,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "interrupted": interrupted,
        }
        replace_file(options.json, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {options.json}", file=sys.stderr)
    if interrupted:
        print("interrupted: not all samples were written", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _read_examples(options: argparse.Namespace) -> list[Example]:
    if options.task is not None:
        from auxkern.tasks.keywords import keyword_examples, split_by_keyword

        return split_by_keyword(keyword_examples(), seed=DATA_SEED)[1]
    examples = read_jsonl(options.file)
    if not examples:
        raise ValueError(f"{options.file} has no examples")
    return examples


def _requests(examples: Sequence[Example], options: argparse.Namespace) -> list[Request]:
    """What samples are written for: one for each of some conditions, drawn from all of the data."""
    wanted = options.samples
    if wanted is None:
        wanted = _TASK_SAMPLES if options.task is not None else 0
    first_of: dict[str, Example] = {}
    for example in examples if wanted else ():
        if not example.condition.strip():
            raise ValueError("a condition is empty, and no sample can contain it; pass --samples 0")
        first_of.setdefault(example.condition.casefold(), example)
    if wanted > len(first_of):
        if options.samples is None:
            wanted = len(first_of)
        else:
            raise ValueError(f"--samples {wanted}, but there are {len(first_of)} conditions; lower it")
    order = sorted(first_of, key=lambda condition: mixed_seed(DATA_SEED, f"sample {condition}"))
    return [Request(first_of[name].condition, first_of[name].prompt) for name in order[:wanted]]


def _nll(model: Any, encoded: Any, options: argparse.Namespace, progress: Progress) -> NllReport:
    total = sum(len(encoded[i]["input_ids"]) for i in range(len(encoded)))
    progress.start(0, total, "scoring, tokens")
    return evaluate_nll(
        model,
        encoded,
        batch_tokens=options.batch_tokens,
        aux_scale=options.aux_scale,
        progress=lambda done, _: progress.advance(done),
    )


def _sample(
    model: Any,
    text_format: Any,
    requests: list[Request],
    who: str,
    options: argparse.Namespace,
    progress: Progress,
) -> list[str]:
    progress.start(0, len(requests), f"samples of the {_NAMES[who]}")
    written: list[str] = []
    for some in pair.texts(
        model,
        text_format,
        requests,
        batch_size=options.batch_size,
        seeds=pair.sample_seeds(options.seed, len(requests)),
        auxiliary=_SAMPLERS[who],
        aux_scale=options.aux_scale,
        max_new_tokens=options.max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    ):
        written += [one.text for one in some]
        progress.advance(len(written))
    return written


def _figures(
    report: NllReport, samples: dict[str, list[str]], requests: list[Request]
) -> dict[str, dict[str, float | None]]:
    """nll, perplexity and, of those that wrote samples, the share with their condition, by model."""
    conditions = [request.condition for request in requests]
    found: dict[str, dict[str, float | None]] = {}
    for who in _NAMES:
        perplexity = getattr(report, f"{who}_perplexity")
        found[who] = {
            "nll": getattr(report, f"{who}_nll"),
            # JSON has no infinity.
            "perplexity": perplexity if math.isfinite(perplexity) else None,
            "contains_condition": keyword_accuracy(samples[who], conditions) if who in samples else None,
        }
    return found


def _print_table(found: dict[str, dict[str, float | None]], samples: int) -> None:
    heads = ["", "nll", "perplexity"]
    if samples:
        heads.append(f"keyword in {samples} samples")
    rows = []
    for who, figures in found.items():
        perplexity, share = figures["perplexity"], figures["contains_condition"]
        row = [
            _NAMES[who],
            f"{figures['nll']:.4f}",
            "beyond 1e308" if perplexity is None else f"{perplexity:,.2f}",
            "" if share is None else f"{share:.1%}",
        ]
        rows.append(row[: len(heads)])
    if importlib.util.find_spec("rich") is None:
        widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
        for name, *cells in (heads, *rows):
            columns = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
            print("  ".join([f"{name:<{widths[0]}}", *columns]))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == _NAMES["pair"] else None)
    Console().print(table)


def _print_facts(report: NllReport, seconds: dict[str, float], options: argparse.Namespace) -> None:
    data = options.task or options.file
    print(f"{data}: {report.sequences:,} sequences, {report.tokens:,} tokens scored")
    print(", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if value >= 0.05))


def _described(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    config = model.config
    scale = config.aux_scale if options.aux_scale is None else options.aux_scale
    return {
        "name": options.model,
        "base": options.base or config.base_model_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "base_dtype": str(model.lm.dtype).removeprefix("torch."),
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "aux_scale": scale,
    }


def _source(options: argparse.Namespace) -> dict[str, Any]:
    limits = {"examples": options.examples, "max_length": options.max_length}
    return {"task": options.task, "file": None if options.file is None else str(options.file), **limits}


def _sampling(options: argparse.Namespace, count: int) -> dict[str, Any]:
    return {
        "count": count,
        "temperature": 1.0,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def _parser() -> argparse.ArgumentParser:
    parser = pair.CommandParser(
        prog="auxkern evaluate",
        description="Measure a trained pair, its base alone and its auxiliary alone.",
        epilog=_EPILOG,
    )
    pair.add_model_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--file", type=Path, metavar="FILE.jsonl", help="condition, text and prompt a line")
    source.add_argument("--task", choices=TASKS, help="held-out side of known data")
    for flag, kind, default, what in (
        ("--examples", positive, None, "score so many, drawn at random as auxkern train draws them"),
        ("--max-length", positive, None, "tokens of prompt and text that are kept"),
        ("--batch-tokens", positive, 1024, "tokens that are scored at a time"),
        (
            "--samples",
            pair.natural,
            None,
            f"samples, see below (default {_TASK_SAMPLES} for a task, 0 for a file)",
        ),
        ("--max-new-tokens", positive, 32, "longest sample"),
        ("--batch-size", positive, 32, "samples at a time"),
        ("--seed", pair.natural, 0, "of the samples"),
    ):
        shown = what if default is None else f"{what} (default {default:,})"
        parser.add_argument(flag, type=kind, default=default, metavar="N", help=shown)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, command, date and versions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
