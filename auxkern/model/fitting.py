"""What an auxiliary takes over from its base: sizes, ids, the first layers."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from auxkern.model import base
from auxkern.model.auxiliary import build_auxiliary
from auxkern.model.config import AuxTunedConfig
from auxkern.model.fingerprints import buffers_of, weights_fingerprint


def base_of(config: AuxTunedConfig, name: str | None = None, options: dict[str, Any] | None = None) -> Any:
    """The base that a config names, or one of another name, loaded.

    Args:
        config: of the pair.
        name: name or path instead of the config's.
        options: more for ``load_base``.

    Raises:
        ValueError: no base is named.
    """
    name = name or config.base_model_name_or_path
    if name is None:
        raise ValueError("the config names no base; pass it as lm=")
    settings = {"revision": config.base_revision, "gguf_file": config.base_gguf_file, **(options or {})}
    return base.load_base(name, **settings)


def fit(config: AuxTunedConfig, lm: Any, lm_fingerprint: str, allow_other_base: bool) -> None:
    """Fills in what the config leaves to the base.

    Args:
        config: of the pair; changed.
        lm: the base.
        lm_fingerprint: its fingerprint.
        allow_other_base: whether another fingerprint than the config's is taken.

    Raises:
        ValueError: the base does not fit the config.
    """
    known = config.base_fingerprint
    # A pair of an earlier version names the weights alone.
    if known in (None, lm_fingerprint) or known == weights_fingerprint(lm):
        config.base_fingerprint = lm_fingerprint
    elif not allow_other_base:
        raise ValueError(
            f"the auxiliary was made for a base with fingerprint {str(known)[:16]}... "
            f"({config.base_model_name_or_path}), but the one given has {lm_fingerprint[:16]}...: its "
            "weights, its quantisation or its configuration differ; pass that base, or allow_other_base=True"
        )
    text = lm.config.get_text_config()
    V, layers = base.vocabulary(lm), text.num_hidden_layers
    config.vocab_size = config.vocab_size or V
    if config.last_layers:
        _fit_last_layers(config, lm, layers)
    for name, size, most in (
        ("vocab_size", config.vocab_size, V),
        ("lm_layers", max(config.lm_layers, default=0), layers),
        ("from_lm_layers", config.from_lm_layers, layers),
    ):
        if size > most:
            raise ValueError(f"{name} asks for {size}, but the base has {most}; give at most that")
    for name, size, known in (
        ("lm_hidden_size", base.hidden_width(lm), text.hidden_size),
        ("lm_embedding_size", lm.get_input_embeddings().weight.shape[1], None),
    ):
        if getattr(config, name) not in (None, size, known):
            raise ValueError(f"{name} is {getattr(config, name)}, but the base's is {size}")
        setattr(config, name, size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            # An id may be 0.
            known = getattr(lm.generation_config, name, None)
            setattr(config, name, getattr(text, name, None) if known is None else known)


def unsaved_buffers(config: AuxTunedConfig, auxiliary: nn.Module | None) -> dict[str, Tensor]:
    """Values of the buffers that no checkpoint holds, as an auxiliary has them that was just made.

    transformers makes models without memory and fills in what it loads; these it leaves to each family.

    Args:
        config: of the pair, complete.
        auxiliary: with ``architecture="custom"``, the module.
    """
    if auxiliary is None and config.architecture == "custom":
        return {}
    module = build_auxiliary(config) if auxiliary is None else auxiliary
    return {name: buffer.clone() for name, buffer, _ in buffers_of(module, saved=False)}


def _fit_last_layers(config: AuxTunedConfig, lm: Any, layers: int) -> None:
    if config.last_layers > layers:
        raise ValueError(f"last_layers is {config.last_layers}, but the base has {layers}; give at most that")
    head = base.output_head(lm)
    if head.softcap is not None:
        raise ValueError(
            'architecture="last-layers" adds to hidden states, but the base caps its logits at '
            f"{head.softcap}; use another architecture"
        )
    first = layers - config.last_layers
    if config.lm_layers not in ([], [first]):
        raise ValueError(
            f"lm_layers is {config.lm_layers}, but the last {config.last_layers} layers read [{first}]; "
            "leave it out"
        )
    config.lm_layers, config.head = [first], "shared"


def some_layers(lm: Any, chosen: slice) -> dict[str, Any]:
    """The base's own config with some of its layers, as a dict."""
    config = copy.deepcopy(lm.config.get_text_config())
    layers = config.num_hidden_layers
    config.num_hidden_layers = len(range(layers)[chosen])
    known = type(config)().to_dict()
    settings = {
        name: value[chosen] if isinstance(value, list) and len(value) == layers else value
        for name, value in config.to_diff_dict().items()
        if name in known and name != "dtype"
    }
    return {"model_type": config.model_type, **settings}


def copy_layers(body: Any, lm: Any) -> None:
    """Copies the base's weights of the layers that a body has.

    Raises:
        ValueError: a weight of the body is not the base's, in name or shape.
    """
    source = base.transformer(lm).state_dict()
    wanted = body.state_dict()
    for name, parameter in wanted.items():
        if name not in source or source[name].shape != parameter.shape:
            raise ValueError(
                f"from_lm_layers cannot copy {name}: the base has "
                f"{tuple(source[name].shape) if name in source else 'no such weight'}, the auxiliary "
                f"{tuple(parameter.shape)}; a quantised base cannot be copied"
            )
    body.load_state_dict({name: source[name].to(wanted[name].dtype) for name in wanted})
