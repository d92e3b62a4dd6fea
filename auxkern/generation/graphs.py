"""Decoding steps as CUDA graphs: recorded for a few batch sizes before the first request, then replayed.

A replay is a whole step: both models, the draw, and the token fed to the next step. It costs one launch
instead of thousands, and nothing is compiled or recorded while texts are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from auxkern.core.terms import rows_of
from auxkern.generation.drawing import RECORDED_ACTS, Acts, Drawer
from auxkern.generation.lanes import AuxiliaryLane
from auxkern.generation.slots import SlotTable
from auxkern.model.caches import AuxiliaryRows, PairCache
from auxkern.model.inputs import PairInputs

Record = Callable[[Callable[[], None]], Callable[[], None]]


class CudaRecorder:
    """Records calls as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        """A function that does the call again, on the same memory."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries choose kernels and take workspaces at their first calls
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            call()
        return graph.replay


class DecodeGraphs:
    """One decoding step of a pair: for each auxiliary, each batch size of 1, 2, 4, ... and each kind of draw.

    All that changes from step to step is in device memory, which the step itself brings up to date. Rows
    beyond the running sequences are computed and not looked at.

    Args:
        model: an ``AuxTunedForCausalLM``.
        table: of the base's keys and values, fixed.
        lanes: of the auxiliaries whose steps are recorded, by name; their tables fixed.
        drawer: of the slots.
        record: records a call.
    """

    def __init__(
        self,
        model: Any,
        table: SlotTable,
        lanes: dict[str, AuxiliaryLane],
        drawer: Drawer,
        record: Record,
    ) -> None:
        self._model, self._table, self._lanes = model, table, lanes
        self._drawer = drawer
        self._slots = table.mask.shape[0]
        self._recorded: dict[tuple[str | None, int, Acts], Callable[[], None]] = {}
        for name in (None, *lanes):
            # The largest first: the others find room in its memory.
            for size in reversed(sizes(self._slots)):
                for acts in reversed(RECORDED_ACTS):
                    self._recorded[name, size, acts] = record(partial(self._step, name, size, acts))
                    self._clear()  # what was called has moved on by some columns

    def replay(self, name: str | None, n: int, acts: Acts) -> Callable[[], None] | None:
        """Does a step of the sequences in slots 0 to n - 1; None if it was not recorded.

        Args:
            name: the auxiliary of all of them; None for the base alone.
            n: sequences.
            acts: what acts on their draws.
        """
        kind = next((one for one in RECORDED_ACTS if acts.within(one)), None)
        size = next(size for size in sizes(self._slots) if size >= n)
        return None if kind is None else self._recorded.get((name, size, kind))

    def _step(self, name: str | None, size: int, acts: Acts) -> None:
        rows, numbers = slice(0, size), self._drawer.rows
        ids = numbers["last"][rows, None]
        mask = torch.cat([self._table.mask[rows], torch.ones_like(ids)], 1)
        parts: list[AuxiliaryRows] = []
        condition: Iterable[Tensor] = ()
        if name is not None:
            lane = self._lanes[name]
            parts = [AuxiliaryRows(name, None, lane.cache(lane.max_condition, size))]
            condition = lane.condition[:, rows]
        terms, cache, _ = self._model.terms(
            PairInputs(ids, mask, *condition),
            cache=PairCache(self._table.cache, parts),
            use_cache=True,
            keep=1,
            aux_scale=numbers["scale"][rows].float(),
        )
        for part in cache.auxiliaries:
            self._lanes[part.name].keep(part.cache)
        every = torch.arange(size, device=ids.device)
        self._drawer.draw_recorded([rows_of(term, every) for term in terms], rows, acts)
        live = numbers["live"][rows]
        for table in (self._table, *(self._lanes[part.name].table for part in parts)):
            table.open_column(live)

    def _clear(self) -> None:
        for table in (self._table, *(lane.table for lane in self._lanes.values())):
            table.clear()
        self._drawer.clear()


def sizes(slots: int) -> list[int]:
    """1, 2, 4, ... and the number of slots."""
    return [*(1 << i for i in range((slots - 1).bit_length())), slots]
