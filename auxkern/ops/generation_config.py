"""What a transformers ``GenerationConfig`` says about drawing a token: honoured, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auxkern.core.terms import as_number

# What generate takes where a config says nothing (``GenerationConfig._get_default_generation_params``).
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}

# Fields that change which token is drawn and have no counterpart here, with the values that switch them off.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "top_h": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "force_words_ids": (),
    "constraints": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "remove_invalid_values": (False,),  # takes NaN for 0, where a row here has a status
    "token_healing": (False,),
    "assistant_ensemble_weight": (),  # mixes the assistant's probabilities in
}

# How long a text is, what is returned, how fast it is made: no matter of a draw.
_CALLERS = """
max_length max_new_tokens max_time stop_strings early_stopping length_penalty eos_token_id pad_token_id
bos_token_id decoder_start_token_id num_return_sequences output_attentions output_hidden_states
output_scores output_logits return_dict_in_generate return_legacy_cache use_cache cache_implementation
cache_config max_cache_len renormalize_logits use_mtp is_assistant num_assistant_tokens
num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens
max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind speculation_type
compile_config disable_compile low_memory continuous_batching_config prefill_chunk_size
transformers_version
"""
KNOWN = frozenset([*_DEFAULTS, *_CALLERS.split(), "do_sample", "sequence_bias"])


def settings_of(config: object) -> dict[str, Any]:
    """The arguments of ``SamplingParams`` that draw what ``generate`` draws with a config.

    Args:
        config: a ``GenerationConfig``.

    Raises:
        TypeError: it is none.
        ValueError: it asks for what cannot be honoured, or has a field that is not known.
    """
    if not hasattr(config, "do_sample"):
        raise TypeError(
            f"config must be a transformers.GenerationConfig, got {type(config).__name__}; make one of a "
            "dict with GenerationConfig(**settings)"
        )
    for name, value in vars(config).items():
        _check(name, value)
    names = _DEFAULTS if config.do_sample else ("repetition_penalty",)
    settings = {name: getattr(config, name, None) for name in names}
    settings = {name: _DEFAULTS[name] if value is None else value for name, value in settings.items()}
    if not config.do_sample:
        settings["temperature"] = 0.0
    return {**settings, "logit_bias": _single_tokens(getattr(config, "sequence_bias", None))}


def _check(name: str, value: object) -> None:
    value = as_number(value)
    rounds = name == "cache_implementation" and value == "quantized"
    if (
        value is None
        or (name in KNOWN and not rounds)
        or name.startswith("_")
        or value in UNSUPPORTED.get(name, ())
    ):
        return
    raise ValueError(
        f"generation_config.{name} is {value!r}, which auxkern.sample cannot honour; "
        "unset it, or use transformers' generate"
    )


def _single_tokens(sequence_bias: Any) -> dict[int, float] | None:
    if not sequence_bias:
        return None
    pairs = sequence_bias.items() if isinstance(sequence_bias, Mapping) else sequence_bias
    bias = {}
    for ids, value in pairs:
        if len(ids) != 1:
            raise ValueError(
                f"generation_config.sequence_bias has the sequence {tuple(ids)}, which auxkern.sample cannot "
                "honour: a bias is of one token"
            )
        bias[ids[0]] = value
    return bias
