"""What an auxiliary model is, in one file beside its weights."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import field, fields
from numbers import Integral, Real
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from auxkern.model.text import check_condition_template

LAST_LAYERS = "last-layers"
ARCHITECTURES = ("decoder", "encoder-decoder", LAST_LAYERS, "custom")
DEFAULT_DECODER = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
DEFAULT_ENCODER_DECODER = {
    "model_type": "t5",
    "d_model": 256,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
# What transformers itself adds to the keywords of a config that it saved or loads.
_INHERITED_NAMES = """
_commit_hash _name_or_path name_or_path model_type torch_dtype attn_implementation output_attentions
num_labels auto_map experts_implementation
"""
_INHERITED = frozenset(_INHERITED_NAMES.split())


class AuxTunedConfig(PreTrainedConfig):
    """An auxiliary model, and the frozen base that it was made for (Zeldes et al. 2020).

    Args:
        base_model_name_or_path, base_revision, base_gguf_file: where the base is, see ``load_base``.
        base_fingerprint: of its weights, see ``auxkern.model.fingerprint``.
        architecture: "decoder" (the condition is a prefix of the auxiliary's own input),
            "encoder-decoder" (an encoder reads it), "last-layers" (the base's last layers once more, on its
            hidden states: the condition is what the base is told, see base_prompt) or "custom" (a module
            that you pass).
        auxiliary_config: a transformers config as a dict with its "model_type": any decoder-only one for
            "decoder", the T5 family for "encoder-decoder". None takes a small Llama, or a small T5.
        from_lm_layers: a decoder with the base's own config and its first layers' weights, so many of
            them; 0 for none.
        last_layers: with "last-layers", how many.
        lora_rank: with "last-layers", the rank of LoRA's matrices in every linear layer, which are all
            that is trained; 0 trains the layers' weights.
        lm_layers: hidden states of the base that the auxiliary reads beside its own embeddings, as in
            transformers' ``hidden_states``: 0 the embeddings, i the output of the i-th layer. Filled in
            with "last-layers".
        input_embedding: "own", or "shared": the base's frozen embedding, projected.
        head: "own": a (V, D) output embedding, or "shared": the base's, behind a projection. Both
            start at exactly zero, so an untrained pair is the base.
        pointer: whether each position also scores the condition's tokens and the end, from zero; added
            to the logits of just these ids.
        pointer_size: width of the pointer's queries and keys.
        pointer_reads_lm: whether the pointer knows the base's own logits of the condition's tokens.
        dropout: of the auxiliary's input vectors and of its final hidden states.
        aux_scale: what the auxiliary's logits are multiplied by.
        vocab_size: V, ids that both models share; the base's when None.
        lm_hidden_size, lm_embedding_size: widths of the base and of its input embedding; filled in from it.
        lm_term: "head": the base's final hidden states and output embedding are enough, or "logits":
            the base computes its own logits (N, V), for one whose head is of another kind.
        base_prompt: how the condition is told to the base, see ``TextFormat``; None tells it nothing, as in
            the paper.
        base_prefix_ids: tokens that the base reads before every text, with a base prompt, the start token
            first: see ``TextFormat.base_prefix``. Their keys and values are computed once.
        condition_template: how a condition is written before it is tokenised.
        text_prefix: what is written before every text that is learnt, see ``TextFormat``.
        initializer_range: standard deviation of new weights.
        on_top_of: auxiliaries that stood in the sum, frozen, while this one was trained, by name: "path",
            "weight" and "fingerprint"; see ``auxkern.training.frozen.hold_frozen``.

    Raises:
        ValueError: a field is unknown or out of range.
    """

    model_type = "aux_tuned"

    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_gguf_file: str | None = None
    base_fingerprint: str | None = None
    architecture: str = "decoder"
    auxiliary_config: dict[str, Any] | None = None
    from_lm_layers: int = 0
    last_layers: int = 0
    lora_rank: int = 16
    lm_layers: list[int] = field(default_factory=list)
    input_embedding: str = "own"
    head: str = "own"
    pointer: bool = False
    pointer_size: int = 64
    pointer_reads_lm: bool = True
    dropout: float = 0.0
    aux_scale: float = 1.0
    vocab_size: int | None = None
    lm_hidden_size: int | None = None
    lm_embedding_size: int | None = None
    lm_term: str = "head"
    base_prompt: str | None = None
    base_prefix_ids: list[int] = field(default_factory=list)
    condition_template: str = "{condition}"
    text_prefix: str = ""
    initializer_range: float = 0.02
    on_top_of: dict[str, Any] = field(default_factory=dict)
    # Part of what transformers' generate asks of every config.
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        generation = GenerationConfig().to_dict()  # older checkpoints carry these in the model's config
        for name in kwargs:
            if name not in _INHERITED and name not in generation:
                known = [f.name for f in fields(self)]
                close = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                raise ValueError(f"AuxTunedConfig has no field {name!r}; {hint}")
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        for name, allowed in (
            ("architecture", ARCHITECTURES),
            ("input_embedding", ("own", "shared")),
            ("head", ("own", "shared")),
            ("lm_term", ("head", "logits")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        for name in ("pointer", "pointer_reads_lm", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if not isinstance(self.text_prefix, str):
            raise ValueError(f"text_prefix is {self.text_prefix!r}; it must be text, such as ' '")
        self._check_base_prompt()
        for name in ("aux_scale", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}; it must be a finite number")
        for name, least in (("from_lm_layers", 0), ("last_layers", 0), ("lora_rank", 0), ("pointer_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name} is {value!r}; it must be a whole number")
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.lm_layers):
            raise ValueError(
                f"lm_layers is {self.lm_layers}; it must list indices of hidden states, 0 or more"
            )
        if self.lm_layers != sorted(set(self.lm_layers)):
            raise ValueError(f"lm_layers is {self.lm_layers}; give each layer once, in rising order")
        self._check_last_layers()
        if self.from_lm_layers and (self.architecture != "decoder" or self.input_embedding != "shared"):
            raise ValueError(
                f'from_lm_layers is {self.from_lm_layers}, which needs architecture="decoder" and '
                f'input_embedding="shared", but they are {self.architecture!r} and {self.input_embedding!r}'
            )
        if self.lm_term == "logits" and self.head == "shared":
            raise ValueError(
                'head="shared" uses the base\'s output embedding, which lm_term="logits" does not'
            )

    def _check_last_layers(self) -> None:
        last = self.architecture == LAST_LAYERS
        if last != bool(self.last_layers):
            raise ValueError(
                f"last_layers is {self.last_layers} and architecture {self.architecture!r}; give "
                '"last-layers" a number of layers, and others none'
            )
        if last and self.lm_term != "head":
            raise ValueError(
                f'architecture="last-layers" needs lm_term="head", but it is {self.lm_term!r}; leave it out'
            )

    def _check_base_prompt(self) -> None:
        if self.base_prompt is not None:
            check_condition_template(self.base_prompt, "base_prompt")
        ids = self.base_prefix_ids
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise ValueError(f"base_prefix_ids is {ids!r:.60}; it must list token ids, 0 or more")
        if (self.base_prompt is None) == bool(ids):
            raise ValueError(
                f"base_prompt is {self.base_prompt!r} and there are {len(ids)} base_prefix_ids; give both or "
                "neither: TextFormat(tokenizer, base_prompt=...).base_prefix() has the start token"
            )

    def end_ids(self) -> list[int]:
        """Ids of the end token: none, one or several."""
        ids = self.eos_token_id
        return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]

    def body_config(self) -> Any:
        """The transformers config of the auxiliary's own transformer.

        Raises:
            ValueError: the architecture is "custom", or the config is of another kind.
        """
        encoder_decoder = self.architecture == "encoder-decoder"
        default = DEFAULT_ENCODER_DECODER if encoder_decoder else DEFAULT_DECODER
        settings = dict(self.auxiliary_config or default)
        model_type = settings.pop("model_type", None)
        if model_type is None:
            raise ValueError(
                'auxiliary_config has no "model_type"; name a kind of transformer, such as "llama"'
            )
        config = AutoConfig.for_model(model_type, **settings)
        known = {*AutoConfig.for_model(model_type).to_dict(), *config.attribute_map}
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ValueError(f"auxiliary_config has {unknown}, which {type(config).__name__} does not know")
        if encoder_decoder and not hasattr(config, "relative_attention_num_buckets"):
            # Without relative positions the decoder would count the padding of a ragged batch.
            raise ValueError(
                f'auxiliary_config is a {model_type!r}; architecture="encoder-decoder" takes the T5 family, '
                "whose positions are relative"
            )
        if not encoder_decoder and config.is_encoder_decoder:
            raise ValueError(
                f"auxiliary_config is a {model_type!r}, which is not decoder-only; use "
                'architecture="encoder-decoder"'
            )
        return config


def trained_on_top_of(on_top_of: Mapping[str, Any]) -> str:
    """The auxiliaries of ``AuxTunedConfig.on_top_of`` in words."""
    return ", ".join(
        f"{name} ({held['path']}, weight {held['weight']:g})" for name, held in on_top_of.items()
    )
