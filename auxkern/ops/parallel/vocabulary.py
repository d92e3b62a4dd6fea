"""A vocabulary that is cut over the ranks of a process group: who has which ids, and what they exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from auxkern.ops.groups import process_group_of
from auxkern.terms import Head, Logits, Sparse, Term


@dataclass(frozen=True)
class VocabularyShard:
    """The ids of this rank, [first_id, first_id + size), of the V over all ranks of a group.

    Ranks have consecutive ids, in the order of their numbers. ``VocabularyShard.of`` asks the group once;
    make it before a training loop.

    Attributes:
        group: the process group.
        rank: this process's place in it.
        sizes: ids of each rank; one at least.
    """

    group: Any
    rank: int
    sizes: tuple[int, ...]

    @property
    def first_id(self) -> int:
        """This rank's first id."""
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        """How many ids this rank has."""
        return self.sizes[self.rank]

    @property
    def vocab_size(self) -> int:
        """V, of all ranks together."""
        return sum(self.sizes)

    @classmethod
    def of(cls, group: Any, size: int) -> VocabularyShard:
        """The shard of this rank, which has ``size`` ids; every rank of the group must call it.

        Args:
            group: a ``ProcessGroup``, or a ``DeviceMesh`` of one dimension.
            size: rows of this rank's output embedding, or columns of its logits.

        Raises:
            TypeError: group is something else.
            ValueError: a rank has no ids.
        """
        process_group = process_group_of(group)
        sizes: list[Any] = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(sizes, size, group=process_group)
        if min(sizes) < 1:
            raise ValueError(
                f"the ranks have {sizes} ids of the vocabulary; each needs one at least, so use fewer ranks"
            )
        return cls(process_group, dist.get_rank(process_group), tuple(sizes))

    def vocabulary(self, vocab_size: int | None) -> tuple[int, int | None]:
        """V that is used over all ranks, and how many of this rank's ids; None for all of them.

        Raises:
            ValueError: there are fewer ids, or this rank would have none.
        """
        if vocab_size is None or vocab_size == self.vocab_size:
            return self.vocab_size, None
        here = min(self.size, vocab_size - self.first_id)
        if vocab_size > self.vocab_size or here < 1:
            raise ValueError(
                f"vocab_size is {vocab_size}, but the ranks have {self.vocab_size} ids and this one's begin "
                f"at {self.first_id}; each rank needs one that is used"
            )
        return vocab_size, here

    def gathered(self, values: Tensor) -> Tensor:
        """(R, ...) what each of the R ranks has, in their order: the same bits on all of them."""
        parts = [torch.empty_like(values) for _ in self.sizes]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.stack(parts)

    def whole(self, logits: Tensor) -> Tensor:
        """(N, V) logits of all ids, from each rank's (N, size); the last rank may leave out its last ids."""
        padded = torch.nn.functional.pad(logits, (0, max(self.sizes) - logits.shape[1]))
        parts = self.gathered(padded).unbind(0)
        return torch.cat([part[:, :size] for part, size in zip(parts, self.sizes, strict=True)], -1)


def shard_of(process_group: Any, terms: Sequence[Term]) -> tuple[VocabularyShard, list[Term]]:
    """This rank's shard, and the terms with local tensors: DTensors become their parts.

    Args:
        process_group: as ``cross_entropy`` takes it; None where DTensors tell.
        terms: logits (..., V of this rank), weights (V of this rank, D) and biases, or DTensors of all ids;
            hidden states and sparse values are the same on all ranks, their ids count from 0 to V.

    Raises:
        TypeError, ValueError: a DTensor is placed in another way, or sizes disagree.
    """
    groups: list[Any] = []
    local = [_local_term(i, term, groups) for i, term in enumerate(terms)]
    if isinstance(process_group, VocabularyShard):
        groups.append(process_group.group)
    elif process_group is not None:
        groups.append(process_group_of(process_group))
    if any(group != groups[0] for group in groups[1:]):
        raise ValueError(
            "terms are cut over different process groups; cut all of them over the one that is process_group"
        )
    sizes = {term.vocabulary for term in local if not isinstance(term, Sparse)}
    if len(sizes) != 1:
        raise ValueError(f"this rank's terms have {sorted(sizes)} ids; cut all of them alike")
    (size,) = sizes
    if not isinstance(process_group, VocabularyShard):
        return VocabularyShard.of(groups[0], size), local
    if process_group.size != size:
        raise ValueError(
            f"process_group is a VocabularyShard of {process_group.size} ids, but this rank's terms have "
            f"{size}; make one with VocabularyShard.of(group, {size})"
        )
    return process_group, local


