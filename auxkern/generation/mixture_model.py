"""A mixture as one model of transformers, for what takes one: evaluation harnesses, ``generate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from auxkern.core.terms import Head, Logits, Sparse, Term, like
from auxkern.generation.limits import check_beside
from auxkern.generation.members import BASE, Member, Mixture, check_reads
from auxkern.generation.request import Request
from auxkern.model import base
from auxkern.model.caches import CACHE_NAME, AuxiliaryRows
from auxkern.model.generation import SumGeneration, check_positions
from auxkern.model.inputs import BaseSide, PairInputs
from auxkern.model.mixing import Added, mixed
from auxkern.model.modeling import AuxTunedForCausalLM
from auxkern.model.order import padding_first
from auxkern.model.pair_terms import label_loss
from auxkern.model.text import TextFormat
from auxkern.ops.dense import dense_logits
from auxkern.ops.mixtures import plausible


class Context(NamedTuple):
    """What a language model of a mixture reads before the text.

    Attributes:
        model: its name.
        begin: (P) start token and prompt; None where it reads the text as it is.
    """

    model: str
    begin: tuple[int, ...] | None


class _Steered(NamedTuple):
    """An auxiliary of a mixture.

    Attributes:
        name: of the auxiliary.
        condition: (K) ids.
        weight: None for the one that it was trained with.
    """

    name: str
    condition: list[int]
    weight: float | None


class _Read(NamedTuple):
    """What a language model made of a context and new tokens of the text.

    Attributes:
        ids: (B, S) that it read now.
        mask: (B, P + S) of all that it has read.
        places: (B, T) columns of the text's tokens among the S; None where they are the same.
        output: of the pass.
    """

    ids: Tensor
    mask: Tensor
    places: Tensor | None
    output: base.LmOutput

    def kept(self, values: Tensor, keep: int) -> Tensor:
        """(B, T', ...) of values (B, S, ...), at the last ``keep`` (0: all) columns of the text."""
        if self.places is None:
            return values[:, -keep:]
        return values.take_along_dim(self.places[:, -keep:, None], 1)


class MixtureCache:
    """What every context and every auxiliary of a mixture keeps of a text.

    Args:
        length: columns of the text so far.
        reads: what the contexts read.
        auxiliaries: in the order of the members.
    """

    is_compileable = False  # read by transformers' generate

    def __init__(self, length: int, reads: list[_Read], auxiliaries: list[AuxiliaryRows]) -> None:
        self._length, self.auxiliaries = length, auxiliaries
        self.lms = [read.output.cache for read in reads]
        self.masks = [read.mask for read in reads]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Text positions seen so far, padding included."""
        return self._length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the sequences ``beam_idx`` (B,), as beam search asks."""
        self.masks = [mask[beam_idx] for mask in self.masks]
        for cache in (*self.lms, *(part.cache for part in self.auxiliaries)):
            cache.reorder_cache(beam_idx)


class MixtureForCausalLM(SumGeneration, PreTrainedModel, GenerationMixin):
    """softmax(sum_m weight_m logits_m): each member reads what is fixed for it, then the text that all share.

    A language model without a prompt reads the text as it is. One with a prompt reads the start token and
    the prompt, then the text, whose own start token is left out. Auxiliaries read what the first member of
    the base reads, and its hidden states. Language models get no gradient. It has nothing to save.

    Args:
        model: a pair, or any causal language model of transformers: "base" among the members.
        text_format: makes ids of prompts and conditions.
        mixture: members and plausibility, such as ``guidance`` returns.
        models: other language models by name, of the base's vocabulary and on its device.

    Raises:
        TypeError, ValueError: there are no members, or they contradict themselves or do not fit the models.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        model: Any,
        text_format: TextFormat,
        mixture: Mixture,
        models: Mapping[str, Any] | None = None,
    ) -> None:
        others = dict(models or {})
        is_pair = isinstance(model, AuxTunedForCausalLM)
        auxiliaries = model.auxiliary_names if is_pair else []
        lms = {BASE: model.lm if is_pair else model, **others}
        V = model.config.vocab_size if is_pair else base.vocabulary(model)
        for name, lm in others.items():
            check_beside(name, lm, lms[BASE], V, [BASE, *auxiliaries])
        if not mixture.members:
            raise ValueError("the mixture has no members; give it some, such as those of guidance(...)")
        Request("mixture", **mixture._asdict())  # refuses what contradicts itself
        super().__init__(PreTrainedConfig(vocab_size=V, **_special_ids(model)))
        self.post_init()  # before there are modules, whose weights are made already
        self.models = nn.ModuleList([model, *others.values()])
        self.mixture, self.start_id = mixture, text_format.start_id
        self._lms = lms
        self._own_logits = {name: _computes_logits(lm) for name, lm in lms.items()}
        if is_pair:
            self._own_logits[BASE] = model.config.lm_term == "logits"
        self._weights: dict[Context, float] = {}
        self._steered: list[_Steered] = []
        for member in mixture.members:
            check_reads(member, lms, auxiliaries)
            if member.model in auxiliaries:
                self._steered.append(_steered(model, text_format, member))
                continue
            context = Context(member.model, _begin(text_format, member.prompt))
            weight = 1.0 if member.weight is None else member.weight
            self._weights[context] = self._weights.get(context, 0.0) + weight
        self._layers = model.layers_read(one.name for one in self._steered) if self._steered else []
        rooms = [
            config.max_position_embeddings - before
            for _, config, before in self._readers()
            if getattr(config, "max_position_embeddings", None) is not None
        ]
        self.config.max_position_embeddings = min(rooms, default=None)
        self.eval()

    # ----------------------------------------------------------------------------- what it computes

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: MixtureCache | None = None,
        use_cache: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        cache: MixtureCache | None = None,
    ) -> Any:
        """Logits of the mixture, and the loss with labels.

        Args:
            input_ids: (B, T) int64; new tokens, if there is a cache.
            attention_mask: (B, P + T) int64, 1 for real tokens; padding on either side.
            labels: (B, T) int64: the ids at the same positions, -100 where nothing is scored; position t is
                scored against label t + 1.
            past_key_values, cache: what an earlier call returned, under either of transformers' names.
            use_cache: whether to return caches.
            num_items_in_batch: what divides the summed loss, instead of the number of labels.
            logits_to_keep: how many of the last positions' logits are wanted; 0 for all. Without labels.
            return_dict: False for a tuple.

        Returns:
            ``CausalLMOutputWithPast``: ``loss`` 0-d float32 in nats, ``logits`` (B, T, V) float32.

        Raises:
            ValueError: arguments do not fit each other.
        """
        if past_key_values is not None and cache is not None:
            raise ValueError("cache and past_key_values are two names of one argument; pass one of them")
        cache = cache if past_key_values is None else past_key_values
        keep, V = 0 if labels is not None else logits_to_keep, self.config.vocab_size
        terms, new_cache = self.terms(input_ids, attention_mask, cache, use_cache=use_cache, keep=keep)
        loss = None if labels is None else label_loss(terms, labels, V, num_items_in_batch)
        logits = dense_logits(terms, vocab_size=V)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: new_cache})
        return output.to_tuple() if return_dict is False else output

    def terms(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        cache: MixtureCache | None = None,
        *,
        use_cache: bool = False,
        keep: int = 0,
    ) -> tuple[list[Term], MixtureCache | None]:
        """The terms of the last ``keep`` (0: all) positions' logits, rows (B, T), and the cache.

        Arguments as in ``forward``.
        """
        past, V = 0 if cache is None else cache.get_seq_length(), self.config.vocab_size
        text = PairInputs(ids, mask, past=past)
        reads = {
            context: self._read(context, place, text, cache, use_cache)
            for place, context in enumerate(self._weights)
        }
        by_model: dict[str, list[tuple[Term, float]]] = {BASE: []}
        for context, read in reads.items():
            logits = read.output.logits
            logits = None if logits is None else read.kept(logits, keep)
            term = base.lm_term(
                self._lms[context.model], read.kept(read.output.states[:, :, 0], keep), logits
            )
            by_model.setdefault(context.model, []).append((term, self._weights[context]))
        own, *others = (_weighted(terms, V) for terms in by_model.values())
        parts, added = self._steer(reads[self._first], cache, use_cache, keep)
        terms = mixed(own, added, V, others)
        if self.mixture.plausibility:
            judge, _ = by_model[BASE][0]
            terms = [plausible(terms, [judge], self.mixture.plausibility, vocab_size=V)]
        kept = MixtureCache(past + ids.shape[1], list(reads.values()), parts) if use_cache else None
        return terms, kept

    @property
    def _first(self) -> Context:
        """What auxiliaries read, penalties count and plausibility is judged by."""
        return next(context for context in self._weights if context.model == BASE)

    def _read(
        self, context: Context, place: int, text: PairInputs, cache: MixtureCache | None, use_cache: bool
    ) -> _Read:
        """One more pass of a context's model, over what is new."""
        ids, mask, places = text.input_ids, text.attention_mask, None
        if cache is not None:
            mask = torch.cat([cache.masks[place], mask[:, -ids.shape[1] :]], 1)
        elif context.begin is not None:
            ids, mask, places = _begun(context.begin, self.start_id, ids, mask)
        output = base.run_base(
            self._lms[context.model],
            ids,
            mask,
            layers=self._layers if context == self._first else (),
            cache=None if cache is None else cache.lms[place],
            use_cache=use_cache,
            want_logits=self._own_logits[context.model],
        )
        return _Read(ids, mask, places, output)

    def _steer(
        self, read: _Read, cache: MixtureCache | None, use_cache: bool, keep: int
    ) -> tuple[list[AuxiliaryRows], Added]:
        """The auxiliaries' caches and terms, behind what the base read."""
        parts: list[AuxiliaryRows] = []
        added: Added = []
        pair: Any = self.models[0]
        states, logits, *_ = read.output
        side = BaseSide(states, self._layers, logits, None)
        for place, one in enumerate(self._steered):
            known = AuxiliaryRows(one.name, None, None) if cache is None else cache.auxiliaries[place]
            condition = read.ids.new_tensor(one.condition).expand(len(read.ids), -1)
            # Where columns differ, the text's are taken of the terms.
            own = keep if read.places is None else 0
            part, terms = pair.auxiliary_part(
                known,
                PairInputs(read.ids, read.mask, condition),
                side,
                one.weight,
                use_cache=use_cache,
                keep=own,
            )
            parts.append(part)
            if read.places is not None:
                terms = [_kept(term, read, keep) for term in terms]
            added.append((part, terms))
        return parts, added

    # -------------------------------------------------------------------------------------- generate

    def next_terms(
        self, ids: Tensor, mask: Tensor, cache: Any, inputs: dict[str, Any]
    ) -> tuple[list[Term], Any]:
        return self.terms(ids, mask, cache, use_cache=inputs.get("use_cache", True), keep=1)

    def prompt_read(self, ids: Tensor, mask: Tensor) -> Tensor:
        begin = self._first.begin
        if begin is not None:
            ids, mask, _ = _begun(begin, self.start_id, ids, mask)
        return super().prompt_read(ids, mask)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        for who, config, before in self._readers():
            check_positions(who, config, generation_config.max_length + before)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _readers(self) -> list[tuple[str, Any, int]]:
        """Who reads the text, the config of its transformer, and the tokens that it reads before."""
        readers = [
            (f"model {one.model!r}", self._lms[one.model].config.get_text_config(), len(one.begin or ()))
            for one in self._weights
        ]
        pair: Any = self.models[0]
        before = len(self._first.begin or ())
        for one in self._steered:
            config = pair.transformer_config(one.name)
            readers.append((f"auxiliary {one.name!r}", config, before + len(one.condition)))
        return readers

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a mixture has no weights of its own; save its models")


def _special_ids(model: Any) -> dict[str, Any]:
    """Of the start, the end and padding; a chat model names its several ends for ``generate`` alone."""
    ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        known = getattr(model.generation_config, name, None)
        ids[name] = getattr(model.config.get_text_config(), name, None) if known is None else known
    return ids


def _computes_logits(lm: Any) -> bool:
    """Whether a language model's logits are more than ``output_head`` of its hidden states."""
    try:
        base.check_output_head(lm)
    except base.UnfitBaseError:
        return True
    return False


def _begin(text_format: TextFormat, prompt: str | None) -> tuple[int, ...] | None:
    if prompt is None:
        return None
    return tuple(text_format.plain.prompts([""], [prompt])["input_ids"][0].tolist())


def _steered(pair: Any, text_format: TextFormat, member: Member) -> _Steered:
    if text_format.base_prompt is not None:
        raise ValueError(
            f"member {member.model!r} was trained on a base that is told the condition by base_prompt "
            f"{text_format.base_prompt!r}; write its texts with the pair itself, or with Engine"
        )
    condition = text_format.prompts([member.condition or ""])["condition_ids"][0].tolist()
    if not condition and pair.auxiliary_traits(member.model).needs_condition:
        raise ValueError(f"member {member.model!r} has an encoder, which needs a condition; give it one")
    return _Steered(member.model, condition, member.weight)


def _begun(begin: tuple[int, ...], start_id: int, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask (B, S) of texts (B, T) behind ``begin`` (P), and the columns of each text's tokens.

    Where a text has the start token, the last of ``begin`` stands in its place, so that the text's first
    token is predicted behind it.
    """
    B, P = len(ids), len(begin)
    rows, real = torch.arange(B, device=ids.device), mask != 0
    first = real.long().argmax(1)
    starts = (ids[rows, first] == start_id) & real[rows, first]
    before = ids.new_tensor(begin).repeat(B, 1)
    # One column less before these.
    before[starts] = before[starts].roll(1, 1)
    shown = torch.ones_like(before)
    shown[starts, 0] = 0
    ids = ids.clone()
    ids[rows[starts], first[starts]] = begin[-1]
    order = padding_first(torch.cat([shown, mask], 1))
    return torch.cat([before, ids], 1).take_along_dim(order.positions, 1), order.mask, order.places[:, P:]


def _kept(term: Term, read: _Read, keep: int) -> Term:
    """A term's rows (B, S) at the text's columns."""
    if isinstance(term, Sparse):
        return like(term, ids=read.kept(term.ids, keep), values=read.kept(term.values, keep))
    name = "hidden" if isinstance(term, Head) else "values"
    return like(term, **{name: read.kept(getattr(term, name), keep)})


def _weighted(terms: list[tuple[Term, float]], V: int) -> Term:
    """The weighted sum of terms of one model: of hidden states, where its logits are linear in them."""
    (first, weight), *more = terms
    if not more and weight == 1.0:
        return first
    if isinstance(first, Head) and first.softcap is None and first.bias is None:
        hidden = [weight * term.hidden.float() for term, weight in terms if isinstance(term, Head)]
        return like(first, hidden=torch.stack(hidden).sum(0))
    z = [weight * dense_logits([term], vocab_size=V) for term, weight in terms]
    return Logits(torch.stack(z).sum(0))
