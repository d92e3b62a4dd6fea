"""The sum of a pair: the base's term, and what each auxiliary adds to the sequences that it serves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auxkern.core.terms import Head, Logits, Sparse, Term, rows_of
from auxkern.model import base
from auxkern.model.caches import AuxiliaryRows, PairCache
from auxkern.model.first_layers import FirstLayers
from auxkern.model.inputs import BaseSide, PairInputs
from auxkern.model.interface import AuxiliaryOutput, AuxiliaryTraits, traits_of
from auxkern.model.last_layers import LastLayers
from auxkern.model.mixing import Alone, alone, mixed
from auxkern.model.prefix import BasePrefix, base_behind
from auxkern.model.text import IGNORED
from auxkern.nn import FrozenLinear
from auxkern.ops.cross_entropy import cross_entropy

DEFAULT = "default"


class PairTerms(NamedTuple):
    """What ``terms`` returns.

    Attributes:
        terms: of the sum, rows (B, T).
        cache: None unless asked for.
        alone: the terms of either side; None unless asked for.
    """

    terms: list[Term]
    cache: PairCache | None
    alone: Alone | None


class PairSum:
    """The terms of a base and of the auxiliaries that are loaded on it.

    Attributes:
        config, auxiliary, head: of the model's own auxiliary, which is called "default".
        lm: the base.
        base_prefix: what it reads before every text.
    """

    config: Any  # an AuxTunedConfig
    auxiliary: Any
    head: Any
    lm: Any
    base_prefix: BasePrefix
    _first: FirstLayers
    _others: dict[str, Any]  # each a pair on the same base

    def auxiliary_scale(self, name: str) -> float:
        """The mixing weight that an auxiliary was trained with."""
        return float(self._named(name).config.aux_scale)

    def auxiliary_traits(self, name: str) -> AuxiliaryTraits:
        """What an auxiliary says of itself."""
        return traits_of(self._named(name).auxiliary)

    @property
    def auxiliary_names(self) -> list[str]:
        """Names for ``generate(auxiliary=...)``."""
        return [DEFAULT, *self._others]

    def terms(
        self,
        batch: PairInputs,
        *,
        lm_states: Tensor | base.LmOutput | None = None,
        cache: PairCache | None = None,
        use_cache: bool = False,
        auxiliary_ids: Tensor | None = None,
        aux_scale: float | Tensor | None = None,
        keep: int = 0,
        separate: bool = False,
    ) -> PairTerms:
        """The terms of the last ``keep`` (0: all) positions' logits, rows (B, T), and the caches.

        Arguments as in ``forward``; for ``lm_states`` also what the base has made of the batch, with all of
        its hidden states. With ``separate`` the terms of either side are wanted, too.
        """
        parts, short = self._parts(auxiliary_ids, batch) if cache is None else cache.auxiliaries, False
        layers = self.layers_read(part.name for part in parts)
        if isinstance(lm_states, Tensor):
            self._check_states(lm_states, batch, layers, use_cache)
            lm_states = base.LmOutput(lm_states, None, None)
        elif lm_states is None:
            short = self._may_end_early(parts, aux_scale) and not separate if cache is None else cache.short
            lm_states = self.run_lm(batch, layers, cache, use_cache=use_cache, short=short)
        else:
            layers = list(range(lm_states.states.shape[2] - 1))
        states, logits, lm, columns = lm_states
        hidden, head = states[:, -keep:, 0], None
        if logits is None:
            head = base.output_head(self.lm)
            lm_term: Term = Head(hidden, *head)
        else:
            lm_term = Logits(logits[:, -keep:])
        caches: list[AuxiliaryRows] = []
        added: list[tuple[AuxiliaryRows, list[Term]]] = []
        for part in parts:
            own = None if logits is None else part.of(logits, False)
            side = BaseSide(part.of(states, False), layers, own, head)
            scale = aux_scale
            if isinstance(scale, Tensor):
                scale = part.of(scale, scale.dim() == 2)
            cache_of_part, terms = self.auxiliary_part(
                part, batch.of(part), side, scale, use_cache=use_cache, keep=keep
            )
            caches.append(cache_of_part)
            added.append((part, terms))
        pair_cache = None
        if use_cache:
            T = batch.attention_mask.shape[1]
            before = 0 if columns is None else columns.shape[1] - T
            pair_cache = PairCache(lm, caches, columns, before=before, short=short)
        V: Any = self.config.vocab_size
        sides = alone(lm_term, added, V) if separate else None
        return PairTerms(mixed(lm_term, added, V), pair_cache, sides)

    def layers_read(self, names: Iterable[str]) -> list[int]:
        """Hidden states of the base that some auxiliaries read, in order."""
        return sorted({layer for name in names for layer in self._named(name).config.lm_layers})

    def auxiliary_part(
        self,
        part: AuxiliaryRows,
        batch: PairInputs,
        side: BaseSide,
        scale: float | Tensor | None,
        *,
        use_cache: bool,
        keep: int,
    ) -> tuple[AuxiliaryRows, list[Term]]:
        """What one auxiliary adds to the logits of the last ``keep`` (0: all) positions, and its new cache.

        Args:
            part: which auxiliary, and its cache; R are its rows.
            batch: what these rows read.
            side: what the base made of them.
            scale: its mixing weight, or (R,) weights; None for the one that it was trained with.
            use_cache: whether a cache is wanted.
            keep: positions.
        """
        model, output = self._named(part.name), self.auxiliary_output(part, batch, side, use_cache=use_cache)
        cache = replace(part, cache=output.cache)
        scale = model.config.aux_scale if scale is None else scale
        output = output.positions(lambda values: values[:, -keep:])
        return cache, model.auxiliary_terms(output, batch, scale, side.head)

    def auxiliary_output(
        self, part: AuxiliaryRows, batch: PairInputs, side: BaseSide, *, use_cache: bool
    ) -> AuxiliaryOutput:
        """What one auxiliary makes of a batch, at all positions; arguments as of ``auxiliary_part``."""
        model = self._named(part.name)
        embedding: Tensor = self.lm.get_input_embeddings().weight
        read, layers = model.config.lm_layers, side.layers
        states = side.states
        chosen = states if read == layers else states[:, :, [0, *(1 + layers.index(i) for i in read)]]
        scores = model.lm_scores(states[:, :, 0], side.logits, batch.condition_ids)
        more: dict[str, Any] = {}
        if isinstance(model.auxiliary, LastLayers):
            more["scores_of"] = partial(base.logits_of_ids, self.lm, logits=None, ids=batch.condition_ids)
            if part.cache is None and self.base_prefix:
                more["prefix"] = self.base_prefix.states()
        output: AuxiliaryOutput = model.auxiliary(
            batch.for_auxiliary(chosen, embedding, scores, part.cache, use_cache, **more)
        )
        return output

    def auxiliary_terms(
        self,
        output: AuxiliaryOutput,
        batch: PairInputs,
        scale: float | Tensor,
        head: base.OutputHead | None = None,
    ) -> list[Term]:
        """What this model's own auxiliary adds to the logits of its rows (B, T).

        ``head`` is the base's, where it is known already.
        """
        hidden = output.hidden
        scales = scale[:, None].expand(hidden.shape[:2]) if isinstance(scale, Tensor) else scale
        if self.head is None:  # states of the base's kind
            head = base.output_head(self.lm) if head is None else head
            terms: list[Term] = [Head(hidden, head.weight, scale=head.scale * scales, packed=head.packed)]
        elif self.config.head == "shared":
            head = base.output_head(self.lm) if head is None else head
            terms = [Head(self.head(hidden), head.weight, scale=scales, packed=head.packed)]
        else:
            packed = self.head.packed() if isinstance(self.head, FrozenLinear) else None
            terms = [Head(hidden, self.head.weight, scale=scales, packed=packed)]
        if output.pointer is not None and batch.condition_ids.shape[1]:
            factor = scale[:, None, None] if isinstance(scale, Tensor) else scale
            mask = batch.condition_mask[:, None, :] != 0
            values = torch.where(mask, output.pointer * factor, 0.0)
            ids = batch.condition_ids[:, None, :] * mask
            ends = self.config.end_ids()
            if output.end is not None and ends:
                added = output.end[:, :, None] * factor
                values = torch.cat([values, *[added] * len(ends)], -1)
                # Filled on the device: a recorded CUDA graph takes nothing from the host.
                ids = torch.cat([ids, *(ids.new_full((len(ids), 1, 1), end) for end in ends)], -1)
            terms.append(Sparse(ids.expand(values.shape), values))
        return terms

    def lm_scores(self, hidden: Tensor, logits: Tensor | None, condition_ids: Tensor) -> Tensor | None:
        """(B, T, K) float32 logits that the base gives the condition's tokens; None if nothing reads them.

        Args:
            hidden: (B, T, D_lm) the base's final hidden states.
            logits: (B, T, V) its own logits, with ``lm_term="logits"``.
            condition_ids: (B, K).
        """
        if not (self.config.pointer and self.config.pointer_reads_lm) or self.head is None:
            return None
        return base.logits_of_ids(self.lm, hidden, logits, condition_ids)

    def _named(self, name: str) -> Any:
        return self if name == DEFAULT else self._others[name]

    def _parts(self, auxiliary_ids: Tensor | None, batch: PairInputs) -> list[AuxiliaryRows]:
        if auxiliary_ids is None:
            return [AuxiliaryRows(DEFAULT, None, None)]
        names, B, conditions = self.auxiliary_names, len(batch.input_ids), batch.condition_ids
        several, listed = auxiliary_ids.dim() == 2, auxiliary_ids.tolist()
        if auxiliary_ids.dim() not in (1, 2) or len(listed) != B:
            raise ValueError(
                f"auxiliary_ids has shape {tuple(auxiliary_ids.shape)} but there are {B} sequences; give "
                "each one index, (B,), or several, (B, A)"
            )
        if several and conditions.dim() == 3 and conditions.shape[1] != auxiliary_ids.shape[1]:
            raise ValueError(
                f"condition_ids has shape {tuple(conditions.shape)} but auxiliary_ids "
                f"{tuple(auxiliary_ids.shape)}; give each auxiliary of a sequence its condition"
            )
        every = [set(row) if several else {row} for row in listed]
        if not all(-1 <= i < len(names) for row in every for i in row):
            raise ValueError(
                f"auxiliary_ids is {listed}; each is an index into {names}, or -1 for the base alone"
            )
        parts = []
        for i, name in enumerate(names):
            if not any(i in row for row in every):
                continue
            rows, *places = (auxiliary_ids == i).nonzero(as_tuple=True)
            if len(rows) > sum(i in row for row in every):
                raise ValueError(f"auxiliary_ids has {name!r} twice for a sequence; name an auxiliary once")
            whole = len(rows) == B
            parts.append(AuxiliaryRows(name, None if whole else rows, None, *places))
        return parts

    def first_layers(self) -> Any:
        """The base up to where the model's own last layers begin; None where it has other ones.

        Those need no more of it, at weight 1.
        """
        if not isinstance(self.auxiliary, LastLayers):
            return None
        return self._first.lm()

    def _may_end_early(self, parts: list[AuxiliaryRows], aux_scale: float | Tensor | None) -> bool:
        """Whether the base's final hidden states count for nothing."""
        scale = self.config.aux_scale if aux_scale is None else aux_scale
        return (
            isinstance(self.auxiliary, LastLayers)
            and [part.name for part in parts] == [DEFAULT]
            and parts[0].rows is None
            and not isinstance(scale, Tensor)
            and scale == 1.0
        )

    def run_lm(
        self,
        batch: PairInputs,
        layers: list[int],
        cache: PairCache | None,
        *,
        use_cache: bool,
        short: bool = False,
    ) -> base.LmOutput:
        """A pass of the base, behind its prefix, that also returns these layers' hidden states.

        Args:
            batch: what it reads.
            layers: as of ``run_base``.
            cache: of an earlier call.
            use_cache: whether a cache is wanted.
            short: its first layers only, see ``first_layers``.
        """
        lm = self.first_layers() if short else self.lm
        options: dict[str, Any] = {"layers": layers, "want_logits": self.config.lm_term == "logits"}
        if cache is None and self.base_prefix:
            before = self.base_prefix.states()
            before = before.first(self.config.lm_layers[0]) if short else before
            return base_behind(before, lm, batch.input_ids, batch.attention_mask, keeps=use_cache, **options)
        mask = batch.attention_mask
        if cache is not None and cache.mask is not None:
            mask = torch.cat([cache.mask, mask[:, -batch.input_ids.shape[1] :]], 1)
        own = None if cache is None else cache.lm
        output = base.run_base(lm, batch.input_ids, mask, cache=own, use_cache=use_cache, **options)
        return output if cache is None or cache.mask is None else output._replace(mask=mask)

    def _check_states(self, states: Tensor, batch: PairInputs, layers: list[int], use_cache: bool) -> None:
        wanted = (*batch.input_ids.shape, 1 + len(self.config.lm_layers), self.config.lm_hidden_size)
        if use_cache or self.config.lm_term == "logits":
            raise ValueError('lm_states are for training and scoring with lm_term="head", not with caches')
        if tuple(states.shape) != wanted:
            raise ValueError(
                f"lm_states has shape {tuple(states.shape)} but it must be {wanted}: (B, T, 1 + L, D_lm) for "
                f"lm_layers {self.config.lm_layers}"
            )
        if layers != self.config.lm_layers:
            raise ValueError(
                f"lm_states are for lm_layers {self.config.lm_layers}, but another auxiliary reads {layers}; "
                "they serve the model's own auxiliary only"
            )


def label_loss(terms: list[Term], labels: Tensor, V: int, num_items: int | Tensor | None) -> Tensor:
    """0-d float32 mean over the labels that count, or their sum over ``num_items``.

    Args:
        terms: of a sum, rows (B, T).
        labels: (B, T) int64 ids at the same positions; position t is scored against label t + 1.
        V: ids.
        num_items: what divides the sum.
    """
    target = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        # A ragged batch is half padding; looking for it would stop a GPU, and costs nothing here.
        rows = (target != IGNORED).flatten().nonzero()[:, 0]
        terms, target = [rows_of(term, rows) for term in terms], target.flatten()[rows]
    reduction = "mean" if num_items is None else "sum"
    loss: Tensor = cross_entropy(terms, target, normalizer=num_items, reduction=reduction, vocab_size=V)
    return loss
