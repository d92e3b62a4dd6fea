"""``python -m auxkern.bench --op generate``: texts of two models beside other ways to write them."""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from auxkern.bench import session
from auxkern.bench.operators import warped
from auxkern.bench.results import ENGINE, LM, LOOP, SHARES, GenerateRun, Throughput
from auxkern.bench.runner import Progress
from auxkern.machine import OtherWork
from auxkern.terminal import command_parser, device_from, positive

SHORTEST, LONGEST = 8, 128
FILTERS: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
_SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
# Batches below the first are measured on this many requests for each text at a time.
_SMALL_BATCH, _FEW_PER_PLACE = 8, 16
_CONDITION = 16  # room for a condition, in tokens
_EPILOG = """\
SmolLM2-135M and an auxiliary of 4.5M parameters write one text for each request; every text has a length of
its own, 8 to 128 tokens, the same for all implementations. A batch of the others goes on until its longest
text is done. A batch N below 8 would take very long and is measured on the first 16 N requests only; a batch
larger than the number of requests is all of them at once.
First the engine's texts are compared with those of model.generate for single requests.
two-model loop: both models with their caches, the sum of their logits, Hugging Face's warpers, multinomial.
Exit status: 0; 1 if the engine's texts are wrong; 2 for bad options or missing packages; 130 after Ctrl-C.
"""


def main(argv: list[str] | None = None) -> int:
    """Checks, measures, prints a table; returns the exit status that ``_EPILOG`` tells.

    ``argv`` are the arguments after the program's name and its --op; None: those of the process.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    session.check_files(parser, options)
    device = device_from(parser, options.device)
    try:
        work = new_work(options.requests, device)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if wrong := differing(work):
        print(f"{parser.prog}: the engine's texts of requests {wrong} are wrong", file=sys.stderr)
        return 1
    # The LM's parameters are not the pair's own.
    models = {"LM": work.model.lm, "auxiliary": work.model}
    sizes = {name: sum(one.numel() for one in model.parameters()) for name, model in models.items()}
    head = session.head(parser.prog, argv, device)
    run = GenerateRun(*head, len(work.lengths), [SHORTEST, LONGEST], FILTERS, sizes)
    runs = _runs(work, sorted(set(options.batch)), run.notes)
    jobs: list[session.Job] = [
        (f"{one[0]}, batch {one[1]}", partial(_measured, f"{index} of {len(runs)}", one))
        for index, one in enumerate(runs, 1)
    ]
    return session.carry_out(run, jobs, options, lambda: busy_notes(run.results, os.cpu_count() or 1))


def _parser() -> argparse.ArgumentParser:
    about = "Tokens per second of two models' texts, beside other ways to write them."
    parser = command_parser("python -m auxkern.bench --op generate", about, _EPILOG)
    parser.add_argument("--requests", type=positive, default=64, metavar="N", help="texts (default 64)")
    batches: dict[str, Any] = {"default": [1, 8, 32, 128], "metavar": "N"}
    which = "texts at a time (default 1 8 32 128)"
    parser.add_argument("--batch", type=positive, nargs="+", help=which, **batches)
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


@dataclass(frozen=True)
class Work:
    """A text for each of ``lengths``, of so many tokens, from the pair ``model``.

    Conditions and prompts are taken by place, and there may be more of them. ``plain_lm`` and
    ``plain_auxiliary`` are the same two models with torch's own layers, for the others.
    """

    model: Any
    text_format: Any
    conditions: list[str]
    prompts: list[str]
    lengths: list[int]
    plain_lm: Any
    plain_auxiliary: Any


def encoded(work: Work, rows: list[int]) -> dict[str, Tensor]:
    """What the models are given for some requests: ids and masks, padded, on the model's device."""
    tensors = work.text_format.prompts([work.conditions[i] for i in rows], [work.prompts[i] for i in rows])
    return {name: tensor.to(work.model.device) for name, tensor in tensors.items()}


Way = Callable[["Work", int], dict[str, float]]  # (work, batch) -> shares of the time, {} if not known


