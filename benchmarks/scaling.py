"""``python -m benchmarks.scaling``: one process is measured, and what more of them would do is computed."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from auxkern.bench.report import between_markers
from auxkern.core.files import replace_file
from auxkern.generation import Engine, Request
from auxkern.model import TextFormat, load_base, load_tokenizer
from auxkern.model.text import Example
from auxkern.terminal import command_parser, positive
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import encode
from auxkern.training.loop import ExampleSet, train
from auxkern.training.settings import LoopSettings, TrainSettings
from benchmarks.recipe import NoLMLosses, recipe, recipe_examples, recipe_format, recipe_pair
from benchmarks.shared import record_head, write_json

RANKS = (1, 2, 4, 8, 16, 32)
_EPILOG = """\
Every process has one thread, so that two of them share a machine of two cores fairly. Measured are a batch,
an update and a text's tokens in one process, and a step of two, which says how far the computed figures can
be trusted. Links between machines are assumed, not measured.
"""


@dataclasses.dataclass(frozen=True)
class Link:
    """A link between processes, assumed.

    Attributes:
        name: what a reader knows it as.
        bandwidth: bytes a second that a process sends.
        latency: seconds of one message.
    """

    name: str
    bandwidth: float
    latency: float


LINKS = (
    Link("Ethernet, 1 Gbit/s", 1e9 / 8, 1e-4),
    Link("Ethernet, 25 Gbit/s", 25e9 / 8, 3e-5),
    Link("InfiniBand, 400 Gbit/s", 400e9 / 8, 5e-6),
)


def all_reduce_seconds(link: Link, size: int, ranks: int) -> float:
    """Seconds of a ring all-reduce of ``size`` bytes: 2 (R - 1) messages of size / R each.

    Source: Patarasuk and Yuan 2009, section 4.
    """
    return 2 * (ranks - 1) * (link.latency + size / ranks / link.bandwidth)


def step_seconds(measured: dict[str, Any], batches: int, ranks: int, link: Link | None) -> float:
    """Seconds of a step of so many batches on R ranks: the longest share, the sum, the update."""
    share = -(-batches // ranks) * measured["batch_seconds"] + measured["update_seconds"]
    if ranks == 1 or link is None:
        return float(share)
    # Label counts, losses and flags are messages of a few bytes.
    small = 3 * all_reduce_seconds(link, 8, ranks)
    return float(share + all_reduce_seconds(link, measured["gradient_bytes"], ranks) + small)


def main(argv: list[str] | None = None) -> int:
    """Measures, computes, prints tables, and writes FILE.json and a page's part.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0; 2 if data is missing. Bad options exit with 2.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.as_rank is not None:
        return _rank(options.as_rank, options.batches, options.steps)
    try:
        measured = measure(options.batches, options.steps)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    record = {
        **record_head("scaling", parser.prog, arguments, torch.device("cpu")),
        "measured": measured,
        "computed": [
            {"link": link.name, "ranks": ranks, "step_seconds": step_seconds(measured, 64, ranks, link)}
            for link in LINKS
            for ranks in RANKS
        ],
    }
    text = page_part(record)
    print(text)
    if options.json is not None:
        write_json(options.json, record)
    if options.update is not None:
        page = options.update.read_text(encoding="utf-8")
        replace_file(options.update, between_markers(page, "scaling", text))
    return 0


def measure(batches: int, steps: int) -> dict[str, Any]:
    """What one process takes, and what a step takes in one and in two processes.

    Args:
        batches: of a step of the two.
        steps: that are timed.

    Returns:
        batch_seconds (forward and backward, the base run at every batch), update_seconds (clipping and
        AdamW), gradient_bytes, base_bytes, new_tokens_per_second of the engine, and step_seconds by the
        number of processes.
    """
    torch.set_num_threads(1)
    settings = recipe()
    model, text_format, examples = _work(settings, 8 * settings.batch_size)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found: dict[str, Any] = {
        "batch_size": settings.batch_size,
        **_training_seconds(model, text_format, encode(examples, text_format), settings),
        "gradient_bytes": sum(parameter.numel() * parameter.element_size() for parameter in trainable),
        "base_bytes": sum(p.numel() * p.element_size() for p in model.lm.parameters()),
        "new_tokens_per_second": _texts_per_second(model, text_format, [one.condition for one in examples]),
    }
    found["step_batches"] = batches
    found["step_seconds"] = {str(world): _in_processes(world, batches, steps) for world in (1, 2)}
    return found


