"""The Hugging Face Trainer in one of several processes: ``trainer_ranks.py FOLDER [shard-base]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import Trainer, TrainingArguments

from auxkern.model.sharding import shard_base
from auxkern.training.collator import AuxCollator
from tests.support.batches import texts
from tests.support.tiny import KIND, PAD, tiny_pair


def trained(folder: Path, *, accumulation: int, shard: bool = False, **options: Any) -> Any:
    """The trainer after four steps of twelve texts over all processes."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    model = tiny_pair(KIND, trained=False)
    if shard:
        shard_base(model.lm, init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    trainer = Trainer(model=model, args=arguments, train_dataset=texts(), data_collator=AuxCollator(PAD))
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(folder: Path, modes: list[str]) -> None:
    trainer = trained(folder, accumulation=3, shard="shard-base" in modes, ddp_backend="gloo")
    trainer.save_model(str(folder / "saved"))
    if trainer.is_world_process_zero():
        found = {
            "world": trainer.args.world_size,
            "losses": losses(trainer),
            "wrapped": type(trainer.model_wrapped).__name__,
            "base has gradients": any(p.grad is not None for p in trainer.model.lm.parameters()),
        }
        torch.save(found, folder / "found.pt")
    # Threads of a group that is left open may end the process with an error.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
