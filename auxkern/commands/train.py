"""``auxkern train``: an auxiliary for a frozen language model, from a YAML file or flags."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.distributed.device_mesh import DeviceMesh

from auxkern.commands.pair import quiet
from auxkern.commands.ranks import Launched
from auxkern.core.seeds import mixed_seed
from auxkern.evaluation.diagnosis import Run, diagnosis
from auxkern.model import AuxTunedConfig, AuxTunedForCausalLM, load_base, load_tokenizer
from auxkern.model.config import trained_on_top_of
from auxkern.model.saving import pair_config
from auxkern.model.text import IGNORED, Example, TextFormat
from auxkern.tasks.registry import load_task
from auxkern.terminal import INTERRUPTED, command_parser, input_file, sentence
from auxkern.training import checkpoint
from auxkern.training.defaults import Plan, plan_for
from auxkern.training.examples import (
    ExampleSet,
    Items,
    PlacedExamples,
    encode,
    fingerprint_of,
    shared_examples,
)
from auxkern.training.fit import check_fit, check_padding
from auxkern.training.frozen import frozen_sources, hold_frozen, shared_text_prefix
from auxkern.training.log import LOG, check_unused
from auxkern.training.loop import TrainingInterrupted, TrainResult, train
from auxkern.training.progress import duration, progress_for
from auxkern.training.settings import TrainSettings, add_flags, settings_from
from auxkern.training.wording import PLAIN, SPACED, Wording, wording_of

_EPILOG = """\
A YAML file has a line NAME: VALUE for each setting, named like the flag with _ for -; a flag beats the
file. --show prints such a file. `pair` holds fields of AuxTunedConfig, as in --pair pointer=true
--pair lm_layers=[10]. `frozen` holds auxiliaries that were trained on the same base, as in --frozen
keyword=out/keyword:0.7: their logits are in the sum that is trained, with a weight, and stay what they are;
the condition that each sees is an example's "conditions": {"keyword": "glacier"}.
Settings that are null there depend on the amount of data. The model in the output folder is that of the best
evaluation, the one before the first step included: no run ends worse than it began.
Ctrl-C finishes the step and saves; --resume goes on from there, as if nothing had happened.
Under torchrun (torchrun --nproc-per-node 4 -m auxkern train ...) processes share the batches of a step, of
which --gradient-accumulation says how many there are; the run is the same, in any number of processes.
Exit status: 0; 1 if the loss was not finite or the disk is full; 2 for bad options or missing data;
130 after Ctrl-C.
"""


@dataclass(frozen=True)
class _Job:
    """What is trained, all of it checked; nothing is written yet."""

    settings: TrainSettings  # with the plan's numbers
    plan: Plan
    chosen: Mapping[str, float]  # of the plan, what was left open
    model: Any
    text_format: TextFormat
    training: Items
    validation: Items
    identity: checkpoint.RunIdentity
    condition: str  # one of the validation set's
    launched: Launched  # this process among those that share the run


def main(argv: list[str] | None = None) -> int:
    """Trains, and prints what came of it.

    Args:
        argv: arguments after ``auxkern train``; those of the process when None.

    Returns:
        0; 1 if the loss was not finite or the disk is full; 2 for bad settings or missing data; 130
        after SIGINT or SIGTERM. Flags that argparse refuses exit with 2 (``SystemExit``).
    """
    arguments = sys.argv[1:] if argv is None else argv
    description = "An auxiliary for a frozen language model."
    parser = command_parser("auxkern train", description, _EPILOG)
    parser.add_argument("--config", type=input_file, metavar="FILE", help="YAML file with settings")
    parser.add_argument("--show", action="store_true", help="print all settings as a YAML file, and stop")
    add_flags(parser)
    options = parser.parse_args(arguments)
    try:
        settings = settings_from(options, options.config)
        if options.show:
            print(settings.as_yaml(), end="")
            return 0
        launched = Launched.from_environment()
        device = launched.device(settings.device)
        on_gpu = device is not None and _device(device).type == "cuda"
    except (ValueError, TypeError, OSError) as error:
        return _say_error(error, 2)
    with quiet(), launched.first_speaks():
        try:
            with launched.joined("nccl" if on_gpu else "gloo") as joined:
                return _run_job(settings, device, joined)
        except KeyboardInterrupt as stop:
            return _say_how_to_resume(stop, arguments) if launched.rank == 0 else INTERRUPTED


def _device(name: str) -> torch.device:
    known = f"device is {name!r}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{known}, which PyTorch does not know; use cpu, cuda or cuda:N") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"{known}, but PyTorch {torch.__version__} sees {count} CUDA devices here")
    return device


def _run_job(settings: TrainSettings, device: str | None, launched: Launched) -> int:
    try:
        job = _prepare(settings, device, launched)
        _print_job(job)
        training, validation = _data(job)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return _say_error(error, 2)
    try:
        result = _train_job(job, training, validation)
    except (FloatingPointError, OSError) as error:
        return _say_error(error, 1)
    except torch.OutOfMemoryError as error:
        print(
            "auxkern train: a lower batch_size with a higher gradient_accumulation is the same run in less "
            f"memory; {sentence(error)}",
            file=sys.stderr,
        )
        return 1
    except ValueError as error:
        return _say_error(error, 2)
    if job.launched.rank == 0:
        _print_summary(job, result)
    return 0


def _prepare(settings: TrainSettings, device: str | None, launched: Launched) -> _Job:
    """Reads data and base, cheapest first, so that a mistake shows soon."""
    if settings.shard_base and launched.count == 1:
        raise ValueError("shard_base is for several processes; start them with torchrun, or leave it out")
    output = Path(settings.output)
    if launched.rank == 0:
        check_unused(output)
    checkpoint.check_output(output, settings.resume)
    sides = _read_examples(settings, launched)
    shots, rest = _base_examples(settings, sides[0])
    sides = (rest, sides[1])
    plan = plan_for(settings, len(rest.examples), checkpoint.saved_settings(output))
    chosen, settings = plan.chosen(settings), plan.written_into(settings)
    text_format, model = _pair(settings, device, rest.examples, shots)
    check_padding(model, text_format.pad_id)
    formats = hold_frozen(model, settings.frozen, text_format)
    training, validation = (
        encode(side.examples, text_format, place=side.place, frozen=formats) for side in sides
    )
    for side, encoded in zip(sides, (training, validation), strict=True):
        check_fit(model, encoded, side.place)
    identity = checkpoint.RunIdentity(
        settings, fingerprint_of(training), fingerprint_of(validation), checkpoint.model_fields(model)
    )
    newest = checkpoint.newest_checkpoint(output)
    if newest is not None:
        checkpoint.load_state(newest, identity)
    _warn_of_shared(*sides)
    condition = sides[1].examples[0].condition
    pair = (model, text_format, training, validation)
    return _Job(settings, plan, chosen, *pair, identity, condition, launched)


def _read_examples(settings: TrainSettings, launched: Launched) -> tuple[PlacedExamples, PlacedExamples]:
    """What is trained on, and what is held out."""
    if settings.task is not None:
        splits = load_task(settings.task, settings.task_source).split()
        sides = [
            PlacedExamples.of(examples, f"{settings.task}, {name}")
            for name, examples in zip(("training", "validation"), splits, strict=False)
        ]
    else:
        files = [_data_file(settings, name) for name in ("train_file", "validation_file")]
        for path in files:
            if launched.count > 1 and path.exists() and not path.is_file():
                raise ValueError(f"{path} is a pipe, which processes cannot share; write it to a file first")
        sides = [PlacedExamples.of_file(path) for path in files]
    return sides[0].drawn(settings.train_examples), sides[1].drawn(settings.validation_examples)


def _data_file(settings: TrainSettings, name: str) -> Path:
    try:
        return input_file(getattr(settings, name))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _base_examples(settings: TrainSettings, side: PlacedExamples) -> tuple[list[Example], PlacedExamples]:
    """What the base reads before every text, and what is left to train on."""
    count = settings.base_examples
    if count >= len(side.examples):
        raise ValueError(
            f"base_examples is {count}, which leaves none of {len(side.examples)} training examples; give "
            "fewer"
        )
    seed = mixed_seed(settings.seed, "base examples")
    chosen = random.Random(seed).sample(range(len(side.examples)), count)
    left = [i for i in range(len(side.examples)) if i not in set(chosen)] if count else None
    rest = side if left is None else side.some(left)
    return [side.examples[i] for i in chosen], rest


def _warn_of_shared(training: PlacedExamples, validation: PlacedExamples) -> None:
    if shared := shared_examples(training, validation):
        print(
            f"auxkern train: {len(shared):,} of {len(validation.examples):,} validation examples also stand "
            f"in the training set, such as {validation.place(shared[0])}: their nll says nothing of new "
            "texts; take them out of one of the two",
            file=sys.stderr,
        )


def _pair(
    settings: TrainSettings, device: str | None, examples: Sequence[Example], shots: Sequence[Example]
) -> tuple[TextFormat, AuxTunedForCausalLM]:
    fields: dict[str, Any] = {
        "base_model_name_or_path": settings.base,
        "base_revision": settings.base_revision,
        "base_gguf_file": settings.base_gguf_file,
        **settings.pair,
    }
    template = settings.condition_template
    wrong = f"a value in pair {settings.pair} is wrong"
    with _saying(wrong, TypeError, ValueError, StrictDataclassError):
        # Refuses unknown names and values before the base is loaded.
        config = AuxTunedConfig(**fields, condition_template=template or PLAIN)
        if config.auxiliary_config:
            config.body_config()
    source: dict[str, Any] = {"revision": settings.base_revision, "gguf_file": settings.base_gguf_file}
    base = f"the base {settings.base!r} cannot be loaded"
    with _saying(base, OSError, ValueError):
        tokenizer = load_tokenizer(settings.base, **source)
    # Nothing but a pointer compares ids; a task says itself how its conditions are written.
    free = config.pointer and settings.task is None
    prefix = shared_text_prefix(_frozen_configs(settings), settings.pair.get("text_prefix"))
    prefix = "" if prefix is None and not free else prefix
    wordings = wording_of(tokenizer, examples, template if template or free else PLAIN, prefix)
    chosen = wordings[0]
    if config.pointer:
        _print_wording(chosen)
    device = device or ("cuda" if torch.cuda.is_available() else None)
    with _saying(base, OSError, ValueError, RuntimeError, SafetensorError):
        native = False if settings.shard_base else None
        lm = load_base(
            settings.base,
            dtype=settings.dtype,
            device=device,
            native=native,
            compute=settings.compute,
            **source,
        )
    fields |= {"condition_template": chosen.condition_template, "text_prefix": chosen.text_prefix}
    with _saying("base_prompt", ValueError):
        text_format = TextFormat(
            tokenizer,
            chosen.condition_template,
            settings.max_length,
            chosen.text_prefix,
            settings.base_prompt,
        )
    if settings.base_prompt is not None:
        fields |= {"base_prompt": settings.base_prompt, "base_prefix_ids": text_format.base_prefix(shots)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(settings.seed, "weights"))
        with _saying(wrong, TypeError, RuntimeError):
            pair = AuxTunedForCausalLM.from_lm(lm, **fields)
    return text_format, pair


def _frozen_configs(settings: TrainSettings) -> dict[str, AuxTunedConfig]:
    """Of the auxiliaries that are held frozen, before anything large is loaded."""
    configs = {}
    for name, source in frozen_sources(settings.frozen).items():
        with _saying(f"frozen {name!r}", OSError, ValueError):
            configs[name] = pair_config(source.path)
    return configs


def _print_wording(wording: Wording) -> None:
    written = f"condition_template {wording.condition_template!r}, text_prefix {wording.text_prefix!r}"
    print(f"wording: {written}; of the conditions {wording.copied:.0%} stand in their text, id by id")
    if wording.copied < 0.5 * wording.held:
        print(
            f"auxkern train: as written {wording.held:.0%} do: the pointer, which copies ids, is of little "
            "use; look for a --condition-template and a --pair text_prefix=... that make ids of a condition "
            f"those in the text, such as {SPACED!r} and ' '",
            file=sys.stderr,
        )


@contextmanager
def _saying(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of transformers, of which a person can mend the cause, under a name that a person knows.

    Raises:
        ValueError: for one of these kinds.
    """
    try:
        yield
    except kinds as error:
        raise ValueError(f"{what}: {error}") from error


