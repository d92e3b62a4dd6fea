"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def llama_file(path: Path, lm: Any, kinds: dict[str, str], default: str = "Q4_1") -> Path:
    """Writes a Llama; skips the test where the package gguf is missing.

    Args:
        lm: whose matrices have rows of a multiple of 32.
        kinds: of tensors, by parts of their names in the file.
        default: of the other matrices. Vectors are float32.
    """
    import pytest

    gguf = pytest.importorskip("gguf")
    config = lm.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, values in lm.state_dict().items():
        stored = _stored_name(name)
        if stored == "output.weight" and config.tie_word_embeddings:
            continue
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for part, count in heads.items():
            if f"{part}." in stored:
                values = _turned(values, count)
        if values.dim() < 2:
            writer.add_tensor(stored, values.float().numpy())
            continue
        kind = next((kind for part, kind in kinds.items() if part in stored), default)
        of = getattr(gguf.GGMLQuantizationType, kind)
        writer.add_tensor(stored, gguf.quants.quantize(values.float().numpy(), of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored_name(name: str) -> str:
    for part, stored in _NAMES.items():
        if part in name:
            number = name.split(".")[2] if ".layers." in name else None
            return f"{stored}.weight" if number is None else f"blk.{number}.{stored}.weight"
    raise ValueError(name)


def _turned(weight: Tensor, heads: int) -> Tensor:
    """Rows of a head as llama.cpp has them: the halves that rotate together side by side."""
    width = weight.shape[0] // heads
    return weight.view(heads, 2, width // 2, -1).transpose(1, 2).reshape(weight.shape)


def damaged(path: Path, stored: str, tensor: str) -> Path:
    """A copy of a file in which the first scale of a tensor is infinite."""
    import pytest

    gguf = pytest.importorskip("gguf")
    copy = path.with_name(stored)
    copy.write_bytes(path.read_bytes())
    reader = gguf.GGUFReader(copy, "r+")
    found = next(one for one in reader.tensors if one.name == tensor)
    found.data[0, :2] = torch.tensor([torch.inf], dtype=torch.float16).view(torch.uint8).numpy()
    reader.data.flush()
    return copy
