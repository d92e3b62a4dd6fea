"""Decoding steps of mixtures as CUDA graphs: of batches whose texts all have members of the same models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auxkern.core.terms import Term, rows_of
from auxkern.generation.drawing import RECORDED_ACTS, Acts, Drawer
from auxkern.generation.graphs import Record, sizes
from auxkern.generation.lanes import AuxiliaryLane, Lane, Reader
from auxkern.generation.members import BASE
from auxkern.generation.reading import linear_term, weighted
from auxkern.generation.request import Sequence, Sequences
from auxkern.generation.transfers import to_device
from auxkern.model import base
from auxkern.model.caches import AuxiliaryRows
from auxkern.model.inputs import BaseSide, PairInputs
from auxkern.model.mixing import Added, mixed, sequences_of

Shape = tuple[str, ...]  # models of a text's members, in order


def shape_of(sequence: Sequence) -> Shape:
    """Of a text."""
    return tuple(sorted(part.model for part in sequence.parts))


class Lanes(NamedTuple):
    """Models and their slots, by name.

    Attributes:
        lms: language models.
        of_lms: slots of each.
        auxiliaries: slots of each auxiliary.
    """

    lms: Mapping[str, Any]
    of_lms: Mapping[str, Lane]
    auxiliaries: Mapping[str, AuxiliaryLane]

    def of(self, name: str) -> Lane:
        """One model's."""
        return self.of_lms[name] if name in self.of_lms else self.auxiliaries[name]


class Places:
    """Where members of one model stand, in device memory that a recorded step reads.

    Args:
        turns: most members of the model that a text has.
        slots: S.
        device: of the model.

    Attributes:
        row: (S,) int64, of the batch, for each slot.
        slot: (turns, S) int64, for the members of a text one after the other, and each row of the batch.
        base: (S,) int64, the base's slot whose hidden states an auxiliary's member reads.
        live: (S,) int64, 1 where a member runs.
        weight: (S,) float32.
    """

    def __init__(self, turns: int, slots: int, device: torch.device) -> None:
        self.row, self.base, self.live = torch.zeros(3, slots, dtype=torch.int64, device=device)
        self.slot = torch.zeros(turns, slots, dtype=torch.int64, device=device)
        self.weight = torch.zeros(slots, dtype=torch.float32, device=device)
        self._known: list[tuple[Reader, int, int]] = []

    def fill(
        self, lane: Lane, usual: float, row: Mapping[int, int], base_slot: Mapping[tuple[int, int], int]
    ) -> None:
        """Brings them up to date; nothing is copied where no member came, left or moved.

        Args:
            lane: of the model.
            usual: weight of members that say none.
            row: of each sequence, by its id.
            base_slot: of each member of the base, by its sequence's id and its place.
        """
        known = [
            (one, row[id(one.sequence)], base_slot.get((id(one.sequence), one.part.base), 0))
            for one in lane.readers
        ]
        if len(known) == len(self._known) and all(map(_same, known, self._known)):
            return
        self._known, S = known, self.live.shape[0]
        rows, of_base = [row for _, row, _ in known], [slot for _, _, slot in known]
        slots = [[0] * S for _ in self.slot]
        for place, reader in enumerate(lane.readers):
            slots[reader.turn][rows[place]] = place
        given = (one.part.weight for one in lane.readers)
        weights = [usual if weight is None else weight for weight in given] + [0.0] * (S - len(known))
        device, rest = self.live.device, [0] * (S - len(known))
        for ours, new in (
            (self.row, rows + rest),
            (self.base, of_base + rest),
            (self.live, [1] * len(known) + rest),
            (self.slot, slots),
            (self.weight, weights),
        ):
            ours.copy_(to_device(new, device, ours.dtype))


def _same(one: tuple[Reader, int, int], other: tuple[Reader, int, int]) -> bool:
    return one[0].sequence is other[0].sequence and one[0].place == other[0].place and one[1:] == other[1:]


