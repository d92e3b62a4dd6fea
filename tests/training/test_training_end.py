"""A run ends no worse than it began, with the best of all steps, and early if nothing gets better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from auxkern.training.checkpoint import checkpoint_steps
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import ExampleSet
from auxkern.training.loop import TrainingInterrupted, TrainResult, train
from auxkern.training.progress import Progress
from auxkern.training.settings import LoopSettings
from tests.support.stand_in import SETTINGS, At, StandIn, bits, examples, interrupt, log, run

# Of a run that only gets worse: the validation set counts in other steps than the training set.
WORSE = {
    **SETTINGS,
    "steps": 40,
    "learning_rate": 0.5,
    "eval_every": 4,
    "save_every": 3,
    "keep_checkpoints": 1,
}


def run_worse(
    output: Path, model: StandIn | None = None, progress: Progress | None = None, **changes: Any
) -> TrainResult:
    return train(
        model or StandIn(),
        examples(),
        LoopSettings(output=str(output), **{**WORSE, **changes}),
        collate=AuxCollator(0),
        validation=examples(step=2),
        progress=progress,
    )


def published(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def is_as_it_began(output: Path) -> bool:
    before = StandIn().state_dict()
    return all(torch.equal(tensor, before[name]) for name, tensor in published(output).items())


def evaluations(output: Path) -> dict[int, float]:
    return {line["step"]: line["nll"] for line in log(output) if line.get("evaluation")}


# ------------------------------------------------------------------------------------------ the best


def test_where_no_step_is_better_the_weights_of_step_0_are_published(tmp_path: Path) -> None:
    state = run_worse(tmp_path, patience=0).state
    nlls = evaluations(tmp_path)
    assert list(nlls) == [*range(0, 41, 4)]
    assert min(nlls, key=nlls.__getitem__) == 0
    assert (state.best_step, state.best_nll, state.nll) == (0, nlls[0], nlls[40])
    assert is_as_it_began(tmp_path)
    assert checkpoint_steps(tmp_path) == [0, 40]


def test_steps_too_few_for_an_evaluation_between_are_judged_too(tmp_path: Path) -> None:
    run_worse(tmp_path, steps=12, eval_every=100, save_every=100)
    assert list(evaluations(tmp_path)) == [0, 12]
    assert is_as_it_began(tmp_path)


def test_the_weights_of_step_0_make_room_for_better_ones(tmp_path: Path) -> None:
    assert run(tmp_path, steps=100, keep_checkpoints=1).state.best_step > 0
    assert 0 not in checkpoint_steps(tmp_path)
    assert not is_as_it_began(tmp_path)


def test_without_validation_data_nothing_is_kept_of_step_0(tmp_path: Path) -> None:
    settings = LoopSettings(output=str(tmp_path), steps=3, keep_checkpoints=9, save_every=1)
    train(StandIn(), examples(), settings, collate=AuxCollator(0))
    assert checkpoint_steps(tmp_path) == [1, 2, 3]


def test_the_parts_of_the_best_score_are_kept(tmp_path: Path) -> None:
    state = run(tmp_path, steps=100).state
    assert len(state.part_labels) == len(state.start_sums) == len(state.best_sums) == 5
    labels = [sum(label != -100 for label in item["labels"][1:]) for item in examples(5, seed=1)]
    assert state.part_labels == labels
    assert sum(state.best_sums) / sum(labels) == pytest.approx(state.best_nll)
    assert sum(state.start_sums) / sum(labels) == pytest.approx(evaluations(tmp_path)[0])


# -------------------------------------------------------------------------------------------- patience


class Listening(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_run_ends_where_so_many_evaluations_brought_nothing_new(tmp_path: Path) -> None:
    progress = Listening()
    state = run_worse(tmp_path, patience=2, progress=progress).state
    assert state.step == 8
    assert list(evaluations(tmp_path)) == [0, 4, 8]
    assert checkpoint_steps(tmp_path) == [0, 8]
    assert progress.said == [
        "ended early, after step 8: 2 evaluations in a row were no better than that of step 0 (patience)"
    ]


def test_an_evaluation_that_is_better_is_waited_for(tmp_path: Path) -> None:
    state = run(tmp_path, steps=100, patience=1).state
    nlls = list(evaluations(tmp_path).values())
    worse = [later >= min(nlls[: i + 1]) for i, later in enumerate(nlls[1:])]
    assert worse[:-1] == [False] * (len(worse) - 1)
    assert worse[-1] == (state.step < 100)


def test_a_run_that_ended_early_resumed_changes_nothing(tmp_path: Path) -> None:
    run_worse(tmp_path)
    before = bits(tmp_path), log(tmp_path)
    assert run_worse(tmp_path, resume=True).state.step == 12
    assert (bits(tmp_path), log(tmp_path)) == before


def test_a_run_that_ended_early_goes_on_with_more_patience(tmp_path: Path) -> None:
    run_worse(tmp_path / "whole", patience=5)
    run_worse(tmp_path / "part", patience=2)
    run_worse(tmp_path / "part", patience=5, resume=True)
    assert checkpoint_steps(tmp_path / "whole") == [0, 20]
    assert bits(tmp_path / "part") == bits(tmp_path / "whole")
    assert log(tmp_path / "part") == log(tmp_path / "whole")


@pytest.mark.parametrize("step", [1, 5, 9, 11])
def test_stopped_and_resumed_it_ends_at_the_same_step_with_the_same_weights(
    step: int, tmp_path: Path
) -> None:
    run_worse(tmp_path / "whole")
    output = tmp_path / "stopped"
    with pytest.raises(TrainingInterrupted):
        run_worse(output, progress=At(step, interrupt))
    run_worse(output, resume=True)
    assert bits(output) == bits(tmp_path / "whole")
    assert log(output) == log(tmp_path / "whole")
    assert is_as_it_began(output)


@pytest.mark.parametrize("at", ["the evaluation", "step 1"])
def test_stopped_before_anything_is_better_step_0_is_still_there(at: str, tmp_path: Path) -> None:
    class Interrupting(StandIn):
        forwards = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.forwards += 1
            if self.forwards == (1 if at == "the evaluation" else len(examples()) + 1):
                interrupt()
            return super().forward(*args, **kwargs)

    run_worse(tmp_path / "whole")
    with pytest.raises(TrainingInterrupted) as caught:
        run_worse(tmp_path / "stopped", Interrupting())
    assert caught.value.step == (0 if at == "the evaluation" else 1)
    run_worse(tmp_path / "stopped", resume=True)
    assert bits(tmp_path / "stopped") == bits(tmp_path / "whole")
    assert log(tmp_path / "stopped") == log(tmp_path / "whole")


def test_an_evaluation_that_no_checkpoint_knows_of_leaves_no_second_line(tmp_path: Path) -> None:
    run_worse(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "log.jsonl").write_text('{"step": 0, "evaluation": true, "nll": 3.0}\n')
    run_worse(tmp_path / "killed", resume=True)
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "old"
    with pytest.raises(TrainingInterrupted):
        run_worse(output, progress=At(7, interrupt))
    path = output / "checkpoint-7" / "trainer.json"
    saved = json.loads(path.read_text())
    for name in ("stale", "part_labels", "start_sums", "best_sums"):
        del saved[name]
    del saved["settings"]["patience"]
    # It did not look at step 0.
    saved |= {"best_step": 4, "best_nll": saved["nll"]}
    path.write_text(json.dumps(saved))
    (output / "checkpoint-0").rename(output / "checkpoint-4")
    assert run_worse(output, resume=True).state.step == 16
    assert list(evaluations(output)) == [0, 4, 8, 12, 16]


# ---------------------------------------------------------------------------------- what is not finite


class Diverging(StandIn):
    """Its loss is NaN from so many training batches on."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        self.left -= self.training
        return output if self.left > 0 else type(output)(loss=output.loss * float("nan"))