def _options(work: Work, length: int, end: int | None = None) -> dict[str, Any]:
    """Of Hugging Face's ``generate`` for texts of one length."""
    ends = {"eos_token_id": end, "pad_token_id": work.text_format.pad_id}
    return {"do_sample": True, "max_new_tokens": length, **ends, **FILTERS}


def hugging_face(pair: bool, work: Work, rows: list[int]) -> None:
    """Hugging Face's ``generate`` of the pair, or of the LM alone."""
    model, inputs = work.model if pair else work.plain_lm, encoded(work, rows)
    given = {name: inputs[name] for name in (inputs if pair else ("input_ids", "attention_mask"))}
    model.generate(**given, **_options(work, max(work.lengths[i] for i in rows)))


@torch.no_grad()
def two_model_loop(work: Work, rows: list[int]) -> None:
    """In the manner of the published code of proxy tuning (Liu et al. 2024)."""
    from auxkern.model.inputs import PairInputs

    model, inputs = work.model, encoded(work, rows)
    embedding = work.plain_lm.get_input_embeddings().weight
    project = work.plain_lm.get_output_embeddings()
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
        nothing = embedding.new_zeros(*new.shape, 0, embedding.shape[1])
        aux = work.plain_auxiliary(pair.for_auxiliary(nothing, embedding, None, aux_cache, True))
        lm_cache, aux_cache = lm.past_key_values, aux.cache
        pointer = aux.pointer[:, -1] * inputs["condition_mask"]
        aux_logits = project(model.head(aux.hidden[:, -1])).scatter_add(1, inputs["condition_ids"], pointer)
        aux_logits[:, model.config.eos_token_id] += aux.end[:, -1]
        scores = warped(lm.logits[:, -1] + aux_logits, **FILTERS)
        new = torch.multinomial(scores.softmax(-1), 1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)


def in_batches(write: Callable[[Work, list[int]], None], work: Work, batch: int) -> dict[str, float]:
    """All requests, batch after batch, each until its longest text is done."""
    # In the order of arrival: how long a text will be is not known before it is written.
    rows = list(range(len(work.lengths)))
    for first in range(0, len(rows), batch):
        write(work, rows[first : first + batch])
    return {}


def continuous_refusal(work: Work) -> str | None:
    """Why transformers' continuous batching does not run here; None if it does."""
    if not hasattr(work.plain_lm, "generate_batch"):
        return "this version of transformers has none"
    return "it needs a GPU" if work.model.device.type == "cpu" else None


def continuous(work: Work, batch: int) -> dict[str, float]:
    """Transformers' continuous batching of the LM alone; it chooses its batches itself.

    ``work`` has one length for all, for its call takes no length of each request.

    Raises:
        RuntimeError: texts are missing or too short; the library only logs what went wrong.
    """
    from transformers import GenerationConfig

    length = max(work.lengths)
    config = GenerationConfig(**_options(work, length, -1))
    prompts = [encoded(work, [i])["input_ids"][0].tolist() for i in range(len(work.lengths))]
    done = work.plain_lm.generate_batch(inputs=prompts, generation_config=config)
    whole = sum(len(one.generated_tokens) == length for one in done.values())
    if whole != len(prompts):
        raise RuntimeError(
            f"generate_batch wrote {whole} texts of {length} tokens, not {len(prompts)}: see its log"
        )
    return {}


def new_work(count: int, device: torch.device) -> Work:
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
            auxiliary_config={"model_type": "llama", **_SIZES},
            head="shared",
            input_embedding="shared",
            pointer=True,
            pointer_reads_lm=False,  # the peers' LM gives logits of the last position only
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

    return Engine(work.model, work.text_format, slots=slots, max_length=192, max_condition=_CONDITION)


def requests(work: Work) -> list[Any]:
    """The work as the engine takes it."""
    from auxkern import SamplingParams
    from auxkern.generation import Request

    params = SamplingParams(**FILTERS)
    fields = zip(work.conditions, work.prompts, work.lengths, strict=False)
    return [
        Request(i, condition, prompt, params, seed=i, max_new_tokens=length, ignore_eos=True)
        for i, (condition, prompt, length) in enumerate(fields)
    ]


