"""The models over the slots: what the running sequences' caches hold, and the terms of their next tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from auxkern.core.memory import available_bytes
from auxkern.core.terms import Term, rows_of
from auxkern.generation.drawing import Drawer, Pending, Said
from auxkern.generation.graphs import DecodeGraphs, Record
from auxkern.generation.lanes import AuxiliaryLane, Lane, Reader, readers_of
from auxkern.generation.members import BASE, FIRST
from auxkern.generation.mixture_graphs import Lanes, MixtureGraphs, Shape
from auxkern.generation.reading import (
    AloneTerms,
    Auxiliaries,
    AuxiliaryPass,
    LmPass,
    added_of,
    first_alone,
    first_pass,
    next_pass,
)
from auxkern.generation.request import Request, Sequences
from auxkern.generation.scheduler import Move
from auxkern.generation.slots import SlotTable
from auxkern.generation.stats import EngineStats
from auxkern.generation.transfers import HostCopy
from auxkern.model import base
from auxkern.model.caches import AuxiliaryRows, PairCache
from auxkern.model.inputs import PairInputs
from auxkern.model.mixing import Alone, alone, mixed
from auxkern.model.pair_terms import DEFAULT
from auxkern.model.prefix import PrefixStates

_OF_BASE = (BASE, FIRST)


@dataclass(frozen=True)
class Room:
    """How much an engine holds at a time.

    Attributes:
        slots: most sequences, and most members of one model.
        length: most tokens of a text with its prompt.
        condition: most tokens of a condition.
        prefix: tokens that the base reads before every text.
    """

    slots: int
    length: int
    condition: int
    prefix: int = 0


class Runner:
    """Runs the models for sequences in slots 0, 1, ..., and draws.

    Args:
        model: an ``AuxTunedForCausalLM``.
        others: language models beside its base, by name.
        room: for caches.
        start_id: a token that the models can read.
        record: records decoding steps; None to run each anew.
        shapes: of mixtures whose steps are recorded too: the models of a text's members.

    Raises:
        ValueError: a cache is of a kind that does not fit.
        RuntimeError: the caches do not fit the free memory.
    """

    def __init__(
        self,
        model: Any,
        others: Mapping[str, Any],
        room: Room,
        start_id: int,
        record: Record | None,
        shapes: Iterable[Shape] = (),
    ) -> None:
        self.model, self._room = model, room
        self._lms: dict[str, Any] = {BASE: model.lm, **others}
        if record is None and model.first_layers() is not None:
            self._lms[FIRST] = model.first_layers()
        fixed = record is not None
        listed = [tuple(shape) for shape in shapes]
        recorded = {BASE, *(name for shape in listed for name in shape)} if fixed else set()
        self._of_lms = {
            name: Lane(
                name,
                SlotTable(
                    room.slots,
                    room.length + (room.prefix if name in _OF_BASE else 0),
                    model.device,
                    fixed=name in recorded,
                ),
            )
            for name in self._lms
        }
        self.lanes: dict[str, AuxiliaryLane] = {}
        for name in model.auxiliary_names:
            traits = model.auxiliary_traits(name)
            recordable = fixed and traits.counts_positions
            columns = room.length + room.condition + (room.prefix if traits.reads_prefix else 0)
            table = SlotTable(room.slots, columns, model.device, fixed=recordable)
            self.lanes[name] = AuxiliaryLane(name, table, room.condition)
        self._drawer = Drawer(model, room.slots, room.length)
        self._reserve(start_id)
        self._graphs: DecodeGraphs | None = None
        self._of_mixtures: MixtureGraphs | None = None
        if record is not None:
            with torch.no_grad():
                lanes = {name: lane for name, lane in self.lanes.items() if lane.table.fixed}
                self._graphs = DecodeGraphs(model, self._base.table, lanes, self._drawer, record)
                every = Lanes(self._lms, self._of_lms, self.lanes)
                self._of_mixtures = MixtureGraphs(model, every, self._drawer, listed, record)

    @property
    def _base(self) -> Lane:
        return self._of_lms[BASE]

    @property
    def _every_lane(self) -> list[Lane]:
        return [*self._of_lms.values(), *self.lanes.values()]

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return [*self._lms, *self.lanes]

    def ends_early(self, request: Request) -> bool:
        """Whether a request for a pair needs the base's first layers only.

        Its own last layers add to the sum what the base's would say, at weight 1, and take it away. Recorded
        steps run the whole base.
        """
        if FIRST not in self._lms or request.auxiliary != DEFAULT or request.logprobs:
            return False
        scale = self.model.auxiliary_scale(DEFAULT) if request.aux_scale is None else request.aux_scale
        return float(scale) == 1.0

    def clear(self) -> None:
        """All sequences leave."""
        for lane in self._every_lane:
            lane.clear()
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
        numbers = self._decode(running, stats) if running else None
        if numbers is not None:
            logprobs[0] = HostCopy(numbers)
        numbers = self._prefill(newcomers, len(running), stats) if newcomers else None
        if numbers is not None:
            logprobs[len(running)] = HostCopy(numbers)
        return Pending((*running, *newcomers), HostCopy(self._drawer.results), logprobs)

    def _decode(self, sequences: Sequences, stats: EngineStats) -> Tensor | None:
        """Draws the next tokens; their log-probabilities (n, 4) if any of them wants them."""
        n, wanted, logprobs = len(sequences), _wants_logprobs(sequences), None
        lanes = [lane for lane in self._every_lane if lane.readers]
        pair = self._is_pair(sequences)
        replay = None
        if self._graphs is not None and pair and not wanted:
            name = next((name for name, lane in self.lanes.items() if lane.readers), None)
            replay = self._graphs.replay(name, n, self._drawer.acts(slice(0, n)))
        elif self._of_mixtures is not None and not wanted:
            replay = self._of_mixtures.replay(sequences, self._drawer.acts(slice(0, n)))
        with stats.timed("models"):
            if replay is not None:
                replay()
            else:
                said = self._of_pair(sequences) if pair else self._of_members(sequences)
        if replay is None:
            with stats.timed("sampling"):
                logprobs = self._drawer.draw(said, slice(0, n))
        for lane in lanes:
            lane.table.advance(opened=replay is not None)
        return logprobs

    def _is_pair(self, sequences: Sequences) -> bool:
        """Whether the base and at most one auxiliary have one member of each, in the batch's order."""
        lanes = [lane for lane in self.lanes.values() if lane.readers]
        read = [name for name, lane in self._of_lms.items() if lane.readers]
        others = len(read) > 1 or read[0] not in _OF_BASE
        one_each = all(lane.serves_all(sequences) for lane in (self._of_lms[read[0]], *lanes))
        return one_each and len(lanes) < 2 and not others and not any(one.members for one in sequences)

    def _of_pair(self, sequences: Sequences) -> Said:
        """The terms of the next tokens, rows (n,), where ``_is_pair``.

        Also those of either side, if a sequence wants log-probabilities.
        """
        n, of = len(sequences), sequences[0].parts[0].model
        table = self._of_lms[of].table
        ids = self._drawer.rows["last"][:n, None]
        mask = torch.cat([table.window, torch.ones_like(ids)], 1)
        width = max(len(s.condition_ids) for s in sequences)
        lane = next((lane for lane in self.lanes.values() if lane.readers), None)
        parts = [] if lane is None else [AuxiliaryRows(lane.name, None, lane.cache(width))]
        condition: Iterable[Tensor] = () if lane is None else lane.condition[:, :n, :width]
        terms, cache, sides = self.model.terms(
            PairInputs(ids, mask, *condition),
            cache=PairCache(table.cache, parts, short=of == FIRST),
            use_cache=True,
            keep=1,
            aux_scale=self._drawer.scales(sequences),
            separate=_wants_logprobs(sequences),
        )
        for part in cache.auxiliaries:
            self.lanes[part.name].keep(part.cache)
        return _flat(terms, sides)

    def _of_members(self, sequences: Sequences) -> Said:
        """As ``_of_pair``, of any members."""
        last = self._drawer.rows["last"][: len(sequences)]
        layers = self.model.layers_read(name for name, lane in self.lanes.items() if lane.readers)
        reads = {
            name: next_pass(self._lms[name], lane, sequences, last, layers if name in _OF_BASE else [])
            for name, lane in self._of_lms.items()
            if lane.readers
        }
        auxiliaries = Auxiliaries(self.model, [reads[name] for name in _OF_BASE if name in reads], layers)
        passes = []
        for name, lane in self.lanes.items():
            if lane.readers:
                passes.append((name, auxiliaries.next(lane, sequences)))
                lane.keep(passes[-1][1].cache)
        return self._summed(sequences, reads, passes)

    def _summed(
        self, sequences: Sequences, reads: Mapping[str, LmPass], passes: list[tuple[str, AuxiliaryPass]]
    ) -> Said:
        N, V = len(sequences), self.model.config.vocab_size
        # The first layers say nothing by themselves.
        saying = [name for name in reads if name != FIRST or BASE not in reads]
        saying.sort(key=lambda name: name not in _OF_BASE)
        own, *others = (reads[name].term(self._lms[name], N, V) for name in saying)
        added = added_of(passes, N, self.model.device)
        judged, sides = any(one.request.plausibility for one in sequences), None
        wanted = _wants_logprobs(sequences)
        first = first_alone(reads[BASE], self.model.lm, N) if wanted or judged else None
        members: list[AloneTerms] = []
        if wanted and first is not None:
            sides = alone(first, added, V)
            members = [reads[name].alone(self._lms[name]) for name in saying]
            members += [made.alone for _, made in passes]
        said = _flat(mixed(own, added, V, others), sides, first if judged else None)
        return said._replace(members=[one for one in members if one.rows])

    def _prefill(self, newcomers: Sequences, start: int, stats: EngineStats) -> Tensor | None:
        """Reads prompts and conditions, takes slots from ``start`` on, and draws; returns as ``_decode``."""
        with stats.timed("models"):
            said = self._joined(newcomers, stats)
        with stats.timed("sampling"):
            self._drawer.join(newcomers)
            return self._drawer.draw(said, slice(start, start + len(newcomers)))

    def _joined(self, newcomers: Sequences, stats: EngineStats) -> Said:
        """As ``_of_members``, of the first tokens; what was read is in the slots' caches."""
        device = self.model.device
        readers = {name: readers_of(newcomers, name) for name in self.names}
        layers = self.model.layers_read(name for name in self.lanes if readers[name])
        reads: dict[str, LmPass] = {}
        for name, lm in self._lms.items():
            if readers[name]:
                prefix = self._prefix_of(name, readers[name])
                layers_of = layers if name in _OF_BASE else []
                read = first_pass(lm, readers[name], newcomers, layers_of, device, prefix)
                reads[name] = read
                stats.prefill_tokens += int(read.lengths)
                before = 0 if prefix is None else len(prefix)
                self._of_lms[name].join(
                    readers[name], read.output.cache, read.columns, read.readings.of, before
                )
        auxiliaries = Auxiliaries(self.model, [reads[name] for name in _OF_BASE if name in reads], layers)
        passes = []
        for name, lane in self.lanes.items():
            if readers[name]:
                made = auxiliaries.first(name, readers[name], newcomers)
                passes.append((name, made))
                stats.prefill_tokens += made.condition_tokens
                reads_prefix = self.model.auxiliary_traits(name).reads_prefix
                before = len(self.model.base_prefix) if reads_prefix else 0
                lane.join_auxiliary(readers[name], made.condition, made.cache, made.readings.of, before)
        return self._summed(newcomers, reads, passes)

    def _prefix_of(self, name: str, readers: list[Reader]) -> PrefixStates | None:
        """What stands before the contexts of some of these."""
        prefix = self.model.base_prefix
        if not prefix or name not in _OF_BASE or not any(reader.part.told for reader in readers):
            return None
        states: PrefixStates = prefix.states()
        return states.first(self.model.config.lm_layers[0]) if name == FIRST else states

    def leave(self, ended: Sequences, moves: list[Move], left: int) -> None:
        """Sequences have ended; ``left`` go on, after these moves."""
        if not ended:
            return
        self._drawer.leave(moves, left)
        for lane in self._every_lane:
            lane.leave(ended)

    @torch.no_grad()
    def _reserve(self, start_id: int) -> None:
        """Takes the memory of all caches before the first request, as large as one token shows it to be."""
        token = torch.tensor([[start_id]], device=self.model.device)
        caches: list[tuple[Lane, Any, Any]] = []
        for name, lane in self.lanes.items():
            _, cache, _ = self.model.terms(
                PairInputs(token, None, token, None),
                cache=PairCache(DynamicCache(), [AuxiliaryRows(name, None, None)]),
                use_cache=True,
                keep=1,
            )
            made = cache.auxiliaries[0].cache
            caches.append((lane, lane.attention_of(made), made))
        for name, of_lm in self._of_lms.items():
            made = base.run_base(self._lms[name], token, cache=DynamicCache(), use_cache=True).cache
            caches.append((of_lm, made, made))
        needed = {one.name: one.table.needed_bytes(attention) for one, attention, _ in caches}
        total, free = sum(needed.values()), available_bytes(self.model.device)
        if free is not None and total > free:
            largest = sorted(needed, key=needed.__getitem__, reverse=True)
            each = ", ".join(f"of {name!r} {needed[name] / 1e9:.1f}" for name in largest)
            raise RuntimeError(
                f"the caches of {self._room.slots} slots of {self._room.length} tokens take "
                f"{total / 1e9:.1f} GB ({each}), but {free / 1e9:.1f} GB are free on "
                f"{self.model.device}; lower slots or max_length, or leave a model out"
            )
        for one, _, made in caches:
            one.reserve(made)


def _flat(terms: list[Term], sides: Alone | None, judge: Term | None = None) -> Said:
    """Of terms of rows (n, 1)."""

    def rows(some: list[Term]) -> list[Term]:
        return [rows_of(term, slice(None)) for term in some]

    return Said(
        rows(terms),
        None if sides is None else Alone(*map(rows, sides)),
        None if judge is None else rows([judge]),
    )


def _wants_logprobs(sequences: Sequences) -> bool:
    return any(sequence.request.logprobs for sequence in sequences)
