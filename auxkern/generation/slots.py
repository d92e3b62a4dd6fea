"""Caches of running sequences in fixed memory, through transformers' own Cache interface.

All sequences of a table stand on the right: the last token of each is in the same column, so a step
writes one column and reads one window of columns, and a mask says where a sequence begins, as in a
batch that is padded on the left. A newcomer is placed before the next column to be written; one that
ends makes room by a move. Nothing is allocated while sequences run.

A CUDA graph replays addresses and shapes, so a table for graphs (``fixed``) hands out all columns at
every step, the mask says which are in use, and the new token stands in one more column behind them,
beside its own place, which the mask opens at the next step. Which column that is stands in device memory
too, where a graph counts it up (``open_column``); the host counts along without asking.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from auxkern.core.decoder import CACHE_DTYPES, CacheMemory, Windows
from auxkern.core.memory import LargePages
from auxkern.model.native import WindowedCache

# One of a sliding window forgets what lies before it; it is taken while the window is wider than a slot.
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, columns, head width).

    All columns are kept where the layer has a sliding window too: transformers' mask leaves out what lies
    before it, for the columns between two tokens of a sequence are as many as its positions.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, table: SlotTable) -> None:
        self.table = table
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        """Takes room like these (R, heads, T, width) for all slots."""
        # Zeros: what is masked is still multiplied, and NaN times 0 is NaN.
        slots, columns = self.table.mask.shape[0], self.table.columns
        self.keys = self.table.zeros(keys, (slots, keys.shape[1], columns, keys.shape[3]))
        self.values = self.table.zeros(values, (slots, values.shape[1], columns, values.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes the new tokens' columns, returns the window up to them."""
        table, T = self.table, key_states.shape[2]
        if self.keys is None or self.values is None:
            raise RuntimeError("a slot has no memory yet; a sequence joins before it goes on")
        if table.fixed:
            return self._update_fixed(self.keys, key_states), self._update_fixed(self.values, value_states)
        window = slice(table.begin, table.end + T)
        written = slice(table.end, table.end + T)
        self.keys[: table.count, :, written] = key_states
        self.values[: table.count, :, written] = value_states
        # A layer that native kernels no longer run attends in its own dtype.
        seen = (room[: table.count, :, window] for room in (self.keys, self.values))
        keys, values = (room.to(key_states.dtype) for room in seen)
        return keys, values

    def _update_fixed(self, room: Tensor, new: Tensor) -> Tensor:
        rows = room[: new.shape[0]]
        rows.index_copy_(2, self.table.column, new)
        rows[:, :, -1:] = new
        return rows

    def get_seq_length(self, *args: Any) -> int:
        return self.table.columns - 1 if self.table.fixed else self.table.end - self.table.begin

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        # transformers passed positions before it passed their number
        new = query if isinstance(query, int) else query.shape[0]
        return self.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class SlotCache(Cache, WindowedCache):
    """The layers of a table."""

    def __init__(self, table: SlotTable) -> None:
        super().__init__(layers=list(table.layers))
        self._table = table
        keys = [layer.keys for layer in table.layers if layer.keys is not None]
        values = [layer.values for layer in table.layers if layer.values is not None]
        # A step that a graph records writes columns that stand in device memory.
        kinds = {(one.stride(), one.dtype) for one in (*keys, *values)}
        plain = not table.fixed and len(kinds) == 1 and kinds.pop()[1] in CACHE_DTYPES
        self._memory = CacheMemory(tuple(keys), tuple(values)) if plain else None

    def windows(self, B: int, T: int) -> Windows | None:
        table = self._table
        if self._memory is None or table.count != B or table.end + T > table.columns:
            return None
        return Windows(self._memory, table.begin, table.end)