def page_part(record: dict[str, Any]) -> str:
    """The tables of a record."""
    measured = record["measured"]
    machine = record["machine"]
    alone, two = (measured["step_seconds"][world] for world in ("1", "2"))
    predicted = step_seconds(measured, measured["step_batches"], 1, None) / step_seconds(
        measured, measured["step_batches"], 2, None
    )
    rows = [
        "**Measured**, one process of one thread (`" + record["command"] + "`, " + record["date"][:10] + ", "
        f"{machine['processor']}, torch {machine['torch']}):",
        "",
        "| | |",
        "|---|---|",
        f"| a batch of {measured['batch_size']} sentences, base, forward and backward | "
        f"{measured['batch_seconds']:.2f} s |",
        f"| clipping and AdamW | {measured['update_seconds']:.3f} s |",
        f"| gradients | {measured['gradient_bytes'] / 1e6:.1f} MB |",
        f"| base | {measured['base_bytes'] / 1e6:.0f} MB |",
        f"| texts, engine with 32 slots | {measured['new_tokens_per_second']:.0f} tokens/s |",
        f"| a step of {measured['step_batches']} batches, 1 process | {alone:.2f} s |",
        f"| the same, 2 processes on this machine | {two:.2f} s: {alone / two:.2f} times as fast; computed "
        f"without a link's time: {predicted:.2f} |",
        "",
        "**Computed, not measured**: a step of 64 such batches, times as fast as one process.",
        "",
        "| assumed link | " + " | ".join(f"{ranks} ranks" for ranks in RANKS[1:]) + " |",
        "|---" * len(RANKS) + "|",
    ]
    for link in LINKS:
        times = {one["ranks"]: one["step_seconds"] for one in record["computed"] if one["link"] == link.name}
        rows.append(
            f"| {link.name} | " + " | ".join(f"{times[1] / times[ranks]:.1f}" for ranks in RANKS[1:]) + " |"
        )
    return "\n".join(rows)


def _work(settings: TrainSettings, count: int) -> tuple[Any, TextFormat, list[Example]]:
    """A pair of the recipe, its text format, and so many examples."""
    model = recipe_pair(settings, load_base(settings.base))
    return model, recipe_format(settings, load_tokenizer(settings.base)), recipe_examples(count)


def _training_seconds(
    model: Any, text_format: TextFormat, encoded: Any, settings: TrainSettings
) -> dict[str, float]:
    collate = AuxCollator(text_format.pad_id)
    size = settings.batch_size
    groups = [[encoded[i] for i in range(first, first + size)] for first in range(0, len(encoded), size)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batches, updates = [], []
    for group in groups:
        began = time.perf_counter()
        model(**collate(group)).loss.backward()
        computed = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        batches.append(computed - began)
        updates.append(time.perf_counter() - computed)
    # The first of each warms up.
    return {
        "batch_seconds": statistics.median(batches[1:]),
        "update_seconds": statistics.median(updates[1:]),
    }


def _texts_per_second(model: Any, text_format: TextFormat, conditions: list[str]) -> float:
    engine = Engine(model, text_format, slots=32, max_length=40, max_condition=16)
    requests = [
        Request(i, condition=condition, seed=i, max_new_tokens=32, ignore_eos=True)
        for i, condition in enumerate(conditions[:128])
    ]
    engine.generate(requests[:32])
    tokens, began = engine.stats.new_tokens, time.perf_counter()
    engine.generate(requests)
    model.train()
    return (engine.stats.new_tokens - tokens) / (time.perf_counter() - began)


def _in_processes(world: int, batches: int, steps: int) -> float:
    """Median seconds of a step that so many processes share."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command += ["-m", "benchmarks.scaling", "--as-rank", folder]
        command += ["--batches", str(batches), "--steps", str(steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        log = (Path(folder) / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in log]
    # The first step warms up.
    return statistics.median(after - before for before, after in itertools.pairwise(seconds))


def _rank(folder: Path, batches: int, steps: int) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    settings = recipe()
    model, text_format, examples = _work(settings, batches * settings.batch_size)
    encoded = encode(examples, text_format)
    loop = LoopSettings(
        output=str(folder / "run"),
        steps=steps + 1,
        batch_size=settings.batch_size,
        gradient_accumulation=batches,
        learning_rate=1e-5,
        log_every=1,
        save_every=10**6,
    )
    data = ExampleSet(encoded, None, NoLMLosses(encoded))
    train(model, data, loop, collate=AuxCollator(text_format.pad_id), process_group=dist.group.WORLD)
    dist.destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m benchmarks.scaling",
        "Training and texts in one process, and computed from them in more.",
        _EPILOG,
    )
    parser.add_argument("--batches", type=positive, default=8, help="of a measured step (default 8)")
    parser.add_argument("--steps", type=positive, default=5, help="that are timed (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    parser.add_argument("--update", type=Path, metavar="FILE.md", help="put the tables between its markers")
    parser.add_argument("--as-rank", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
