"""The line at the end of a run: its gain, whether it fitted, and what to try."""

from __future__ import annotations

from typing import Any

import pytest

from auxkern.evaluation.bootstrap import bootstrap_mean, bootstrap_ratio
from auxkern.evaluation.diagnosis import Run, diagnosis, gain
from auxkern.training.checkpoint import Score, TrainState
from auxkern.training.defaults import Plan

PLAN = Plan(60, 3e-4, 6, 0.1, 6, "cosine", None)
LABELS = [8.0, 12.0, 5.0, 9.0, 6.0]


def ended(nlls: list[float], loss: float, *, lm_nll: float | None = 6.0, validation: int = 100) -> Run:
    """A run with an evaluation every 6 steps, of parts that differ a little."""
    state = TrainState(lm_nll=lm_nll)
    records: list[dict[str, Any]] = []
    for i, nll in enumerate(nlls):
        state.step = 6 * i
        parts = [nll + 0.1 * (j % 2) * i - 0.05 * i * 21 / 20 for j in range(5)]
        state.evaluated(Score([part * count for part, count in zip(parts, LABELS, strict=True)], LABELS))
        records.append({"step": state.step, "evaluation": True, "nll": state.nll})
    records.insert(-1, {"step": state.step, "loss": loss, "lm_loss": lm_nll})
    return Run(state, PLAN, records, 200, validation, 0.3)


def test_no_gain_says_which_weights_there_are_and_what_to_change() -> None:
    said = diagnosis(ended([6.0, 7.0, 11.0], 1.2))
    assert said.startswith(
        "no gain over the base; no step was better than step 0, whose weights the model has"
    )
    assert "validation nll was 6.000 there and 11.0" in said
    assert "the training loss at 1.200" in said
    assert "try a lower learning_rate (it is 0.0003), more training examples (200 now), or a smaller" in said


@pytest.mark.parametrize(
    ("nlls", "loss", "said"),
    [
        ([6.0, 5.0, 5.5], 2.0, "overfitted after step 6 (validation nll was "),
        ([6.0, 5.0, 4.5], 4.4, "not finished: validation nll fell by 0.5"),
        ([6.0, 5.0, 4.999], 3.0, "fitted: 3.000 nats below the base on training examples, 1.0"),
        ([6.0, 5.0, 4.999], 4.9, "underfitted: training examples are learnt no better than others"),
    ],
)
def test_what_fits_is_told_from_what_does_not(nlls: list[float], loss: float, said: str) -> None:
    line = diagnosis(ended(nlls, loss))
    assert line.startswith("gain over the base ")
    assert said in line
    assert "\n" not in line


def test_the_gain_is_of_all_tokens_with_an_interval_around_it() -> None:
    run = ended([6.0, 5.0], 4.0)
    interval = gain(run.state)
    assert interval is not None
    assert run.state.best_nll is not None
    assert interval.mean == pytest.approx(6.0 - run.state.best_nll)
    assert interval.low < interval.mean < interval.high
    assert f"{interval.mean:.3f} nats per token (95% interval {interval.low:.3f} to {interval.high:.3f})" in (
        diagnosis(run)
    )


def test_a_gain_that_may_be_chance_is_said_to_be() -> None:
    state = ended([6.0, 5.99], 4.0).state
    state.best_sums = [a - b for a, b in zip(state.start_sums, [9.0, -9.0, 5.0, -4.0, 1.0], strict=True)]
    assert "so it may be chance" in diagnosis(Run(state, PLAN, [], 200, 100, 0.3))


def test_few_validation_examples_are_said() -> None:
    assert "9 validation examples tell little" in diagnosis(ended([6.0, 5.0], 4.0, validation=9))
    assert "tell little" not in diagnosis(ended([6.0, 5.0], 4.0))


def test_a_start_that_is_not_the_base_is_not_called_so() -> None:
    assert "over what it began with" in diagnosis(ended([6.0, 5.0], 4.0, lm_nll=7.0))
    assert "over what it began with" in diagnosis(ended([6.0, 5.0], 4.0, lm_nll=None))


def test_an_older_run_is_measured_against_the_lm() -> None:
    run = ended([6.0, 5.0], 4.0)
    run.state.start_sums, run.state.best_sums, run.state.part_labels = [], [], []
    assert gain(run.state) is None
    assert diagnosis(run).startswith("gain over the base 1.0")


def test_a_run_without_validation_data_has_nothing_to_tell() -> None:
    assert diagnosis(Run(TrainState(step=5), PLAN, [], 9, 100, 0.0)) == "there is no validation data to tell"


def test_sums_of_clusters_have_the_interval_of_their_values() -> None:
    values, names = [1.0, 2.0, 4.0, 8.0, 3.0], ["a", "a", "b", "c", "b"]
    expected = bootstrap_mean(values, clusters=names)
    assert bootstrap_ratio([3.0, 7.0, 8.0], [2, 2, 1]) == expected
    assert bootstrap_ratio([3.0, 7.0, 0.0, 8.0], [2, 2, 0, 1]) == expected
    for sums, sizes, message in (
        ([1.0], [1, 2], "1 sums and 2 sizes"),
        ([1.0], [0], "none of the 1 clusters"),
        ([1.0, float("nan")], [1, 1], "not finite"),
        ([1.0], [1], "resampling needs 2"),
    ):
        with pytest.raises(ValueError, match=message):
            bootstrap_ratio(sums, sizes)
