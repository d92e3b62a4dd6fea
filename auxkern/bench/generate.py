"""``python -m auxkern.bench --op generate``: texts of two models beside other ways to write them."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from auxkern.bench import mixtures, peers, quality, session
from auxkern.bench.clocks import SECONDS, forward_counts
from auxkern.bench.operators import warped
from auxkern.bench.peers import jobs as peer_jobs
from auxkern.bench.results import (
    CONTINUOUS,
    ENGINE,
    ENGINE_LM,
    KERNEL_SHARES,
    LM,
    LOOP,
    SHARES,
    GenerateRun,
    Throughput,
)
from auxkern.bench.rounds import round_jobs, spread_notes
from auxkern.bench.runner import Progress
from auxkern.bench.work import (
    COMPUTES,
    CONDITION,
    FILTERS,
    LONGEST,
    PLAIN,
    SHORTEST,
    ComputeError,
    Work,
    encoded,
    engine,
    new_work,
    requests,
    text_options,
)
from auxkern.machine import OtherWork
from auxkern.terminal import command_parser, device_from, natural, positive

# Batches below the first are measured on this many requests for each text at a time.
_SMALL_BATCH, _FEW_PER_PLACE = 8, 16
# Words in the names of native calls, by the part of the time that they are.
_KERNEL_NAMES = {"linear": ("linear", "product"), "attention": ("attention",), "layers": ("layer",)}
_EPILOG = """\
SmolLM2-135M and an auxiliary of 4.5M parameters write one text for each request; every text has a length of
its own, 8 to 128 tokens, the same for all implementations. A batch of the others goes on until its longest
text is done. A batch N below 8 would take very long and is measured on the first 16 N requests only; a batch
larger than the number of requests is all of them at once.
First the engine's texts are compared with those of model.generate for single requests.
two-model loop: both models with their caches, the sum of their logits, Hugging Face's warpers, multinomial.
A peer is another program that writes texts of the LM alone for the same requests: same prompts, lengths,
filters and number of threads, N at a time, at each precision that it has. NAME is one of
openvino, ctranslate2, vllm, llama_cpp, PYTHON the interpreter of the virtual environment that has it. What it
converts is kept in auxkern's cache folder. docs/peers.md says how to install each.
Exit status: 0; 1 if the engine's texts are wrong or a peer failed; 2 for bad options or missing packages; 130
after Ctrl-C.
"""


def main(argv: list[str] | None = None) -> int:
    """Checks, measures, prints a table; returns the exit status that ``_EPILOG`` tells.

    ``argv`` are the arguments after the program's name and its --op; None: those of the process.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    session.check_files(parser, options)
    device = device_from(parser, options.device)
    _check_options(parser, options, device)
    try:
        versions = _versions(options.peer)
        work = new_work(options, device)
    except (ModuleNotFoundError, FileNotFoundError, peers.PeerError, ComputeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for compute, pair in work.pairs().items():
        if wrong := differing(pair):
            which = "" if compute == PLAIN else f" in {compute}"
            print(f"{parser.prog}: the engine's texts of requests {wrong}{which} are wrong", file=sys.stderr)
            return 1
    lines = mixtures.engine_lines(work) if options.mixtures else []
    if texts := mixtures.differing(work, lines):
        print(f"{parser.prog}: the engine's texts are wrong: {', '.join(texts)}", file=sys.stderr)
        return 1
    # The LM's parameters are not the pair's own.
    models = {"LM": work.model.lm, "auxiliary": work.model}
    sizes = {name: sum(one.numel() for one in model.parameters()) for name, model in models.items()}
    head = session.head(parser.prog, argv, device)
    run = GenerateRun(*head, len(work.lengths), [SHORTEST, LONGEST], FILTERS, sizes)
    run.machine |= versions
    run.sentences = len(work.sentences)
    jobs = _jobs(work, options, run, lines)
    return session.carry_out(
        run,
        jobs,
        options,
        lambda: mixtures.notes(run) + busy_notes(run.results, os.cpu_count() or 1) + spread_notes(run),
    )


def _check_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device
) -> None:
    """Ends the program with a message where options contradict each other or the device."""
    names = [peer.name for peer in options.peer]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        parser.error(f"--peer names {', '.join(twice)} more than once; give each one Python")
    if device.type != "cpu":
        if names:
            parser.error(
                f"--peer {names[0]}: peers are measured on a CPU; leave it out, or give --device cpu"
            )
        if options.profile:
            parser.error(
                "--profile clocks native calls, which are a CPU's; leave it out, or give --device cpu"
            )


