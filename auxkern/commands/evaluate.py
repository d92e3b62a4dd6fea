"""``auxkern evaluate``: how much better a trained pair does than the language model alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from auxkern.commands import pair
from auxkern.commands.ranks import Launched
from auxkern.core.files import replace_file
from auxkern.core.seeds import DATA_SEED, mixed_seed
from auxkern.evaluation.bootstrap import bootstrap_mean
from auxkern.evaluation.diversity import distinct_n, self_bleu
from auxkern.evaluation.perplexity import NllReport, evaluate_nll, plain_nll
from auxkern.evaluation.slor import UnigramCounts, slor
from auxkern.machine import now
from auxkern.model.base import positions_for
from auxkern.model.text import Example, TextFormat
from auxkern.tasks.keywords import contains_keyword
from auxkern.tasks.registry import TASKS, load_task
from auxkern.terminal import (
    INTERRUPTED,
    command_parser,
    console_for_stdout,
    input_file,
    natural,
    output_file,
    positive,
)
from auxkern.training.examples import PlacedExamples, encode, read_jsonl
from auxkern.training.fit import check_fit
from auxkern.training.progress import Progress, progress_for

_EPILOG = """\
nll is in nats per token of the texts and their ends; perplexity is exp(nll). The auxiliary alone is
softmax(aux_scale * logits_aux).
--task takes the data that auxkern train holds out to validate: no condition and no text was trained on.
--samples M writes a text for M of the examples, of as many conditions as there are, at temperature 1 with
fixed seeds, by the pair and by the language model alone, and measures them beside the references, which are
the texts of the data for the same conditions:
  has condition  share that satisfies its condition: for a file and keywords, contains it as a word; for
                 definition, shares a third of its content with a gloss; for length, has as many words
  SLOR           (log p_LM - log p_unigram) / tokens of a text, in nats per token (Kann et al. 2018); the LM
                 is the base, the unigram counts are of --unigram, for a task of its training side
  distinct-n     different n-grams / tokens, of all texts (Li et al. 2016)
  self-BLEU-4    mean BLEU-4 of a text with the others as references (Zhu et al. 2018); low is diverse
