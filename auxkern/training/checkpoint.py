"""Checkpoints of a training run: all that it needs to go on as if it had never stopped.

``output/checkpoint-<step>/`` holds what ``model.save_pretrained`` writes (model.safetensors among it),
optimizer.safetensors and trainer.json. A folder has that name only once it is complete.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from auxkern.training.settings import LoopSettings

FORMAT = 1
WEIGHTS, OPTIMIZER, TRAINER = "model.safetensors", "optimizer.safetensors", "trainer.json"
_REMOVE = "remove that folder to go on from the checkpoint before"
_PREFIX, _UNFINISHED = "checkpoint-", ".unfinished-"


@dataclass(frozen=True)
class Score:
    """What a model gives to a set of examples, in parts of consecutive ones: an interval resamples them.

    Attributes:
        sums: nll of each part's labels, in nats.
        labels: how many each part has.
    """

    sums: list[float]
    labels: list[float]

    @property
    def nll(self) -> float:
        """The mean over all labels."""
        return math.fsum(self.sums) / max(1.0, math.fsum(self.labels))


@dataclass
class TrainState:
    """Where a run is. Everything else that it computes follows from this, the weights and the settings.

    Attributes:
        step: optimizer steps done.
        tokens: text tokens (labels) seen.
        seconds: spent training and evaluating, over all parts of the run.
        evaluated_step: the last step after which the pair was evaluated.
        nll: the pair's validation nll then, nats per token; None before the first evaluation.
        lm_nll: the LM's alone, which never changes.
        best_step, best_nll: the step with the lowest validation nll; 0 is before the first.
        stale: evaluations in a row that brought no new best.
        part_labels: labels in each part of the validation set, see ``Score``.
        start_sums, best_sums: the pair's summed nll of each part, before the first step and at the best.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated_step: int = 0
    nll: float | None = None
    lm_nll: float | None = None
    best_step: int | None = None
    best_nll: float | None = None
    stale: int = 0
    part_labels: list[float] = field(default_factory=list)
    start_sums: list[float] = field(default_factory=list)
    best_sums: list[float] = field(default_factory=list)

    def evaluated(self, score: Score) -> bool:
        """Takes in the validation score of this step; whether it is the best."""
        self.nll, self.evaluated_step = score.nll, self.step
        if self.step == 0:
            self.part_labels, self.start_sums = score.labels, score.sums
        if self.best_nll is not None and self.best_nll <= score.nll:
            self.stale += 1
            return False
        self.best_nll, self.best_step, self.stale = score.nll, self.step, 0
        self.best_sums = score.sums
        return True


# Fields of ``TrainState`` that older checkpoints lack.
_LATER = ("stale", "part_labels", "start_sums", "best_sums")


class Weights(NamedTuple):
    """What a checkpoint keeps of a model and its optimizer, whole wherever it was sharded.

    Attributes:
        model: its state dict; None where nothing is sharded, and ``save_pretrained`` finds it by itself.
        optimizer: tensors by "parameter:entry".
    """

    model: dict[str, torch.Tensor] | None
    optimizer: dict[str, torch.Tensor]


@dataclass(frozen=True)
class RunIdentity:
    """What makes two runs the same run: settings, fingerprints of the data, and what the model is.

    Attributes:
        settings: of the loop, or those of the command.
        training, validation: fingerprints; None without validation data.
        model: fields of its config, the fingerprint of its base among them; see ``model_fields``.
    """

    settings: LoopSettings
    training: str
    validation: str | None
    model: dict[str, Any]

    def check(self, saved: dict[str, Any], folder: Path) -> None:
        """Compares with a checkpoint's trainer.json.

        Raises:
            ValueError: it belongs to another run; the message names what differs.
        """
        if saved.get("format") != FORMAT:
            raise ValueError(f"{folder} has format {saved.get('format')}, but this version reads {FORMAT}")
        current, before = self.settings.as_json(), saved["settings"]
        pairs = [_differs(name, current[name], before.get(name)) for name in self.settings.changed(before)]
        if pairs:
            raise ValueError(
                f"{folder} was made with other settings: {'; '.join(pairs)}; "
                "set them back, or start anew in another output folder"
            )
        # A newer transformers may know more fields, with defaults.
        values = [(name, now, saved["model"].get(name, now)) for name, now in self.model.items()]
        pairs = [_differs(*field) for field in values if field[1] != field[2]]
        if pairs:
            raise ValueError(
                f"{folder} is of another model: {'; '.join(pairs)}; "
                "make the same one, or start anew in another output folder"
            )
        for kind in ("training", "validation"):
            if saved[kind] != getattr(self, kind):
                raise ValueError(
                    f"{folder} was made with other {kind} data: fingerprint {saved[kind]}, now "
                    f"{getattr(self, kind)}; bring that data back, or start anew in another output folder"
                )


