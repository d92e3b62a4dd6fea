"""Batches and examples of random ids, of different lengths, for tiny pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.tiny import BOS, EOS, PAD, V


def ragged_batch(B: int = 4, T: int = 9, K: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """A training batch of texts and conditions of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (B, T), generator=generator)
    condition = torch.randint(3, V, (B, K), generator=generator)
    ids[:, 0] = BOS
    lengths = torch.randint(3, T + 1, (B,), generator=generator)
    lengths[0] = T
    sizes = torch.randint(1, K + 1, (B,), generator=generator)
    mask = (torch.arange(T) < lengths[:, None]).long()
    condition_mask = (torch.arange(K) < sizes[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return {
        "input_ids": ids * mask + PAD * (1 - mask),
        "attention_mask": mask,
        "labels": labels,
        "condition_ids": condition * condition_mask,
        "condition_mask": condition_mask,
    }


def prompts(B: int = 4, T: int = 4, K: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """What ``generate`` takes: prompts of different lengths, padded on the left, and conditions."""
    batch = ragged_batch(B, T, K, seed)
    lengths = batch["attention_mask"].sum(1)
    left = torch.zeros_like(batch["input_ids"])
    mask = torch.zeros_like(left)
    for row, length in enumerate(lengths.tolist()):
        left[row, T - length :] = batch["input_ids"][row, :length]
        mask[row, T - length :] = 1
    return {
        "input_ids": left,
        "attention_mask": mask,
        "condition_ids": batch["condition_ids"],
        "condition_mask": batch["condition_mask"],
    }


def one_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sequence of ``prompts`` without its padding."""
    text, condition = batch["attention_mask"][row] != 0, batch["condition_mask"][row] != 0
    return {
        "input_ids": batch["input_ids"][row, text][None],
        "attention_mask": batch["attention_mask"][row, text][None],
        "condition_ids": batch["condition_ids"][row, condition][None],
        "condition_mask": batch["condition_mask"][row, condition][None],
    }


def texts(count: int = 24, seed: int = 0) -> list[dict[str, list[int]]]:
    """Training examples, texts and conditions of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, V, (length,), generator=generator).tolist()

    examples = []
    for _ in range(count):
        text = [BOS, *ids(2, 12), EOS]
        examples.append({"input_ids": text, "labels": [-100, *text[1:]], "condition_ids": ids(1, 6)})
    return examples
