"""A tiny base, its tokenizer and an auxiliary with random weights, saved as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from auxkern.model import AuxTunedForCausalLM

SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
WORDS = tuple(f"w{i}" for i in range(93))
V = len(SPECIAL) + len(WORDS)
AUXILIARY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def tiny_lm(seed: int = 0) -> Any:
    """A base of three layers whose distributions are far from uniform."""
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = LlamaForCausalLM(config)
        torch.nn.init.normal_(lm.lm_head.weight, std=0.5)
    return lm.eval()


def tiny_pair(lm: Any, seed: int = 1, **fields: Any) -> AuxTunedForCausalLM:
    """A pair whose auxiliary is as loud as the base."""
    if fields.get("architecture", "decoder") == "decoder":
        fields.setdefault("auxiliary_config", AUXILIARY)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AuxTunedForCausalLM.from_lm(lm, **fields)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                # These count tenfold; texts would end at once.
                loud = ".pointer.follow." in name or ".pointer.end." in name
                torch.nn.init.normal_(parameter, std=0.05 if loud else 0.5)
    return model


def save_tokenizer(folder: Path) -> None:
    """One id for each of ``WORDS``, split at spaces."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def save_tiny_pair(root: Path, **fields: Any) -> Path:
    """Writes root/base (weights and tokenizer) and root/pair, which names it; returns the latter."""
    lm = tiny_lm()
    lm.save_pretrained(root / "base")
    save_tokenizer(root / "base")
    tiny_pair(lm, base_model_name_or_path=str(root / "base"), **fields).save_pretrained(root / "pair")
    return root / "pair"
