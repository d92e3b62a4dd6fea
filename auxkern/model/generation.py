"""``generate`` for a sum of models: drawn by ``auxkern.sample`` where it can, by transformers elsewhere."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode

from auxkern.core.terms import Term, rows_of
from auxkern.model.inputs import PairInputs, checked_weights
from auxkern.model.text import padded
from auxkern.ops.sample import sample
from auxkern.ops.sampling_params import SamplingParams

# What of SamplingParams each of transformers' processors is; any other one leaves the drawing to
# transformers. By type, for a subclass computes something else.
_SETTINGS: dict[type, Callable[[Any], dict[str, Any]]] = {
    TemperatureLogitsWarper: lambda one: {"temperature": float(one.temperature)},
    TopKLogitsWarper: lambda one: {"top_k": int(one.top_k)},
    TopPLogitsWarper: lambda one: {"top_p": float(one.top_p)},
    MinPLogitsWarper: lambda one: {"min_p": float(one.min_p)},
    RepetitionPenaltyLogitsProcessor: lambda one: {"repetition_penalty": float(one.penalty)},
    SequenceBiasLogitsProcessor: lambda one: {
        "logit_bias": {int(ids[0]): float(bias) for ids, bias in one.sequence_bias.items()}
    },
}
_ROLLS_BACK = "assisted generation takes tokens back, which the caches of several models cannot"
_ON_THE_HUB = "transformers has moved that search to code on the Hub, which knows one model"
_SEVERAL = "there are several models; ask one of them for its own"
# Fields of a GenerationConfig that several models cannot honour, with the reason.
_REFUSED = {
    "prompt_lookup_num_tokens": _ROLLS_BACK,
    "assistant_early_exit": _ROLLS_BACK,
    "use_mtp": _ROLLS_BACK,
    "penalty_alpha": _ON_THE_HUB,
    "dola_layers": _ON_THE_HUB,
    "constraints": _ON_THE_HUB,
    "force_words_ids": _ON_THE_HUB,
    "num_beam_groups": _ON_THE_HUB,
    "output_attentions": _SEVERAL,
    "cache_implementation": "several models make their caches themselves",
    "prefill_chunk_size": "several models read a prompt at once",
    "token_healing": "a prompt would end in other tokens than its mask says",
}


class _FromConfig(LogitsProcessorList):
    """Processors that a GenerationConfig alone asks for; a user's own are of any order and any kind."""


