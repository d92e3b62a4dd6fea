"""``auxkern generate --mixture FILE``: models beside the pair's own, and who writes a text."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from auxkern.generation import Request
from auxkern.generation.members import BASE, Member, members_from
from auxkern.model import open_models
from auxkern.model.fingerprints import fingerprint
from auxkern.training.yaml_values import parsed_yaml

_FIELDS = ("models", "auxiliaries", "members", "plausibility")


@dataclass(frozen=True)
class MixtureFile:
    """What a mixture's file says.

    Attributes:
        path: of the file; names of folders are looked for beside it first.
        models: language models beside the base: name or folder, by the name that members call them.
        auxiliaries: likewise, of the pair's base.
        members, plausibility: of lines that say nothing of members, condition or auxiliary.
    """

    path: Path
    models: dict[str, str] = field(default_factory=dict)
    auxiliaries: dict[str, str] = field(default_factory=dict)
    members: tuple[Member, ...] = ()
    plausibility: float = 0.0

    @classmethod
    def read(cls, path: Path) -> MixtureFile:
        """From a YAML file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no such file; the message names it, the field and the remedy.
        """
        try:
            content = parsed_yaml(path.read_text(encoding="utf-8"))
        except ValueError as error:  # of an encoding, too
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} must be a mapping with {', '.join(_FIELDS)}; see docs/mixtures.md")
        for name in content:
            if name not in _FIELDS:
                raise ValueError(f"{path} has the field {name!r}; known are {', '.join(_FIELDS)}")
        names = {kind: _named(path, kind, content.get(kind) or {}) for kind in ("models", "auxiliaries")}
        try:
            members = members_from(content.get("members") or [])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(path, **names, members=members, plausibility=content.get("plausibility") or 0.0)

    def load(self, model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
        """The language models by name; auxiliaries are loaded into the pair.

        Args:
            model: an ``AuxTunedForCausalLM``.
            tokenizer: its base's.
            options: of ``auxkern generate``.

        Raises:
            OSError, ValueError: one cannot be loaded, or has other tokens than the base.
        """
        for name, source in self.auxiliaries.items():
            try:
                model.load_auxiliary(name, self._place(source), allow_other_base=options.allow_other_base)
            except (OSError, ValueError, SafetensorError) as error:
                raise ValueError(f"{self.path}: auxiliary {name!r} ({source}): {error}") from error
        names = [BASE, *self.models, *model.auxiliary_names]
        for member in self.members:
            if member.model not in names:
                raise ValueError(
                    f"{self.path}: there is no model {member.model!r} for a member; choose one of "
                    f"{', '.join(names)}, or name it among models or auxiliaries"
                )
        places = {name: self._place(source) for name, source in self.models.items()}
        loaded = open_models(places, model, tokenizer, dtype=options.dtype, compute=options.compute)
        if model.device.type == "cpu" and self.auxiliaries:
            model.use_native_kernels(options.compute)
        return loaded

    def defaults(self, request: Request) -> Request:
        """What lines leave out, with the members of the file.

        Raises:
            ValueError: they contradict the options.
        """
        if not self.members and not self.plausibility:
            return request
        try:
            return replace(request, members=self.members, plausibility=self.plausibility)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: {error}") from error

    def record(self, models: Mapping[str, Any]) -> dict[str, Any]:
        """What makes another output if it changes."""
        return {
            "models": {name: fingerprint(lm) for name, lm in models.items()},
            "auxiliaries": self.auxiliaries,
        }

    def _place(self, source: str) -> str:
        beside = self.path.parent / source
        return str(beside) if beside.is_dir() else source


def _named(path: Path, kind: str, content: Any) -> dict[str, str]:
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(source, str) for name, source in content.items()
    ):
        raise ValueError(
            f"{path}: {kind} must be a mapping of names to folders or Hub names, got {content!r:.60}"
        )
    return dict(content)
