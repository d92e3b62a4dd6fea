"""``python -m auxkern.bench --op generate``: texts of two models beside other ways to write them."""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from auxkern.bench.generate_peers import (
    FILTERS,
    LONGEST,
    SHORTEST,
    Work,
    continuous,
    continuous_refusal,
    encoded,
    generate_lm,
    generate_pair,
    in_batches,
    two_model_loop,
)
from auxkern.bench.machine import OtherWork, machine_facts, now
from auxkern.bench.session import device_from, positive
from auxkern.files import replace_file

PROGRAM = "python -m auxkern.bench --op generate"
_AUXILIARY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_EPILOG = """\
SmolLM2-135M and an auxiliary of 4.8M parameters write one text for each request; every text has a length of
its own, 8 to 128 tokens, the same for all implementations. A batch of the others goes on until its longest
text is done. First the engine's texts are compared with those of model.generate for single requests.
two-model loop: both models with their caches, the sum of their logits, Hugging Face's warpers, multinomial.
Exit status: 0; 1 if the engine's texts are wrong; 2 for bad options or missing packages; 130 after Ctrl-C.
"""


@dataclass(frozen=True)
class Throughput:
    """One implementation at one batch size.

    Attributes:
        implementation: its name.
        batch: texts at a time.
        seconds: for all requests.
        tokens: that were asked for, all of them written.
        shares: of the time, by what it went to; empty if not known.
        busy_cores: cores that other programs kept busy meanwhile.
    """

    implementation: str
    batch: int
    seconds: float
    tokens: int
    shares: dict[str, float]
    busy_cores: float | None

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def main(argv: list[str] | None = None) -> int:
    """Checks, measures, prints a table.

    Args:
        argv: arguments after the program's name and its --op; those of the process when None.

    Returns:
        0; 1 if the engine's texts are wrong; 2 if a package is missing; 130 after Ctrl-C. Bad options
        exit with 2.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(arguments)
    device = device_from(parser, options.device)
    try:
        work = made_work(options.requests, device)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    wrong = differing(work)
    if wrong:
        print(f"{parser.prog}: the engine's texts of requests {wrong} are wrong", file=sys.stderr)
        return 1
    found: list[Throughput] = []
    notes: list[str] = []
    try:
        for name, batch, run in _runs(work, options.batch, notes):
            print(f"{name}, batch {batch}", file=sys.stderr, flush=True)
            found.append(_measured(work, name, batch, run))
    except KeyboardInterrupt:
        return 130
    finally:
        print(table(found))
        for note in notes:
            print(note)
        if options.json is not None:
            record = {
                "kind": "generate",
                "command": shlex.join([*PROGRAM.split(), *arguments]),
                "date": now(),
                "machine": machine_facts(device),
                "requests": options.requests,
                "lengths": [SHORTEST, LONGEST],
                "filters": FILTERS,
                "results": [asdict(one) for one in found],
                "notes": notes,
            }
            replace_file(options.json, json.dumps(record, indent=1) + "\n")
    return 0


def made_work(count: int, device: torch.device) -> Work:
    """Requests for WordNet's keywords, with prompts and lengths of their own, always the same.

    Raises:
        ModuleNotFoundError, FileNotFoundError: what is missing, and how to install it.
    """
    from auxkern.model import AuxTunedForCausalLM, TextFormat, load_base, load_tokenizer
    from auxkern.model.base import PACKAGED
    from auxkern.model.native import native_refusal
    from auxkern.tasks.keywords import keyword_examples

    examples = keyword_examples()
    chosen = [examples[i * len(examples) // count] for i in range(count)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AuxTunedForCausalLM.from_lm(
            load_base(PACKAGED, device=device),
            auxiliary_config=_AUXILIARY,
            head="shared",
            input_embedding="shared",
            pointer=True,
        )
        # An untrained head is zero, and would leave the auxiliary's logits out of the comparison.
        torch.nn.init.normal_(model.head.weight, std=0.02)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (count,)).tolist()
        words = torch.randint(0, 9, (count,)).tolist()
    prompts = [" ".join(one.text.split()[:n]) for one, n in zip(chosen, words, strict=True)]
    text_format = TextFormat(load_tokenizer(PACKAGED), " {condition}")
    plain_lm, plain_auxiliary = model.lm, copy.deepcopy(model.eval().auxiliary)
    if device.type == "cpu" and native_refusal() is None:
        plain_lm = load_base(PACKAGED, native=False)
        model.use_native_kernels()
    conditions = [one.condition for one in chosen]
    return Work(model, text_format, conditions, prompts, lengths, plain_lm, plain_auxiliary)


def engine(work: Work, slots: int) -> Any:
    """An engine with room for this work."""
    from auxkern.generation import Engine

    return Engine(work.model, work.text_format, slots=slots, max_length=192, max_condition=16)


def requests(work: Work) -> list[Any]:
    """The work as the engine takes it."""
    from auxkern import SamplingParams
    from auxkern.generation import Request

    params = SamplingParams(**FILTERS)
    fields = zip(work.conditions, work.prompts, work.lengths, strict=True)
    return [
        Request(i, condition, prompt, params, seed=i, max_new_tokens=length, ignore_eos=True)
        for i, (condition, prompt, length) in enumerate(fields)
    ]


def differing(work: Work, count: int = 4) -> list[int]:
    """Which of some requests the engine answers otherwise than ``model.generate`` does for each alone."""
    wrong = []
    asked = requests(work)[:count]
    for request, done in zip(asked, engine(work, count).generate(asked), strict=True):
        inputs = encoded(work, [request.id])
        ids = work.model.generate(
            **inputs,
            do_sample=True,
            seeds=[request.seed],
            max_new_tokens=request.max_new_tokens,
            eos_token_id=None,
            **FILTERS,
        )
        if ids[0, inputs["input_ids"].shape[1] :].tolist() != list(done.token_ids):
            wrong.append(request.id)
    return wrong


def table(found: list[Throughput]) -> str:
    """Tokens per second of each, and how they compare."""

    def best(name: str) -> float:
        return max((one.speed for one in found if one.implementation == name), default=float("nan"))

    loop, lm = best("two-model loop"), best("generate, LM alone")
    names = ("implementation", "batch", "seconds", "tokens/s", "vs loop", "vs LM alone")
    lines = ["{:<26} {:>5} {:>8} {:>9} {:>8} {:>11}".format(*names)]
    for one in found:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in one.shares.items())
        lines.append(
            f"{one.implementation:<26} {one.batch:>5} {one.seconds:>8.1f} {one.speed:>9.1f} "
            f"{one.speed / loop:>7.2f}x {one.speed / lm:>10.2f}x  {shares}"
        )
    return "\n".join(lines)


def _runs(
    work: Work, batches: list[int], notes: list[str]
) -> Iterator[tuple[str, int, Callable[[], dict[str, float]]]]:
    ways: list[tuple[str, Callable[[int], dict[str, float]]]] = [
        ("engine", lambda batch: _engine(work, batch)),
        ("two-model loop", lambda batch: in_batches(work, batch, two_model_loop)),
        ("generate, LM alone", lambda batch: in_batches(work, batch, generate_lm)),
        ("generate, pair", lambda batch: in_batches(work, batch, generate_pair)),
    ]
    if work.plain_lm is not work.model.lm:
        ours = replace(work, plain_lm=work.model.lm, plain_auxiliary=work.model.auxiliary)
        ways += [
            ("two-model loop, our kernels", lambda batch: in_batches(ours, batch, two_model_loop)),
            ("generate, LM, our kernels", lambda batch: in_batches(ours, batch, generate_lm)),
        ]
    for batch in batches:
        for name, way in ways:
            yield name, batch, lambda way=way, batch=batch: way(batch)  # type: ignore[misc]
    reason = continuous_refusal(work)
    if reason is None:
        yield "continuous, LM alone", max(batches), lambda: continuous(work)
    else:
        notes.append(f"transformers' continuous batching of the LM alone does not run here: {reason}")


def _measured(work: Work, name: str, batch: int, run: Callable[[], dict[str, float]]) -> Throughput:
    other, began = OtherWork(), time.perf_counter()
    shares = run()
    seconds = time.perf_counter() - began
    return Throughput(name, batch, seconds, sum(work.lengths), shares, other.cores())


def _engine(work: Work, batch: int) -> dict[str, float]:
    made = engine(work, batch)
    parts = {"LM": work.model.lm.base_model, "auxiliary": work.model.auxiliary}
    with _timed(parts) as spent:
        began = time.perf_counter()
        rows = _generated(made, requests(work))
        whole = time.perf_counter() - began
    heads = _head_seconds(work, rows)
    seconds = {**spent, "heads": heads, "sampling": made.stats.seconds["sampling"] - heads}
    seconds["rest"] = whole - sum(seconds.values())
    return {name: value / whole for name, value in seconds.items()}


def _generated(made: Any, asked: list[Any]) -> list[int]:
    """Answers requests; how many rows each step drew at once."""
    for request in asked:
        made.submit(request)
    rows = []
    while not made.scheduler.idle:
        before = made.stats.new_tokens
        made.step()
        rows.append(made.stats.new_tokens - before)
    return rows


def _head_seconds(work: Work, rows: list[int]) -> float:
    """What the output embedding takes of so many draws.

    On a CPU its product is the first half of ``auxkern.sample``; here it is timed by itself.
    """
    from auxkern.model.base import output_head
    from auxkern.ops.dense import dense_logits
    from auxkern.terms import Head

    if work.model.device.type != "cpu":
        return 0.0
    head, total = output_head(work.model.lm), 0.0
    for n in set(rows):
        hidden = torch.ones(n, head.weight.shape[1])
        times = []
        for _ in range(4):
            began = time.perf_counter()
            dense_logits([Head(hidden, *head)])
            times.append(time.perf_counter() - began)
        total += statistics.median(times[1:]) * rows.count(n)
    return total


@contextmanager
def _timed(modules: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Seconds spent in the forward passes of modules."""
    spent = dict.fromkeys(modules, 0.0)
    handles = []
    for name, module in modules.items():

        def before(*_: Any, name: str = name) -> None:
            spent[name] -= time.perf_counter()

        def after(*_: Any, name: str = name) -> None:
            spent[name] += time.perf_counter()

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Tokens per second of two models' texts, beside other ways to write them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--requests", type=positive, default=64, metavar="N", help="texts (default 64)")
    parser.add_argument(
        "--batch",
        type=positive,
        nargs="+",
        default=[8, 32, 64],
        metavar="N",
        help="texts at a time (8 32 64)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