def _versions(asked: list[peers.Peer]) -> dict[str, str]:
    """Of the peers' packages.

    Raises:
        PeerError: a peer cannot run; the message says what to install.
    """
    versions: dict[str, str] = {}
    for peer in asked:
        versions |= peer.versions()
    return versions


def _parser() -> argparse.ArgumentParser:
    about = "Tokens per second of two models' texts, beside other ways to write them."
    parser = command_parser("python -m auxkern.bench --op generate", about, _EPILOG)
    parser.add_argument("--requests", type=positive, default=64, metavar="N", help="texts (default 64)")
    batches: dict[str, Any] = {"default": [1, 8, 32, 128], "metavar": "N"}
    which = "texts at a time (default 1 8 32 128)"
    parser.add_argument("--batch", type=positive, nargs="+", help=which, **batches)
    computes = f"arithmetic of the engine's lines: {', '.join(COMPUTES)} (default {PLAIN})"
    parser.add_argument("--compute", nargs="+", choices=COMPUTES, default=[PLAIN], help=computes)
    peer: dict[str, Any] = {"default": [], "type": peers.peer_from, "metavar": "NAME=PYTHON"}
    parser.add_argument("--peer", action="append", help="another program to measure (repeatable)", **peer)
    again = "times that the engine's and the peers' lines are measured, one after the other (default 1)"
    parser.add_argument("--rounds", type=positive, default=1, metavar="N", help=again)
    without = "leave out a pair's loops and Hugging Face's generate, which take most of a run's time"
    parser.add_argument("--no-loops", action="store_true", help=without)
    mixed = "measure guidance and three-model proxy tuning, too"
    parser.add_argument("--mixtures", action="store_true", help=mixed)
    scored = "held-out sentences that each LM is scored on (default 500; 0: none)"
    parser.add_argument("--sentences", type=natural, default=500, metavar="N", help=scored)
    profile = "run the engine a second time, with a clock around each native call"
    parser.add_argument("--profile", action="store_true", help=profile)
    session.add_device(parser)
    session.add_files(parser, "measurement", "speed and shares of the time")
    return parser


def busy_notes(results: list[Throughput], cores: int) -> list[str]:
    """What to tell the reader where other programs took a tenth of the machine's cores or more."""
    busy = [one for one in results if (one.busy_cores or 0.0) >= cores / 10]
    if not busy:
        return []
    most = max(one.busy_cores or 0.0 for one in busy)
    names = ", ".join(f"{one.implementation} (batch {one.batch})" for one in busy)
    return [f"Busy: other programs kept up to {most:.1f} of {cores} cores; times are too long for {names}."]


Shares = Callable[[], dict[str, float]]  # of the time, {} if not known; what they ask for is not timed


class Written(NamedTuple):
    """All texts of a work, written.

    Attributes:
        seconds: that it took, without the making of an engine, which a program keeps; None: the call's.
        shares: of the time.
    """

    seconds: float | None = None
    shares: Shares = dict


Way = Callable[["Work", int], Written]  # (work, batch), by which the texts are written


def hugging_face(pair: bool, work: Work, rows: list[int]) -> None:
    """Hugging Face's ``generate`` of the pair, or of the LM alone."""
    model, inputs = work.model if pair else work.plain_lm, encoded(work, rows)
    given = {name: inputs[name] for name in (inputs if pair else ("input_ids", "attention_mask"))}
    model.generate(**given, **text_options(work, max(work.lengths[i] for i in rows)))


@torch.no_grad()
def two_model_loop(work: Work, rows: list[int]) -> None:
    """In the manner of the published code of proxy tuning (Liu et al. 2024)."""
    from auxkern.model.inputs import PairInputs

    model, inputs = work.model, encoded(work, rows)
    embedding = work.plain_lm.get_input_embeddings().weight
    project = work.plain_lm.get_output_embeddings()
    from transformers.generation import logits_process

    new = inputs["input_ids"]
    mask, lm_cache, aux_cache = inputs["attention_mask"], None, None
    for _ in range(max(work.lengths[i] for i in rows)):
        lm = work.plain_lm(
            input_ids=new,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :],
            past_key_values=lm_cache,
            use_cache=True,
            logits_to_keep=1,
        )
        pair = PairInputs(new, mask, inputs["condition_ids"], inputs["condition_mask"])
        nothing = embedding.new_zeros(*new.shape, 1, embedding.shape[1])
        aux = work.plain_auxiliary(pair.for_auxiliary(nothing, embedding, None, aux_cache, True))
        lm_cache, aux_cache = lm.past_key_values, aux.cache
        pointer = aux.pointer[:, -1] * inputs["condition_mask"]
        aux_logits = project(model.head(aux.hidden[:, -1])).scatter_add(1, inputs["condition_ids"], pointer)
        aux_logits[:, model.config.eos_token_id] += aux.end[:, -1]
        scores = warped(logits_process, lm.logits[:, -1] + aux_logits, **FILTERS)
        new = torch.multinomial(scores.softmax(-1), 1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)