def _differs(name: str, current: Any, saved: Any) -> str:
    """Both values; of two mappings only what is not the same in both."""
    if isinstance(current, dict) and isinstance(saved, dict):
        same = {key for key in current if key in saved and current[key] == saved[key]}
        current, saved = (
            {key: value for key, value in one.items() if key not in same} for one in (current, saved)
        )
        inner = [*current.values(), *saved.values()]
        if len(current) == 1 and current.keys() == saved.keys() and all(isinstance(v, dict) for v in inner):
            return _differs(f"{name}.{next(iter(current))}", *inner)
    return f"{name} is {current!r} but was {saved!r}"


def model_fields(model: Any) -> dict[str, Any]:
    """A model's config in types that JSON has, less what may change between runs; {} if it has none."""
    if not hasattr(model, "config"):
        return {}
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    # A base may move: its fingerprint says whether it is the same.
    free = ("transformers_version", "base_model_name_or_path", "base_revision", "base_gguf_file")
    # As may an auxiliary that is held frozen.
    values["on_top_of"] = {
        name: {key: value for key, value in held.items() if key != "path"}
        for name, held in (values.get("on_top_of") or {}).items()
    }
    return {name: value for name, value in values.items() if name not in free and not name.startswith("_")}


def checkpoint_folder(output: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return output / f"{_PREFIX}{step}"


def checkpoint_steps(output: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, rising."""
    if not output.is_dir():
        return []
    numbers = (path.name.removeprefix(_PREFIX) for path in output.glob(f"{_PREFIX}*") if path.is_dir())
    return sorted(int(number) for number in numbers if number.isdecimal())


def newest_checkpoint(output: Path) -> Path | None:
    """The last complete checkpoint in a folder; None if there is none."""
    steps = checkpoint_steps(output)
    return checkpoint_folder(output, steps[-1]) if steps else None


def check_output(output: Path, resume: bool) -> None:
    """Looks whether a run may begin in a folder.

    Raises:
        ValueError: another run is there and ``resume`` is off, it is no folder, or nothing can be
            written there.
    """
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"output is {output}, but {place} is not a folder; name another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"output is {output}, but nothing can be written to {place}; name another folder")
    newest = newest_checkpoint(output)
    if newest is not None and not resume:
        raise ValueError(
            f"output {output} holds a run with {newest.name} already; "
            "resume it (resume=True, --resume), or name another folder"
        )
    if newest is None and (output / "config.json").exists():
        raise ValueError(
            f"output {output} holds a model (config.json) already, which this run would write over; name "
            "another folder"
        )


def save_checkpoint(
    output: Path, model: Any, weights: Weights | None, state: TrainState, identity: RunIdentity
) -> Path:
    """Writes the checkpoint of ``state.step``.

    Args:
        output: folder of the run.
        model: has ``save_pretrained``.
        weights: ``whole_weights`` of it; None if the checkpoint is there. The weights after a step never
            change, but what is known of them does: that they were evaluated. Then its trainer.json is
            replaced, atomically.
        state, identity: of the run.

    Raises:
        OSError, SafetensorError: the disk is full, say; nothing half-written has the name of a checkpoint.
    """
    folder = checkpoint_folder(output, state.step)
    trainer = {
        "format": FORMAT,
        **asdict(state),
        "settings": identity.settings.as_json(),
        "training": identity.training,
        "validation": identity.validation,
        "model": identity.model,
    }
    text = json.dumps(trainer, indent=2, allow_nan=False) + "\n"
    if weights is None:
        with replacing(folder / TRAINER) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
        return folder
    unfinished = output / f"{_UNFINISHED}{folder.name}"
    remove_unfinished(output)
    unfinished.mkdir(parents=True)
    try:
        model.save_pretrained(unfinished, **({"state_dict": weights.model} if weights.model else {}))
        save_file(weights.optimizer, unfinished / OPTIMIZER)
        (unfinished / TRAINER).write_text(text, encoding="utf-8")
        for path in unfinished.iterdir():
            _flush(path)
        unfinished.rename(folder)
    except BaseException:
        # On a full disk it would keep others, and the next attempt, from writing.
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def whole_weights(model: Any, optimizer: torch.optim.Optimizer) -> Weights:
    """The weights of a model and its optimizer's state; every rank that has a part must call it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {
        f"{names[parameter]}:{entry}": _whole(tensor)
        for parameter, entries in optimizer.state.items()
        for entry, tensor in entries.items()
    }
    if not any(isinstance(parameter, DTensor) for parameter in names):
        return Weights(None, state)
    return Weights({name: _whole(tensor) for name, tensor in model.state_dict().items()}, state)


def load_state(folder: Path, identity: RunIdentity) -> TrainState:
    """The state of a checkpoint, once its run is known to be this one.

    Raises:
        ValueError: it belongs to another run, or is damaged.
    """
    with _naming_damage(folder):
        saved = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
        identity.check(saved, folder)
        names = [one.name for one in fields(TrainState) if one.name in saved or one.name not in _LATER]
        return TrainState(**{name: saved[name] for name in names})


def saved_settings(output: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, as its newest checkpoint has them; None if nothing is saved.

    Raises:
        ValueError: it is damaged.
    """
    folder = newest_checkpoint(output)
    if folder is None:
        return None
    with _naming_damage(folder):
        settings: dict[str, Any] = json.loads((folder / TRAINER).read_text(encoding="utf-8"))["settings"]
        return settings


@contextmanager
def _naming_damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / TRAINER} is damaged ({error!r}); {_REMOVE}") from error


def load_weights(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Weights and optimizer state of a checkpoint, bit for bit as they were saved.

    Raises:
        RuntimeError: the model has other parameters.
        ValueError: the optimizer's state is of other parameters, or a file is damaged.
    """
    device = next(model.parameters()).device
    known = dict(model.named_parameters())
    try:
        if any(isinstance(parameter, DTensor) for parameter in known.values()):
            own = model.state_dict()
            whole = load_file(folder / WEIGHTS, device=str(device))
            model.load_state_dict({name: _like(tensor, own[name]) for name, tensor in whole.items()})
        else:
            load_model(model, folder / WEIGHTS, device=str(device))
        entries = load_file(folder / OPTIMIZER)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{folder} is damaged ({error}); {_REMOVE}") from error
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in entries.items():
        name, _, entry = key.rpartition(":")
        if name not in known:
            raise ValueError(f"{folder / OPTIMIZER} has the state of {name!r}, which the model has not")
        state.setdefault(name, {})[entry] = _like(tensor, known[name])
    # torch numbers parameters in the order of the groups.
    names = {id(parameter): name for name, parameter in known.items()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    saved = optimizer.state_dict()
    saved["state"] = {index: state[name] for index, name in enumerate(ordered) if name in state}
    optimizer.load_state_dict(saved)


def prune_checkpoints(output: Path, keep: int, best_step: int | None) -> None:
    """Removes all but the newest ``keep`` checkpoints and the best one."""
    for step in checkpoint_steps(output)[:-keep]:
        if step != best_step:
            # Renamed first: a folder that is half removed must not look like a checkpoint.
            remove_unfinished(output)
            unfinished = output / f"{_UNFINISHED}{_PREFIX}{step}"
            checkpoint_folder(output, step).rename(unfinished)
            shutil.rmtree(unfinished)


def publish(output: Path, step: int) -> None:
    """Copies the model files of a checkpoint into the output folder, each atomically, config last."""
    source = checkpoint_folder(output, step)
    paths = [path for path in source.iterdir() if path.is_file() and path.name not in (OPTIMIZER, TRAINER)]
    for path in sorted(paths, key=lambda path: (path.name == "config.json", path.name)):
        with replacing(output / path.name) as unfinished:
            shutil.copyfile(path, unfinished)


def remove_unfinished(output: Path) -> None:
    """Removes what an interrupted run left half-written."""
    for path in output.glob(f"{_UNFINISHED}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its name when the block ends well."""
    unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
    try:
        yield unfinished
        _flush(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()


def _like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded as a parameter is."""
    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole
    # Every rank has read the file: nothing needs to be sent.
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _flush(path: Path) -> None:
    # Without this a power cut after the renaming could leave an empty file under a final name.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
