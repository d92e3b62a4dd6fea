"""Tokenizers, language models and pairs small enough to be made anew in each test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from auxkern.model import AuxTunedForCausalLM

START, END, PADDING = "<start>", "<end>", "<padding>"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
WORDS = tuple(f"w{i}" for i in range(93))
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
    "last layers of the LM": {
        "architecture": "last-layers",
        "last_layers": 2,
        "lora_rank": 4,
        "pointer": True,
        "pointer_size": 8,
    },
}


# The one of most parts.
KIND = "shared head, features, pointer"


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


def word_tokenizer(words: Sequence[str] = WORDS, **special: str) -> Any:
    """An id for each special token, then for each word; split at spaces."""
    special = special or SPECIAL
    vocabulary = {word: i for i, word in enumerate((*special.values(), *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


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
    return tiny_lm(**{"vocab_size": len(tokenizer), **ids, **options})


def word_lm(**options: Any) -> LlamaForCausalLM:
    """``tiny_lm`` with the ids of words, grouped queries and 64 positions."""
    settings = {"num_key_value_heads": 2, "max_position_embeddings": 64, **options}
    return tiny_lm_for(word_tokenizer(), **settings)


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


def with_two_more(lm: Any, folder: Path) -> AuxTunedForCausalLM:
    """A model with its own auxiliary and two of other kinds, "t5" and "own", on one base."""
    model = tiny_pair("shared head, features, pointer", lm)
    for name, kind in (("t5", "encoder-decoder"), ("own", "own head")):
        tiny_pair(kind, lm).save_pretrained(folder / name)
        model.load_auxiliary(name, folder / name)
    return model


def save_tiny_pair(root: Path, **fields: Any) -> Path:
    """Writes root/base (``word_lm`` and its tokenizer) and root/pair, which names it; returns the latter."""
    lm = word_lm()
    lm.save_pretrained(root / "base")
    word_tokenizer().save_pretrained(root / "base")
    pair = tiny_pair("own head", lm, base_model_name_or_path=str(root / "base"), **fields)
    pair.save_pretrained(root / "pair")
    return root / "pair"
