"""What became of a training run, in a line: its gain, whether it fitted, and what to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auxkern.evaluation.bootstrap import Interval, bootstrap_ratio
from auxkern.training.checkpoint import TrainState
from auxkern.training.defaults import Plan

_FEW = 20  # examples, of which a mean says little
_NOISE = 0.01  # nats per token


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        state: at its end.
        plan: what it went by.
        records: of its log, see ``Progress``.
        training, validation: how many examples it had of each.
        dropout: of the pair.
    """

    state: TrainState
    plan: Plan
    records: Sequence[Mapping[str, Any]]
    training: int
    validation: int
    dropout: float


def gain(state: TrainState) -> Interval | None:
    """How much lower the best validation nll is than that before the first step, nats per token.

    With a 95% interval, over the parts of the validation set; None where these are not known (an older run,
    or one without validation data) or there is one only.
    """
    differences = [a - b for a, b in zip(state.start_sums, state.best_sums, strict=True)]
    if sum(count > 0 for count in state.part_labels) < 2 or not differences:
        return None
    return bootstrap_ratio(differences, state.part_labels)


def diagnosis(run: Run) -> str:
    """Gain, over- or underfitted, and what to try, on one line."""
    parts = [_gained(run), _fit(run)]
    if run.validation < _FEW:
        parts.append(f"{run.validation} validation examples tell little; take 100 or more")
    return "; ".join(part for part in parts if part)


def _gained(run: Run) -> str:
    state, interval = run.state, gain(run.state)
    if state.best_nll is None:
        return "there is no validation data to tell"
    if state.best_step == 0:
        return f"no gain over {_start(state)}"
    if interval is None:
        before = _nll_before(state)
        return (
            ""
            if before is None
            else f"gain over {_start(state)} {before - state.best_nll:.3f} nats per token"
        )
    chance = ", so it may be chance" if interval.low <= 0 else ""
    return (
        f"gain over {_start(state)} {interval.mean:.3f} nats per token "
        f"(95% interval {interval.low:.3f} to {interval.high:.3f}{chance})"
    )


def _nll_before(state: TrainState) -> float | None:
    """That of step 0; of an older run the LM's alone."""
    return sum(state.start_sums) / sum(state.part_labels) if state.start_sums else state.lm_nll


def _start(state: TrainState) -> str:
    before = _nll_before(state)
    same = before is not None and state.lm_nll is not None and abs(before - state.lm_nll) < _NOISE
    return "the base" if same else "what it began with"


def _fit(run: Run) -> str:
    state, plan = run.state, run.plan
    if state.best_nll is None or state.nll is None:
        return ""
    before, best = _nll_before(state), state.best_step
    gained = 0.0 if before is None else before - state.best_nll
    noise = max(_NOISE, 0.02 * gained)
    steps = [record for record in run.records if "loss" in record]
    nlls = [record["nll"] for record in run.records if record.get("evaluation")]
    loss = f", the training loss at {steps[-1]['loss']:.3f}" if steps else ""
    ended = f"validation nll was {state.best_nll:.3f} there and {state.nll:.3f} at step {state.step:,}{loss}"
    gentler = (
        f"a lower learning_rate (it is {plan.learning_rate:g}), more training examples ({run.training:,} now)"
    )
    if best == 0:
        return (
            f"no step was better than step 0, whose weights the model has ({ended}); try {gentler}, or a "
            "smaller auxiliary"
        )
    if state.nll - state.best_nll > noise:
        return (
            f"overfitted after step {best:,} ({ended}); try {gentler}, or more dropout ({run.dropout:g}) and "
            f"weight_decay ({plan.weight_decay:g})"
        )
    if best == state.step and len(nlls) > 1 and nlls[-2] - nlls[-1] > noise:
        return (
            f"not finished: validation nll fell by {nlls[-2] - nlls[-1]:.3f} in the last {plan.eval_every:,} "
            f"steps; try more steps ({plan.steps:,} now)"
        )
    if state.lm_nll is None or not steps or steps[-1]["lm_loss"] is None:
        return ""
    learnt, held_out = steps[-1]["lm_loss"] - steps[-1]["loss"], state.lm_nll - state.best_nll
    if learnt > 1.25 * held_out or (best is not None and best < state.step):
        return (
            f"fitted: {learnt:.3f} nats below the base on training examples, {held_out:.3f} on others; more "
            f"examples would help most ({run.training:,} now)"
        )
    return (
        "underfitted: training examples are learnt no better than others; try a higher learning_rate "
        f"({plan.learning_rate:g} now), more steps ({plan.steps:,}) or a larger auxiliary"
    )
