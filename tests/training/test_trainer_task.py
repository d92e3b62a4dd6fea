"""Options of the Hugging Face Trainer train and measure the same task: the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from auxkern.model import AuxTunedForCausalLM
from auxkern.training.collator import AuxCollator
from tests.support.batches import ragged_batch, texts
from tests.support.tiny import BOS, DECODER, EOS, KIND, PAD, V, tiny_lm, tiny_pair


def counting(count: int = 12) -> list[dict[str, list[int]]]:
    """Texts that count upwards, so that the next token is known and never the current one."""
    examples = []
    for i in range(count):
        ids = [BOS, *range(10 + i, 18 + i + i % 3), EOS]
        examples.append({"input_ids": ids, "labels": [-100, *ids[1:]], "condition_ids": [5]})
    return examples


def trainer(folder: Path, model: Any, **options: Any) -> Trainer:
    callables = {name: options.pop(name) for name in list(options) if callable(options[name])}
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=counting(),
        eval_dataset=counting(6),
        data_collator=AuxCollator(PAD),
        **callables,
    )


def shares(model: Any) -> tuple[float, float]:
    """How often the most probable token is the next one, and the current one."""
    batch = AuxCollator(PAD)(counting())
    labels = batch.pop("labels")
    with torch.no_grad():
        best = model.eval()(**batch).logits.argmax(-1)[:, 1:-1]
    real = labels[:, 2:] != -100
    return tuple(
        (best == ids)[real].float().mean().item() for ids in (labels[:, 2:], batch["input_ids"][:, 1:-1])
    )


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1},
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3, "max_steps": 30},
        {"label_smoothing_factor": 0.1, "train_sampling_strategy": "group_by_length"},
    ],
    ids=["smoothing", "accumulated", "grouped"],
)
def test_what_is_trained_is_the_next_token(tmp_path: Path, options: dict[str, Any]) -> None:
    """The Trainer's smoother shifts labels for models whose name it knows."""
    model = AuxTunedForCausalLM.from_lm(tiny_lm(), auxiliary_config=DECODER)
    trainer(tmp_path, model, **{"max_steps": 80, **options}).train()
    following, current = shares(model)
    assert following > 0.8
    assert current < 0.1


def test_the_trainers_smoothed_loss_is_torchs_on_shifted_labels(tmp_path: Path) -> None:
    model = tiny_pair(KIND)
    batch = AuxCollator(PAD)(counting(6))
    loss = trainer(tmp_path, model, label_smoothing_factor=0.2, per_device_eval_batch_size=6).evaluate()[
        "eval_loss"
    ]
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in batch if name != "labels"}).logits
    exact = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten(), label_smoothing=0.2
    )
    assert loss == pytest.approx(exact.item(), rel=1e-5)


def test_a_pair_prints_under_its_own_name() -> None:
    assert repr(tiny_pair(KIND)).startswith("AuxTunedForCausalLM(")


@pytest.mark.parametrize("concatenated", [True, False])
def test_metrics_get_logits_beside_their_labels(tmp_path: Path, concatenated: bool) -> None:
    model = tiny_pair(KIND)
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        seen.append((logits, labels, prediction.inputs, prediction.losses))
        return {}

    trainer(
        tmp_path,
        model,
        compute_metrics=metrics,
        eval_do_concat_batches=concatenated,
        include_for_metrics=["inputs", "loss"],
    ).evaluate()
    ((logits, labels, inputs, losses),) = seen
    parts = [(logits, labels)] if concatenated else list(zip(logits, labels, strict=True))
    assert [part.shape[-1] for part, _ in parts] == [V] * len(parts)
    kept = [(z[:, :-1], y[:, 1:]) for z, y in parts]
    nll = np.concatenate(
        [
            F.cross_entropy(
                torch.tensor(z).flatten(0, 1), torch.tensor(y).flatten(), reduction="none"
            ).numpy()[y.flatten() != -100]
            for z, y in kept
        ]
    )
    with torch.no_grad():
        loss = model(**AuxCollator(PAD)(counting(6))).loss.item()
    assert nll.mean() == pytest.approx(loss, rel=1e-5)
    assert sum(len(part) for part in ([inputs] if concatenated else inputs)) == 6
    assert np.isfinite(np.concatenate(losses) if isinstance(losses, list) else losses).all()


def test_preprocessed_logits_reach_the_metrics(tmp_path: Path) -> None:
    shapes: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {}

    trainer(
        tmp_path,
        tiny_pair(KIND),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    ).evaluate()
    assert shapes[0][0] == shapes[0][1]


def test_predictions_come_with_and_without_labels(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_pair(KIND))
    assert run.predict(counting(3)).predictions.shape == (3, 12, V)


def test_a_training_step_makes_no_logits() -> None:
    model = tiny_pair(KIND).train()
    with torch.no_grad():
        assert model(**ragged_batch()).logits is None
        assert model.eval()(**ragged_batch(), return_logits=False).logits is None
        assert model(**ragged_batch()).logits.shape == (4, 9, V)


def test_smoothed_steps_of_unequal_batches_equal_one_big_batch(tmp_path: Path) -> None:
    weights = []
    for size, parts in ((6, 1), (2, 3)):
        model = tiny_pair(KIND, trained=False)
        run = trainer(
            tmp_path,
            model,
            label_smoothing_factor=0.1,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            learning_rate=1e-3,
            train_sampling_strategy="sequential",
        )
        run.train_dataset = texts(12)
        run.train()
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
