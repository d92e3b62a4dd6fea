"""What a run does where its settings leave it open: that depends on the amount of data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from auxkern.training.settings import FROM_DATA, LoopSettings, TrainSettings

_Settings = TypeVar("_Settings", bound=LoopSettings)

# Between so few examples and so many, defaults change with the logarithm of their number.
_FEW, _MANY = 200, 6400
# Of few examples and of many. Few are learnt by heart within a few epochs: slower, and with more noise.
_EPOCHS = (10.0, 2.0)
_LEARNING_RATE = (5e-4, 1e-3)
_WEIGHT_DECAY = (0.1, 0.01)
_DROPOUT = (0.3, 0.1)
_MOST_STEPS, _LEAST_STEPS, _EVALUATIONS = 1000, 20, 10


@dataclass(frozen=True)
class Plan:
    """The numbers that a run goes by, whether its settings or the amount of data gave them.

    Attributes:
        steps, learning_rate, warmup_steps, weight_decay, eval_every: as in ``LoopSettings``.
        schedule: of the learning rate after the warm-up.
        dropout: of the pair, where ``TrainSettings.pair`` gives none; None if it stays the model's own.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    eval_every: int
    schedule: str
    dropout: float | None

    def learning_rate_at(self, step: int) -> float:
        """That of a step, counted from 0: warm-up, then the schedule down to 0 after the last."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        share = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        left = 1.0 - share if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
        return self.learning_rate * left

    def chosen(self, settings: LoopSettings) -> dict[str, float]:
        """Those of its numbers that the settings leave open, by name."""
        names = [name for name in FROM_DATA if getattr(settings, name) is None]
        if (
            isinstance(settings, TrainSettings)
            and "dropout" not in settings.pair
            and self.dropout is not None
        ):
            names.append("dropout")
        return {name: getattr(self, name) for name in names}

    def written_into(self, settings: _Settings) -> _Settings:
        """The settings with these numbers where they left them open, as a checkpoint keeps them.

        Raises:
            ValueError: they contradict what the settings give.
        """
        values: dict[str, Any] = dict(self.chosen(settings))
        if "dropout" in values:
            pair: Any = settings
            values["pair"] = {**pair.pair, "dropout": values.pop("dropout")}
        return replace(settings, **values)


def plan_for(settings: LoopSettings, examples: int, saved: Mapping[str, Any] | None = None) -> Plan:
    """The numbers of a run; what its settings give stays.

    Args:
        settings: of the loop, or of the command.
        examples: to train on.
        saved: settings in a checkpoint of the run, which goes on with them where it was given none.
    """
    share = min(1.0, max(0.0, math.log(max(1, examples) / _FEW, _MANY / _FEW)))

    def between(ends: tuple[float, float]) -> float:
        few, many = ends
        # Two digits, such as people write.
        return float(f"{few ** (1 - share) * many**share:.2g}")

    values: dict[str, Any] = {name: getattr(settings, name) for name in FROM_DATA}
    for name in FROM_DATA:
        if values[name] is None and saved is not None:
            values[name] = saved.get(name)
    each = settings.batch_size * settings.gradient_accumulation
    if values["steps"] is None:
        steps = min(_MOST_STEPS, max(_LEAST_STEPS, math.ceil(between(_EPOCHS) * examples / each)))
        values["steps"] = max(steps, values["warmup_steps"] or 0)
    steps = values["steps"]
    dropout: float | None = between(_DROPOUT)
    if saved is not None:
        dropout = saved.get("pair", {}).get("dropout")
    elif steps * each <= examples:
        dropout = 0.0  # what is seen once is not learnt by heart
    computed = {
        "learning_rate": between(_LEARNING_RATE),
        "warmup_steps": steps // 10,
        "weight_decay": between(_WEIGHT_DECAY),
        "eval_every": min(100, math.ceil(steps / _EVALUATIONS)),
    }
    values |= {name: value for name, value in computed.items() if values[name] is None}
    return Plan(**values, schedule=settings.schedule, dropout=dropout)
