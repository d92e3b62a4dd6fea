"""A tokenizer and language models small enough to be made anew in each test."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from auxkern.model.base import freeze

START, END, PADDING = "<start>", "<end>", "<padding>"


def byte_tokenizer(start: str | None = START, end: str | None = END, padding: str | None = PADDING) -> Any:
    """An id for every byte, 0 to 255 in the order of ByteLevel's alphabet, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=padding
    )


def tiny_lm(seed: int = 0, **settings: Any) -> Any:
    """A random Llama with V 97, D 32 and three layers, frozen."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    return freeze(LlamaForCausalLM(LlamaConfig(**{**config, **settings})))
