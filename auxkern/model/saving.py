"""What a checkpoint of a pair holds, and whether it is all that the auxiliary has."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from torch import nn

from auxkern.model.base import HUB_NAME
from auxkern.model.config import AuxTunedConfig

_RECIPE = Path(__file__).parents[1] / "recipes" / "wordnet_keywords.yaml"


def pair_config(name_or_path: Any, **hub: Any) -> AuxTunedConfig:
    """The config of a trained pair.

    Args:
        name_or_path: folder that was saved, or a Hub name.
        hub: of what the Hub is asked, as in transformers: revision, token, cache_dir, local_files_only.

    Raises:
        OSError: there is no such folder, and the Hub gives none; the message says how a pair is trained.
        ValueError: the folder holds something else.
    """
    _check_folder(str(name_or_path))
    try:
        return AuxTunedConfig.from_pretrained(name_or_path, **hub)
    except OSError as error:
        raise OSError(
            f"there is no folder {name_or_path}, and the Hub has none for us: {str(error).rstrip('.')}; "
            + _how_to_train()
        ) from error


def _check_folder(name: str) -> None:
    """Says what is wrong with a folder before transformers looks for it on the Hub."""
    folder, shown = Path(name), name or "''"
    if not name or not folder.is_dir():
        if folder.exists() or not HUB_NAME.fullmatch(name) or folder.parent.is_dir():
            raise FileNotFoundError(
                f"there is no folder {shown}; name the one that auxkern train wrote, or a Hub name; "
                + _how_to_train()
            )
        return
    path = folder / "config.json"
    if not path.is_file():
        # The longer number is the larger.
        newest = max(folder.glob("checkpoint-*"), key=lambda one: (len(one.name), one.name), default=None)
        remedy = f"its run is not finished, try {newest}" if newest else _how_to_train()
        raise FileNotFoundError(f"{folder} holds no config.json, so no model; {remedy}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != AuxTunedConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {kind!r}, not an auxiliary; {_how_to_train()}")


def _how_to_train() -> str:
    """Two commands."""
    recipe = _RECIPE.relative_to(Path.cwd()) if _RECIPE.is_relative_to(Path.cwd()) else _RECIPE
    return (
        f"to train one: auxkern train --config {shlex.quote(str(recipe))} (a recipe that comes along) or, on "
        "your own data, auxkern train --base NAME --train-file TRAIN.jsonl --validation-file HELD_OUT.jsonl "
        "--output FOLDER"
    )


def tied_weights(model: nn.Module) -> dict[str, str] | None:
    """Names of parameters that stand for an earlier one, and its name; None if there are none.

    Raises:
        ValueError: tensors that are saved share memory, but are not one parameter.
    """
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    memory: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr() if tensor.device.type != "meta" else 0
        if place and name not in tied and memory.setdefault(place, name) != name:
            raise ValueError(
                f"{name} and {memory[place]} of the auxiliary share memory, so that it cannot be saved; "
                "register one parameter under both names, or copy it"
            )
    return tied or None


def check_complete(path: Any, report: dict[str, Any]) -> None:
    """Compares what transformers has loaded with what the model has.

    Args:
        path: of the checkpoint.
        report: transformers' ``output_loading_info``.

    Raises:
        ValueError: weights are missing, left over or of another shape.
    """
    # transformers would go on with new weights in place of missing ones.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            names = ", ".join(sorted(map(str, report[what]))[:5])
            raise ValueError(
                f"{path} does not hold the auxiliary that its config describes: {what.replace('_', ' ')} "
                f"{names}; it was made with another version, or for another module"
            )
