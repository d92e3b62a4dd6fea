"""The Hugging Face Trainer, unchanged, on a pair."""

import copy
import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from auxkern.training.collator import AuxCollator
from auxkern.training.loop import train
from auxkern.training.settings import LoopSettings
from tests.support.batches import texts
from tests.support.tiny import KIND, PAD, tiny_lm, tiny_pair

STEPS = 12


def _arguments(folder, **options):
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **options,
    }
    return TrainingArguments(**settings)


def _trainer(folder, model, **options):
    return Trainer(
        model=model,
        args=_arguments(folder, **options),
        train_dataset=texts(),
        eval_dataset=texts(6, seed=1),
        data_collator=AuxCollator(PAD),
    )


def _losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_trainer_and_plain_loop_give_the_same_loss_curve(tmp_path):
    """Accumulation of batches with unequal counts, so the normaliser must be the group's."""
    lm = tiny_lm()
    trainer = _trainer(tmp_path / "trainer", tiny_pair(KIND, lm, trained=False))
    trainer.train()
    settings = LoopSettings(
        output=str(tmp_path / "loop"),
        steps=STEPS,
        batch_size=2,
        gradient_accumulation=3,
        learning_rate=5e-3,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        shuffle=False,
        log_every=1,
        save_every=STEPS,
    )
    model = tiny_pair(KIND, lm, trained=False)
    train(model, texts(), settings, collate=AuxCollator(PAD))
    log = [json.loads(line) for line in (tmp_path / "loop" / "log.jsonl").read_text().splitlines()]
    plain = [entry["loss"] for entry in log if "loss" in entry]
    assert len(plain) == STEPS
    assert plain[-1] < 0.9 * plain[0]
    # The Trainer rounds what it logs, and its fused AdamW rounds elsewhere.
    torch.testing.assert_close(torch.tensor(_losses(trainer)), torch.tensor(plain), rtol=1e-3, atol=2e-4)


def test_the_trainer_saves_the_auxiliary_alone_and_resumes(tmp_path):
    lm = tiny_lm()
    before = copy.deepcopy(lm.state_dict())
    whole = _trainer(tmp_path / "whole", tiny_pair(KIND, lm, trained=False))
    whole.train()
    half = _trainer(tmp_path / "half", tiny_pair(KIND, lm, trained=False), max_steps=8)
    half.train()
    resumed = _trainer(tmp_path / "half", tiny_pair(KIND, lm, trained=False))
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-8"))
    assert _same_weights(whole.model, resumed.model)
    size = (tmp_path / "whole" / "checkpoint-12" / "model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in whole.model.parameters()) + 20_000
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())


def test_the_trainer_evaluates_and_predicts(tmp_path):
    trainer = _trainer(tmp_path, tiny_pair(KIND))
    figures = trainer.evaluate()
    batch = AuxCollator(PAD)(texts(6, seed=1))
    expected = trainer.model(**batch).loss.item()
    assert figures["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_mixed_precision_stays_near_float32(tmp_path):
    lm = tiny_lm()
    exact = _trainer(tmp_path / "exact", tiny_pair(KIND, lm, trained=False))
    exact.train()
    mixed = _trainer(tmp_path / "mixed", tiny_pair(KIND, lm, trained=False), bf16=True)
    mixed.train()
    torch.testing.assert_close(torch.tensor(_losses(mixed)), torch.tensor(_losses(exact)), rtol=5e-2, atol=0)
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing(tmp_path):
    lm = tiny_lm()
    plain = _trainer(tmp_path / "plain", tiny_pair(KIND, lm, trained=False), max_steps=3)
    plain.train()
    checked = _trainer(
        tmp_path / "checked", tiny_pair(KIND, lm, trained=False), max_steps=3, gradient_checkpointing=True
    )
    checked.train()
    assert _losses(plain) == pytest.approx(_losses(checked), rel=1e-5)


@pytest.mark.slow
def test_the_trainer_compiles_the_pair(tmp_path):
    lm = tiny_lm()
    plain = _trainer(tmp_path / "plain", tiny_pair(KIND, lm, trained=False), max_steps=3)
    plain.train()
    compiled = _trainer(
        tmp_path / "compiled", tiny_pair(KIND, lm, trained=False), max_steps=3, torch_compile=True
    )
    compiled.train()
    assert _losses(plain) == pytest.approx(_losses(compiled), rel=1e-3)