def _data(job: _Job) -> tuple[ExampleSet, ExampleSet]:
    """Both data sets; of several processes the first computes the states, and the others find them."""
    if not job.settings.cache_states:
        known = job.identity
        return ExampleSet(job.training, known.training), ExampleSet(job.validation, known.validation)
    is_first = job.launched.rank == 0
    if is_first:
        sets = _with_states(job)
    job.launched.wait()
    return sets if is_first else _with_states(job)


class _Stored(NamedTuple):
    """What is to be kept on disk of one side of the data.

    Attributes:
        what: of whom, for people.
        side: "training" or "validation".
        folder: where.
        size: in bytes.
        cache: computes what is missing, tells ``progress=`` of it, and opens all.
    """

    what: str
    side: str
    folder: Path
    size: int
    cache: Callable[..., Any]


def _to_store(job: _Job, side: str, root: Path) -> dict[str, _Stored]:
    """Of one side: the base's states, under "", and what each auxiliary held frozen makes of it."""
    from auxkern.training.examples import data_fingerprint
    from auxkern.training.frozen_outputs import cache_frozen_outputs, outputs_folder, outputs_size
    from auxkern.training.lm_states import announce_size, cache_lm_states, states_folder

    model, encoded, config = job.model, getattr(job, side), job.model.config
    layers, dtype = list(config.lm_layers), getattr(torch, job.settings.states_dtype)
    base, prefix = config.base_fingerprint, model.base_prefix
    behind = prefix.fingerprint(base)
    folder = states_folder(root, data_fingerprint(encoded), behind, layers, dtype, job.settings.compute)
    size = announce_size(encoded, model.lm, layers, dtype)
    options = {"layers": layers, "dtype": dtype, "base_fingerprint": base, "prefix": prefix}
    of_base = functools.partial(cache_lm_states, model.lm, encoded, folder, **options)
    stored = {"": _Stored("the base", side, folder, size, of_base)}
    for name in config.on_top_of:
        folder = outputs_folder(root, model, name, encoded, dtype)
        size = outputs_size(model, name, encoded, dtype)
        of_frozen = functools.partial(cache_frozen_outputs, model, name, encoded, folder, dtype=dtype)
        stored[name] = _Stored(name, side, folder, size, of_frozen)
    return stored


