"""Small models of the same kind: what a family does is seen on one, in milliseconds and in float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

V = 61  # ids of a twin
WINDOW = 4  # of its sliding windows and chunks; ``trials`` reads more tokens than that
_POSITIONS = 64
_MOST = 20_000_000  # parameters of a twin
# What fields are at most, by their names in transformers' configs, for heads of width 16 and a width of 64.
_SIZES = f"""
128 mamba_d_ssm
64 hidden_size d_model n_embd embedding_size intermediate_size mlp_intermediate_size ffn_dim
64 ffn_hidden_size decoder_ffn_dim encoder_ffn_dim n_inner d_ff dff lru_width attention_hidden_size
32 word_embed_proj_dim moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
16 head_dim global_head_dim swa_head_dim d_kv q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim
16 v_head_dim index_head_dim mamba_d_head mamba_headdim mamba_head_dim
8 num_heads mamba_n_heads n_mamba_heads mamba_num_heads rotary_dim chunk_size mamba_chunk_size
8 linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input
4 num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads attention_heads
4 num_experts num_local_experts n_routed_experts moe_num_experts state_size mamba_d_state
4 linear_num_value_heads laurel_rank
2 num_experts_per_tok moe_topk moe_k top_k_experts index_n_heads linear_num_key_heads attn_layer_period
2 expert_layer_period
1 n_group num_group topk_group mamba_n_groups mamba_ngroups n_groups attn_layer_offset
1 expert_layer_offset first_k_dense_replace
0 num_kv_shared_layers num_nextn_predict_layers
{WINDOW} sliding_window attention_window_size attention_chunk_size window_size local_attention
{WINDOW} sliding_window_size
{_POSITIONS} max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length
"""
_LIMITS = {name: int(most) for most, *names in map(str.split, _SIZES.strip().split("\n")) for name in names}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers")


def tiny_config(config: Any, **changes: Any) -> Any:
    """A transformers config of the same kind with few, narrow layers, at least one of each type.

    Args:
        config: of a text model; it is not changed.
        changes: fields that are set instead.

    Raises:
        whatever the config's class says of fields that do not fit each other.
    """
    settings = copy.deepcopy(config.to_dict())
    count = next((settings[name] for name in _LAYERS if isinstance(settings.get(name), int)), None)
    kept = _kept_layers(settings.get("layer_types") or settings.get("layers_block_type"), count)
    heads = next((settings[n] for n in ("num_attention_heads", "n_head", "n_heads") if settings.get(n)), None)
    width = settings.get("hidden_size") if "word_embed_proj_dim" in settings else None
    tiny: dict[str, Any] = {}
    for name, value in settings.items():
        if name in config.sub_configs and hasattr(getattr(config, name, None), "hidden_size"):
            tiny[name] = tiny_config(getattr(config, name))
            continue
        if name in _LAYERS and isinstance(value, int):
            value = min(value, len(kept))
        elif isinstance(value, list) and count and len(value) == count:
            value = [value[i] for i in kept]
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            value = {kept.index(int(key)): one for key, one in value.items() if int(key) in kept}
        elif name == "num_key_value_heads" and isinstance(value, int):
            value = min(value, _LIMITS["num_attention_heads"] if value == heads else 2)
        elif name.endswith("token_id"):
            value = _tiny_token(name, value)
        elif "vocab_size" in name and isinstance(value, int):
            value = min(value, V)
        # An embedding as wide as the transformer stays so.
        tiny[name] = _limited("hidden_size" if width and value == width else name, value)
    for name in ("quantization_config", "dtype", "torch_dtype", "architectures", "_name_or_path"):
        tiny.pop(name, None)
    if isinstance(tiny.get("mamba_d_ssm"), int) and isinstance(tiny.get("mamba_d_head"), int):
        tiny["mamba_d_ssm"] = tiny["mamba_n_heads"] * tiny["mamba_d_head"]
    if isinstance(tiny.get("rope_parameters"), dict):
        tiny["rope_parameters"] = _tiny_rope(tiny["rope_parameters"])
    tiny.pop("model_type", None)  # the class's own
    result = type(config)(**{**tiny, **changes})
    result._attn_implementation = "sdpa" if config._attn_implementation == "sdpa" else "eager"
    return result


def tiny_copy(lm: Any) -> Any:
    """A new language model of a language model's class, small, on the CPU and in float32.

    Its weights are random and nowhere zero, so that whatever can reach a logit does.

    Raises:
        ValueError: a small one has too many parameters.
        whatever the class says of a config that it cannot build.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        build = lambda config: type(lm)._from_config(config, dtype=torch.float32)  # noqa: E731
        config = tiny_config(lm.config)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build(config).parameters())
        if parameters > _MOST:
            raise ValueError(f"a {type(lm).__name__} of few layers has {parameters:,} parameters")
        twin = build(config)
        randomise(twin)
    return twin.requires_grad_(False).eval()


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Gives every parameter values that keep a signal's size and are nowhere zero."""
    for parameter in module.parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() > 1:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(noise * 0.1)


def _tiny_token(name: str, value: Any) -> Any:
    """An id below V, where there is one at all; that of padding is rarely in a text."""
    small = 0 if name.startswith("pad") else 1 if name.startswith("bos") else 2
    if isinstance(value, list):
        return [one if 0 <= one < V else small for one in value]
    return value if value is None or 0 <= value < V else small


def _limited(name: str, value: Any) -> Any:
    limit = _LIMITS.get(name)
    if limit is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return min(value, limit)
    if isinstance(value, list) and all(isinstance(one, int) for one in value):
        return [min(one, limit) for one in value]
    return value


def _kept_layers(types: Any, count: int | None) -> list[int]:
    """Indices of the first layer of each type, two at least where there are as many."""
    if not isinstance(types, list) or not types:
        return list(range(2 if count is None else min(count, 2)))
    kept = sorted(map(types.index, set(types)))
    rest = [i for i in range(len(types)) if i not in kept]
    return sorted(kept + rest[: max(0, 2 - len(kept))])


def _tiny_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings without lists for each channel, which belong to another width."""
    return {
        name: _tiny_rope(value) if isinstance(value, dict) else value
        for name, value in rope.items()
        if not isinstance(value, list)
    }
