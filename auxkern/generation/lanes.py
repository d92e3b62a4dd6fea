"""Who reads a model: the running sequences' members of it, in slots of its own, and what it keeps of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from auxkern.generation.members import Part
from auxkern.generation.request import Sequence, Sequences
from auxkern.generation.scheduler import Move, closing_moves
from auxkern.generation.slots import SlotTable
from auxkern.generation.transfers import to_device
from auxkern.model.interface import OF_CONDITION, AuxiliaryCache


class Reader(NamedTuple):
    """A member of a sequence.

    Attributes:
        sequence: as given.
        place: of the member among the sequence's.
    """

    sequence: Sequence
    place: int

    @property
    def part(self) -> Part:
        """What it reads."""
        return self.sequence.parts[self.place]

    @property
    def turn(self) -> int:
        """How many members of its model the sequence has before it."""
        return sum(part.model == self.part.model for part in self.sequence.parts[: self.place])

    @property
    def base_model(self) -> str:
        """Of an auxiliary, the model of the member whose hidden states it reads."""
        return self.sequence.parts[self.part.base].model

    @property
    def ids(self) -> tuple[int, ...]:
        """Its prompt, and what was drawn so far."""
        return (*self.part.prompt_ids, *self.sequence.generated)


def readers_of(sequences: Iterable[Sequence], model: str) -> list[Reader]:
    """The members that are of one model, in order."""
    return [
        Reader(sequence, place)
        for sequence in sequences
        for place, part in enumerate(sequence.parts)
        if part.model == model
    ]


class Lane:
    """The members of one model, in slots of its own, in the order in which they came or were moved.

    Args:
        name: of the model.
        table: for its keys and values.

    Attributes:
        readers: in slots 0, 1, ...
    """

    def __init__(self, name: str, table: SlotTable) -> None:
        self.name, self.table = name, table
        self.readers: list[Reader] = []

    def serves_all(self, sequences: Sequences) -> bool:
        """Whether it has one member of each of these, the whole batch, in the same order."""
        return [id(reader.sequence) for reader in self.readers] == [*map(id, sequences)]

    def rows(self, sequences: Sequences) -> Tensor | None:
        """(R,) slots of the whole batch that are its members', in its own order; None if it serves all."""
        if self.serves_all(sequences):
            return None
        return to_device([reader.sequence.slot for reader in self.readers], self.table.mask.device)

    def reserve(self, cache: Any) -> None:
        """Takes the memory for all slots, as a cache of any size shows it to be.

        Raises:
            ValueError: the cache is of a kind that does not fit.
        """
        self.table.reserve(cache)

    def join(self, joining: list[Reader], cache: Any, mask: Tensor, of: list[int], before: int = 0) -> None:
        """Newcomers take the next slots.

        Args:
            joining: R of them.
            cache: what the model returned for the contexts that were read.
            mask: (U, W) int64 of these.
            of: each newcomer's row among them.
            before: tokens of a prefix before those that are told something.
        """
        rows = to_device(of, mask.device)
        cache.reorder_cache(rows)
        tokens = [len(one.ids) + (before if one.part.told else 0) for one in joining]
        self.table.join(cache, mask[rows], tokens)
        self.readers += joining

    def clear(self) -> None:
        """All sequences leave."""
        self.table.clear()
        self.readers.clear()

    def leave(self, ended: Sequences) -> list[Move]:
        """Sequences have ended; those that are not this lane's do not matter. Returns what was moved."""
        gone = {id(sequence) for sequence in ended}
        slots = [slot for slot, reader in enumerate(self.readers) if id(reader.sequence) in gone]
        if not slots:
            return []
        moves = closing_moves(len(self.readers), slots)
        left = len(self.readers) - len(slots)
        self.table.leave(moves, left)
        for source, destination in moves:
            self.readers[destination] = self.readers[source]
        del self.readers[left:]
        return moves