def is_cut(terms: Sequence[Term]) -> bool:
    """Whether a tensor of the terms is a DTensor."""
    return any(_is_dtensor(tensor) for term in terms for tensor in term.tensors.values())


def _is_dtensor(tensor: Tensor) -> bool:
    # Without torch.distributed's tensors there are none; importing them takes a second.
    return type(tensor).__name__ == "DTensor"


def _local_term(index: int, term: Term, groups: list[Any]) -> Term:
    cut = {"values": -1} if isinstance(term, Logits) else {"weight": 0, "bias": 0}
    found = {}
    for name, tensor in term.tensors.items():
        if _is_dtensor(tensor):
            dimension = cut.get(name) if not isinstance(term, Sparse) else None
            found[name] = _local(f"terms[{index}].{name}", tensor, dimension, groups)
    if not found:
        return term
    if isinstance(term, Head):
        # Checked together: a part of a weight fits a part of its bias only.
        return Head(
            found.get("hidden", term.hidden),
            found.get("weight", term.weight),
            found.get("bias", term.bias),
            term.scale,
            term.softcap,
        )
    if isinstance(term, Sparse):
        return Sparse(found.get("ids", term.ids), found.get("values", term.values))
    return Logits(found["values"], term.scale, term.softcap)


def _local(name: str, tensor: Any, dimension: int | None, groups: list[Any]) -> Tensor:
    """The local part of a DTensor, cut along ``dimension`` and nowhere else; whole on all ranks for None."""
    wanted = None if dimension is None else dimension % tensor.dim()
    cuts = [i for i, p in enumerate(tensor.placements) if p.is_shard() and p.dim == wanted]
    others = [p for i, p in enumerate(tensor.placements) if i not in cuts and not p.is_replicate()]
    if others or len(cuts) != (wanted is not None):
        what = "Replicate()" if wanted is None else f"Shard({wanted}) in one dimension of the mesh"
        raise ValueError(
            f"{name} is a DTensor placed as {tuple(tensor.placements)}; redistribute it to {what}, and "
            "Replicate() in the others"
        )
    if cuts:
        groups.append(tensor.device_mesh.get_group(cuts[0]))
    return tensor.to_local()


def with_local_ids(terms: Sequence[Term], shard: VocabularyShard) -> list[Term]:
    """Sparse terms with this rank's ids, counted from its first one; entries of other ranks add 0 to id 0."""
    found: list[Term] = []
    for term in terms:
        if isinstance(term, Sparse):
            here, ids = local_ids(term.ids, shard)
            term = Sparse(ids, torch.where(here, term.values, 0.0))
        found.append(term)
    return found


def local_ids(ids: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Which of the ids are this rank's, bool; and they, counted from its first, 0 for the others; int64."""
    moved = ids.long() - shard.first_id
    here = (moved >= 0) & (moved < shard.size)
    return here, torch.where(here, moved, 0)


class _Replicated(torch.autograd.Function):
    """What is the same on all ranks; each of them has a part of its gradient, and backward adds them up."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        g = g.contiguous().clone()
        dist.all_reduce(g, group=ctx.group)
        return g, None


def with_summed_gradients(terms: Sequence[Term], shard: VocabularyShard) -> list[Term]:
    """The terms, with gradients of hidden states and sparse values that are complete on every rank."""
    found: list[Term] = []
    for term in terms:
        if isinstance(term, Head) and term.hidden.requires_grad:
            term = replace(term, hidden=_Replicated.apply(term.hidden, shard.group))
        elif isinstance(term, Sparse) and term.values.requires_grad:
            term = replace(term, values=_Replicated.apply(term.values, shard.group))
        found.append(term)
    return found
