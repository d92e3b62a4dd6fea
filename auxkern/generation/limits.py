"""What an engine can serve: refused when it is made, or for one request alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from auxkern.generation.members import BASE, Part
from auxkern.generation.request import Sequence
from auxkern.model.base import counts_positions, output_device, run_base, vocabulary
from auxkern.model.text import TextFormat

_USE = "use model.generate for this model"
_NO_SLOTS = f"whose state cannot be kept in slots; {_USE}"
# Rotary embeddings whose frequencies change for a whole batch when one of its texts grows long.
_BATCH_WIDE_ROTARY = ("longrope", "dynamic")


def check_slots_of_base(model: Any, max_length: int) -> None:
    """Refuses a base that cannot be kept in slots.

    Args:
        model: an ``AuxTunedForCausalLM``.
        max_length: most tokens of a text with its prompt.

    Raises:
        ValueError: it computes its own logits, or as ``check_slots_of_lm``.
    """
    if model.config.lm_term == "logits":
        raise ValueError('lm_term is "logits"; the engine draws from output embeddings. Use model.generate')
    check_slots_of_lm("the base", model.lm, model.transformer_config(None), max_length)


def check_format(model: Any, text_format: TextFormat) -> None:
    """Refuses a format that tells the base something else than it was told in training.

    Args:
        model: an ``AuxTunedForCausalLM``.
        text_format: of its texts.

    Raises:
        ValueError: so it is.
    """
    trained, given = model.config.base_prompt, text_format.base_prompt
    if trained != given:
        raise ValueError(
            f"the base was told conditions by base_prompt={trained!r}, but text_format has {given!r}; take "
            "TextFormat.of(model.config, tokenizer)"
        )


def check_members(model: Any, others: Mapping[str, Any], max_length: int) -> None:
    """Refuses language models that cannot write texts with a pair.

    Args:
        model: an ``AuxTunedForCausalLM``.
        others: language models by name.
        max_length: most tokens of a text with its prompt.

    Raises:
        ValueError: a name is taken, a model has other ids or is on another device, or as
            ``check_slots_of_lm``.
    """
    for name, lm in others.items():
        check_beside(name, lm, model.lm, model.config.vocab_size, [BASE, *model.auxiliary_names])
        check_slots_of_lm(f"model {name!r}", lm, lm.config.get_text_config(), max_length)


def check_beside(name: str, lm: Any, own: Any, V: int, taken: Collection[str]) -> None:
    """Refuses a language model that cannot be a member beside a base.

    Args:
        name: what members call it.
        lm: the model.
        own: the base.
        V: ids that are drawn from.
        taken: names of the base and of its auxiliaries.

    Raises:
        ValueError: the name is taken, or it has fewer ids or is on another device.
    """
    if name in taken:
        raise ValueError(f"models has {name!r}, which names a model of the pair; choose another name")
    size = vocabulary(lm)
    if size < V:
        raise ValueError(
            f"model {name!r}, a {type(lm).__name__}, has {size} ids, but the base, a "
            f"{type(own).__name__}, draws from {V}; members of a mixture share one vocabulary. "
            f"Where the rest is padding, make the pair with vocab_size={size}"
        )
    device, where = output_device(own), output_device(lm)
    if where != device:
        raise ValueError(f"model {name!r} is on {where} but the base on {device}; move it there")


def check_shapes(
    model: Any, others: Mapping[str, Any], shapes: Collection[tuple[str, ...]], slots: int, columns: int
) -> None:
    """Refuses mixtures whose steps cannot be recorded.

    Args:
        model: an ``AuxTunedForCausalLM``.
        others: language models by name.
        shapes: models of a text's members.
        slots: members of one model that there is room for.
        columns: of a cache, behind which a recorded step has its new token.

    Raises:
        ValueError: a model is not known, or cannot be recorded; there is no base; or too many members.
    """
    lms = {BASE: model.lm, **others}
    known = [*lms, *model.auxiliary_names]
    for shape in shapes:
        for name in shape:
            where = f"graphs has {shape!r}, but"
            if name not in known:
                raise ValueError(f"{where} there is no model {name!r}; choose from {known}")
            if shape.count(name) > slots:
                raise ValueError(f"{where} there are {slots} slots of {name!r}; make slots larger")
            counts = (
                counts_positions(lms[name]) if name in lms else model.auxiliary_traits(name).counts_positions
            )
            window = _window_of(lms[name].config.get_text_config()) if name in others else None
            if window is not None and window < columns:
                raise ValueError(f"{where} {name!r} has a sliding window of {window} positions; leave it out")
            if not counts:
                raise ValueError(
                    f"{where} steps of {name!r} tell positions by columns of a cache; leave it out"
                )
        if BASE not in shape:
            raise ValueError(f"graphs has {shape!r} without {BASE!r}, which every text has; add it")


def check_slots_of_lm(who: str, lm: Any, config: Any, max_length: int) -> None:
    """Refuses a language model that cannot be kept in slots.

    Args:
        who: it is, for the message.
        lm: a causal LM of transformers.
        config: of its transformer.
        max_length: most tokens of a text with its prompt.

    Raises:
        ValueError: it has too few positions, has layers other than of attention, or its states depend on
            what else is in a batch.
    """
    name = type(lm).__name__
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(
            f"max_length is {max_length}, but {who} has positions for {positions} tokens; lower it "
            "(--max-length)"
        )
    cache = DynamicCache(config=config)
    kinds = getattr(config, "layer_types", None) or [type(layer).__name__ for layer in cache.layers]
    for kind, layer in zip(kinds, cache.layers, strict=False):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(f"{who}, a {name}, has layers of type {kind!r}, {_NO_SLOTS}")
        window = getattr(layer, "sliding_window", None)
        if kind == "chunked_attention" and window is not None and window < max_length:
            raise ValueError(
                f"{who}, a {name}, has layers of type {kind!r} over {window} positions, less than "
                f"max_length, {max_length}; lower max_length, or {_USE}"
            )
    _check_rotary(who, config, max_length)
    if not counts_positions(lm) and not _ignores_padding(lm, lm.device):
        raise ValueError(
            f"{who}, a {name}, tells positions by columns of its cache, so that a text would depend on "
            f"the others in its batch; {_USE}, one text at a time"
        )


def check_slots_of_auxiliary(model: Any, name: str, columns: int) -> None:
    """Refuses an auxiliary that cannot be kept in slots.

    Args:
        model: an ``AuxTunedForCausalLM``.
        name: of the auxiliary.
        columns: most of a condition and a text together.

    Raises:
        ValueError: it has layers other than of attention, or a sliding window that matters.
    """
    config = model.transformer_config(name)
    if config is None:
        return  # a custom module, whose cache is looked at when memory is reserved
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(f"auxiliary {name!r} has a {type(layer).__name__}, {_NO_SLOTS}")
        if window is not None and window < columns:
            # The padding of conditions stands between a condition and its text.
            raise ValueError(
                f"auxiliary {name!r} has a sliding window of {window} positions, which is less than the "
                f"{columns} of max_condition and max_length; lower them, or {_USE}"
            )
    _check_rotary(f"auxiliary {name!r}", config, columns)


def window_of(model: Any) -> int | None:
    """The base's narrowest sliding window, in positions; None if it has none."""
    return _window_of(model.transformer_config(None))