def in_batches(write: Callable[[Work, list[int]], None], work: Work, batch: int) -> Written:
    """All requests, batch after batch, each until its longest text is done."""
    # In the order of arrival: how long a text will be is not known before it is written.
    rows = list(range(len(work.lengths)))
    for first in range(0, len(rows), batch):
        write(work, rows[first : first + batch])
    return Written()


def continuous_refusal(work: Work) -> str | None:
    """Why transformers' continuous batching does not run here; None if it does."""
    if not hasattr(work.plain_lm, "generate_batch"):
        return "this version of transformers has none"
    return "it needs a GPU" if work.model.device.type == "cpu" else None


def continuous(work: Work, batch: int) -> Written:
    """Transformers' continuous batching of the LM alone; it chooses its batches itself.

    ``work`` has one length for all, for its call takes no length of each request.

    Raises:
        RuntimeError: texts are missing or too short; the library only logs what went wrong.
    """
    from transformers import GenerationConfig

    length = max(work.lengths)
    config = GenerationConfig(**text_options(work, length, -1))
    prompts = [encoded(work, [i])["input_ids"][0].tolist() for i in range(len(work.lengths))]
    done = work.plain_lm.generate_batch(inputs=prompts, generation_config=config)
    whole = sum(len(one.generated_tokens) == length for one in done.values())
    if whole != len(prompts):
        raise RuntimeError(
            f"generate_batch wrote {whole} texts of {length} tokens, not {len(prompts)}: see its log"
        )
    return Written()


def differing(work: Work, count: int = 4) -> list[int]:
    """Which of some requests the engine answers otherwise than ``model.generate`` does for each alone."""
    wrong, asked = [], requests(work)[:count]
    for request, done in zip(asked, engine(work, count).generate(asked), strict=True):
        inputs = encoded(work, [request.id])
        ids = work.model.generate(
            **inputs, seeds=[request.seed], **text_options(work, request.max_new_tokens)
        )
        if ids[0, inputs["input_ids"].shape[1] :].tolist() != list(done.token_ids):
            wrong.append(request.id)
    return wrong


def _runs(
    work: Work, batches: list[int], notes: list[str], lines: Sequence[mixtures.Line] = ()
) -> list[tuple[str, int, Work, Way]]:
    """(implementation, batch, requests, way) of each measurement; adds notes for the reader."""
    loop = partial(in_batches, two_model_loop)
    lm, pair = (partial(in_batches, partial(hugging_face, pair)) for pair in (False, True))
    ways: list[tuple[str, Way, Work]] = [
        (name, partial(_engine, auxiliary=auxiliary), one) for name, one, auxiliary in _engine_lines(work)
    ]
    ways += [(LOOP, loop, work), (LM, lm, work), ("generate, pair", pair, work)]
    if work.plain_lm is not work.model.lm:
        ours = replace(work, plain_lm=work.model.lm, plain_auxiliary=work.model.auxiliary)
        ways += [("loop, our kernels", loop, ours), ("LM alone, our kernels", lm, ours)]
    ways += [(line.name, partial(_mixed, line), work) for line in lines]
    ways += [(name, partial(in_batches, way), work) for name, way in (mixtures.others(work) if lines else ())]
    runs, count = [], len(work.lengths)
    for batch in batches:
        few = count if batch >= _SMALL_BATCH else min(count, _FEW_PER_PLACE * batch)
        runs += [(name, batch, replace(one, lengths=one.lengths[:few]), way) for name, way, one in ways]
        if few < count:
            notes.append(f"Batch {batch} is measured on the first {few} of {count} requests.")
        elif batch > count:
            notes.append(f"Batch {batch} is all {count} requests at once.")
    if work.model.device.type != "cpu":
        notes.append("Shares of the time are not known: a GPU's kernels run on after their calls.")
    reason = continuous_refusal(work)
    if reason is None:
        alike = replace(work, lengths=[LONGEST] * count)
        runs.append((CONTINUOUS, max(batches), alike, continuous))
        notes.append(f"transformers' continuous batching writes {LONGEST} tokens for each request.")
    else:
        notes.append(f"transformers' continuous batching of the LM alone does not run here: {reason}")
    return runs