class SumGeneration(GenerationMixin):
    """transformers' ``generate`` for a model whose logits are a sum of terms: it draws them where it can.

    Attributes:
        generates_from: names of what its ``generate`` takes beside the fields of a GenerationConfig.
    """

    generates_from: tuple[str, ...] = ("input_ids", "attention_mask", "seeds")

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        seeds: Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Token ids; arguments as in transformers' ``generate``, and ``seeds``.

        Drawing and greedy search go through ``auxkern.sample``: the noise of a sequence comes from its
        seed, the position and the token, so its text is the same alone and in any batch. Beam search,
        processors of your own and every option that ``SamplingParams`` does not know are transformers'
        own code on the summed logits. What several models cannot do, such as assisted generation, is
        refused.

        Args:
            inputs: (B, T) ids, left-padded; or ``input_ids`` and ``attention_mask`` by name.
            seeds: one int for each returned sequence, B * num_return_sequences of them; drawn from
                torch's global generator if None.

        Raises:
            ValueError: an argument has the wrong number of entries, or an option is unknown or refused.
        """
        checked_ids(inputs if inputs is not None else kwargs.get("input_ids"), kwargs.get("attention_mask"))
        if seeds is not None:
            kwargs["seeds"] = tuple(map(int, seeds))  # a tuple is not repeated for return sequences
        return super().generate(inputs, generation_config, *args, **kwargs)

    def next_terms(
        self, ids: Tensor, mask: Tensor, cache: Any, inputs: dict[str, Any]
    ) -> tuple[list[Term], Any]:
        """Terms of the next tokens, rows (B, 1), and the cache.

        Args:
            ids: (B, T) new tokens.
            mask: (B, P + T) of these and of those before.
            cache: of the call before; None at first.
            inputs: what else ``generate`` was given.
        """
        raise NotImplementedError(f"{type(self).__name__} has no next_terms")

    def prompt_read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, P) ids that a text goes on from, -1 for padding: penalties and positions count them."""
        return ids.masked_fill(mask == 0, -1)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, seeds: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, which calls it where it does the search or the drawing itself."""
        if seeds is not None:
            raise ValueError("seeds are given, but this search does not draw with auxkern.sample; drop them")
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return prepared

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_generation_config(*args, **kwargs)
        for name, reason in _REFUSED.items():
            value = getattr(prepared[0], name, None)
            if value and not (name == "num_beam_groups" and value == 1):
                raise ValueError(f"{name} is {value!r}, but {reason}; leave it out")
        return prepared

    def _validate_generation_mode(self, mode: Any, config: Any, mode_kwargs: dict[str, Any]) -> None:
        if mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(f"assistant_model is given, but {_ROLLS_BACK}; leave it out")
        super()._validate_generation_mode(mode, config, mode_kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        for name, value in model_kwargs.items():
            if name in self.generates_from or value is None:
                continue
            if name in ("past_key_values", "cache"):
                raise ValueError(f"{name} is given to generate, which starts anew; pass the whole text")
            close = difflib.get_close_matches(name, self.generates_from, 1)
            known = f"{', '.join(self.generates_from)} and the fields of GenerationConfig"
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {known}"
            raise ValueError(f"generate of {type(self).__name__} does not take {name}; {hint}")
        super()._validate_model_kwargs(model_kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses: transformers' own batches keep one model's cache.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "transformers' continuous batching keeps the cache of one model, and there are several; use "
            "auxkern.generation.Engine"
        )

    def _get_logits_processor(
        self, generation_config: Any, *args: Any, logits_processor: Any = None, **kwargs: Any
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(
            generation_config, *args, logits_processor=logits_processor, **kwargs
        )
        return processors if logits_processor else _FromConfig(processors)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # each model has its own

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        seeds: tuple[int, ...] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        refusal = _drawing_refusal(logits_processor, generation_config, synced_gpus)
        if refusal is not None:
            if seeds is not None:
                raise ValueError(
                    "seeds are given, but an option of this call leaves the drawing to transformers "
                    f"({refusal}); drop it, or use torch.manual_seed instead"
                )
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        settings: dict[str, Any] = {} if generation_config.do_sample else {"temperature": 0.0}
        for one in logits_processor:
            settings |= _SETTINGS[type(one)](one)
        params = SamplingParams(**settings)
        return self._draw(
            input_ids, params, stopping_criteria, generation_config, streamer, seeds, model_kwargs
        )

    def _draw(
        self,
        ids: Tensor,
        params: SamplingParams,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any,
        seeds: tuple[int, ...] | None,
        inputs: dict[str, Any],
    ) -> Tensor:
        B, device = ids.shape[0], ids.device
        rows = torch.arange(B, device=device)
        seed = _seed_tensor(seeds, B).to(device)
        mask = inputs.pop("attention_mask", None)  # transformers drops one that is all ones
        mask = torch.ones_like(ids) if mask is None else mask
        penalised = params.repetition_penalty != 1.0
        prompt = self.prompt_read(ids, mask)
        # Positions count real tokens, so that padding does not change the noise.
        position = (prompt >= 0).sum(-1)
        told = inputs.get("told")
        if told is not None:
            # What tells the base the condition is no text that a penalty counts.
            prompt = prompt.masked_fill((prompt >= 0).cumsum(-1) <= told[:, None], -1)
        start = ids.shape[1]
        unfinished = torch.ones(B, dtype=torch.bool, device=device)
        pad = _padding(generation_config, stopping_criteria)
        cache: Any = None
        while True:
            new = ids if cache is None else ids[:, -1:]
            terms, cache = self.next_terms(new, mask, cache, inputs)
            terms = [rows_of(term, rows) for term in terms]
            history = ids[:, start:] if penalised else None
            drawn = sample(
                terms,
                params,
                seed=seed,
                position=position + (ids.shape[1] - start),
                prompt=prompt if penalised else None,
                history=history,
                vocab_size=self.config.vocab_size,
            )
            tokens = drawn.tokens if pad is None else torch.where(unfinished, drawn.tokens, pad)
            failed = ((drawn.status != 0) & unfinished).nonzero()[:, 0].tolist()
            if failed:
                raise RuntimeError(
                    f"the logits of sequences {failed} are NaN or infinite; look at the models' weights and "
                    "aux_scale"
                )
            ids = torch.cat([ids, tokens[:, None]], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            unfinished = unfinished & ~stopping_criteria(ids, None)
            if not bool(unfinished.any()):
                break
        if streamer is not None:
            streamer.end()
        return ids


class PairGeneration(SumGeneration):
    """``generate`` with conditions, auxiliaries and mixing weights per sequence."""

    generates_from = (
        *SumGeneration.generates_from,
        *("condition_ids", "condition_mask", "told"),
        *("auxiliary_ids", "aux_scale", "output_hidden_states"),
    )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        seeds: Sequence[int] | Tensor | None = None,
        auxiliary: str | Sequence[str | Sequence[str] | None] | None = "default",
        aux_scale: float | Sequence[float | Sequence[float] | None] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Token ids; as of ``SumGeneration``, and with these arguments.

        Args:
            inputs: (B, T) ids, left-padded; or ``input_ids`` and ``attention_mask`` by name.
            condition_ids, condition_mask: (B, K), by name; (B, A, K) where each of a text's auxiliaries
                has its own, in their order (``TextFormat.prompts`` makes them).
            told: (B,), by name: how many tokens of each prompt are the base prompt (made likewise).
            seeds: as there.
            auxiliary: name of an auxiliary, None for the base alone, or one of these for each input; a list
                of names for an input adds up several.
            aux_scale: mixing weight instead of those of the configs; a float, one for each input, or a list
                of one for each of its auxiliaries.

        Raises:
            ValueError: there is no such auxiliary, an argument has the wrong number of entries, or an
                option is unknown or not for pairs.
        """
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        ids = checked_ids(ids, kwargs.get("attention_mask"))
        B = ids.shape[0]
        counts = None
        if auxiliary != "default":
            indices = self._auxiliary_ids(auxiliary, B)
            if _is_nested(auxiliary):
                counts = [len(row) for row in indices]
                rows, _ = padded(indices, -1)
            else:
                rows = torch.tensor([row[0] if row else -1 for row in indices])
            kwargs["auxiliary_ids"] = rows.to(ids.device)
        if aux_scale is not None:
            if _is_nested(aux_scale):
                aux_scale = _weights_of(aux_scale, counts, B)
            shape = (B,) if counts is None else (B, max(counts))
            kwargs["aux_scale"] = checked_weights(aux_scale, shape, ids.device)
        return super().generate(inputs, generation_config, *args, seeds=seeds, **kwargs)

    def next_terms(
        self, ids: Tensor, mask: Tensor, cache: Any, inputs: dict[str, Any]
    ) -> tuple[list[Term], Any]:
        batch = PairInputs(
            ids, mask, *(inputs.get(one) for one in ("condition_ids", "condition_mask", "told"))
        )
        options = {name: inputs.get(name) for name in ("auxiliary_ids", "aux_scale")}
        use_cache = inputs.get("use_cache", True)
        terms, cache, _ = self.terms(batch, cache=cache, use_cache=use_cache, keep=1, **options)
        return terms, cache

    def transformer_config(self, auxiliary: str | None) -> Any:
        """The config of the base's transformer (None) or of an auxiliary's; None for a custom module."""
        if auxiliary is None:
            return self.lm.config.get_text_config()
        return self.auxiliary_traits(auxiliary).transformer_config

    def _auxiliary_ids(self, auxiliary: Any, B: int) -> list[list[int]]:
        """Indices of the auxiliaries of each input."""
        asked = [auxiliary] * B if auxiliary is None or isinstance(auxiliary, str) else list(auxiliary)
        if len(asked) != B:
            raise ValueError(f"auxiliary has {len(asked)} names but there are {B} inputs; give each one")
        names = [[] if one is None else list(one) if _is_list(one) else [one] for one in asked]
        known = self.auxiliary_names
        for place, row in enumerate(names):
            for name in row:
                if name not in known:
                    can = [None, *known]
                    raise ValueError(
                        f"there is no auxiliary {name!r}; choose one of {can}, or load_auxiliary it"
                    )
            if len(set(row)) < len(row):
                raise ValueError(f"auxiliary[{place}] is {row}; name an auxiliary once for a text")
        return [[known.index(name) for name in row] for row in names]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        condition = model_kwargs.get("condition_ids")
        K = 0 if condition is None else condition.shape[-1]
        names: list[str | None] = [None]
        if model_kwargs.get("auxiliary_ids") is None:
            names.append("default")
        else:
            used = set(model_kwargs["auxiliary_ids"].flatten().tolist())
            names += [name for i, name in enumerate(self.auxiliary_names) if i in used]
        for name in names:
            behind = name is None or self.auxiliary_traits(name).reads_prefix
            needed = generation_config.max_length + (0 if name is None else K)
            needed += len(self.base_prefix) if behind else 0
            who = "the base" if name is None else f"auxiliary {name!r}"
            check_positions(who, self.transformer_config(name), needed)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def checked_ids(ids: Any, mask: Any) -> Tensor:
    """The prompts of a ``generate``.

    Raises:
        ValueError: they are no ids (B, T), or padded on the right.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"generate needs input_ids (B, T), the start token at least, but got {shape}; "
            "see TextFormat.prompts"
        )
    if isinstance(mask, Tensor) and mask.shape == ids.shape and not bool((mask[:, -1] != 0).all()):
        raise ValueError(
            "attention_mask is 0 at the end of a row, where new tokens follow; pad prompts on the left"
        )
    return ids


def check_positions(who: str, config: Any, needed: int) -> None:
    """Refuses what a table of learned positions does not hold; rotary embeddings have no end.

    Args:
        who: has the table, for the message.
        config: of its transformer; None for a module that says nothing.
        needed: tokens of a text with all that stands before it.

    Raises:
        ValueError: it does not hold them.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and not getattr(config, "rope_parameters", None) and needed > positions:
        raise ValueError(
            f"prompt, max_new_tokens and condition take {needed} positions, but {who} has {positions}; "
            "shorten them"
        )


