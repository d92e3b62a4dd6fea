"""Angles that are looked up are those that a model's rotary embedding makes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from auxkern.model.native.angles import Angles

X = torch.zeros(5, 1, 32)


def rotary_of(kind: str) -> LlamaRotaryEmbedding:
    more = {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        "yarn": {"original_max_position_embeddings": 32},
    }
    scaling = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **more.get(kind, {})}
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=32, num_attention_heads=2, max_position_embeddings=64, rope_parameters=scaling
        )
    )


def equal(angles: Angles, rotary: LlamaRotaryEmbedding, seed: int, columns: int) -> None:
    positions = torch.randint(columns, (5, 1), generator=torch.Generator().manual_seed(seed))
    for got, want in zip(angles.of(X, positions, columns), rotary(X, positions), strict=True):
        assert got.shape == want.shape
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn", "dynamic"])
def test_equal_in_any_order_and_beyond_what_was_known(kind):
    rotary = rotary_of(kind)
    angles = Angles(rotary)
    for seed, columns in enumerate((3, 40, 700, 20)):
        equal(angles, rotary, seed, columns)


def test_made_once_where_a_position_has_angles_of_its_own():
    calls = dict.fromkeys(("default", "dynamic"), 0)
    for kind in calls:
        rotary = rotary_of(kind)
        angles = Angles(rotary)
        forward = rotary.forward

        def counted(*inputs, kind=kind, forward=forward):
            calls[kind] += 1
            return forward(*inputs)

        rotary.forward = counted
        for columns in (3, 4, 5):
            angles.of(X, torch.full((5, 1), columns - 1), columns)
    assert calls == {"default": 1, "dynamic": 3}


def test_changed_frequencies_are_seen():
    rotary = rotary_of("default")
    angles = Angles(rotary)
    equal(angles, rotary, 0, 9)
    rotary.inv_freq.mul_(0.5)
    equal(angles, rotary, 1, 9)
    rotary.inv_freq = rotary.inv_freq * 3
    equal(angles, rotary, 2, 9)


def test_hooks_are_called():
    rotary, seen = rotary_of("default"), []
    angles = Angles(rotary)
    equal(angles, rotary, 0, 9)
    rotary.register_forward_hook(lambda *call: seen.append(1))
    angles.of(X, torch.zeros(5, 1, dtype=torch.int64), 9)
    assert seen