def _engine_lines(work: Work) -> list[tuple[str, Work, str | None]]:
    """(implementation, work, auxiliary) of the pair and of the LM alone, in every compute."""
    return [
        (name if compute == PLAIN else f"{name}, {compute}", one, auxiliary)
        for compute, one in work.pairs().items()
        for name, auxiliary in ((ENGINE, "default"), (ENGINE_LM, None))
    ]


def _jobs(
    work: Work, options: argparse.Namespace, run: GenerateRun, lines: Sequence[mixtures.Line] = ()
) -> list[session.Job]:
    """Everything that is measured: texts, batch after batch; then what is scored, and what is profiled."""
    runs = _runs(work, sorted(set(options.batch)), run.notes, lines)
    ours = {name for name, *_ in _engine_lines(work)} | {line.name for line in lines}
    kept = {*ours, *(mixtures.OTHERS if lines else ())}
    runs = [one for one in runs if one[0] in kept or not options.no_loops]
    texts = [(one[1], f"{one[0]}, batch {one[1]}", partial(_measured, one)) for one in runs]
    counts = {batch: len(one.lengths) for _, batch, one, _ in runs}
    if options.peer:
        prompts = [encoded(work, [i])["input_ids"][0].tolist() for i in range(len(work.lengths))]
        asked = [*zip(prompts, work.lengths, strict=True)]
        task = peers.LmTask(work.files, torch.get_num_threads(), FILTERS)
        peer_lines = [
            peer_jobs.Line(one, precision, task) for one in options.peer for precision in one.kind.precisions
        ]
        texts += peer_jobs.text_jobs(
            peer_lines, {batch: asked[:count] for batch, count in counts.items()}, run
        )
    first = len(runs)
    jobs: list[session.Job] = []
    for batch in sorted(counts):
        own = [(title, job) for size, title, job in texts if size == batch]
        jobs += own
        repeated = {f"{name}, batch {batch}" for name in ours} | {title for _, title, _ in texts[first:]}
        jobs += round_jobs([one for one in own if one[0] in repeated], options.rounds, run)
    if work.sentences:
        jobs += quality.nll_jobs(_scored_lms(work, {one[0] for one in runs}), work.sentences, run)
        jobs += peer_jobs.nll_jobs(peer_lines, work.sentences, run) if options.peer else []
    for batch, count in counts.items() if options.profile else ():
        for name, one, auxiliary in _engine_lines(work):
            title, few = f"{name}, batch {batch}", replace(one, lengths=one.lengths[:count])
            jobs.append((f"{title}, profile", partial(_profiled, title, few, batch, auxiliary, run)))
    return [
        (title, partial(_announced, f"{index} of {len(jobs)}: {title}", measure))
        for index, (title, measure) in enumerate(jobs, 1)
    ]


def _scored_lms(work: Work, measured: set[str]) -> list[quality.ScoredLm]:
    """Every LM that texts are ``measured`` with, and the implementations that it belongs to."""
    ours = {name: one.model.lm for name, one, _ in _engine_lines(work)}
    ours |= dict.fromkeys(("generate, pair", "loop, our kernels", "LM alone, our kernels"), work.model.lm)
    plain = dict.fromkeys((LOOP, LM, CONTINUOUS), work.plain_lm)
    return [
        quality.ScoredLm(lm, own, tuple(name for name in lms if lms[name] is lm and name in measured))
        for lms, own in ((ours, False), (plain, True))
        for lm in {id(lm): lm for lm in lms.values()}.values()
    ]


def _announced(title: str, measure: Callable[[Progress], Any], progress: Progress) -> Any:
    print(title, file=sys.stderr, flush=True)
    return measure(progress)


def _measured(run: tuple[str, int, Work, Way], progress: Progress) -> Throughput:
    name, batch, work, way = run
    progress(0.0, "writing")
    other, began = OtherWork(), time.perf_counter()
    written = way(work, batch)
    whole, busy = time.perf_counter() - began, other.cores()
    seconds = whole if written.seconds is None else written.seconds
    return Throughput(name, batch, len(work.lengths), sum(work.lengths), seconds, written.shares(), busy)