def _with_states(job: _Job) -> tuple[ExampleSet, ExampleSet]:
    """Both data sets with the states of what is frozen, computed where they are not on disk yet."""
    from auxkern.model.smollm2 import cache_folder

    settings = job.settings
    root = Path(settings.states_folder) if settings.states_folder else cache_folder() / "states"
    sides = {side: _to_store(job, side, root) for side in ("training", "validation")}
    needed = sum(one.size for side in sides.values() for one in side.values() if not one.folder.is_dir())
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    if needed and not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ValueError(
            f"states_folder is {root}, but nothing can be written to {existing}; name another folder"
        )
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"the states of what is frozen need {needed / 1e6:,.0f} MB but {existing} has "
            f"{free / 1e6:,.0f} MB free; name another states_folder, fewer lm_layers, or set cache_states "
            "to false"
        )
    sets = []
    for side, stored in sides.items():
        frozen = {name: _cached(one) for name, one in stored.items()}
        states = frozen.pop("")
        dataset = states.dataset(getattr(job, side), frozen)
        sets.append(ExampleSet(dataset, getattr(job.identity, side), states.lm_nll))
    return sets[0], sets[1]


def _cached(stored: _Stored) -> Any:
    print(
        f"states of {stored.what} for {stored.side}: {stored.size / 1e6:,.1f} MB in {stored.folder}",
        flush=True,
    )
    progress = progress_for()
    try:
        return stored.cache(progress=progress.counting(f"{stored.side} states, tokens"))
    finally:
        progress.close()