class MixtureGraphs:
    """One decoding step for each shape, each number of texts of 1, 2, 4, ... and each kind of draw.

    Args:
        model: an ``AuxTunedForCausalLM``.
        lanes: of all models; tables of those in the shapes are fixed.
        drawer: of the slots.
        shapes: models of a text's members.
        record: records a call.
    """

    def __init__(
        self, model: Any, lanes: Lanes, drawer: Drawer, shapes: Iterable[Shape], record: Record
    ) -> None:
        self._model, self._lanes, self._drawer = model, lanes, drawer
        self._slots = lanes.of(BASE).table.mask.shape[0]
        self._places: dict[str, Places] = {}
        self._recorded: dict[tuple[Shape, int, Acts], Callable[[], None]] = {}
        listed = {tuple(sorted(shape)) for shape in shapes}
        for name in {name for shape in listed for name in shape}:
            turns = max(shape.count(name) for shape in listed)
            self._places[name] = Places(turns, self._slots, model.device)
        for shape in listed:
            # The largest first: the others find room in its memory.
            for size in reversed(self._sizes(shape)):
                for acts in reversed(RECORDED_ACTS):
                    self._recorded[shape, size, acts] = record(partial(self._step, shape, size, acts))
                    self._clear(shape)  # what was called has moved on by some columns

    def _sizes(self, shape: Shape) -> list[int]:
        return sizes(self._slots // max(Counter(shape).values()))

    def replay(self, sequences: Sequences, acts: Acts) -> Callable[[], None] | None:
        """Does a step of the running sequences; None if it was not recorded.

        Args:
            sequences: in slots 0 to n - 1.
            acts: what acts on their draws.
        """
        shape = shape_of(sequences[0])
        kind = next((one for one in RECORDED_ACTS if acts.within(one)), None)
        if kind is None or not set(shape) <= self._places.keys():
            return None
        if any(one.request.plausibility or shape_of(one) != shape for one in sequences):
            return None
        size = next((size for size in self._sizes(shape) if size >= len(sequences)), None)
        recorded = None if size is None else self._recorded.get((shape, size, kind))
        if recorded is not None:
            self._fill(shape, sequences)
        return recorded

    def _fill(self, shape: Shape, sequences: Sequences) -> None:
        row = {id(sequence): place for place, sequence in enumerate(sequences)}
        readers = self._lanes.of(BASE).readers
        base_slot = {(id(one.sequence), one.place): slot for slot, one in enumerate(readers)}
        for name in set(shape):
            is_lm = name in self._lanes.lms
            usual = 1.0 if is_lm else self._model.auxiliary_scale(name)
            self._places[name].fill(self._lanes.of(name), usual, row, base_slot)

    def _step(self, shape: Shape, size: int, acts: Acts) -> None:
        counts, rows, device = Counter(shape), slice(0, size), self._model.device
        layers = self._model.layers_read(name for name in counts if name in self._lanes.auxiliaries)
        terms: list[Term] = []
        side: BaseSide | None = None
        for name, lm in self._lanes.lms.items():
            if not counts[name]:
                continue
            places, R = self._places[name], counts[name] * size
            table = self._lanes.of(name).table
            ids = self._drawer.rows["last"][places.row[:R], None]
            mask = torch.cat([table.mask[:R], torch.ones_like(ids)], 1)
            output = base.run_base(
                lm, ids, mask, layers=layers if name == BASE else [], cache=table.cache, use_cache=True
            )
            head = base.output_head(lm)
            if name == BASE:
                batch, side = (ids, mask), BaseSide(output.states, layers, None, head)

            def summed(z: Tensor, places: Places = places, turns: int = counts[name]) -> Tensor:
                scaled = z * places.weight[: z.shape[0], None, None]
                total = scaled[places.slot[0, rows]]
                for turn in range(1, turns):
                    total = total + scaled[places.slot[turn, rows]]
                return total

            terms.append(linear_term(output.states[:, -1:, 0], head, self._model.config.vocab_size, summed))
        added: Added = []
        for name, lane in self._lanes.auxiliaries.items():
            if counts[name] and side is not None:
                own = self._auxiliary(lane, counts[name] * size, batch, side)
                slot = self._places[name].slot
                for turn in range(counts[name]):
                    of_rows = [sequences_of(term, slot[turn, rows]) for term in own]
                    added.append((AuxiliaryRows(name, None, None), of_rows))
        lm_term, *others = terms
        every = torch.arange(size, device=device)
        total = mixed(lm_term, added, self._model.config.vocab_size, others)
        self._drawer.draw_recorded([rows_of(term, every) for term in total], rows, acts)
        for name, count in counts.items():
            self._lanes.of(name).table.open_column(self._places[name].live[: count * size])

    def _auxiliary(
        self, lane: AuxiliaryLane, R: int, batch: tuple[Tensor, Tensor], side: BaseSide
    ) -> list[Term]:
        """Terms of R slots, with their weights."""
        places = self._places[lane.name]
        of_base = places.base[:R]
        ids, mask, states = (one[of_base] for one in (*batch, side.states))
        part = AuxiliaryRows(lane.name, None, lane.cache(lane.max_condition, R))
        inputs = PairInputs(ids, mask, *lane.condition[:, :R])
        returned, terms = self._model.auxiliary_part(
            part, inputs, side._replace(states=states), 1.0, use_cache=True, keep=1
        )
        lane.keep(returned.cache)
        return weighted(terms, places.weight[:R])

    def _clear(self, shape: Shape) -> None:
        for name in shape:
            self._lanes.of(name).table.clear()
        self._drawer.clear()
