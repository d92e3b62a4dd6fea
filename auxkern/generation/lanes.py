"""The running sequences of one auxiliary, and what it keeps of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from auxkern.generation.request import Sequence, Sequences
from auxkern.generation.scheduler import closing_moves
from auxkern.generation.slots import SlotTable
from auxkern.generation.transfers import to_device
from auxkern.model.interface import OF_CONDITION, AuxiliaryCache


class Lane:
    """One auxiliary's sequences, in slots of its own, in the order in which they came or were moved.

    Args:
        name: of the auxiliary.
        table: for its keys and values.
        max_condition: most tokens K of a condition.
    """

    def __init__(self, name: str, table: SlotTable, max_condition: int) -> None:
        self.name, self.table, self.max_condition = name, table, max_condition
        self.members: list[Sequence] = []
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

    def serves_all(self, sequences: Sequences) -> bool:
        """Whether it is the lane of the whole batch, in the same order."""
        return [*map(id, self.members)] == [*map(id, sequences)]

    def rows(self, sequences: Sequences) -> Tensor | None:
        """(R,) slots of the whole batch that are this lane's, in its own order; None if it is all of them."""
        if self.serves_all(sequences):
            return None
        return to_device([member.slot for member in self.members], self.table.mask.device)

    def cache(self, K: int, rows: int | None = None) -> AuxiliaryCache:
        """What the auxiliary is given at the next step, with conditions of K tokens, padded.

        With ``rows`` it is for so many slots of a fixed table, whether they are taken or not.
        """
        n = len(self.members) if rows is None else rows
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

    def join(self, joining: list[tuple[Sequence, int]], cache: Any) -> None:
        """Newcomers, each with its row of what the auxiliary returned for the rows that were read."""
        rows = to_device([row for _, row in joining], self.table.mask.device)
        start, end = len(self.members), len(self.members) + len(joining)
        cache.reorder_cache(rows)
        # A decoder has its condition before the text.
        most = [one.length + len(one.condition_ids) for one, _ in joining] if self.table.fixed else None
        self.table.join(self.attention_of(cache), cache.mask, most)
        for name in OF_CONDITION:
            new = getattr(cache, name)
            if new is None:
                continue
            self._of_condition[name][start:end] = 0
            self._of_condition[name][start:end, : new.shape[1]] = new
        self.members += [sequence for sequence, _ in joining]

    def leave(self, ended: Sequences) -> None:
        """Sequences have ended; those that are not this lane's do not matter."""
        gone = {id(sequence) for sequence in ended}
        slots = [slot for slot, member in enumerate(self.members) if id(member) in gone]
        if not slots:
            return
        moves = closing_moves(len(self.members), slots)
        left = len(self.members) - len(slots)
        self.table.leave(moves, left)
        for source, destination in moves:
            self.members[destination] = self.members[source]
            for tensor in self._of_condition.values():
                tensor[destination] = tensor[source]
        del self.members[left:]