def _train_job(job: _Job, training: ExampleSet, validation: ExampleSet) -> TrainResult:
    from auxkern.model import shard_base
    from auxkern.training.collator import AuxCollator

    if job.settings.shard_base:
        shard_base(job.model.lm, DeviceMesh.from_group(job.launched.group, job.model.device.type))
    return train(
        job.model,
        training,
        job.settings,
        collate=AuxCollator(job.text_format.pad_id),
        validation=validation,
        progress=progress_for(),
        process_group=job.launched.group,
    )


def _print_job(job: _Job) -> None:
    settings, model = job.settings, job.model
    lm_size = sum(parameter.numel() for parameter in model.lm.parameters())
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    each = settings.batch_size * settings.gradient_accumulation
    epochs = job.plan.steps * each / len(job.training)
    chosen = ", ".join(f"{name} {value:g}" for name, value in job.chosen.items())
    _print_rows(
        ("base", f"{settings.base}: {lm_size:,} parameters, {model.lm.dtype}, {model.lm.device}, frozen"),
        ("auxiliary", f"{model.config.architecture}: {size:,} trainable parameters"),
        *([("on top of", trained_on_top_of(model.config.on_top_of))] if model.config.on_top_of else []),
        ("training", _size_of(job.training)),
        ("validation", _size_of(job.validation)),
        ("steps", f"{job.plan.steps:,} of {each:,} examples, {epochs:.1f} epochs"),
        *([("defaults", f"{chosen}, from the amount of data")] if chosen else []),
    )


