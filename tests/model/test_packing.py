"""Packed texts: rows and masks, and that what is trained on them is what is trained on padded ones."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from auxkern.model import packing
from auxkern.model.packing import packed_rows, packing_refusal, read_packed
from tests.model.test_last_layers import TOLD, last_layers
from tests.support.batches import prompts, ragged_batch
from tests.support.tiny import D_LM, V

MASK = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])


@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize(("most", "groups"), [(100, [[0, 1, 3, 4]]), (5, [[0, 1], [3], [4]]), (1, None)])
def test_a_row_holds_whole_texts_that_see_what_is_before_and_themselves(
    P: int, most: int, groups: list[list[int]] | None
) -> None:
    packed = list(packed_rows(MASK, P, most))
    assert [row.rows.unique().tolist() for row in packed] == (groups or [[0], [1], [3], [4]])
    for row in packed:
        N = len(row.rows)
        assert bool(MASK[row.rows, row.columns].all())
        assert row.seen.shape == (1, 1, N, P + N)
        assert bool(row.seen[..., :P].all())
        for i in range(N):
            text = row.rows[i]
            before = [j for j in range(i + 1) if row.rows[j] == text]
            assert row.seen[0, 0, i, P:].nonzero()[:, 0].tolist() == before
            assert row.positions[0, i] == P + len(before) - 1
    assert sum(len(row.rows) for row in packed) == MASK.sum()


def test_what_is_made_of_a_row_returns_to_its_place_and_gradients_with_it() -> None:
    values = torch.randn(*MASK.shape, 2, requires_grad=True)
    made = read_packed(values, MASK, lambda values, _: 3 * values, 0, 5)
    torch.testing.assert_close(made, 3 * values * MASK[..., None])
    made.sum().backward()
    torch.testing.assert_close(values.grad, 3.0 * MASK[..., None].expand(*MASK.shape, 2))


def losses_and_gradients(model: Any, batch: dict[str, Tensor], packs: bool | None) -> list[Tensor]:
    model.auxiliary._packs = packs
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("most", [packing.MOST, 12])
@pytest.mark.parametrize(
    "fields",
    [{}, {"lora_rank": 0}, {"pointer": True, "pointer_size": 8}, TOLD, {**TOLD, "pointer": True}],
    ids=["LoRA", "whole", "pointer", "prefix", "prefix and pointer"],
)
def test_a_step_is_that_of_padded_texts(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], most: int
) -> None:
    monkeypatch.setattr("auxkern.model.last_layers.MOST", most)
    model, batch = last_layers(**fields).train(), ragged_batch(B=7)
    ran: list[tuple[int, ...]] = []
    model.auxiliary.transformer.register_forward_hook(
        lambda _, args, given, out: ran.append(tuple(given["attention_mask"].shape)), with_kwargs=True
    )
    packed = losses_and_gradients(model, batch, None)
    assert model.auxiliary._packs
    assert len(ran[-1]) == 4
    assert len(ran) >= (2 if most > 100 else 5)
    ran.clear()
    padded = losses_and_gradients(model, batch, False)
    assert [len(shape) for shape in ran] == [2]
    assert len(packed) == len(padded) > 4
    for ours, theirs in zip(packed, padded, strict=True):
        # The same products, summed in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_padding_before_texts_is_left_out_too() -> None:
    model, batch = last_layers(**TOLD).train(), prompts(B=5, T=8)
    mask = batch["attention_mask"]
    # Nothing before a text's first token predicts it.
    batch["labels"] = batch["input_ids"].masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    packed, padded = (losses_and_gradients(model, batch, packs) for packs in (None, False))
    for ours, theirs in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_texts_and_scores_are_read_as_ever() -> None:
    model, batch = last_layers(), ragged_batch()
    with torch.no_grad():
        model(**batch)
        model.generate(batch["input_ids"][:, :3], max_new_tokens=2)
    assert model.auxiliary._packs is None


def test_layers_with_windows_are_padded(caplog: pytest.LogCaptureFixture) -> None:
    config = MistralConfig(
        vocab_size=V, hidden_size=D_LM, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    model = last_layers(MistralForCausalLM(config).eval()).train()
    with caplog.at_level(logging.INFO, "auxkern"):
        model(**ragged_batch()).loss.backward()
    assert model.auxiliary._packs is False
    assert "batches are padded: not all layers attend to all tokens" in caplog.text


def test_dropout_is_drawn_once() -> None:
    model, batch = last_layers(dropout=0.5).train(), ragged_batch()
    torch.manual_seed(5)
    first = losses_and_gradients(model, batch, None)
    torch.manual_seed(5)
    again = losses_and_gradients(model, batch, True)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    assert model.auxiliary.transformer.training


def test_a_model_that_reads_such_masks_in_another_way_is_refused() -> None:
    mask = torch.ones(2, 3)
    values = torch.randn(2, 3, 4)

    def broken() -> Tensor:
        raise TypeError("no such mask")

    assert packing_refusal(lambda: values + 1e-6, lambda: values, mask) is None
    assert "no such mask" in str(packing_refusal(broken, lambda: values, mask))
    assert "change each other" in str(packing_refusal(lambda: values + 0.1, lambda: values, mask))
    assert "change each other" in str(packing_refusal(lambda: values * torch.nan, lambda: values, mask))
    half = values.bfloat16()
    assert packing_refusal(lambda: half * 1.01, lambda: half, mask) is None
    silent = torch.tensor([[1, 1, 0], [1, 0, 0]])
    beside = torch.where(silent[..., None] != 0, values, torch.nan)
    assert packing_refusal(lambda: values, lambda: beside, silent) is None


def test_the_trial_needs_no_gradient_and_no_autocast() -> None:
    seen: list[tuple[bool, bool]] = []
    layer = nn.Linear(4, 4)

    def made() -> Tensor:
        out: Tensor = layer(torch.ones(1, 2, 4))
        seen.append((out.requires_grad, out.dtype == torch.bfloat16))
        return out

    with torch.autocast("cpu", torch.bfloat16):
        assert packing_refusal(made, made, torch.ones(1, 2)) is None
    assert seen == [(False, False)] * 2
