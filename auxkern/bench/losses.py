"""What the benchmarks of losses have in common: their two passes, and how both are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auxkern.bench.operators import Errors, Implementation


class LossOperator(ABC):
    """An operator whose implementations return a 0-d loss, measured forward and with its backward."""

    kernel = "losses"

    def step(self, inputs: Any, implementation: Implementation, name: str) -> Tensor:
        if name == "forward":
            with torch.no_grad():
                return implementation.run(inputs)
        loss = implementation.run(inputs)
        loss.backward()
        return loss.detach()

    def check(
        self, inputs: Any, exact: Any, implementation: Implementation, made: Mapping[str, Tensor]
    ) -> Errors:
        # A forward without gradients may take another path; it must say the same.
        each = [self.errors(inputs, exact, loss) for loss in made.values()]
        worst = {name: _worst([errors.values[name] for errors in each]) for name in each[0].values}
        return Errors(worst, each[0].tolerance)

    @abstractmethod
    def errors(self, inputs: Any, exact: Any, loss: Tensor) -> Errors:
        """Errors of ``loss`` and of the gradients that now lie in ``inputs.leaves()``."""


def _worst(errors: list[float]) -> float:
    # max() would lose a NaN that is not its first argument.
    return float(torch.tensor(errors, dtype=torch.float64).max())
