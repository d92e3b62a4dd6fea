"""What settings leave open follows from the amount of data, or from the checkpoint of the run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from auxkern.training.defaults import plan_for
from auxkern.training.settings import FROM_DATA, LoopSettings, TrainSettings

DATA = {"output": "o", "base": "b", "train_file": "t", "validation_file": "v"}


def plan(examples: int, saved: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    return asdict(plan_for(LoopSettings(output="o", **given), examples, saved))


def test_few_examples_get_few_gentle_steps_and_many_what_a_recipe_has() -> None:
    few, many = plan(200), plan(6400, batch_size=64)
    assert many["steps"] == 200
    assert many["warmup_steps"] == 20
    assert (many["learning_rate"], many["weight_decay"], many["dropout"]) == (1e-3, 0.01, 0.1)
    assert few["steps"] < many["steps"]
    assert few["learning_rate"] < many["learning_rate"]
    assert few["weight_decay"] > many["weight_decay"]
    assert few["dropout"] > many["dropout"]
    # Early stopping can act, and does not look all the time.
    assert 3 * few["eval_every"] < few["steps"] < 20 * few["eval_every"]


def test_defaults_change_with_the_amount_of_data_in_one_direction() -> None:
    plans = [plan(10**i) for i in range(7)]
    for name, sign in (("steps", 1), ("learning_rate", 1), ("weight_decay", -1), ("dropout", -1)):
        values = [sign * one[name] for one in plans]
        assert values == sorted(values), name
    assert plans[0]["steps"] >= 10
    assert plans[-1] == {**plans[-2], "dropout": 0.0}


def test_what_is_given_stays() -> None:
    given = {"steps": 7, "learning_rate": 0.5, "warmup_steps": 0, "weight_decay": 0.0, "eval_every": 9}
    assert {name: value for name, value in plan(10**6, **given).items() if name in given} == given
    assert plan(10, warmup_steps=500)["steps"] == 500


def test_a_run_goes_on_with_what_its_checkpoint_has() -> None:
    saved = {name: getattr(LoopSettings(output="o", steps=77, learning_rate=2.0), name) for name in FROM_DATA}
    saved |= {"warmup_steps": 3, "weight_decay": 0.5, "eval_every": 11}
    assert {name: plan(10, saved)[name] for name in FROM_DATA} == saved
    assert plan(10, saved, steps=9)["steps"] == 9


def test_dropout_is_the_pairs_only_where_it_gives_none() -> None:
    settings = TrainSettings(**DATA, pair={"pointer": True})
    chosen = plan_for(settings, 200)
    assert chosen.written_into(settings).pair == {"pointer": True, "dropout": chosen.dropout}
    assert set(chosen.chosen(settings)) == {*FROM_DATA, "dropout"}
    own = TrainSettings(**DATA, pair={"dropout": 0.25})
    assert plan_for(own, 200).written_into(own).pair == {"dropout": 0.25}
    # A run that was begun without goes on without.
    old = plan_for(settings, 200, {**LoopSettings(output="o").as_json(), "pair": {"pointer": True}})
    assert old.written_into(settings).pair == {"pointer": True}


def test_settings_that_are_written_are_complete_and_stay_the_same() -> None:
    settings = TrainSettings(**DATA)
    written = plan_for(settings, 300).written_into(settings)
    assert all(getattr(written, name) is not None for name in FROM_DATA)
    assert plan_for(written, 10**6).written_into(written) == written


def test_defaults_that_contradict_what_is_given_are_refused() -> None:
    settings = LoopSettings(output="o", steps=None, warmup_steps=5)
    with pytest.raises(ValueError, match="warmup_steps is 5 but steps is 4"):
        plan_for(settings, 200, {"steps": 4}).written_into(settings)