Brackets hold 95% bootstrap intervals over the conditions. SLOR and self-BLEU leave empty texts out. A
reference is whole, a sample ends after --max-new-tokens. References are no ceiling of SLOR: the base finds
its own samples the most probable, and in short texts the first token, which it cannot guess, weighs more.
Exit status: 0; 2 for bad options, missing data or a model that cannot be loaded; 130 after Ctrl-C.
"""
_TASK_SAMPLES = 100
_NAMES = {"plain": "LM alone, told nothing", "lm": "LM alone", "aux": "auxiliary alone", "pair": "pair"}
_SAMPLERS = {"pair": "default", "lm": None}  # which auxiliary writes the samples
_WRITERS = {"lm": "LM alone", "pair": "pair", "reference": "references"}
_COUNTED = ("source", "tokens", "vocab_size", "data_fingerprint", "tokenizer_fingerprint")
_BLEU = 4
_MEASURES = (
    "contains_condition",
    "contains_condition_interval",
    "slor",
    "slor_interval",
    "distinct_1",
    "distinct_2",
    f"self_bleu_{_BLEU}",
    "empty",
)

# A figure is a number, or both ends of its interval; None where there is none.
_Figures = dict[str, float | list[float] | None]


class _Data(NamedTuple):
    """What a task trains on, nothing for a file; what is measured; whether a text does what it should."""

    training: list[Example]
    held_out: PlacedExamples
    satisfied: Callable[[str, str], bool]  # of condition and text


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
    command = shlex.join([*parser.prog.split(), *arguments])
    return pair.run(parser.prog, lambda: _evaluate(parser, options, command))


def _evaluate(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    Launched.from_environment().check_alone("auxkern evaluate")
    data = _read_data(options)
    asked = _asked(data.held_out.examples, options)
    unigram = _unigram_source(data.training, options) if asked else None
    chosen = data.held_out.drawn(options.examples)
    seconds: dict[str, float] = {}
    date = now()
    with _clocked(seconds, "loading"):
        model, text_format = pair.load_pair(parser, options, options.max_length)
        counts = unigram if isinstance(unigram, UnigramCounts) else None
        if isinstance(unigram, tuple):
            name, counted = unigram
            counts = UnigramCounts.of_texts(counted, text_format, model.config.vocab_size, source=name)
    progress = progress_for()
    writers = _Writers(model, text_format, asked, options, progress)
    measured: dict[str, _Figures] = {}
    interrupted = False
    try:
        with _clocked(seconds, "nll"):
            encoded = encode(chosen.examples, text_format, place=chosen.place)
            check_fit(model, encoded, chosen.place)
            report = evaluate_nll(
                model,
                encoded,
                batch_tokens=options.batch_tokens,
                aux_scale=options.aux_scale,
                progress=progress.counting("scoring, tokens"),
            )
            if model.base_prefix:
                plain = plain_nll(
                    model,
                    encode(chosen.examples, text_format.plain, place=chosen.place),
                    batch_tokens=options.batch_tokens,
                    progress=progress.counting("scoring the LM told nothing, tokens"),
                )
                report = replace(report, plain_nll=plain)
        try:
            for who in (*_SAMPLERS, "reference") if asked else ():
                with _clocked(seconds, "samples"):
                    texts = writers.texts(who)
                with _clocked(seconds, "measures"):
                    measured[who] = _measures(asked, texts, data.satisfied)
                    if counts is not None:
                        measured[who].update(writers.slor(who, texts, counts))
        except KeyboardInterrupt:
            interrupted = True  # the nll took minutes, and is complete
    finally:
        progress.close()
    results = _results(report, measured)
    _print_table(results)
    if measured:
        _print_measures(results, len(asked))
    print(f"{options.task or options.file}: {report.sequences:,} sequences, {report.tokens:,} tokens scored")
    if counts is not None:
        print(f"SLOR: p_LM of the base, p_unigram of {counts.tokens:,} tokens ({counts.source})")
    print(", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if value >= 0.05))
    if options.json is not None:
        record = {
            "kind": "evaluation",
            "command": command,
            "date": date,
            "machine": pair.versions(model.device),
            "model": _model_record(model, options),
            "data": {**_source(options), "sequences": report.sequences, "tokens": report.tokens},
            "results": results,
            "samples": _samples_record(options, len(asked), counts) if asked else None,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "interrupted": interrupted,
        }
        replace_file(options.json, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {options.json}", file=sys.stderr)
    if interrupted:
        print("interrupted: not all samples were written", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _read_data(options: argparse.Namespace) -> _Data:
    if options.task is not None:
        task = load_task(options.task, options.task_source)
        training, validation, _ = task.split()
        return _Data(training, PlacedExamples.of(validation, f"{options.task}, validation"), task.satisfied)
    if options.task_source is not None:
        raise ValueError(f"--task-source {options.task_source}, but there is no task; pass --task")
    return _Data([], PlacedExamples.of_file(options.file), lambda word, text: contains_keyword(text, word))


def _asked(examples: Sequence[Example], options: argparse.Namespace) -> list[Example]:
    """What samples are written for: an example of each condition in an order drawn from all of the data.

    Where there are fewer conditions than samples it goes round again, with each condition's next example.
    """
    by_default = _TASK_SAMPLES if options.task is not None else 0
    wanted = by_default if options.samples is None else options.samples
    of: dict[str, list[Example]] = {}
    for example in examples if wanted else ():
        if not example.condition.strip():
            raise ValueError("a condition is empty, and no sample can contain it; pass --samples 0")
        of.setdefault(example.condition.casefold(), []).append(example)
    order = sorted(of, key=lambda condition: mixed_seed(DATA_SEED, f"sample {condition}"))
    listed = [
        of[name][turn]
        for turn in range(max(map(len, of.values()), default=0))
        for name in order
        if turn < len(of[name])
    ]
    if options.samples is not None and wanted > len(listed):
        raise ValueError(f"--samples {wanted}, but there are {len(listed)} examples; lower it")
    wanted = min(wanted, len(listed))
    if options.unigram is not None and not wanted:
        raise ValueError(f"--unigram {options.unigram}, but there are no samples to measure; pass --samples")
    return listed[:wanted]


def _unigram_source(
    training: Sequence[Example], options: argparse.Namespace
) -> UnigramCounts | tuple[str, list[str]] | None:
    """Counts, or texts to count and their name; before a model is loaded, so that a bad file shows early."""
    path: Path | None = options.unigram
    if path is not None and path.suffix == ".safetensors":
        return UnigramCounts.load(path)
    if path is None and not training:
        return None
    name = f"training side of {options.task}" if path is None else str(path)
    examples = training if path is None else read_jsonl(path)
    if not examples:
        raise ValueError(f"{path} has no examples to count")
    return f"{name}, each text once", list(dict.fromkeys(example.text for example in examples))


@dataclass(frozen=True)
class _Writers:
    """Who writes texts for the examples that are asked for, and how fluent the base finds them."""

    model: Any
    text_format: TextFormat
    asked: list[Example]
    options: argparse.Namespace
    progress: Progress

    def texts(self, who: str) -> list[str]:
        """A text for each example: its own, or what a model writes for its condition after its prompt."""
        if who not in _SAMPLERS:
            return [example.text for example in self.asked]
        show = self.progress.counting(f"samples of the {_NAMES[who]}")
        show(0, len(self.asked))
        written: list[str] = []
        for some in pair.texts(
            self.model,
            self.text_format,
            self.asked,
            batch_size=self.options.batch_size,
            seeds=pair.sample_seeds(self.options.seed, len(self.asked)),
            auxiliary=_SAMPLERS[who],
            aux_scale=self.options.aux_scale,
            max_new_tokens=self.options.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        ):
            # Measured as the references are, which have none.
            written += [one.text.removeprefix(self.text_format.text_prefix) for one in some]
            show(len(written), len(self.asked))
        return written

    def slor(self, who: str, texts: Sequence[str], counts: UnigramCounts) -> _Figures:
        """SLOR of the texts that are not empty, by the base; nothing if all are."""
        model, asked = self.model, self.asked
        scores = slor(
            model.lm,
            # A sample can be more tokens when it is read than when it was written.
            TextFormat(self.text_format.tokenizer, max_length=positions_for(model.lm)),
            texts,
            counts,
            prompts=[example.prompt for example in asked],
            batch_size=self.options.batch_size,
            lm_term=model.config.lm_term,
            lm_fingerprint=model.config.base_fingerprint,
            progress=self.progress.counting(f"SLOR of the {_WRITERS[who]}"),
        )
        scored = [(x, example) for x, example in zip(scores.values, asked, strict=True) if x is not None]
        if not scored:
            return {}
        interval = _interval([x for x, _ in scored], [example for _, example in scored])
        return {"slor": scores.mean, "slor_interval": interval}


def _measures(
    asked: Sequence[Example], texts: Sequence[str], satisfied: Callable[[str, str], bool]
) -> _Figures:
    """Those of ``_MEASURES`` that need no model, for one text an example; None for the others."""
    kept = [float(satisfied(example.condition, text)) for example, text in zip(asked, texts, strict=True)]
    worded = sum(bool(text.split()) for text in texts)
    figures: _Figures = dict.fromkeys(_MEASURES)
    figures["contains_condition"] = sum(kept) / len(kept)
    figures["contains_condition_interval"] = _interval(kept, asked)
    figures["empty"] = len(texts) - worded
    if worded:
        figures.update({f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)})
    if worded > 1:
        figures[f"self_bleu_{_BLEU}"] = self_bleu(texts, _BLEU)
    return figures


def _interval(values: Sequence[float], asked: Sequence[Example]) -> list[float] | None:
    """Both ends of a 95% interval; None for one condition, of which there is nothing to resample."""
    conditions = [example.condition.casefold() for example in asked]
    if len(set(conditions)) < 2:
        return None
    interval = bootstrap_mean(values, clusters=conditions)
    return [interval.low, interval.high]


def _results(report: NllReport, measured: dict[str, _Figures]) -> dict[str, _Figures]:
    """nll, perplexity and measures of what was written, by model, and of the references if they were."""
    results: dict[str, _Figures] = {}
    for who in _NAMES:
        perplexity = getattr(report, f"{who}_perplexity")
        if perplexity is None:
            continue
        # JSON has no infinity.
        shown = perplexity if math.isfinite(perplexity) else None
        results[who] = {"nll": getattr(report, f"{who}_nll"), "perplexity": shown}
    if "reference" in measured:
        results["reference"] = {"nll": None, "perplexity": None}
    for who, figures in results.items():
        figures.update(measured.get(who, dict.fromkeys(_MEASURES)))
    return results


def _print_table(results: dict[str, _Figures]) -> None:
    rows = []
    for who in [one for one in _NAMES if one in results]:
        name, perplexity = _NAMES[who], results[who]["perplexity"]
        shown = "beyond 1e308" if perplexity is None else f"{perplexity:,.2f}"
        rows.append([name, f"{results[who]['nll']:.4f}", shown])
    _print_cells(["", "nll", "perplexity"], rows)


def _print_measures(results: dict[str, _Figures], samples: int) -> None:
    """A column for each writer, since five measures and their intervals are wider than a terminal."""
    shown = [who for who in _WRITERS if results.get(who, {}).get("contains_condition") is not None]
    rows = [
        ["has condition", *(_cell(results[who], "contains_condition", ".1%", ".0%") for who in shown)],
        ["SLOR", *(_cell(results[who], "slor", ".2f", ".2f") for who in shown)],
        *([f"distinct-{n}", *(_cell(results[who], f"distinct_{n}", ".3f") for who in shown)] for n in (1, 2)),
        [f"self-BLEU-{_BLEU}", *(_cell(results[who], f"self_bleu_{_BLEU}", ".3f") for who in shown)],
        ["empty", *(f"{results[who]['empty']}" for who in shown)],
    ]
    if all(results[who]["slor"] is None for who in shown):
        del rows[1]
    _print_cells([f"{samples} texts each", *(_WRITERS[who] for who in shown)], rows)


def _cell(figures: _Figures, name: str, form: str, ends: str = "") -> str:
    """A figure and, in brackets, its interval if it has one."""
    value, interval = figures[name], figures.get(f"{name}_interval")
    if value is None:
        return "-"
    if not isinstance(interval, list):
        return f"{value:{form}}"
    low, high = (f"{end:{ends}}".removesuffix("%") for end in interval)
    return f"{value:{form}} [{low}, {high}]"


def _print_cells(heads: list[str], rows: list[list[str]]) -> None:
    """A table whose first column names its rows."""
    if importlib.util.find_spec("rich") is None:
        widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
        for name, *cells in (heads, *rows):
            columns = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
            print("  ".join([f"{name:<{widths[0]}}", *columns]))
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == _NAMES["pair"] else None)
    console_for_stdout().print(table)


def _model_record(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    config = model.config
    return {
        "name": options.model,
        "base": options.base or config.base_model_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "base_dtype": str(model.lm.dtype).removeprefix("torch."),
        "compute": options.compute,
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "aux_scale": config.aux_scale if options.aux_scale is None else options.aux_scale,
    }


def _source(options: argparse.Namespace) -> dict[str, Any]:
    limits = {"examples": options.examples, "max_length": options.max_length}
    file = None if options.file is None else str(options.file)
    return {"task": options.task, "task_source": options.task_source, "file": file, **limits}


def _samples_record(options: argparse.Namespace, count: int, counts: UnigramCounts | None) -> dict[str, Any]:
    return {
        "count": count,
        "temperature": 1.0,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        "confidence": 0.95,
        "unigram": counts and {name: getattr(counts, name) for name in _COUNTED},
    }


@contextmanager
def _clocked(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began


def _parser() -> argparse.ArgumentParser:
    description = "Measure a trained pair, its base alone and its auxiliary alone."
    parser = command_parser("auxkern evaluate", description, _EPILOG)
    pair.add_model_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--file",
        type=input_file,
        metavar="FILE.jsonl",
        help="condition, text and prompt a line; - is standard input",
    )
    source.add_argument("--task", choices=TASKS, help="held-out side of known data")
    parser.add_argument("--task-source", metavar="TEXT", help="as of auxkern train (default wordnet)")
    for flag, kind, default, what in (
        ("--examples", positive, None, "score so many, drawn at random as auxkern train draws them"),
        ("--max-length", positive, None, "tokens of prompt and text that are kept"),
        ("--batch-tokens", positive, 1024, "tokens that are scored at a time"),
        (
            "--samples",
            natural,
            None,
            f"samples, see below (default {_TASK_SAMPLES} for a task, 0 for a file)",
        ),
        ("--max-new-tokens", positive, 32, "longest sample"),
        ("--batch-size", positive, 32, "samples at a time"),
        ("--seed", natural, 0, "of the samples"),
    ):
        shown = what if default is None else f"{what} (default {default:,})"
        parser.add_argument(flag, type=kind, default=default, metavar="N", help=shown)
    parser.add_argument(
        "--unigram",
        type=input_file,
        metavar="FILE",
        help="for SLOR: texts to count (.jsonl) or counts (.safetensors); default: what the task trains on",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write figures, command, date and versions"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
