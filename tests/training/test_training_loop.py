"""The training loop: exact resumption, one denominator, checkpoints, signals, refusals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from auxkern.training.checkpoint import checkpoint_steps
from auxkern.training.collator import AuxCollator
from auxkern.training.defaults import plan_for
from auxkern.training.examples import ExampleSet, fingerprint_of
from auxkern.training.loop import TrainingInterrupted, train
from auxkern.training.order import DataOrder
from auxkern.training.settings import LoopSettings
from tests.support.stand_in import (
    SETTINGS,
    At,
    StandIn,
    bits,
    examples,
    interrupt,
    log,
    run,
    run_in_a_process,
)


@pytest.fixture
def uninterrupted(tmp_path: Path) -> Path:
    run(tmp_path / "uninterrupted")
    return tmp_path / "uninterrupted"


# --------------------------------------------------------------------------------- what a step is


def test_learning_rates_of_the_schedules() -> None:
    def rates(schedule: str) -> list[float]:
        settings = LoopSettings(output="x", steps=6, warmup_steps=2, learning_rate=1.0, schedule=schedule)
        return [plan_for(settings, 1).learning_rate_at(step) for step in range(6)]

    assert rates("constant") == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates("linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates("cosine") == pytest.approx([0.5, 1.0, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


def test_each_epoch_takes_each_example_once_in_its_own_order() -> None:
    settings = LoopSettings(output="x", batch_size=4, gradient_accumulation=2)
    order = DataOrder(10, settings)
    stream = [index for step in range(5) for batch in order.of_step(step) for index in batch]
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_of_a_step_does_not_depend_on_the_steps_before() -> None:
    settings = LoopSettings(output="x", batch_size=3)
    order = DataOrder(10, settings)
    walked = [order.of_step(step) for step in range(9)]
    assert [DataOrder(10, settings).of_step(step) for step in range(9)] == walked
    other = LoopSettings(output="x", batch_size=3, seed=1)
    assert [DataOrder(10, other).of_step(step) for step in range(9)] != walked


def test_without_shuffling_the_order_is_the_files() -> None:
    order = DataOrder(5, LoopSettings(output="x", batch_size=4, shuffle=False))
    assert order.of_step(0) == [[0, 1, 2, 3]]
    assert order.of_step(1) == [[4, 0, 1, 2]]


def test_accumulated_batches_of_unequal_counts_equal_one_big_batch(tmp_path: Path) -> None:
    weights = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        model = StandIn(dropout=0.0)
        options = {"batch_size": batch_size, "gradient_accumulation": accumulation}
        run(tmp_path / str(accumulation), model, **options)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    # Sums in another order; AdamW's division by the root of tiny squares enlarges their rounding.
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(weights[2], weights[0], rtol=0, atol=1e-4)


def test_batches_of_like_length_make_the_same_step_with_less_padding(tmp_path: Path) -> None:
    weights, cells = {}, {}
    for sort in (False, True):
        seen: list[torch.Tensor] = []
        model = StandIn(dropout=0.0)
        model.register_forward_pre_hook(
            lambda module, _, batch, seen=seen: (
                seen.append(batch["attention_mask"]) if module.training else None
            ),
            with_kwargs=True,
        )
        options = {"steps": 3, "batch_size": 2, "gradient_accumulation": 4}
        run(tmp_path / str(sort), model, sort_by_length=sort, **options)
        weights[sort] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        cells[sort] = [(mask.numel(), mask.sum().item()) for mask in seen]
    torch.testing.assert_close(weights[True], weights[False], rtol=0, atol=1e-4)
    padded, real = ({sort: sum(cell[i] for cell in cells[sort]) for sort in cells} for i in (0, 1))
    assert real[True] == real[False]
    assert padded[True] < padded[False]


def test_what_is_measured_stands_in_the_evaluations_of_the_log(tmp_path: Path) -> None:
    modes = []

    def measure(step: int) -> dict[str, Any]:
        modes.append(model.training)
        return {"square": step**2}

    model = StandIn()
    train(
        model,
        examples(9),
        LoopSettings(output=str(tmp_path), **SETTINGS),
        collate=AuxCollator(0),
        validation=examples(4),
        measure=measure,
    )
    measured = {line["step"]: line["measured"] for line in log(tmp_path) if line.get("evaluation")}
    assert measured == {step: {"square": step**2} for step in (0, 4, 8, 11)}
    assert modes == [False] * 4


def test_clipping_scales_the_gradient_to_the_limit(tmp_path: Path) -> None:
    # Plain gradient descent would show it directly; AdamW does in its second moment after one step.
    options = {"steps": 1, "warmup_steps": 0, "batch_size": 10, "betas": (0.9, 0.5)}
    norms = {}
    for limit in (0.0, 0.01):
        output = tmp_path / str(limit)
        run(output, StandIn(dropout=0.0), max_grad_norm=limit, **options)
        tensors = load_file(output / "checkpoint-1" / "optimizer.safetensors")
        squares = [t.sum() for key, t in tensors.items() if key.endswith("exp_avg_sq")]
        norms[limit] = (2 * torch.stack(squares).sum()).sqrt().item()
        assert log(output)[1]["gradient_norm"] == pytest.approx(norms[0.0], rel=1e-5)
    assert norms[0.0] > 0.02
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


def test_training_learns_and_gives_the_random_state_back(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    model = StandIn()
    torch.manual_seed(3)
    result = run(tmp_path, model, steps=200, eval_every=100)
    assert torch.equal(torch.rand(4), expected)
    assert result.state.best_nll < 0.5  # log 23 = 3.1 before


# ------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("point", ["step", "save"])
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(
    point: str, tmp_path: Path, uninterrupted: Path
) -> None:
    output = tmp_path / "killed"
    done = run_in_a_process(output, point)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint_steps(output) == ([6, 8] if point == "step" else [0, 3])
    run(output, resume=True)
    assert bits(output) == bits(uninterrupted)
    assert log(output) == log(uninterrupted)
    assert not list(output.glob(".*"))


@pytest.mark.parametrize("step", [1, 4, 7])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_resumes_exactly(
    step: int, number: signal.Signals, tmp_path: Path, uninterrupted: Path
) -> None:
    output = tmp_path / "interrupted"
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted) as caught:
        run(output, progress=At(step, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) is before
    assert caught.value.step == step
    assert caught.value.checkpoint == output / f"checkpoint-{step}"
    run(output, resume=True)
    assert bits(output) == bits(uninterrupted)
    assert log(output) == log(uninterrupted)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt) as caught:
        run(tmp_path, progress=At(5, twice))
    assert not isinstance(caught.value, TrainingInterrupted)
    assert checkpoint_steps(tmp_path) == [3, 4]


def test_an_evaluation_that_was_interrupted_is_made_up_for(tmp_path: Path, uninterrupted: Path) -> None:
    class Interrupting(StandIn):
        steps = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += self.training
            if not self.training and self.steps:
                interrupt()
            return super().forward(*args, **kwargs)

    output = tmp_path / "interrupted"
    with pytest.raises(TrainingInterrupted):
        run(output, Interrupting())
    assert json.loads((output / "checkpoint-4" / "trainer.json").read_text())["evaluated_step"] == 0
    # As if it was killed after the evaluation of the resumed run and before the next checkpoint.
    with (output / "log.jsonl").open("a") as lines:
        lines.write('{"step": 4, "evaluation": true, "nll": 1.0}\n')
    run(output, resume=True)
    assert log(output) == log(uninterrupted)


def test_a_finished_run_resumed_changes_nothing(uninterrupted: Path) -> None:
    before = bits(uninterrupted), log(uninterrupted)
    result = run(uninterrupted, resume=True)
    assert (bits(uninterrupted), log(uninterrupted)) == before
    assert result.state.step == 11


def test_resuming_where_nothing_is_saved_starts_at_the_beginning(tmp_path: Path, uninterrupted: Path) -> None:
    run(tmp_path / "new", resume=True)
    assert bits(tmp_path / "new") == bits(uninterrupted)


def test_a_log_line_cut_short_is_dropped(tmp_path: Path, uninterrupted: Path) -> None:
    output = tmp_path / "interrupted"
    with pytest.raises(TrainingInterrupted):
        run(output, progress=At(7, interrupt))
    with (output / "log.jsonl").open("a") as lines:
        lines.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
    run(output, resume=True)
    assert log(output) == log(uninterrupted)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.01}, r"learning_rate is 0.01 but was 0.05"),
        ({"steps": 12}, r"steps is 12 but was 11"),
        (
            {"seed": 6, "betas": (0.8, 0.9)},
            r"betas is \[0.8, 0.9\] but was \[0.9, 0.999\]; seed is 6 but was 5",
        ),
    ],
)
def test_resuming_with_other_settings_is_refused(
    changes: dict[str, Any], named: str, uninterrupted: Path
) -> None:
    before = bits(uninterrupted)
    with pytest.raises(ValueError, match=named):
        run(uninterrupted, resume=True, **changes)
    assert bits(uninterrupted) == before


def test_settings_that_change_nothing_may_differ_on_resuming(tmp_path: Path, uninterrupted: Path) -> None:
    output = tmp_path / "interrupted"
    with pytest.raises(TrainingInterrupted):
        run(output, progress=At(7, interrupt))
    run(output, resume=True, log_every=1, save_every=5, keep_checkpoints=1)
    name = "checkpoint-11/optimizer.safetensors"
    assert bits(output)[name] == bits(uninterrupted)[name]


def test_a_constant_learning_rate_may_go_on_for_more_steps(tmp_path: Path) -> None:
    options = {"schedule": "constant", "max_grad_norm": 0.0}
    run(tmp_path / "long", steps=9, **options)
    run(tmp_path / "short", steps=6, **options)
    run(tmp_path / "short", steps=9, resume=True, **options)
    assert bits(tmp_path / "short") == bits(tmp_path / "long")
    with pytest.raises(ValueError, match="at step 9, past steps=8"):
        run(tmp_path / "short", steps=8, resume=True, **options)


def test_resuming_with_other_data_is_refused(uninterrupted: Path) -> None:
    for training, validation, kind in ((11, 5, "training"), (10, 6, "validation")):
        with pytest.raises(ValueError, match=f"other {kind} data"):
            train(
                StandIn(),
                examples(training),
                LoopSettings(output=str(uninterrupted), resume=True, **SETTINGS),
                collate=AuxCollator(0),
                validation=examples(validation, seed=1),
            )


def test_the_fingerprint_knows_ids_labels_and_conditions() -> None:
    def changed(name: str) -> list[dict[str, list[int]]]:
        made = examples()
        made[4] = {**made[4], name: [*made[4][name][:-1], 22 - made[4][name][-1]]}
        return made

    names = ("input_ids", "labels", "condition_ids")
    assert len({fingerprint_of(examples()), *(fingerprint_of(changed(name)) for name in names)}) == 4


def test_a_new_run_in_a_folder_with_another_is_refused(uninterrupted: Path) -> None:
    before = bits(uninterrupted), log(uninterrupted)
    with pytest.raises(ValueError, match="holds a run with checkpoint-11 already; resume it"):
        run(uninterrupted)
    assert (bits(uninterrupted), log(uninterrupted)) == before


# ------------------------------------------------------------------------------------ checkpoints


def test_checkpoints_hold_no_pickle_and_nothing_but_the_model_is_published(uninterrupted: Path) -> None:
    folder = uninterrupted / "checkpoint-11"
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "config.json", "optimizer.safetensors", "trainer.json"}
    files = {path.name for path in uninterrupted.iterdir() if path.is_file()}
    assert files == {"model.safetensors", "config.json", "log.jsonl"}


def test_the_best_checkpoint_is_kept_and_published(tmp_path: Path) -> None:
    result = train(
        StandIn(dropout=0.0),
        examples(),
        LoopSettings(
            output=str(tmp_path), steps=40, learning_rate=0.05, eval_every=4, save_every=4, patience=0
        ),
        collate=AuxCollator(0),
        validation=[*examples(), *examples(step=2)],  # half of it contradicts what it learns
    )
    nlls = {line["step"]: line["nll"] for line in log(tmp_path) if line.get("evaluation")}
    best = min(nlls, key=nlls.__getitem__)
    assert 0 < best < 36
    assert (result.state.best_step, result.state.best_nll) == (best, nlls[best])
    assert checkpoint_steps(tmp_path) == [best, 36, 40]
    published = (tmp_path / "model.safetensors").read_bytes()
    assert published == (tmp_path / f"checkpoint-{best}" / "model.safetensors").read_bytes()


def test_without_validation_the_last_model_is_published(tmp_path: Path) -> None:
    settings = LoopSettings(output=str(tmp_path), steps=3)
    result = train(StandIn(), examples(), settings, collate=AuxCollator(0))
    assert result.state.best_step is None
    published = (tmp_path / "model.safetensors").read_bytes()
    assert published == (tmp_path / "checkpoint-3" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(value: float, tmp_path: Path) -> None:
    class Diverging(StandIn):
        steps = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            self.steps += self.training
            return (
                output if self.steps < 9 else type(output)(loss=output.loss * value)
            )  # 5th step, first half

    model = Diverging()
    with pytest.raises(
        FloatingPointError, match=r"in step 5: try a lower learning_rate.*checkpoint-4 is kept"
    ):
        run(tmp_path, model)
    kept = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        run(tmp_path / "a", StandIn().requires_grad_(False))
    settings = LoopSettings(output=str(tmp_path / "a"))
    with pytest.raises(ValueError, match="training has no examples"):
        train(StandIn(), [], settings, collate=AuxCollator(0))
    with pytest.raises(ValueError, match="validation has no examples"):
        train(StandIn(), examples(), settings, collate=AuxCollator(0), validation=[])
    assert not list(tmp_path.iterdir())


def test_validation_nll_is_the_mean_over_all_labels(tmp_path: Path) -> None:
    model = StandIn()
    result = run(tmp_path, model, batch_size=2)
    total, count = 0.0, 0
    model.eval()
    for item in examples(5, seed=1):
        ids, labels = torch.tensor(item["input_ids"]), torch.tensor(item["labels"])
        z = model.head(model.embedding(ids))[:-1].double()
        total += F.cross_entropy(z, labels[1:], reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    assert result.state.nll == pytest.approx(total / count, rel=1e-5)


def test_lm_alone_of_known_nlls_counts_labels_only(tmp_path: Path) -> None:
    made = examples()
    # Position t holds the nll of token t + 1: let it be that token's place, 100 at the last.
    places = [torch.tensor([*range(1, len(item["input_ids"])), 100], dtype=torch.float32) for item in made]
    known = ExampleSet(made, lm_nll=places.__getitem__)
    settings = LoopSettings(output=str(tmp_path), steps=1, batch_size=10)
    result = train(StandIn(), known, settings, collate=AuxCollator(0), validation=known)
    labelled = [place for item in made for place, label in enumerate(item["labels"]) if label != -100]
    assert result.state.lm_nll == pytest.approx(sum(labelled) / len(labelled))
    assert log(tmp_path)[1]["lm_loss"] == pytest.approx(sum(labelled) / len(labelled))
