"""Batches of ragged examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from auxkern.model.text import TextFormat
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import Example, encode
from tests.support.tiny import byte_tokenizer

PADDING = 9


def item(length: int, **fields: Any) -> dict[str, Any]:
    ids = list(range(1, length + 1))
    return {"input_ids": ids, "labels": [-100, *ids[1:]], "condition_ids": [7] * (length - 1), **fields}


def states(length: int, layers: int = 2, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.arange(1, length * layers * 4 + 1).view(length, layers, 4).to(dtype)


def test_a_ragged_batch():
    batch = AuxCollator(PADDING)([item(3), item(1)])
    expected = {
        "input_ids": [[1, 2, 3], [1, PADDING, PADDING]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 2, 3], [-100, -100, -100]],
        "condition_ids": [[7, 7], [PADDING, PADDING]],
        "condition_mask": [[1, 1], [0, 0]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_tensors_batch_like_lists():
    ragged = [item(3), item(2)]
    tensors = [{name: torch.tensor(ids) for name, ids in entry.items()} for entry in ragged]
    batch, of_tensors = AuxCollator(PADDING)(ragged), AuxCollator(PADDING)(tensors)
    assert all(torch.equal(batch[name], of_tensors[name]) for name in batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_are_padded_with_zeros_and_keep_their_dtype(dtype, poisoned_memory):
    batch = AuxCollator(PADDING)(
        [item(1, lm_states=states(1, dtype=dtype)), item(3, lm_states=states(3, dtype=dtype))]
    )
    found = batch["lm_states"]
    assert found.dtype == dtype
    assert found.shape == (2, 3, 2, 4)
    assert torch.equal(found[0, :1], states(1, dtype=dtype))
    assert torch.equal(found[1], states(3, dtype=dtype))
    assert (found[0, 1:] == 0).all()


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([], ValueError, "got none"),
        ([item(2), {"input_ids": [1], "labels": [1]}], ValueError, "item 1 has no condition_ids"),
        ([item(2, weight=2)], ValueError, "item 0 has the unknown field 'weight'"),
        ([item(2, labels=[-100])], ValueError, "item 0 has 2 input_ids but 1 labels"),
        ([item(2, lm_states=states(2)), item(2)], ValueError, "1 of 2 items have lm_states"),
        ([item(2, lm_states=[[0.0]])], TypeError, "item 0 has lm_states of type list"),
        ([item(2, lm_states=states(3))], ValueError, r"2 input_ids but lm_states of shape \(3, 2, 4\)"),
        ([item(2, lm_states=states(2)[0])], ValueError, r"lm_states of shape \(2, 4\)"),
        ([item(2, lm_states=states(2)), item(2, lm_states=states(2, 3))], ValueError, "all must come from"),
        (
            [item(2, lm_states=states(2)), item(2, lm_states=states(2).float())],
            ValueError,
            r"float16 and \(2, 4\) torch.float32",
        ),
    ],
)
def test_refuses(items, error, message):
    with pytest.raises(error, match=message):
        AuxCollator(PADDING)(items)


@pytest.mark.parametrize(("pad", "error"), [(None, TypeError), (True, TypeError), (-1, ValueError)])
def test_a_padding_token_is_an_id(pad, error):
    with pytest.raises(error, match="pad_token_id"):
        AuxCollator(pad)


class _Pair(torch.nn.Module):
    """The signature of the pair; the trainer drops what is not in it."""

    def forward(
        self, input_ids, attention_mask, labels, condition_ids, condition_mask, lm_states=None
    ):  # fmt: skip
        raise NotImplementedError


def test_the_trainer_of_transformers_takes_it(tmp_path):
    text_format = TextFormat(byte_tokenizer())
    encoded = encode([Example("c", "a text"), Example("cd", "text", "a ")], text_format)
    collator = AuxCollator(text_format.pad_id)
    trainer = transformers.Trainer(
        model=_Pair(),
        args=transformers.TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to=[]
        ),
        eval_dataset=encoded,
        data_collator=collator,
    )
    (batch,) = trainer.get_eval_dataloader()
    expected = collator([encoded[0], encoded[1]])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