def test_a_loss_that_is_not_finite_leaves_the_best_weights(tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=rf"in step 5: .*{tmp_path} holds the best weights so far, of"
    ):
        run(tmp_path, Diverging(9))
    best = json.loads((tmp_path / "checkpoint-4" / "trainer.json").read_text())["best_step"]
    expected = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in published(tmp_path).items())


def test_a_first_step_that_is_not_finite_leaves_what_it_began_with(tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"in step 1: .*checkpoint-0 is kept; .*weights so far, of step 0"
    ):
        run(tmp_path, Diverging(1))
    assert is_as_it_began(tmp_path)


def test_a_base_whose_loss_is_not_finite_is_said_to_be_at_fault(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="nan before the first step: load the base in float32"):
        run(tmp_path, Diverging(0))
    assert not (tmp_path / "model.safetensors").exists()


def test_a_validation_set_without_a_label_is_refused(tmp_path: Path) -> None:
    masked = [{**item, "labels": [-100] * len(item["labels"])} for item in examples(3)]
    settings = LoopSettings(output=str(tmp_path / "out"), **SETTINGS)
    options: dict[str, Any] = {"collate": AuxCollator(0)}
    with pytest.raises(ValueError, match=r"nothing is to be learnt from 3 examples, .* validation example 0"):
        train(StandIn(), examples(), settings, validation=masked, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="validation has no label to score"):
        train(StandIn(), examples(), settings, validation=ExampleSet(masked, "known"), **options)
