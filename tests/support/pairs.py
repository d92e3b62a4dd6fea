"""Tiny pairs and ragged batches for the tests of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from auxkern.model import AuxTunedForCausalLM

V, D_LM, BOS, EOS, PAD = 97, 32, 1, 2, 0
DECODER = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
# Every architecture, head, embedding and pointer at least once.
PAIRS: dict[str, dict[str, Any]] = {
    "own head": {"auxiliary_config": DECODER},
    "shared head, features, pointer": {
        "auxiliary_config": DECODER,
        "head": "shared",
        "input_embedding": "shared",
        "lm_layers": [1, 2],
        "pointer": True,
        "pointer_size": 8,
    },
    "encoder-decoder": {
        "architecture": "encoder-decoder",
        "auxiliary_config": T5,
        "pointer": True,
        "lm_layers": [3],
    },
    "first layers of the LM": {"from_lm_layers": 2, "input_embedding": "shared", "head": "shared"},
    "the LM's own logits": {"auxiliary_config": DECODER, "lm_term": "logits", "pointer": True},
}


def tiny_lm(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A random Llama that can be told from others; its logits are spread like those of a trained one."""
    settings = {
        "vocab_size": V,
        "hidden_size": D_LM,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": 0.2,
        **options,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def tiny_lm_for(tokenizer: Any, **options: Any) -> LlamaForCausalLM:
    """``tiny_lm`` with a tokenizer's ids."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return tiny_lm(vocab_size=len(tokenizer), **ids, **options)


def with_two_more(lm: Any, folder: Path) -> AuxTunedForCausalLM:
    """A model with its own auxiliary and two of other kinds, "t5" and "own", on one base."""
    model = tiny_pair("shared head, features, pointer", lm)
    for name, kind in (("t5", "encoder-decoder"), ("own", "own head")):
        tiny_pair(kind, lm).save_pretrained(folder / name)
        model.load_auxiliary(name, folder / name)
    return model


def tiny_pair(kind: str, lm: Any = None, *, trained: bool = True, **more: Any) -> AuxTunedForCausalLM:
    """A pair of PAIRS; ``trained`` stands for weights that are nowhere zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AuxTunedForCausalLM.from_lm(lm or tiny_lm(), **{**PAIRS[kind], **more})
        if trained:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    # These count tenfold; texts would end at once.
                    loud = ".pointer.follow." in name or ".pointer.end." in name
                    parameter.add_(torch.randn_like(parameter) * (0.02 if loud else 0.2))
    return model.eval()


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
