"""Both models over the slots: what the running sequences' caches hold, and the terms of their next tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from auxkern.core.terms import Term, rows_of
from auxkern.generation.drawing import Drawer, Drawn
from auxkern.generation.graphs import DecodeGraphs, Record
from auxkern.generation.lanes import Lane
from auxkern.generation.request import Sequences
from auxkern.generation.scheduler import Move
from auxkern.generation.slots import SlotTable
from auxkern.model.caches import AuxiliaryRows, PairCache
from auxkern.model.inputs import PairInputs
from auxkern.model.text import padded


@dataclass(frozen=True)
class Room:
    """How much an engine holds at a time.

    Attributes:
        slots: most sequences.
        length: most tokens of a text with its prompt.
        condition: most tokens of a condition.
    """

    slots: int
    length: int
    condition: int


class Runner:
    """Runs the models for sequences in slots 0, 1, ..., and draws.

    Args:
        model: an ``AuxTunedForCausalLM``.
        room: for caches.
        start_id: a token that the models can read.
        record: records decoding steps; None to run each anew.

    Raises:
        ValueError: a cache is of a kind that does not fit.
        RuntimeError: the caches do not fit the GPU's free memory.
    """

    def __init__(self, model: Any, room: Room, start_id: int, record: Record | None) -> None:
        self.model, self._room = model, room
        fixed, columns = record is not None, room.length + room.condition
        self._table = SlotTable(room.slots, room.length, model.device, fixed=fixed)
        self.lanes: dict[str, Lane] = {}
        for name in model.auxiliary_names:
            recordable = fixed and model.auxiliary_traits(name).counts_positions
            table = SlotTable(room.slots, columns, model.device, fixed=recordable)
            self.lanes[name] = Lane(name, table, room.condition)
        self._condition = torch.zeros(2, room.slots, room.condition, dtype=torch.int64, device=model.device)
        self._drawer = Drawer(model)
        self._reserve(start_id)
        self._graphs: DecodeGraphs | None = None
        if record is not None:
            with torch.no_grad():
                lanes = {name: lane for name, lane in self.lanes.items() if lane.table.fixed}
                self._graphs = DecodeGraphs(model, self._table, lanes, self._condition, record)

    def clear(self) -> None:
        """All sequences leave."""
        for table in (self._table, *(lane.table for lane in self.lanes.values())):
            table.clear()
        for lane in self.lanes.values():
            lane.members.clear()
        self._drawer = Drawer(self.model)

    def draw(self, terms: list[Term], sequences: Sequences) -> Drawn:
        """One token for each sequence, from terms of rows (n,)."""
        return self._drawer.draw(terms, sequences)

    def decoded(self, sequences: Sequences) -> list[Term]:
        """The terms of the next token of running sequences, rows (n,)."""
        n = len(sequences)
        lanes = [lane for lane in self.lanes.values() if lane.members]
        parts = [(lane, lane.rows(sequences)) for lane in lanes]
        together = not parts or (len(parts) == 1 and parts[0][1] is None)
        name = lanes[0].name if lanes else None
        recorded = self._graphs is not None and self._graphs.serves(name) and together
        if self._graphs is not None and recorded and not _wants_logprobs(sequences):
            tokens = [s.generated[-1] for s in sequences]
            terms = self._graphs.terms(name, tokens, [self._drawer.scale(s) for s in sequences])
        else:
            terms = self._computed(sequences, [AuxiliaryRows(lane.name, rows, None) for lane, rows in parts])
        for table in (self._table, *(lane.table for lane in lanes)):
            table.advance()
        return [rows_of(term, torch.arange(n, device=self.model.device)) for term in terms]

    def _computed(self, sequences: Sequences, parts: list[AuxiliaryRows]) -> list[Term]:
        """The same without graphs; ``parts`` without their caches."""
        n, table = len(sequences), self._table
        ids = torch.tensor([[s.generated[-1]] for s in sequences], device=self.model.device)
        mask = torch.cat([table.window, torch.ones_like(ids)], 1)
        width = max(len(s.condition_ids) for s in sequences)
        parts = [AuxiliaryRows(p.name, p.rows, self.lanes[p.name].cache(width)) for p in parts]
        terms, cache = self.model.terms(
            PairInputs(ids, mask, *self._condition[:, :n, :width]),
            cache=PairCache(table.cache, parts),
            use_cache=True,
            keep=1,
            aux_scale=self._drawer.scales(sequences),
            separate=_wants_logprobs(sequences),
        )
        for part in cache.auxiliaries:
            self.lanes[part.name].keep(part.cache)
        return terms

    def prefilled(self, newcomers: Sequences) -> list[Term]:
        """Reads prompts and conditions, and takes slots; the terms of the first token, rows (n,)."""
        # Samples of one request read their prompt once.
        keys = [(s.request.auxiliary, s.ids, s.condition_ids, s.request.aux_scale) for s in newcomers]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        unique = sorted(first.values())
        place = {keys[i]: row for row, i in enumerate(unique)}
        of = torch.tensor([place[key] for key in keys], device=self.model.device)
        readers = [newcomers[i] for i in unique]
        prompts = padded([s.ids for s in readers], 0, side="left")
        conditions = padded([s.condition_ids for s in readers], 0)
        inputs = PairInputs(*(ids.to(self.model.device) for ids in (*prompts, *conditions)))
        terms, cache = self.model.terms(
            inputs,
            # Layers with sliding windows keep all columns too, as the table does.
            cache=PairCache(DynamicCache(), self._readers([s.request.auxiliary for s in readers])),
            use_cache=True,
            keep=1,
            aux_scale=self._drawer.scales(readers),
            separate=_wants_logprobs(readers),
        )
        cache.lm.reorder_cache(of)
        self._table.join(cache.lm, inputs.attention_mask[of])
        start = self._table.count - len(newcomers)
        self._condition[:, start : self._table.count] = 0
        width = inputs.condition_ids.shape[1]
        for side, ids in zip(self._condition, (inputs.condition_ids, inputs.condition_mask), strict=True):
            side[start : self._table.count, :width] = ids[of]
        for part in cache.auxiliaries:
            rows = range(len(readers)) if part.rows is None else part.rows.tolist()
            here = {row: i for i, row in enumerate(rows)}
            joining = [(s, here[row]) for s, row in zip(newcomers, of.tolist(), strict=True) if row in here]
            self.lanes[part.name].join(joining, part.cache)
        return [rows_of(term, of) for term in terms]

    def leave(self, ended: Sequences, moves: list[Move], left: int) -> None:
        """Sequences have ended; ``left`` go on, after these moves."""
        if not ended:
            return
        self._table.leave(moves, left)
        for source, destination in moves:
            self._condition[:, destination] = self._condition[:, source]
        for lane in self.lanes.values():
            lane.leave(ended)

    @torch.no_grad()
    def _reserve(self, start_id: int) -> None:
        """Takes the memory of all caches before the first request, as large as one token shows it to be."""
        token = torch.tensor([[start_id]], device=self.model.device)
        caches = []
        for lane in self.lanes.values():
            _, cache = self.model.terms(
                PairInputs(token, None, token, None),
                cache=PairCache(DynamicCache(), self._readers([lane.name])),
                use_cache=True,
                keep=1,
            )
            caches.append((lane, cache.auxiliaries[0].cache))
            lm_cache = cache.lm
        needed = self._table.needed_bytes(lm_cache)
        needed += sum(lane.table.needed_bytes(lane.attention_of(cache)) for lane, cache in caches)
        if self.model.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.model.device)
            if needed > free:
                raise RuntimeError(
                    f"the caches of {self._room.slots} slots of {self._room.length} tokens take "
                    f"{needed / 1e9:.1f} GB, but the GPU has {free / 1e9:.1f} GB free; lower slots or "
                    "max_length"
                )
        self._table.reserve(lm_cache)
        for lane, cache in caches:
            lane.reserve(cache)

    def _readers(self, names: list[str | None]) -> list[AuxiliaryRows]:
        """Who reads which rows of a first pass, of an auxiliary each."""
        parts = []
        for name in self.lanes:
            rows = [row for row, one in enumerate(names) if one == name]
            if len(rows) == len(names):
                return [AuxiliaryRows(name, None, None)]
            if rows:
                parts.append(AuxiliaryRows(name, torch.tensor(rows, device=self.model.device), None))
        return parts


def _wants_logprobs(sequences: Sequences) -> bool:
    return any(sequence.request.logprobs for sequence in sequences)
