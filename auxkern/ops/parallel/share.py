"""One rank's part of a sum whose vocabulary is cut: what its ids add up to, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auxkern.backends.choice import backend_of
from auxkern.core.loss import Loss, RowLosses, RowSlopes
from auxkern.core.sums import Layout, Sum
from auxkern.core.terms import Sparse
from auxkern.ops.parallel.vocabulary import VocabularyShard, local_ids, with_own_entries
from auxkern.ops.torch_ops import Gradients

IGNORED = -100  # a target that is ignored; those of this rank count from 0


@dataclass(frozen=True)
class Share:
    """The terms of a sum on one rank, but for their tensors.

    The tensors are those of ``Sum.tensors``: logits, weights and biases of this rank's ids; hidden
    states and sparse terms as all ranks have them, with ids from 0 to V.

    Attributes:
        layout: of the terms.
        shard: of this rank.
        V: ids of all ranks that count.
        chunk_rows: rows whose logits exist at a time, with heads; None for the default.
        backend: its name; "" for the first that can run.
    """

    layout: Layout
    shard: VocabularyShard
    V: int
    chunk_rows: int | None
    backend: str

    def sum(self, tensors: Sequence[Tensor]) -> Sum:
        """The terms with this rank's ids; entries of other ranks add 0 to its first."""
        whole = self.layout.sum(tensors, self.shard.used_sizes(self.V)[self.shard.rank], self.chunk_rows)
        return replace(whole, terms=tuple(with_own_entries(whole.terms, self.shard)))

    def rows(self, tensors: Sequence[Tensor], target: Tensor, loss: Loss) -> list[RowLosses]:
        """What this rank's ids add up to in each row; with stats, then the same of each term alone.

        Args:
            target: (N,) ids from this rank's first one, ``NO_TARGET`` or ``IGNORED``.

        Returns:
            Rows whose ``argmax`` counts from this rank's first id.
        """
        sum, kernel = self.sum(tensors), backend_of(self.backend or None, tensors)
        sums = [(sum, replace(loss, ignore_index=IGNORED))]
        sums += [(alone, Loss(IGNORED)) for alone in sum.alone()] if loss.stats else []
        if not target.numel():
            return [RowLosses.empty(target, one.dtype, len(one.terms), its) for one, its in sums]
        return [kernel.losses(one, target, its, None, [{}] * len(one.terms)) for one, its in sums]

    def gradients(
        self, tensors: Sequence[Tensor], target: Tensor, slopes: RowSlopes, wanted: Sequence[int]
    ) -> dict[int, Tensor]:
        """Gradients of the tensors in ``wanted``; of hidden states and sparse values this rank's part.

        Args:
            target: as in ``rows``.
            slopes: of the rows, from what all ids add up to.
        """
        sum = self.sum(tensors)
        result = Gradients(sum, tensors, wanted, float32=True)
        if not target.numel():
            return {i: torch.zeros_like(d) for i, d in result.flat.items()}
        backend_of(self.backend or None, tensors).gradients(sum, target, slopes, result.wanted)
        for index, term in enumerate(self.layout.sum(tensors, self.V).terms):
            if isinstance(term, Sparse) and result.wanted[index]:
                here, _ = local_ids(term.ids, self.shard)
                result.wanted[index]["values"].masked_fill_(~here, 0.0)
        return result.flat

    def is_whole(self, tensors: Sequence[Tensor], place: int) -> bool:
        """Whether a tensor is the same on all ranks, so that its gradient is a sum over them."""
        sum = self.layout.sum(tensors, self.V)
        index, name = list(sum.places())[place]
        return name == "hidden" or isinstance(sum.terms[index], Sparse)
