"""``python -m benchmarks.cached_states``: an epoch with and without the cached states of the base."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from auxkern.model import load_base, load_tokenizer
from auxkern.terminal import command_parser, positive
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import EncodedExamples, encode
from auxkern.training.lm_states import LMStates, cache_lm_states
from auxkern.training.loop import ExampleSet, train
from auxkern.training.settings import LoopSettings, TrainSettings
from benchmarks.recipe import RECIPE, NoLMLosses, recipe, recipe_examples, recipe_format, recipe_pair
from benchmarks.shared import record_head, write_json

_EPILOG = """\
The recipe's pair is trained for one epoch in which the base runs at every step, and for two from its states
on disk; forward passes of the base are counted. The epochs take the same examples in the same order.
Exit status: 0; 1 if an epoch from cached states ran the base; 2 for bad options or missing data.
"""


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a table, and writes FILE.json.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0; 1 if an epoch from cached states ran the base. Bad options exit with 2.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = command_parser(
        "python -m benchmarks.cached_states",
        "Times of an epoch of the keyword recipe with and without cached states.",
        _EPILOG,
    )
    parser.add_argument("--batches", type=positive, default=10, help="of an epoch (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    try:
        settings = recipe()
        with tempfile.TemporaryDirectory() as folder:
            results = measure(settings, options.batches, Path(folder))
    except (FileNotFoundError, ModuleNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    record = {
        **record_head("cached states", parser.prog, arguments, torch.device("cpu")),
        "settings": {"recipe": RECIPE.name, "batches": options.batches, "batch_size": settings.batch_size},
        "results": results,
    }
    _print(results)
    if options.json is not None:
        write_json(options.json, record)
    return 1 if results["second epoch"]["forward passes of the base"] else 0


def measure(settings: TrainSettings, batches: int, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds and forward passes of the base, for each part.

    Args:
        settings: a recipe.
        batches: of an epoch.
        folder: for states and checkpoints; about 100 MB for 10 batches.
    """
    count = batches * settings.batch_size
    encoded = encode(recipe_examples(count), recipe_format(settings, load_tokenizer(settings.base)))
    tokens = sum(len(encoded[i]["input_ids"]) for i in range(count))
    lm = load_base(settings.base)
    loop = LoopSettings(
        output=str(folder / "plain"),
        steps=batches,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        schedule="constant",
        log_every=10**6,
        save_every=10**6,
    )
    results: dict[str, dict[str, float]] = {}
    _epoch(settings, dataclasses.replace(loop, output=str(folder / "warm-up"), steps=1), lm, encoded)
    results["epoch without cached states"] = _epoch(settings, loop, lm, encoded)
    with _counted(lm) as calls:
        began = time.monotonic()
        states = cache_lm_states(lm, encoded, folder / "states", layers=settings.pair["lm_layers"])
        results["caching"] = _row(time.monotonic() - began, calls) | {"tokens": tokens}
    for name in ("first epoch", "second epoch"):
        output = dataclasses.replace(loop, output=str(folder / name.split()[0]))
        results[name] = _epoch(settings, output, lm, encoded, states)
    return results


def _epoch(
    settings: TrainSettings,
    loop: LoopSettings,
    lm: Any,
    encoded: EncodedExamples,
    states: LMStates | None = None,
) -> dict[str, float]:
    """Seconds of the steps of an epoch, and forward passes of the base in them."""
    model = recipe_pair(settings, lm)
    examples = ExampleSet(encoded if states is None else states.dataset(encoded), lm_nll=NoLMLosses(encoded))
    pad = model.config.pad_token_id
    with _counted(lm) as calls:
        return _row(train(model, examples, loop, collate=AuxCollator(pad)).state.seconds, calls)


@contextmanager
def _counted(lm: Any) -> Iterator[list[int]]:
    """The numbers of tokens, padding included, of every forward pass of the base."""
    calls: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs["input_ids"].numel())

    handle = lm.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _row(seconds: float, calls: list[int]) -> dict[str, float]:
    return {
        "seconds": round(seconds, 2),
        "forward passes of the base": len(calls),
        "padded tokens": sum(calls),
    }


def _print(results: dict[str, dict[str, float]]) -> None:
    for name, row in results.items():
        figures = ", ".join(f"{key} {value:,}" for key, value in row.items())
        print(f"{name:<28} {figures}")
    ratio = results["epoch without cached states"]["seconds"] / results["second epoch"]["seconds"]
    print(f"{'second epoch is faster by':<28} {ratio:.2f}")


if __name__ == "__main__":
    sys.exit(main())