class SlotTable:
    """The cache of one model over the running sequences, which fill slots 0 to ``count`` - 1.

    Args:
        slots: most sequences.
        length: most columns of a sequence.
        device: of the model.
        fixed: for CUDA graphs.
    """

    def __init__(self, slots: int, length: int, device: torch.device, *, fixed: bool = False) -> None:
        self._room = columns_for(length) - 1
        self.length, self.fixed = length, fixed
        self.columns = self._room + 1 if fixed else self._room
        self.mask = torch.zeros(slots, self._room, dtype=torch.int64, device=device)
        self.count = 0
        self._pages = LargePages()
        self.end = length
        self._starts: list[int] = []
        self._first: int | None = None  # of these: every layer asks for it at every step
        self.layers: list[SlotLayer] = []
        self.cache: Cache | None = None
        self.column = torch.full((1,), length, dtype=torch.int64, device=device)

    @property
    def begin(self) -> int:
        """First column that a running sequence uses."""
        return self.end if self._first is None else self._first

    def _start_at(self, starts: list[int]) -> None:
        self._starts, self._first = starts, min(starts, default=None)

    @property
    def window(self) -> Tensor:
        """(count, columns so far) int64, 1 where there is a real token; all columns of a fixed table."""
        return self.mask[: self.count] if self.fixed else self.mask[: self.count, self.begin : self.end]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        tensors = [t for layer in self.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def zeros(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Memory for keys or values of a layer, of another's dtype and device."""
        if like.device.type != "cpu":
            return like.new_zeros(shape)
        # Written now: pages that are first touched while texts are written would hold those up.
        return self._pages.zeros(shape, like.dtype).zero_()

    def needed_bytes(self, cache: Cache) -> int:
        """What ``reserve`` would take."""
        slots, columns = self.mask.shape[0], self.columns
        sources = [tensor for layer in cache.layers for tensor in _plain_layer(layer)]
        return sum(slots * columns * t.shape[1] * t.shape[3] * t.element_size() for t in sources)

    def reserve(self, cache: Cache) -> None:
        """Takes the memory for all slots.

        Args:
            cache: as a forward pass of the model filled it, of any size.

        Raises:
            ValueError: the cache is of a kind that does not fit.
        """
        sources = [_plain_layer(layer) for layer in cache.layers]
        self.layers = [SlotLayer(self) for _ in sources]
        for layer, (keys, values) in zip(self.layers, sources, strict=True):
            layer.lazy_initialization(keys, values)
        self.cache = SlotCache(self)

    def join(self, cache: Cache, mask: Tensor, most: Sequence[int] | None = None) -> None:
        """Newcomers take the next slots.

        Args:
            cache: of R sequences, W columns each, as a forward pass filled it.
            mask: (R, W) int64 of these columns.
            most: as many real tokens as each may have, the last columns; None to count them, for which a
                GPU has to stop.

        Raises:
            ValueError: W is too long.
        """
        R, W = mask.shape
        if self.length < W:
            raise ValueError(f"newcomers take {W} columns, but a slot has {self.length}")
        sources = [_plain_layer(layer) for layer in cache.layers]
        rows, columns = slice(self.count, self.count + R), slice(self.end - W, self.end)
        for layer, (keys, values) in zip(self.layers, sources, strict=True):
            for room, new in ((layer.keys, keys), (layer.values, values)):
                room[rows, :, columns] = new  # type: ignore[index]
        self.mask[rows] = 0
        self.mask[rows, columns] = mask
        if most is None:
            first = mask.argmax(1) if W else mask.new_zeros(R)
            most = [W - start for start in first.tolist()]
        self._start_at([*self._starts, *(self.end - min(W, tokens) for tokens in most)])
        self.count += R

    def open_column(self, live: Tensor) -> None:
        """The device's part of ``advance``, where a graph can record it.

        Args:
            live: (R,) int64, 1 for each of the first R slots in which a sequence runs.
        """
        self.mask[: live.shape[0]].index_copy_(1, self.column, live[:, None])
        self.column.add_(1)

    def advance(self, *, opened: bool = False) -> None:
        """A step has written one column of every running sequence.

        Args:
            opened: whether the step called ``open_column`` itself.
        """
        if not opened:
            self.mask[: self.count, self.end] = 1
        self.end += 1
        full = self.end >= self._room
        if full:
            self._shift_back()
        if full or not opened:
            self.column.fill_(self.end)

    def clear(self) -> None:
        """All sequences leave."""
        self.count, self.end = 0, self.length
        self._start_at([])
        self.mask.zero_()
        self.column.fill_(self.end)

    def leave(self, moves: Sequence[tuple[int, int]], left: int) -> None:
        """Sequences have ended; others go on in their slots.

        Args:
            moves: (source, destination) slots; no source is a destination.
            left: sequences that run on.
        """
        window = slice(self.begin, self.end)
        for source, destination in moves:
            for layer in self.layers:
                for room in (layer.keys, layer.values):
                    room[destination, :, window] = room[source, :, window]  # type: ignore[index]
            self.mask[destination] = self.mask[source]
            self._starts[destination] = self._starts[source]
        self._start_at(self._starts[:left])
        self.count = left

    def _shift_back(self) -> None:
        begin, end = self.begin, self.end
        by = end - self.length
        if begin < by:
            raise RuntimeError(f"a sequence takes {end - begin} columns, but a slot has {self.length}")
        old, new = slice(begin, end), slice(begin - by, end - by)
        for layer in self.layers:
            for room in (layer.keys, layer.values):
                room[: self.count, :, new] = room[: self.count, :, old].clone()  # type: ignore[index]
        kept = self.mask[: self.count, old].clone()
        self.mask[: self.count] = 0
        self.mask[: self.count, new] = kept
        self._start_at([start - by for start in self._starts])
        self.end = end - by


def columns_for(length: int) -> int:
    """Columns of a table whose sequences have so many at most."""
    # Columns move to the right as sequences go on; a quarter more than the longest needs makes
    # moving all of them back rare. Attention kernels like a multiple of 16, the last one included.
    return -(-max(length + 64, length * 5 // 4) // 16) * 16


def _plain_layer(layer: Any) -> tuple[Tensor, Tensor]:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if type(layer) not in _PLAIN or keys is None or values is None or keys.dim() != 4:
        raise ValueError(
            f"the model's cache has a {type(layer).__name__}; the engine takes layers of attention. "
            "Use model.generate for this model"
        )
    return keys, values