def _window_of(config: Any) -> int | None:
    layers = DynamicCache(config=config).layers
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return min(windows, default=None)


def sequence_refusal(model: Any, others: Mapping[str, Any], sequence: Sequence) -> str | None:
    """Why models cannot read a sequence, whatever room there is; None if they can.

    Args:
        model: an ``AuxTunedForCausalLM``.
        others: language models by name.
    """
    for part in sequence.parts:
        refusal = _part_refusal(model, others.get(part.model, model.lm), sequence, part)
        if refusal is not None:
            return refusal
    return None


def _part_refusal(model: Any, lm: Any, sequence: Sequence, part: Part) -> str | None:
    size = int(lm.get_input_embeddings().weight.shape[0])
    of_auxiliary = part.base >= 0
    if of_auxiliary:
        size = min(size, model.config.vocab_size)
    for what, ids in (("prompt", part.prompt_ids), ("condition", part.condition_ids)):
        if ids and max(ids) >= size:
            return (
                f"the {what}{sequence.named(part)} has the id {max(ids)}, but the models have {size} ids; "
                "the tokenizer is another model's, or has tokens that they lack"
            )
    if not of_auxiliary:
        return None
    name = part.model
    positions = getattr(model.transformer_config(name), "max_position_embeddings", None)
    text, condition = len(part.prompt_ids) + sequence.max_new_tokens, len(part.condition_ids)
    # An encoder-decoder reads the condition apart.
    needed = text + condition if not model.auxiliary_traits(name).needs_condition else max(text, condition)
    needed += len(model.base_prefix) if model.auxiliary_traits(name).reads_prefix else 0
    if positions is not None and needed > positions:
        return (
            f"condition, prompt and max_new_tokens take {needed} positions, but auxiliary {name!r} has "
            f"{positions}; shorten them"
        )
    return None


def _check_rotary(who: str, config: Any, columns: int) -> None:
    rotary = getattr(config, "rope_parameters", None) or {}
    every = rotary.values() if all(isinstance(one, dict) for one in rotary.values()) else [rotary]
    for one in every:
        names = ("original_max_position_embeddings", "max_position_embeddings")
        limits = (one.get(names[0]), *(getattr(config, name, None) for name in names))
        limit = next(filter(None, limits), None)
        if one.get("rope_type") in _BATCH_WIDE_ROTARY and limit is not None and columns > limit:
            raise ValueError(
                f"{who} has rotary embeddings of type {one['rope_type']}, which change for a whole batch "
                f"beyond {limit} positions, and there may be {columns}; lower max_length or max_condition"
            )


@torch.no_grad()
def _ignores_padding(lm: Any, device: torch.device) -> bool:
    """Whether two tokens have the states with padding before them that they have without."""
    ids = torch.tensor([[0, 0, 1, 2]], device=device)
    mask = torch.tensor([[0, 0, 1, 1]], device=device)
    padded: Tensor = run_base(lm, ids, mask).states[:, 2:].float()
    alone = run_base(lm, ids[:, 2:], mask[:, 2:]).states.float()
    # Half precision adds up in another order.
    return bool((padded - alone).abs().max() <= 0.02 * alone.abs().max())
