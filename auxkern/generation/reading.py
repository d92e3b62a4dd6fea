"""What models read in one step, members of many sequences in one pass, and the sum of what they say."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as AnySequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from auxkern.core.terms import Head, Logits, Sparse, Term, like, rows_of
from auxkern.generation.lanes import AuxiliaryLane, Lane, Reader
from auxkern.generation.request import Sequences
from auxkern.generation.transfers import to_device
from auxkern.model import base
from auxkern.model.caches import AuxiliaryRows
from auxkern.model.inputs import BaseSide, PairInputs
from auxkern.model.mixing import Added, sequences_of
from auxkern.model.prefix import PrefixStates, base_behind
from auxkern.model.text import padded
from auxkern.ops.dense import dense_logits


class Readings(NamedTuple):
    """Readers of one model, and the passes that were made for them.

    Attributes:
        readers: R of them.
        rows: (R,) int64, the sequence of each in the batch.
        of: each one's row of the pass; readers with one context share it.
    """

    readers: list[Reader]
    rows: list[int]
    of: list[int]

    @classmethod
    def each(cls, readers: list[Reader], sequences: Sequences, of: list[int] | None = None) -> Readings:
        """Of a batch, each reader by itself where nothing else is said."""
        place = {id(sequence): row for row, sequence in enumerate(sequences)}
        rows = [place[id(reader.sequence)] for reader in readers]
        return cls(readers, rows, list(range(len(readers))) if of is None else of)

    @property
    def read(self) -> list[Reader]:
        """One reader of each row of the pass."""
        return list(dict(zip(self.of, self.readers, strict=True)).values())


class AloneTerms(NamedTuple):
    """What members of one model say by themselves, without their weights.

    Attributes:
        terms: of rows (R,).
        rows: (R,) the sequence of each in the batch.
        places: (R,) of each among its sequence's members.
    """

    terms: list[Term]
    rows: list[int]
    places: list[int]

    @classmethod
    def of(cls, readings: Readings, terms: list[Term], device: torch.device) -> AloneTerms:
        """Of the readers whose sequence is a mixture that wants log-probabilities.

        Args:
            readings: of a pass.
            terms: of its rows, (U, 1).
            device: of the terms.
        """
        asked = [
            (reader.place, row, of)
            for reader, row, of in zip(*readings, strict=True)
            if reader.sequence.members and reader.sequence.request.logprobs
        ]
        read = to_device([of for _, _, of in asked], device) if asked else None
        own = [] if read is None else [rows_of(term, read) for term in terms]
        return cls(own, [row for _, row, _ in asked], [place for place, _, _ in asked])


class LmPass(NamedTuple):
    """What a language model made of some contexts.

    Attributes:
        readings: of whom.
        output: of the pass.
        inputs: (U, T) ids and (U, P + T) mask of the pass; of the text alone where it stands behind a prefix.
    """

    readings: Readings
    output: base.LmOutput
    inputs: tuple[Tensor, Tensor]

    @property
    def columns(self) -> Tensor:
        """(U, columns) mask of the cache."""
        return self.inputs[1] if self.output.mask is None else self.output.mask

    @property
    def lengths(self) -> int:
        """Tokens of all contexts."""
        return sum(len(reader.ids) for reader in self.readings.read)

    @property
    def hidden(self) -> Tensor:
        """(U, 1, D) final hidden states of the last tokens."""
        return self.output.states[:, -1:, 0]

    def alone(self, lm: Any) -> AloneTerms:
        """What members say by themselves whose requests ask for it."""
        head = Head(self.hidden, *base.output_head(lm))
        return AloneTerms.of(self.readings, [head], self.hidden.device)

    def term(self, lm: Any, N: int, V: int) -> Term:
        """The weighted sum of the members, rows (N, 1): of hidden states where logits are linear in them.

        A row's numbers are made of its own members, one after the other, whatever the rows beside it are.
        """
        readers, rows, of = self.readings
        head, hidden = base.output_head(lm), _rows_of(self.hidden, of)
        weights = [1.0 if one.part.weight is None else one.part.weight for one in readers]
        if rows == list(range(N)) and all(weight == 1.0 for weight in weights):
            return Head(hidden, *head)

        def summed(z: Tensor) -> Tensor:
            total = z.new_zeros(N, *z.shape[1:])
            for own in _turns(readers):
                some = to_device([weights[i] for i in own], z.device, torch.float32)
                into = to_device([rows[i] for i in own], z.device)
                total = total.index_add(0, into, z[to_device(own, z.device)] * some[:, None, None])
            return total

        return linear_term(hidden, head, V, summed)


def linear_term(hidden: Tensor, head: base.OutputHead, V: int, summed: Callable[[Tensor], Tensor]) -> Term:
    """A linear function of logits: of the hidden states, where logits are linear in them.

    Args:
        hidden: (U, 1, D) final hidden states.
        head: of the model.
        V: ids.
        summed: (U, 1, D or V) float32 to (N, 1, D or V).
    """
    if head.softcap is None and head.bias is None:
        return Head(summed(hidden.float()), *head)
    return Logits(summed(dense_logits([Head(hidden, *head)], vocab_size=V).float()))


def _rows_of(x: Tensor, rows: list[int]) -> Tensor:
    """Rows of a tensor; itself where that is all of them, in order."""
    return x if rows == list(range(x.shape[0])) else x[to_device(rows, x.device)]


def _turns(readers: list[Reader]) -> list[list[int]]:
    """Places of the readers whose sequence has none of the model before them, has one, and so on."""
    turns: dict[int, list[int]] = {}
    for place, reader in enumerate(readers):
        turns.setdefault(reader.turn, []).append(place)
    return [turns[turn] for turn in sorted(turns)]


def unique_readings(readers: list[Reader], sequences: Sequences, key: Any) -> tuple[Readings, list[Reader]]:
    """Readers, of whom those with one key are read once; and the first of each key, in order."""
    known: dict[Hashable, int] = {}
    first: list[Reader] = []
    of = []
    for reader in readers:
        mine = key(reader)
        if mine not in known:
            known[mine] = len(first)
            first.append(reader)
        of.append(known[mine])
    return Readings.each(readers, sequences, of), first


def first_pass(
    lm: Any,
    readers: list[Reader],
    sequences: Sequences,
    layers: list[int],
    device: torch.device,
    prefix: PrefixStates | None = None,
) -> LmPass:
    """Reads the contexts of newcomers, each once.

    Args:
        prefix: what stands before those that are told something; it is not read again.
    """
    readings, first = unique_readings(readers, sequences, lambda reader: (reader.ids, reader.part.told > 0))
    ids, mask = (to_device(one, device) for one in padded([reader.ids for reader in first], 0, side="left"))
    if prefix is not None:
        told = to_device([int(reader.part.told > 0) for reader in first], device)
        output = base_behind(prefix, lm, ids, mask, layers=layers, told=told)
    else:
        # Layers with sliding windows keep all columns too, as the table does.
        output = base.run_base(lm, ids, mask, layers=layers, cache=DynamicCache(), use_cache=True)
    return LmPass(readings, output, (ids, mask))


def next_pass(lm: Any, lane: Lane, sequences: Sequences, last: Tensor, layers: list[int]) -> LmPass:
    """One more token of every member of a lane.

    Args:
        sequences: the whole batch.
        last: (N,) int64, the tokens that they read.
    """
    rows = lane.rows(sequences)
    ids = (last if rows is None else last[rows])[:, None]
    mask = torch.cat([lane.table.window, torch.ones_like(ids)], 1)
    output = base.run_base(lm, ids, mask, layers=layers, cache=lane.table.cache, use_cache=True)
    return LmPass(Readings.each(lane.readers, sequences), output, (ids, mask))


class AuxiliaryPass(NamedTuple):
    """What an auxiliary made of some members.

    Attributes:
        readings: of whom.
        terms: of the rows of the pass, (U, 1), without their weights.
        weights: (U,) float32.
        cache: that it returned.
        condition: (U, K) ids and mask that it read.
    """

    readings: Readings
    terms: list[Term]
    weights: Tensor
    cache: Any
    condition: tuple[Tensor, Tensor]

    @property
    def condition_tokens(self) -> int:
        """Of all conditions that were read."""
        return sum(len(reader.part.condition_ids) for reader in self.readings.read)

    @property
    def alone(self) -> AloneTerms:
        """What members say by themselves whose requests ask for it."""
        return AloneTerms.of(self.readings, self.terms, self.weights.device)

    @property
    def weighted(self) -> list[Term]:
        """The terms with their weights."""
        return weighted(self.terms, self.weights)


def weighted(terms: list[Term], weights: Tensor) -> list[Term]:
    """Terms of rows (U, 1), whose scales are 1, with weights (U,)."""
    scale = weights[:, None]
    return [
        like(term, values=term.values * scale[..., None])
        if isinstance(term, Sparse)
        else like(term, scale=scale)
        for term in terms
    ]


class Auxiliaries:
    """Passes of a model's auxiliaries behind one of its base.

    Args:
        model: an ``AuxTunedForCausalLM``.
        reads: what the base made: of some contexts the whole, of others its first layers.
        layers: whose hidden states it returned.
    """

    def __init__(self, model: Any, reads: list[LmPass], layers: list[int]) -> None:
        self._model, self._layers = model, layers
        self._row: dict[tuple[int, int], int] = {}
        before = 0
        for read in reads:
            readings = read.readings
            for reader, row in zip(readings.readers, readings.of, strict=True):
                self._row[id(reader.sequence), reader.place] = before + row
            before += len(read.inputs[0])
        self._given = _one_batch([(*read.inputs, read.output.states) for read in reads])

    def first(self, name: str, readers: list[Reader], sequences: Sequences) -> AuxiliaryPass:
        """Of newcomers: conditions and prompts, those that are alike once."""
        device = self._given[0].device
        readings, first = unique_readings(
            readers,
            sequences,
            # What of the base was read decides what an auxiliary adds to it.
            lambda one: (one.ids, one.part.condition_ids, one.part.weight, one.base_model),
        )
        conditions = padded([reader.part.condition_ids for reader in first], 0)
        condition = (to_device(conditions[0], device), to_device(conditions[1], device))
        part = AuxiliaryRows(name, None, None)
        told = to_device([reader.part.told for reader in first], device)
        return self._made(part, readings, first, condition, self._of_base(first), told)

    def next(self, lane: AuxiliaryLane, sequences: Sequences) -> AuxiliaryPass:
        """One more token of every member of a lane."""
        readers, n = lane.readers, len(lane.readers)
        readings = Readings.each(readers, sequences)
        K = max(len(one.part.condition_ids) for one in readers)
        ids, mask = lane.condition[:, :n, :K]
        part = AuxiliaryRows(lane.name, None, lane.cache(K))
        return self._made(part, readings, readers, (ids, mask), self._of_base(readers))

    def _of_base(self, readers: list[Reader]) -> list[int]:
        return [self._row[id(one.sequence), one.part.base] for one in readers]

    def _made(
        self,
        part: AuxiliaryRows,
        readings: Readings,
        readers: list[Reader],
        condition: tuple[Tensor, Tensor],
        of_base: list[int],
        told: Tensor | None = None,
    ) -> AuxiliaryPass:
        ids, mask, states = (_rows_of(one, of_base) for one in self._given)
        model = self._model
        weights = [
            model.auxiliary_scale(part.name) if one.part.weight is None else one.part.weight
            for one in readers
        ]
        side = BaseSide(states, self._layers, None, base.output_head(model.lm))
        returned, terms = model.auxiliary_part(
            part, PairInputs(ids, mask, *condition, told), side, 1.0, use_cache=True, keep=1
        )
        scale = to_device(weights, ids.device, torch.float32)
        return AuxiliaryPass(readings, terms, scale, returned.cache, condition)


def _one_batch(given: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (U, T), mask and states of several passes, the shorter ones padded on the left."""
    if len(given) == 1:
        return given[0]
    T = max(ids.shape[1] for ids, _, _ in given)
    padding = [T - ids.shape[1] for ids, _, _ in given]
    ids, mask = (
        torch.cat([nn.functional.pad(one, (n, 0)) for one, n in zip(some, padding, strict=True)])
        for some in ([ids for ids, _, _ in given], [mask[:, -ids.shape[1] :] for ids, mask, _ in given])
    )
    states = [
        nn.functional.pad(one, (0, 0, 0, 0, n, 0)) for (_, _, one), n in zip(given, padding, strict=True)
    ]
    return ids, mask, torch.cat(states)


def added_of(passes: AnySequence[tuple[str, AuxiliaryPass]], N: int, device: torch.device) -> Added:
    """The passes' terms, one entry for each time that a sequence has the auxiliary."""
    added: Added = []
    for name, made in passes:
        readings, weighted = made.readings, made.weighted
        for turn in _turns(readings.readers):
            rows, of = ([one[i] for i in turn] for one in (readings.rows, readings.of))
            whole = rows == list(range(N))
            same = of == list(range(weighted[0].leading[0]))
            terms = weighted if same else [sequences_of(term, to_device(of, device)) for term in weighted]
            added.append((AuxiliaryRows(name, None if whole else to_device(rows, device), None), terms))
    return added


def first_alone(read: LmPass, lm: Any, N: int) -> Head:
    """The logits of each sequence's first member of the base, rows (N, 1)."""
    readers, rows, of = read.readings
    place = {row: of[i] for i, (reader, row) in enumerate(zip(readers, rows, strict=True)) if not reader.turn}
    # A sequence without one asks for nothing of it.
    return Head(_rows_of(read.hidden, [place.get(row, 0) for row in range(N)]), *base.output_head(lm))