def differing(work: Work, count: int = 4) -> list[int]:
    """Which of some requests the engine answers otherwise than ``model.generate`` does for each alone."""
    wrong, asked = [], requests(work)[:count]
    for request, done in zip(asked, engine(work, count).generate(asked), strict=True):
        inputs = encoded(work, [request.id])
        ids = work.model.generate(**inputs, seeds=[request.seed], **_options(work, request.max_new_tokens))
        if ids[0, inputs["input_ids"].shape[1] :].tolist() != list(done.token_ids):
            wrong.append(request.id)
    return wrong


def _runs(work: Work, batches: list[int], notes: list[str]) -> list[tuple[str, int, Work, Way]]:
    """(implementation, batch, requests, way) of each measurement; adds notes for the reader."""
    loop = partial(in_batches, two_model_loop)
    lm, pair = (partial(in_batches, partial(hugging_face, pair)) for pair in (False, True))
    ways: list[tuple[str, Way, Work]] = [(ENGINE, _engine, work), (LOOP, loop, work), (LM, lm, work)]
    ways.append(("generate, pair", pair, work))
    if work.plain_lm is not work.model.lm:
        ours = replace(work, plain_lm=work.model.lm, plain_auxiliary=work.model.auxiliary)
        ways += [("loop, our kernels", loop, ours), ("LM alone, our kernels", lm, ours)]
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
        runs.append(("continuous, LM alone", max(batches), alike, continuous))
        notes.append(f"transformers' continuous batching writes {LONGEST} tokens for each request.")
    else:
        notes.append(f"transformers' continuous batching of the LM alone does not run here: {reason}")
    return runs


def _measured(place: str, run: tuple[str, int, Work, Way], progress: Progress) -> Throughput:
    name, batch, work, way = run
    print(f"{place}: {name}, batch {batch}", file=sys.stderr, flush=True)
    progress(0.0, "writing")
    other, began = OtherWork(), time.perf_counter()
    shares = way(work, batch)
    seconds = time.perf_counter() - began
    return Throughput(name, batch, len(work.lengths), sum(work.lengths), seconds, shares, other.cores())


def _engine(work: Work, batch: int) -> dict[str, float]:
    running, drawn = engine(work, min(batch, len(work.lengths))), [0]  # tokens until each step
    modules = {"LM": work.model.lm.base_model, "auxiliary": work.model.auxiliary}
    spent, handles = dict.fromkeys(modules, 0.0), list[Any]()

    def clock(*_: Any, name: str, sign: int) -> None:
        spent[name] += sign * time.perf_counter()

    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(partial(clock, name=name, sign=-1)))
        handles.append(module.register_forward_hook(partial(clock, name=name, sign=1)))
    try:
        began = time.perf_counter()
        for request in requests(work):
            running.submit(request)
        while not running.scheduler.idle:
            running.step()
            drawn.append(running.stats.new_tokens)
        whole = time.perf_counter() - began
    finally:
        for handle in handles:
            handle.remove()
    if work.model.device.type != "cpu":
        return {}
    drawing = running.stats.seconds["sampling"]
    sampling = min(drawing, _sampling_seconds(work, [b - a for a, b in pairwise(drawn)]))
    seconds = {**spent, "heads": drawing - sampling, "sampling": sampling}
    seconds["rest"] = whole - sum(seconds.values())
    return {name: seconds[name] / whole for name in SHARES}


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
        pointer = auxkern.Sparse(torch.arange(_CONDITION).repeat(n, 1), torch.zeros(n, _CONDITION))
        given, seeds, times = (logits.repeat(n, 1), pointer), torch.arange(n), []
        for position in range(6):
            began = time.perf_counter()
            auxkern.sample(given, params, seed=seeds, position=position)
            times.append(time.perf_counter() - began)
        total += statistics.median(times[1:]) * rows.count(n)
    return total