def _drawing_refusal(processors: LogitsProcessorList, config: Any, synced_gpus: bool) -> str | None:
    """Why ``auxkern.sample`` cannot do a search; None if it can."""
    if type(processors) is not _FromConfig:
        return f"logits_processor {[type(one).__name__ for one in processors]}"
    others = [type(one).__name__ for one in processors if not _is_known(one)]
    if others:
        return ", ".join(others)
    if config.return_dict_in_generate:
        return "return_dict_in_generate=True"
    return "synced_gpus=True" if synced_gpus else None


def _is_known(processor: Any) -> bool:
    if type(processor) is SequenceBiasLogitsProcessor:
        return all(len(ids) == 1 for ids in processor.sequence_bias)
    return type(processor) in _SETTINGS


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_nested(value: Any) -> bool:
    """Whether inputs have lists of their own."""
    return _is_list(value) and any(_is_list(one) for one in value)


def _weights_of(aux_scale: Any, counts: list[int] | None, B: int) -> Tensor:
    """(B, A) of lists, 0 where an input has fewer auxiliaries.

    Args:
        aux_scale: a number, a list, or None for no auxiliary, for each input.
        counts: how many auxiliaries each has; None where they have no lists of names.
    """
    if counts is None:
        raise ValueError("aux_scale has lists, but auxiliary has none; give each input a list of names")
    if len(aux_scale) != B:
        raise ValueError(f"aux_scale has {len(aux_scale)} entries but there are {B} inputs; give each one")
    weights = torch.zeros(B, max(counts))
    for place, (one, count) in enumerate(zip(aux_scale, counts, strict=True)):
        row = [] if one is None else one if _is_list(one) else [one] * count
        if len(row) != count:
            raise ValueError(
                f"aux_scale[{place}] is {one} but auxiliary[{place}] names {count}; give each a weight"
            )
        weights[place, :count] = torch.tensor([float(weight) for weight in row])
    return weights


def _seed_tensor(seeds: tuple[int, ...] | None, B: int) -> Tensor:
    if seeds is None:
        return torch.randint(2**63 - 1, (B,))
    if len(seeds) != B:
        raise ValueError(f"seeds has {len(seeds)} entries but {B} sequences are returned; give each one")
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds])


def _padding(generation_config: Any, stopping_criteria: Any) -> Tensor | None:
    """What follows the end of a finished sequence; None if nothing ends one."""
    if not any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
        return None
    pad: Tensor | None = generation_config._pad_token_tensor
    if pad is None:
        raise ValueError(
            "eos_token_id is set but pad_token_id is not; pass pad_token_id for finished sequences"
        )
    return pad