def _size_of(examples: Items) -> str:
    count = len(examples)
    tokens = sum(label != IGNORED for i in range(count) for label in examples[i]["labels"][1:])
    return f"{count:,} examples, {tokens:,} tokens to learn"


def _print_summary(job: _Job, result: TrainResult) -> None:
    state = result.state
    rows = []
    for name, nll in (("LM alone", state.lm_nll), (f"pair, step {state.best_step:,}", state.best_nll)):
        if nll is not None:
            # exp overflows beyond 709.
            rows.append((name, f"validation nll {nll:.4f}, perplexity {math.exp(min(nll, 700.0)):,.2f}"))
    command = ["auxkern", "generate", str(result.output), "--condition", job.condition]
    records = (result.output / LOG).read_text(encoding="utf-8").splitlines()
    run = Run(
        state,
        job.plan,
        [json.loads(line) for line in records],
        training=len(job.training),
        validation=len(job.validation),
        dropout=job.model.config.dropout,
    )
    print()
    _print_rows(
        *rows,
        ("time", f"{duration(state.seconds)} for {state.step:,} steps, {state.tokens:,} tokens"),
        ("result", diagnosis(run)),
        ("model", str(result.output)),
        ("try it", shlex.join(command)),
    )


def _print_rows(*rows: tuple[str, str]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}", flush=True)


def _say_how_to_resume(stop: KeyboardInterrupt, arguments: Sequence[str]) -> int:
    said = stop if isinstance(stop, TrainingInterrupted) else "stopped; what was saved before is kept"
    print(f"\nauxkern train: {said}", file=sys.stderr)
    others = [argument for argument in arguments if argument not in ("--resume", "--no-resume")]
    print(f"resume: {shlex.join(['auxkern', 'train', *others, '--resume'])}", file=sys.stderr)
    return INTERRUPTED


def _say_error(error: Exception, status: int) -> int:
    print(f"auxkern train: {sentence(error)}", file=sys.stderr)
    return status