class AuxiliaryLane(Lane):
    """One auxiliary's members, with their conditions.

    Args:
        name, table: as of ``Lane``.
        max_condition: most tokens K of a condition.
    """

    def __init__(self, name: str, table: SlotTable, max_condition: int) -> None:
        super().__init__(name, table)
        self.max_condition = max_condition
        # Ids and mask of the conditions.
        slots = table.mask.shape[0]
        self.condition = torch.zeros(2, slots, max_condition, dtype=torch.int64, device=table.mask.device)
        self._of_condition: dict[str, Tensor] = {}  # (slots, K, ...) each

    def attention_of(self, cache: Any) -> Any:
        """The keys and values over the text in what an auxiliary returned.

        Raises:
            ValueError: it is a module of another kind, whose cache cannot be kept in slots.
        """
        if not isinstance(cache, AuxiliaryCache):
            raise ValueError(
                f"auxiliary {self.name!r} returns a {type(cache).__name__} as its cache; the engine takes "
                "the package's own architectures. Use model.generate"
            )
        attention = cache.attention
        return attention.self_attention_cache if isinstance(attention, EncoderDecoderCache) else attention

    def cache(self, K: int, rows: int | None = None) -> AuxiliaryCache:
        """What the auxiliary is given at the next step, with conditions of K tokens, padded.

        With ``rows`` it is for so many slots of a fixed table, whether they are taken or not.
        """
        n = len(self.readers) if rows is None else rows
        window = self.table.window if rows is None else self.table.mask[:rows]
        kept = {name: tensor[:n, :K] for name, tensor in self._of_condition.items()}
        attention: Any = self.table.cache
        if "memory" in kept:
            # Keys and values of the condition are made anew at each step: it is short.
            attention = EncoderDecoderCache(attention, DynamicCache())
        return AuxiliaryCache(attention, window, *(kept.get(name) for name in OF_CONDITION))

    def keep(self, cache: AuxiliaryCache) -> None:
        """Takes over what a step changed, but for the table."""
        if cache.stretches is not None:
            n, K, _ = cache.stretches.shape
            self._of_condition["stretches"][:n, :K] = cache.stretches

    def reserve(self, cache: AuxiliaryCache) -> None:
        """Takes the memory for all slots, as an auxiliary's cache of any size shows it to be.

        Raises:
            ValueError: the cache is of a kind that does not fit.
        """
        self.table.reserve(self.attention_of(cache))
        slots = self.table.mask.shape[0]
        for name in OF_CONDITION:
            if (like := getattr(cache, name)) is not None:
                self._of_condition[name] = like.new_zeros(slots, self.max_condition, *like.shape[2:])

    def join_auxiliary(
        self,
        joining: list[Reader],
        condition: tuple[Tensor, Tensor],
        cache: Any,
        of: list[int],
        before: int = 0,
    ) -> None:
        """Newcomers take the next slots.

        Args:
            joining: R of them.
            condition: (U, K) ids and mask of the rows that were read.
            cache: what the auxiliary returned for them.
            of: each newcomer's row among these.
            before: tokens of a prefix that stand in the cache before each text.
        """
        rows = to_device(of, self.condition.device)
        start, end = len(self.readers), len(self.readers) + len(joining)
        self.condition[:, start:end] = 0
        for side, ids in zip(self.condition, condition, strict=True):
            side[start:end, : ids.shape[1]] = ids[rows]
        cache.reorder_cache(rows)
        most = None
        if self.table.fixed:  # a decoder has its condition before the text, last layers a prefix
            most = [len(one.ids) + (before or len(one.part.condition_ids)) for one in joining]
        self.table.join(self.attention_of(cache), cache.mask, most)
        for name in OF_CONDITION:
            new = getattr(cache, name)
            if new is None:
                continue
            self._of_condition[name][start:end] = 0
            self._of_condition[name][start:end, : new.shape[1]] = new
        self.readers += joining

    def leave(self, ended: Sequences) -> list[Move]:
        moves = super().leave(ended)
        for source, destination in moves:
            self.condition[:, destination] = self.condition[:, source]
            for tensor in self._of_condition.values():
                tensor[destination] = tensor[source]
        return moves
