"""One new token of each sequence in a slot, by embedding, layers and norm instead of the model's forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from auxkern.generation.slots import SlotTable
from auxkern.model.caches import CACHE_NAME
from auxkern.model.native import final_states, native_refusal, stack_of, use_native_kernels
from tests.model.test_native_layers import FAMILIES, called, model_of, padded_on_the_left

pytestmark = pytest.mark.skipif(native_refusal() is not None, reason=str(native_refusal()))

# Families whose layers differ among themselves, or see fewer columns than there are; GPT-2's adds positions.
OWN_FORWARD = {"gpt2", "gemma3", "smollm3", "mistral, window", "phi3"}


class Running:
    """A model whose slots hold some texts."""

    def __init__(self, family: str) -> None:
        self.lm = use_native_kernels(model_of(FAMILIES[family]))
        self.model: Any = self.lm.base_model
        ids, mask = padded_on_the_left()
        cache = DynamicCache()
        with torch.no_grad():
            called(self.model, ids, mask, **{CACHE_NAME: cache})
        self.table = SlotTable(len(ids), 40, ids.device)
        self.table.reserve(cache)
        self.table.join(cache, mask)

    def inputs(self, seed: int) -> dict[str, Any]:
        count = self.table.count
        ids = torch.randint(3, 97, (count, 1), generator=torch.Generator().manual_seed(seed))
        mask = torch.cat([self.table.window, torch.ones_like(ids)], 1)
        positions = (mask.cumsum(-1) - 1)[:, -1:]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        return {**inputs, CACHE_NAME: self.table.cache}

    @torch.no_grad()
    def step(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of one step by ``final_states``, and by the model's own forward."""
        inputs = self.inputs(seed)
        hidden, cache, _ = final_states(self.model, inputs, CACHE_NAME)
        assert cache is self.table.cache
        own = self.model(**inputs).last_hidden_state
        self.table.advance()
        return hidden, own

    @property
    def token_step(self) -> Any:
        return stack_of(self.model).token_step


def forwards(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[int]:
    """One entry for each call of the model's forward."""
    calls, forward = list[int](), type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda *args, **options: calls.append(1) or forward(*args, **options)
    )
    return calls


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2"])
def test_hidden_states_of_layers_are_those_of_the_models_own_forward(family):
    running = Running(family)
    with torch.no_grad():
        for seed in range(3):
            inputs = running.inputs(seed)
            every = final_states(running.model, inputs, CACHE_NAME, every=True).every
            own = running.model(**inputs, output_hidden_states=True).hidden_states
            assert len(every) == len(own) == 4
            assert all(map(torch.equal, every, own))
            running.table.advance()
    assert running.token_step._compared == (family != "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_the_models_own_forward(family, monkeypatch):
    running = Running(family)
    with torch.no_grad():
        for seed in range(3):
            hidden, own = running.step(seed)
            assert torch.equal(hidden, own)
    if family not in OWN_FORWARD:
        assert running.token_step.refusal is None
        calls = forwards(monkeypatch, running.model)
        with torch.no_grad():
            final_states(running.model, running.inputs(9), CACHE_NAME)
        assert not calls
    elif family == "gpt2":
        assert "wpe" in running.token_step.refusal


def test_hooks_of_the_model_are_called(monkeypatch):
    running, seen = Running("llama"), []
    running.step(0)
    running.model.register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state))
    hidden, *_ = final_states(running.model, running.inputs(1), CACHE_NAME)
    assert len(seen) == 1
    assert torch.equal(seen[0], hidden)


def test_a_changed_weight_is_seen_by_the_next_step():
    running = Running("llama")
    running.step(0)
    for layer, parameter in ((1, "mlp.down_proj.weight"), (2, "self_attn.q_proj.weight")):
        with torch.no_grad():
            running.model.layers[layer].get_parameter(parameter).mul_(1.5)
        hidden, own = running.step(layer)
        assert torch.equal(hidden, own)
    fresh = Running("llama")
    fresh.step(0)
    hidden, *_ = fresh.step(1)
    assert not torch.equal(hidden, final_states(running.model, running.inputs(1), CACHE_NAME).hidden)


def test_another_layer_is_seen_by_the_next_step():
    running = Running("llama")
    running.step(0)
    running.model.layers[1].mlp = nn.Sequential(nn.Linear(64, 64))
    hidden, own = running.step(1)
    assert torch.equal(hidden, own)


def test_a_forward_that_does_more_makes_every_step(monkeypatch):
    running = Running("llama")
    forward = type(running.model).forward

    def shifted(self, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        output.last_hidden_state = output.last_hidden_state + 1
        return output

    monkeypatch.setattr(type(running.model), "forward", shifted)
    for seed in range(2):
        hidden, own = running.step(seed)
        assert torch.equal(hidden, own)
    assert "more than" in running.token_step.refusal


def test_a_window_narrower_than_the_columns_is_the_models_affair():
    running = Running("mistral, window")  # of 5 columns, and there are 9 and more
    hidden, own = running.step(0)
    assert torch.equal(hidden, own)
    assert not running.token_step._compared