def _profiled(
    title: str, work: Work, batch: int, auxiliary: str | None, run: GenerateRun, progress: Progress
) -> None:
    progress(0.0, "writing")
    run.kernels[title] = _kernel_shares(work, batch, auxiliary)


def _engine(work: Work, batch: int, auxiliary: str | None = "default") -> Written:
    drawn = [0]  # tokens until each step
    # Made before anything is counted: an engine runs its models once to see how large their caches are.
    running = engine(work, min(batch, len(work.lengths)))
    with forward_counts(_forward_passes(work)) as forward:
        whole = _written(running, requests(work, auxiliary), drawn)
    if work.model.device.type != "cpu":
        return Written(whole)

    def shares() -> dict[str, float]:
        drawing = running.stats.seconds["sampling"]
        sampling = min(drawing, _sampling_seconds(work, [b - a for a, b in pairwise(drawn)]))
        seconds = {name: counts[SECONDS] for name, counts in forward.items()}
        seconds |= {"heads": drawing - sampling, "sampling": sampling}
        seconds["rest"] = whole - sum(seconds.values())
        return {name: seconds[name] / whole for name in SHARES}

    return Written(whole, shares)


def _kernel_shares(work: Work, batch: int, auxiliary: str | None) -> dict[str, float]:
    """Of the engine's time, by ``KERNEL_SHARES``.

    Raises:
        RuntimeError: there are no native calls, whose time it could be.
    """
    from auxkern.backends.choice import load
    from auxkern.backends.cpu.abi import Native

    native = load("cpu")
    if not isinstance(native, Native):
        raise RuntimeError("the backend of the CPU has no native calls")
    running = engine(work, min(batch, len(work.lengths)))
    with native.timed_calls() as calls, forward_counts(_forward_passes(work), lambda: calls) as forward:
        whole = _written(running, requests(work, auxiliary), [])
    inside = [(name, count) for counts in forward.values() for name, count in counts.items()]
    seconds = {
        part: sum(count for name, count in inside if any(word in name for word in words))
        for part, words in _KERNEL_NAMES.items()
    }
    passes = sum(count for name, count in inside if name == SECONDS)
    seconds["between"] = passes - sum(seconds.values())
    seconds["heads and draw"] = running.stats.seconds["sampling"]
    seconds["engine"] = whole - passes - seconds["heads and draw"]
    return {name: seconds[name] / whole for name in KERNEL_SHARES}


def _forward_passes(work: Work) -> dict[str, tuple[Any, Any]]:
    # A hook on the LM itself would keep it from making steps without its own forward.
    lm, auxiliary = work.model.lm, work.model.auxiliary
    return {"LM": (lm.get_input_embeddings(), lm.base_model.norm), "auxiliary": (auxiliary, auxiliary)}


def _mixed(line: mixtures.Line, work: Work, batch: int) -> Written:
    running = line.engine(work, min(batch, len(work.lengths)))
    return Written(_written(running, line.requests(work), []))


def _written(running: Any, asked: list[Any], drawn: list[int]) -> float:
    """Seconds that an engine takes for all requests; adds to ``drawn`` after each step."""
    began = time.perf_counter()
    for request in asked:
        running.submit(request)
    while not running.scheduler.idle:
        running.step()
        drawn.append(running.stats.new_tokens)
    return time.perf_counter() - began


@torch.inference_mode()
def _sampling_seconds(work: Work, rows: list[int]) -> float:
    """What so many draws take beside the product with the output embedding.

    On a CPU the product is the first part of ``auxkern.sample``, and most of it. So the small part is
    what is timed by itself, on logits of a prompt that are there already: the difference of two large
    times would be noise. ``rows`` are how many texts each step drew a token for.
    """
    import auxkern
    from auxkern.model.base import output_head
    from auxkern.ops.dense import dense_logits

    lm = work.model.lm
    hidden = lm.base_model(encoded(work, [0])["input_ids"]).last_hidden_state[:, -1]
    logits = dense_logits([auxkern.Head(hidden, *output_head(lm))])
    params, total = auxkern.SamplingParams(**FILTERS), 0.0
    for n in set(rows) - {0}:
        pointer = auxkern.Sparse(torch.arange(CONDITION).repeat(n, 1), torch.zeros(n, CONDITION))
        given, seeds, times = (logits.repeat(n, 1), pointer), torch.arange(n), []
        for position in range(6):
            began = time.perf_counter()
            auxkern.sample(given, params, seed=seeds, position=position)
            times.append(time.perf_counter() - began)
        total += statistics.median(times[1:]) * rows.count(n)
    return total
