"""Both models over the slots: what the running sequences' caches hold, and the terms of their next tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from auxkern.core.terms import Term, rows_of
from auxkern.generation.drawing import Drawer, Pending
from auxkern.generation.graphs import DecodeGraphs, Record
from auxkern.generation.lanes import Lane
from auxkern.generation.request import Sequences
from auxkern.generation.scheduler import Move
from auxkern.generation.slots import SlotTable
from auxkern.generation.stats import EngineStats
from auxkern.generation.transfers import HostCopy, to_device
from auxkern.model.caches import AuxiliaryRows, PairCache
from auxkern.model.inputs import PairInputs
from auxkern.model.mixing import Alone
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
        self._drawer = Drawer(model, room.slots, room.length)
        self._reserve(start_id)
        self._graphs: DecodeGraphs | None = None
        if record is not None:
            with torch.no_grad():
                lanes = {name: lane for name, lane in self.lanes.items() if lane.table.fixed}
                self._graphs = DecodeGraphs(model, self._table, lanes, self._condition, self._drawer, record)

    def clear(self) -> None:
        """All sequences leave."""
        for table in (self._table, *(lane.table for lane in self.lanes.values())):
            table.clear()
        for lane in self.lanes.values():
            lane.members.clear()
        self._drawer.clear()

    @property
    def recorded(self) -> bool:
        """Whether steps are recorded, and the host may look at a step's tokens after the next has begun."""
        return self._graphs is not None

    def launch(self, running: Sequences, newcomers: Sequences, stats: EngineStats) -> Pending:
        """One token for every running sequence, and the first one for newcomers, which take the next slots.

        Args:
            running: in slots 0 to n - 1.
            newcomers: for the slots from n on.
            stats: counts time and tokens read.
        """
        logprobs: dict[int, HostCopy] = {}
        for first, sequences, draw in ((0, running, self._decode), (len(running), newcomers, self._prefill)):
            numbers = draw(sequences, stats) if sequences else None
            if numbers is not None:
                logprobs[first] = HostCopy(numbers)
        return Pending((*running, *newcomers), HostCopy(self._drawer.results), logprobs)

    def _decode(self, sequences: Sequences, stats: EngineStats) -> Tensor | None:
        """Draws the next tokens; their log-probabilities (n, 4) if any of them wants them."""
        n, wanted, logprobs = len(sequences), _wants_logprobs(sequences), None
        lanes = [lane for lane in self.lanes.values() if lane.members]
        replay = None
        if self._graphs is not None and not wanted and all(lane.serves_all(sequences) for lane in lanes):
            name = lanes[0].name if lanes else None
            replay = self._graphs.replay(name, n, self._drawer.acts(slice(0, n)))
        with stats.timed("models"):
            if replay is None:
                terms, sides = self._computed(sequences, lanes)
            else:
                replay()
        if replay is None:
            with stats.timed("sampling"):
                logprobs = self._drawer.draw(terms, slice(0, n), sides)
        for table in (self._table, *(lane.table for lane in lanes)):
            table.advance(opened=replay is not None)
        return logprobs

    def _computed(self, sequences: Sequences, lanes: list[Lane]) -> tuple[list[Term], Alone | None]:
        """The terms of the next tokens, rows (n,), as models of which nothing is recorded make them.

        Also those of either side, if a sequence wants log-probabilities.
        """
        n, table = len(sequences), self._table
        ids = self._drawer.rows["last"][:n, None]
        mask = torch.cat([table.window, torch.ones_like(ids)], 1)
        width = max(len(s.condition_ids) for s in sequences)
        parts = [AuxiliaryRows(lane.name, lane.rows(sequences), lane.cache(width)) for lane in lanes]
        terms, cache, sides = self.model.terms(
            PairInputs(ids, mask, *self._condition[:, :n, :width]),
            cache=PairCache(table.cache, parts),
            use_cache=True,
            keep=1,
            aux_scale=self._drawer.scales(sequences),
            separate=_wants_logprobs(sequences),
        )
        for part in cache.auxiliaries:
            self.lanes[part.name].keep(part.cache)
        return _taken(terms, sides, slice(n))

    def _prefill(self, newcomers: Sequences, stats: EngineStats) -> Tensor | None:
        """Reads prompts and conditions, takes slots, and draws the first tokens; returns as ``_decode``."""
        start = self._table.count
        with stats.timed("models"):
            terms, sides = self._joined(newcomers, stats)
        with stats.timed("sampling"):
            self._drawer.join(newcomers)
            return self._drawer.draw(terms, slice(start, start + len(newcomers)), sides)

    def _joined(self, newcomers: Sequences, stats: EngineStats) -> tuple[list[Term], Alone | None]:
        """As ``_computed``, of the first tokens; what was read is in the slots' caches."""
        device = self.model.device
        # Samples of one request read their prompt once.
        keys = [(s.request.auxiliary, s.ids, s.condition_ids, s.request.aux_scale) for s in newcomers]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        unique = sorted(first.values())
        place = {keys[i]: row for row, i in enumerate(unique)}
        read_in = [place[key] for key in keys]
        of = to_device(read_in, device)
        readers = [newcomers[i] for i in unique]
        names = [s.request.auxiliary for s in readers]
        prompts = padded([s.ids for s in readers], 0, side="left")
        conditions = padded([s.condition_ids for s in readers], 0)
        inputs = PairInputs(*(to_device(ids, device) for ids in (*prompts, *conditions)))
        terms, cache, sides = self.model.terms(
            inputs,
            # Layers with sliding windows keep all columns too, as the table does.
            cache=PairCache(DynamicCache(), self._readers(names)),
            use_cache=True,
            keep=1,
            aux_scale=self._drawer.scales(readers),
            separate=_wants_logprobs(newcomers),
        )
        cache.lm.reorder_cache(of)
        self._table.join(cache.lm, inputs.attention_mask[of], [s.length for s in newcomers])
        self._keep_conditions(inputs, of)
        for part in cache.auxiliaries:
            here = {
                row: i for i, row in enumerate(row for row, name in enumerate(names) if name == part.name)
            }
            joining = [(s, here[row]) for s, row in zip(newcomers, read_in, strict=True) if row in here]
            self.lanes[part.name].join(joining, part.cache)
        stats.prefill_tokens += sum(s.length + len(s.condition_ids) for s in readers)
        return _taken(terms, sides, of)

    def _keep_conditions(self, inputs: PairInputs, of: Tensor) -> None:
        """Of newcomers that have just taken their slots; ``of`` (n,) are their rows of ``inputs``."""
        slots, width = slice(self._table.count - len(of), self._table.count), inputs.condition_ids.shape[1]
        self._condition[:, slots] = 0
        for side, ids in zip(self._condition, (inputs.condition_ids, inputs.condition_mask), strict=True):
            side[slots, :width] = ids[of]

    def leave(self, ended: Sequences, moves: list[Move], left: int) -> None:
        """Sequences have ended; ``left`` go on, after these moves."""
        if not ended:
            return
        self._table.leave(moves, left)
        self._drawer.leave(moves, left)
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
            _, cache, _ = self.model.terms(
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
                parts.append(AuxiliaryRows(name, to_device(rows, self.model.device), None))
        return parts


def _taken(terms: list[Term], sides: Alone | None, rows: slice | Tensor) -> tuple[list[Term], Alone | None]:
    some = None if sides is None else Alone(*[[rows_of(term, rows) for term in side] for side in sides])
    return [rows_of(term, rows) for term in terms], some


def _wants_logprobs(sequences: Sequences) -> bool:
    return any(sequence.request.logprobs for sequence in sequences)
