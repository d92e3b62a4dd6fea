"""The final hidden states of a transformers model, by the shortest way that it has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auxkern.model.native.ahead import Stack, stack_of
from auxkern.model.native.angles import Angles
from auxkern.model.native.inputs import converted
from auxkern.model.native.packed_layers import hooks_of
from auxkern.model.native.structures import FINAL_NORMS, SILENT_MODULES
from auxkern.model.native.windows import WindowedCache

# Children that a model may have, by what they do.
_EMBEDDINGS = ("embed_tokens", "wte")
_LAYERS = ("layers", "h")
_ROTARY = ("rotary_emb",)


class FinalStates(NamedTuple):
    """What a forward pass gives.

    Attributes:
        hidden: (B, T, D) behind the final norm.
        cache: with the new tokens; None if none was asked for.
        every: of transformers' ``hidden_states``, the embeddings first and ``hidden`` last; None if they
            are not wanted.
    """

    hidden: Tensor
    cache: Any
    every: Sequence[Tensor] | None


def final_states(
    model: nn.Module, inputs: Mapping[str, Any], cache_name: str | None, *, every: bool = False
) -> FinalStates:
    """A forward pass of which nobody wants more than hidden states and the cache.

    Args:
        model: a transformer without output embedding.
        inputs: its arguments.
        cache_name: of its cache among them, and in its output; None if there is none.
        every: whether the hidden states of all layers are wanted.
    """
    stack = None if torch.compiler.is_compiling() else stack_of(model)
    if stack is None:
        return _given(model(**inputs, output_hidden_states=every), cache_name)
    step = stack.token_step
    if step is None or step.model is not model:
        stack.token_step = step = TokenStep(model, stack)
    return step.run(inputs, cache_name, every)


def _given(output: Any, cache_name: str | None) -> FinalStates:
    cache = None if cache_name is None else output.get(cache_name)
    return FinalStates(output.last_hidden_state, cache, output.get("hidden_states"))


class TokenStep:
    """One new token of each sequence, read by an embedding, all layers in one call, and a norm.

    That is what most models do with it, and much of what else their forward does is there for prompts,
    training and other caches. The first step of a model is made both ways; where they differ by one bit,
    ``refusal`` says so, and its own forward makes all of them.

    Args:
        model: a transformer without output embedding.
        stack: its layers.

    Attributes:
        model: as given.
        refusal: why its own forward makes every step; None if it does not.
    """

    def __init__(self, model: nn.Module, stack: Stack) -> None:
        self.model, self._stack = model, stack
        self._compared = False
        children = {
            name: child
            for name, child in model.named_children()
            if name in FINAL_NORMS or not isinstance(child, SILENT_MODULES)
        }
        self._embedding, _, self._norm, rotary = (
            next((children.pop(name) for name in names if name in children), None)
            for names in (_EMBEDDINGS, _LAYERS, FINAL_NORMS, _ROTARY)
        )
        self._rotary = None if rotary is None else Angles(rotary)
        self.refusal = f"it has {', '.join(children)}, too" if children else None
        if self.refusal is None and self._norm is None:
            self.refusal = "it has no norm behind its layers"

    def run(self, inputs: Mapping[str, Any], cache_name: str | None, every: bool) -> FinalStates:
        """As ``final_states``."""
        step = None if self.refusal is not None else self._step(inputs, cache_name)
        if step is not None and self._compared:
            return step(every)
        forward = functools.partial(self.model, **inputs, output_hidden_states=every)
        given = _given(forward() if every else self._stack.run(forward), cache_name)
        if step is not None:
            # What the step writes to the cache is there already.
            self._compared = _equal(step(every), given)
            if not self._compared:
                self.refusal = "its forward does more than to embed, to call its layers, and to norm"
        return given

    def _step(
        self, inputs: Mapping[str, Any], cache_name: str | None
    ) -> Callable[[bool], FinalStates] | None:
        """What makes a step, with all hidden states or without; None if these inputs are of another kind."""
        cache = None if cache_name is None else inputs.get(cache_name)
        vectors, mask = inputs.get("inputs_embeds"), inputs.get("attention_mask")
        new = inputs.get("input_ids") if vectors is None else vectors
        embedding, norm, rotary = self._embedding, self._norm, self._rotary
        if new is None or new.shape[1] != 1 or type(mask) is not Tensor or mask.dim() != 2 or norm is None:
            return None
        if not isinstance(cache, WindowedCache) or not self._may_run(mask):
            return None
        if vectors is None:
            if embedding is None:
                return None
            vectors = embedding(new)
        packed = self._stack.packed(vectors)
        windows = None if packed is None else packed.windows(cache, vectors)
        if packed is None or windows is None or packed.turns_heads is None:
            return None
        angles = None
        if packed.turns_heads:
            positions = inputs.get("position_ids")
            if rotary is None or positions is None:
                return None
            angles = rotary.of(vectors, positions, mask.shape[1])
        layer_inputs = converted(
            packed.packed[0].kernel, (mask.shape[0], 1), mask.bool()[:, None, None], angles
        )
        if layer_inputs is None:
            return None
        x, kernel = vectors.contiguous(), packed.kernel

        def step(every: bool) -> FinalStates:
            made = kernel.through(x, layer_inputs, windows, every=every)
            if not every:
                return FinalStates(norm(made), cache, None)
            *between, last = made.unbind(0)
            hidden = norm(last)
            return FinalStates(hidden, cache, (x, *between, hidden))

        return step

    def _may_run(self, mask: Tensor) -> bool:
        model: Any = self.model
        if model.training or torch.is_grad_enabled() or any(hooks_of(model)):
            return False
        # Of more columns a layer would see a part.
        width = getattr(model.config, "sliding_window", None)
        return width is None or mask.shape[1] <= width


def _equal(one: FinalStates, other: FinalStates) -> bool:
    if one.every is None or other.every is None:
        return torch.equal(one.hidden, other.hidden)
    return len(one.every) == len(other.every) and all(map(torch.equal, one.every, other.every))
