"""Choices of speed that were measured on a GPU, in a file that dispatch reads.

``make gpu ARGS=--tune`` writes it. Dispatch looks in the folder that ``AUXKERN_GPU_CONFIGS`` names, then in
``tuned`` beside this module, for a file named after the device; without one the defaults hold.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from auxkern.backends.triton.configs import Configs, Tiles

VARIABLE = "AUXKERN_GPU_CONFIGS"
PACKAGED = Path(__file__).with_name("tuned")
BY_THE_MODEL = "defaults, by the model"


@dataclass(frozen=True)
class Tuned:
    """What was measured to be faster than the defaults.

    Attributes:
        device: as the driver names it.
        capability: its major compute capability.
        versions: of what compiled the kernels, by name.
        date: ISO 8601, UTC.
        command: that measured.
        choices: by keys as ``keys`` gives them: numbers, or fields of a configuration by name.
    """

    device: str
    capability: int
    versions: Mapping[str, str]
    date: str
    command: str
    choices: Mapping[str, Any]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Tuned:
        """From a file.

        Raises:
            ValueError: it is not such a file; choices are looked at when they are applied.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no JSON: {error}; {_REMEDY}") from error
        types = {its.name: its.type for its in fields(cls)}
        if not isinstance(content, dict) or set(content) != set(types):
            given = sorted(content) if isinstance(content, dict) else content
            raise ValueError(f"{path} must hold {', '.join(types)}, not {given!r}; {_REMEDY}")
        for name, value in content.items():
            wanted = int if types[name] == "int" else str if types[name] == "str" else dict
            if type(value) is not wanted:
                raise ValueError(
                    f"{path}: {name} is {value!r}; it must be of type {wanted.__name__}; {_REMEDY}"
                )
        return cls(**content)


_REMEDY = "let `make gpu ARGS=--tune` write it anew, or delete it for the defaults"


def file_name(device: str) -> str:
    """Of the file for a device of this name."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", device).strip("_") + ".json"


def file_of(device: str) -> Path | None:
    """The file for a device of this name; None if there is none.

    Raises:
        ValueError: ``AUXKERN_GPU_CONFIGS`` names no folder.
    """
    named = os.environ.get(VARIABLE)
    if named and not Path(named).is_dir():
        raise ValueError(f"{VARIABLE}={named!r} is no folder; name one with {file_name(device)}, or unset it")
    folders = [Path(named)] if named else []
    for folder in (*folders, PACKAGED):
        path = folder / file_name(device)
        if path.exists():
            return path
    return None


def configs_for(device: str, capability: int) -> tuple[Configs, str]:
    """The choices for a device, and where they come from, in words.

    Raises:
        ValueError: the file for it is for another device, is malformed, or holds what no kernel takes.
    """
    configs, path = Configs.of(capability), file_of(device)
    if path is None:
        return configs, BY_THE_MODEL
    tuned = Tuned.read(path)
    if (tuned.device, tuned.capability) != (device, capability):
        raise ValueError(
            f"{path} is for {tuned.device!r} of compute capability {tuned.capability}, "
            f"and the device is {device!r} of {capability}; delete it, or measure there"
        )
    try:
        return chosen(configs, tuned.choices), f"measured on {tuned.date}, {path}"
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_REMEDY}") from error


def keys(configs: Configs) -> dict[str, Any]:
    """Every choice by its key, such as "forward.2", "tiles.half.1.roomy" or "cache_share"."""
    return {
        ".".join(path): choice
        for its in fields(configs)
        for path, choice in _choices((its.name,), getattr(configs, its.name))
    }


def chosen(configs: Configs, choices: Mapping[str, Any]) -> Configs:
    """``configs`` with other choices.

    Raises:
        ValueError: a key is unknown, or its value is not what its configuration takes; it names both.
    """
    unknown = sorted(set(choices) - set(keys(configs)))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no choice; there are {', '.join(keys(configs))}")
    replaced = {
        its.name: _replaced((its.name,), getattr(configs, its.name), choices) for its in fields(configs)
    }
    return replace(configs, **replaced)


def written(choice: Any) -> Any:
    """A choice as it stands in a file."""
    return asdict(choice) if is_dataclass(choice) and not isinstance(choice, type) else choice


def _parts(value: Any) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(names of, key of, and) each part of a table; nothing for a single choice."""
    if isinstance(value, Mapping):
        for key, its in value.items():
            yield tuple(map(str, key if isinstance(key, tuple) else (key,))), key, its
    elif isinstance(value, Tiles):
        for name, its in zip(value._fields, value, strict=True):
            yield (name,), name, its


def _choices(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    parts = list(_parts(value))
    if not parts:
        yield path, value
    for names, _, its in parts:
        yield from _choices((*path, *names), its)


def _replaced(path: tuple[str, ...], value: Any, choices: Mapping[str, Any]) -> Any:
    parts = {key: _replaced((*path, *names), its, choices) for names, key, its in _parts(value)}
    if parts:
        return Tiles(**parts) if isinstance(value, Tiles) else parts
    key = ".".join(path)
    return _read(key, value, choices[key]) if key in choices else value


def _read(key: str, default: Any, value: Any) -> Any:
    """A choice of the default's type."""
    if not is_dataclass(default):
        return value  # ``Configs`` looks at it
    names = [its.name for its in fields(default)]
    if not isinstance(value, dict) or sorted(value) != sorted(names):
        raise ValueError(f"{key} is {value!r}; it must hold {', '.join(names)} and nothing else")
    try:
        return type(default)(**value)  # type: ignore[misc]
    except ValueError as error:
        raise ValueError(f"{key} is {value!r}: {error}") from error
