"""A causal LM's first layers as a model of their own, for those who need no more of it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from auxkern.model.base import FIRST_LAYERS, transformer
from auxkern.model.native import shared_stack
from auxkern.model.native.structures import FINAL_NORMS


class FirstLayers:
    """The view of a base that ends behind a layer: its modules and weights are the base's own.

    ``run_base`` gives its final hidden states as zeros, and as the hidden states of that layer what stands
    there: with last layers at weight 1 the base's own final states count for nothing in the sum.

    Args:
        lm: the base.
        count: of its layers.
    """

    def __init__(self, lm: Any, count: int) -> None:
        self._lm, self._count = lm, count
        self._view: Any = None
        self._made_of: list[nn.Module] = []

    def lm(self) -> Any:
        """The view; made anew where the base's layers have been exchanged."""
        body = transformer(self._lm)
        name, layers = next(
            (name, child) for name, child in body.named_children() if isinstance(child, nn.ModuleList)
        )
        chosen = list(layers)[: self._count]
        if self._view is None or any(a is not b for a, b in zip(chosen, self._made_of, strict=True)):
            inner = copy.copy(body)
            inner._modules = {
                **body._modules,
                name: shared_stack(layers, chosen),
                **{norm: nn.Identity() for norm in FINAL_NORMS if norm in body._modules},
            }
            view = copy.copy(self._lm)
            within = next(part for part, child in self._lm.named_children() if child is body)
            view._modules = {**self._lm._modules, within: inner}
            setattr(view, FIRST_LAYERS, self._count)
            self._view, self._made_of = view, chosen
        return self._view
