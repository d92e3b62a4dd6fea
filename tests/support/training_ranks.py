"""Training runs that several processes share, and what one of their ranks does."""

from __future__ import annotations

import copy
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from auxkern.core.files import lock_file
from auxkern.model import fingerprint
from auxkern.model.sharding import shard_auxiliary, shard_base
from auxkern.training.collator import AuxCollator
from auxkern.training.loop import TrainingInterrupted, TrainResult, train
from auxkern.training.settings import LoopSettings
from tests.support.batches import ragged_batch, texts
from tests.support.tiny import KIND, PAD, tiny_pair

SETTINGS: dict[str, Any] = {
    "steps": 12,
    "batch_size": 2,
    "gradient_accumulation": 3,  # of two or four ranks some have one batch less than others
    "learning_rate": 5e-3,
    "schedule": "constant",
    "warmup_steps": 2,
    "log_every": 1,
    "eval_every": 3,
    "save_every": 3,
    "sort_by_length": True,
    "patience": 0,
}
# Of each run: what it changes of SETTINGS.
RUNS: dict[str, dict[str, Any]] = {
    "uneven": {},
    "fifty": {"steps": 50, "gradient_accumulation": 2, "sort_by_length": False},
    "unlabelled": {"shuffle": False, "sort_by_length": False},
    "counts": {
        "batch_size": 8,
        "gradient_accumulation": 2,
        "steps": 4,
        "shuffle": False,
        "sort_by_length": False,
    },
    "sharded": {},
    "begun by ranks": {"steps": 6},
    "ended by ranks": {},
    "stopped": {},
    "worse": {"learning_rate": 3.0, "patience": 2},
}


def new_pair(name: str) -> Any:
    """The same model on every rank; dropout shows which random numbers were drawn."""
    model = tiny_pair(KIND, trained=False, dropout=0.0 if name == "fifty" else 0.2)
    return model.train()


def examples(name: str) -> list[dict[str, list[int]]]:
    """Of "unlabelled" nothing is to be learnt from the examples of every other batch.

    Of "counts" the two batches of a step have 64 and 320 labels.
    """
    made = texts()
    if name == "counts":
        for i, example in enumerate(made := texts(16)):
            length = 1 + (8 if i < 8 else 40)
            ids = (example["input_ids"] * length)[:length]
            example |= {"input_ids": ids, "labels": [-100, *ids[1:]]}
    if name == "unlabelled":
        for i, example in enumerate(made):
            if i // 2 % 2:
                example["labels"] = [-100] * len(example["labels"])
    return made


def run(
    output: Path, name: str, model: Any = None, *, process_group: Any = None, measure: Any = None, **more: Any
) -> TrainResult:
    """One of RUNS, or the rank's part of it."""
    return train(
        new_pair(name) if model is None else model,
        examples(name),
        LoopSettings(output=str(output), **{**SETTINGS, **RUNS[name], **more}),
        collate=AuxCollator(PAD),
        validation=texts(5, seed=1),
        measure=measure,
        process_group=process_group,
    )


def _stopped(output: Path, rank: int) -> tuple[int, str]:
    """The last rank is told to stop while all evaluate; where the run was then."""

    def stop(step: int) -> dict[str, int]:
        if rank == dist.get_world_size() - 1 and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"rank": rank}

    try:
        run(output, "stopped", process_group=dist.group.WORLD, measure=stop)
    except TrainingInterrupted as interrupted:
        found = interrupted.step, interrupted.checkpoint.name
    run(output, "stopped", process_group=dist.group.WORLD, measure=lambda _: {"rank": rank}, resume=True)
    return found


def _failed(folder: Path, rank: int) -> list[str]:
    """What a rank hears where only the first one can fail: a folder that is in use, a disk that is full."""
    said = []
    if rank == 0:
        (folder / "used").mkdir()
        file = lock_file(folder / "used" / "log.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int) -> dict[str, int]:
        if rank == 0 and step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        return {}

    for name, measure in (("used", None), ("full", fill)):
        try:
            run(folder / name, "stopped", process_group=dist.group.WORLD, measure=measure)
        except (ValueError, OSError) as error:
            said.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if rank == 0:
        os.close(file)
    return said


def _wrapped() -> dict[str, Any]:
    """A pair in torch's own data parallelism."""
    model = new_pair("fifty")
    wrapped = DistributedDataParallel(model)
    names = [name for name, _ in wrapped.named_parameters()]
    return {**_gradients_of_a_part(wrapped, model), "synchronised": names}


def _gradients_of_a_part(wrapped: Any, model: Any) -> dict[str, Any]:
    """Gradients of a model that is wrapped to average them, of one row in so many of a batch."""
    batch = ragged_batch()
    labels = int((batch["labels"][:, 1:] != -100).sum())
    own = {name: tensor[dist.get_rank() :: dist.get_world_size()] for name, tensor in batch.items()}
    # Its gradients are means over the ranks.
    wrapped(**own, num_items_in_batch=labels / dist.get_world_size()).loss.backward()
    return {
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "of the base": [
            name for name, parameter in model.lm.named_parameters() if parameter.grad is not None
        ],
    }


def _sharded_by_accelerate(folder: Path, mesh: Any) -> dict[str, Any]:
    """What accelerate, and so the Trainer, does with ``fsdp`` on GPUs; on CPUs it makes copies."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    # All that it asks an Accelerator for, which would be none of FSDP here.
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh={("dp",): mesh},
        parallelism_config=SimpleNamespace(fsdp_dim_names=("dp",)),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=dist.get_rank() == 0,
    )
    model = fsdp2_prepare_model(accelerator, new_pair("fifty"))
    found = _gradients_of_a_part(model, model)
    saved = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=saved)
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    of_base = [name for name, parameter in model.lm.named_parameters() if isinstance(parameter, DTensor)]
    gradients = {name: gradient.full_tensor() for name, gradient in found["gradients"].items()}
    return {**found, "gradients": gradients, "sharded": sharded, "sharded base": of_base}


def rank_result(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Makes every run of ``RUNS`` in FOLDER/NAME; what else the rank found."""
    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {
        "stopped": _stopped(folder / "stopped", rank),
        "failed": _failed(folder, rank),
        "wrapped": _wrapped(),
        "accelerate": _sharded_by_accelerate(folder / "accelerate", mesh),
    }
    for name in ("uneven", "fifty", "unlabelled", "counts", "worse", "begun by ranks"):
        run(folder / name, name, process_group=dist.group.WORLD)
    run(folder / "ended by ranks", "ended by ranks", process_group=mesh, resume=True)
    model = new_pair("sharded")
    whole = copy.deepcopy(model.lm)
    shard_base(model.lm, mesh)
    shard_auxiliary(model, mesh)
    run(folder / "sharded", "sharded", model, process_group=mesh, steps=6)
    again = new_pair("sharded")
    shard_base(again.lm, mesh)
    shard_auxiliary(again, mesh)
    run(folder / "sharded", "sharded", again, process_group=mesh, resume=True)
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in again.lm.parameters())
    found["fingerprints"] = {fingerprint(again.lm), fingerprint(whole)}
    found["base"] = held, sum(parameter.numel() for parameter in whole.parameters())
    return found
