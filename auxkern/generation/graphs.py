"""Decoding steps as CUDA graphs: recorded for a few batch sizes before the first request, then replayed.

A replay costs one launch instead of thousands, and nothing is compiled or recorded while texts are
written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from auxkern.core.terms import Term
from auxkern.generation.lanes import Lane
from auxkern.generation.slots import SlotTable
from auxkern.model.caches import AuxiliaryRows, PairCache
from auxkern.model.inputs import PairInputs

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


class CudaRecorder:
    """Records calls as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A function that does the call again, and what it left: each time in the same memory."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries choose kernels and take workspaces at their first calls
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = call()
        return graph.replay, result


class DecodeGraphs:
    """One decoding step of a pair, for each auxiliary and each batch size of 1, 2, 4, ... slots.

    Rows beyond the running sequences are computed and not looked at.

    Args:
        model: an ``AuxTunedForCausalLM``.
        table: of the base's keys and values, fixed.
        lanes: of the auxiliaries whose steps are recorded, by name; their tables fixed.
        condition: (2, slots, K) int64, ids and mask of the running sequences' conditions.
        record: records a call.
    """

    def __init__(
        self, model: Any, table: SlotTable, lanes: dict[str, Lane], condition: Tensor, record: Record
    ) -> None:
        self._model, self._table, self._lanes, self._condition = model, table, lanes, condition
        slots, device = condition.shape[1], condition.device
        self._ids = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self._scales = torch.ones(slots, device=device)
        self._recorded: dict[tuple[str | None, int], tuple[Callable[[], None], list[Term]]] = {}
        for name in (None, *lanes):
            # The largest first: the others find room in its memory.
            for size in reversed(sizes(slots)):
                self._recorded[name, size] = record(partial(self._step, name, size))

    def serves(self, name: str | None) -> bool:
        """Whether steps of this auxiliary were recorded."""
        return (name, 1) in self._recorded

    def terms(self, name: str | None, tokens: list[int], scales: list[float]) -> list[Term]:
        """The terms of the next token of the sequences in slots 0, 1, ..., rows (size); size >= n.

        Args:
            name: the auxiliary of all of them; None for the base alone.
            tokens: n, the last one of each.
            scales: n mixing weights.
        """
        n = len(tokens)
        device = self._ids.device
        self._ids[:n, 0] = torch.tensor(tokens, device=device)
        self._scales[:n] = torch.tensor(scales, device=device)
        size = next(size for size in sizes(self._ids.shape[0]) if size >= n)
        replay, terms = self._recorded[name, size]
        replay()
        return terms

    def _step(self, name: str | None, size: int) -> list[Term]:
        ids, K = self._ids[:size], self._condition.shape[2]
        mask = torch.cat([self._table.mask[:size], torch.ones_like(ids)], 1)
        parts = [] if name is None else [AuxiliaryRows(name, None, self._lanes[name].cache(K, size))]
        terms, cache = self._model.terms(
            PairInputs(ids, mask, *self._condition[:, :size]),
            cache=PairCache(self._table.cache, parts),
            use_cache=True,
            keep=1,
            aux_scale=self._scales[:size],
        )
        for part in cache.auxiliaries:
            self._lanes[part.name].keep(part.cache)
        return terms


def sizes(slots: int) -> list[int]:
    """1, 2, 4, ... and the number of slots."""
    return [*(1 << i for i in range((slots - 1).bit_length())), slots]
