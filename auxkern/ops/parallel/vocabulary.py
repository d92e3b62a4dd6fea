"""A vocabulary that is cut over the ranks of a process group: who has which ids, and what they exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from auxkern.core.terms import Head, Logits, Sparse, Term, Terms, as_terms, is_dtensor, like
from auxkern.ops.parallel.agreement import Facts, agreed
from auxkern.ops.parallel.groups import process_group_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_Call = TypeVar("_Call")
_Checked = TypeVar("_Checked")

# The name of a mesh dimension over which layers, and so vocabularies, are cut.
_TENSOR_PARALLEL = "tp"


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

    group: ProcessGroup
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
    def of(cls, group: ProcessGroup | DeviceMesh, size: int) -> VocabularyShard:
        """The shard of this rank, which has ``size`` ids; every rank of the group must call it.

        Args:
            group: a ``ProcessGroup``, or a ``DeviceMesh`` of one dimension.
            size: rows of this rank's output embedding, or columns of its logits.

        Raises:
            TypeError: group is something else.
            ValueError: a rank has no ids.
        """
        process_group = process_group_of(group)
        _, sizes = agreed(process_group, lambda: (None, {}, size))
        return cls.from_sizes(process_group, sizes)

    @classmethod
    def from_sizes(cls, process_group: ProcessGroup, sizes: Sequence[int]) -> VocabularyShard:
        """The shard of this rank, from the ids that each rank has; they are not asked.

        Raises:
            ValueError: a rank has no ids.
        """
        if min(sizes) < 1:
            raise ValueError(
                f"the ranks have {list(sizes)} ids of the vocabulary; each needs one at least, so use fewer "
                "ranks"
            )
        return cls(process_group, dist.get_rank(process_group), tuple(sizes))

    def used_ids(self, vocab_size: int | None) -> int:
        """V that is used over all ranks.

        Raises:
            TypeError: vocab_size is no int.
            ValueError: there are fewer ids, or a rank would have none.
        """
        if vocab_size is None:
            return self.vocab_size
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
            raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
        if vocab_size > self.vocab_size or min(self.used_sizes(vocab_size)) < 1:
            raise ValueError(
                f"vocab_size is {vocab_size}, but the ranks have {self.vocab_size} ids, the last of them "
                f"from {self.vocab_size - self.sizes[-1]} on; each rank needs one that is used"
            )
        return vocab_size

    def used_sizes(self, vocab_size: int) -> list[int]:
        """How many ids of each rank are below ``vocab_size``."""
        firsts = [sum(self.sizes[:rank]) for rank in range(len(self.sizes))]
        return [max(0, min(size, vocab_size - first)) for size, first in zip(self.sizes, firsts, strict=True)]

    def owner_of(self, ids: Tensor) -> Tensor:
        """(N,) int64 rank that has each id of 0 to V; -1 for others."""
        ends = torch.tensor(self.sizes, device=ids.device).cumsum(0)
        owner = torch.bucketize(ids, ends, right=True)
        return torch.where((ids >= 0) & (owner < len(self.sizes)), owner, -1)

    def gathered(self, values: Tensor) -> Tensor:
        """(R, ...) what each of the R ranks has, in their order: the same bits on all of them."""
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in self.sizes]
        if values.numel():
            dist.all_gather(parts, values, group=self.group)
        return torch.stack(parts)

    def whole(self, logits: Tensor) -> Tensor:
        """(N, V) logits of all ids, from each rank's (N, size); the last rank may leave out its last ids."""
        padded = torch.nn.functional.pad(logits, (0, max(self.sizes) - logits.shape[1]))
        parts = self.gathered(padded).unbind(0)
        return torch.cat([part[:, :size] for part, size in zip(parts, self.sizes, strict=True)], -1)


def group_of(process_group: object, terms: Terms) -> ProcessGroup | None:
    """The process group that the vocabulary is cut over; None where it is whole.

    Args:
        process_group: as ``cross_entropy`` takes it; None where DTensors tell.
        terms: as ``cross_entropy`` takes them; their DTensors tell only if the mesh says what it is for, by
            the name "tp": the parameters that FSDP2 shards over a data-parallel mesh look the same.

    Raises:
        TypeError: process_group is something else, or DTensors stand beside whole weights.
        ValueError: a DTensor is cut over the vocabulary, and its mesh does not say that it is for that.
    """
    if isinstance(process_group, VocabularyShard):
        return process_group.group
    if process_group is not None:
        return process_group_of(process_group)
    whole = None
    for index, term in enumerate(as_terms(terms)):
        for key, tensor in term.tensors.items():
            if is_dtensor(tensor):
                name = f"terms[{index}].{key}"
                _, groups = _local(name, tensor, _cut_dimension(term, key))
                if groups:
                    _check_mesh(name, tensor)
                    return groups[0]
                whole = name
    if whole is not None:
        raise TypeError(f"{whole} is a DTensor, but no logits or weight are; pass its to_local()")
    return None


@dataclass(frozen=True)
class CutVocabulary:
    """How a call says that its vocabulary is cut.

    Attributes:
        group: the process group, from ``group_of``.
        process_group, vocab_size: as the call has them.
    """

    group: ProcessGroup
    process_group: object
    vocab_size: int | None

    def agreed(
        self,
        terms: Terms,
        check: Callable[[list[Term]], tuple[_Call, dict[str, object]]],
        check_ids: Callable[[_Call, int], _Checked],
    ) -> tuple[_Checked, VocabularyShard, int]:
        """A checked call, this rank's shard, and V over all ranks; every rank calls it.

        Args:
            terms: as the call has them.
            check: of the terms with this rank's tensors; returns the call, and what all ranks must have
                alike.
            check_ids: of what must fit V, which the ranks have together.

        Raises:
            TypeError, ValueError, RuntimeError: something is refused, here or on another rank.
        """
        given = self.process_group if isinstance(self.process_group, VocabularyShard) else None

        def fitting(shard: VocabularyShard, call: _Call) -> tuple[_Checked, int]:
            V = shard.used_ids(self.vocab_size)
            return check_ids(call, V), V

        def first() -> tuple[tuple[_Call, tuple[_Checked, int] | None], Facts, int]:
            local, size = local_terms(self.group, as_terms(terms))
            if given is not None and given.size != size:
                raise ValueError(
                    f"process_group is a VocabularyShard of {given.size} ids, but this rank's terms have "
                    f"{size}; make one with VocabularyShard.of(group, {size})"
                )
            call, facts = check(local)
            facts["terms"] = [_description(term) for term in local]
            facts["vocab_size"] = self.vocab_size
            facts["process_group"] = "a group" if given is None else given.sizes
            return (call, None if given is None else fitting(given, call)), facts, size

        (call, fitted), sizes = agreed(self.group, first)
        if given is not None and fitted is not None:
            return fitted[0], given, fitted[1]
        shard = VocabularyShard.from_sizes(self.group, sizes)
        (checked, V), _ = agreed(self.group, lambda: (fitting(shard, call), {}, 0))
        return checked, shard, V


def _description(term: Term) -> tuple[object, ...]:
    """What ranks must have alike of a term, but for its values."""
    tensors = {
        name: (str(t.dtype), tuple(term.leading), t.requires_grad and torch.is_grad_enabled())
        for name, t in term.tensors.items()
    }
    scaling = (
        () if isinstance(term, Sparse) else (str(getattr(term.scale, "shape", term.scale)), term.softcap)
    )
    return type(term).__name__, tensors, scaling


def _check_mesh(name: str, tensor: DTensor) -> None:
    mesh = tensor.device_mesh
    (dimension,) = (i for i, placement in enumerate(tensor.placements) if placement.is_shard())
    names = mesh.mesh_dim_names
    if names is None or names[dimension] != _TENSOR_PARALLEL:
        called = "has no name" if names is None else f"is called {names[dimension]!r}"
        raise ValueError(
            f"{name} is a DTensor that is cut over a mesh whose dimension {called}. If its parts are those "
            "of a vocabulary, for one batch that all ranks have, pass process_group=mesh, or call the "
            f"dimension {_TENSOR_PARALLEL!r}. If they are FSDP2's, for batches of each rank's own, use the "
            "whole parameter: inside the forward of its FSDP2 module, after module.unshard(), or "
            "tensor.full_tensor()"
        )


def local_terms(group: ProcessGroup, terms: Sequence[Term]) -> tuple[list[Term], int]:
    """The terms with local tensors, DTensors being their parts, and how many ids this rank has.

    Args:
        group: that the vocabulary is cut over.
        terms: logits (..., V of this rank), weights (V of this rank, D) and biases, or DTensors of all ids;
            hidden states and sparse values are the same on all ranks, their ids count from 0 to V.

    Raises:
        ValueError: a DTensor is placed in another way, or sizes disagree.
    """
    groups = [group]
    local = [_local_term(i, term, groups) for i, term in enumerate(terms)]
    if any(other != group for other in groups):
        raise ValueError(
            "terms are cut over different process groups; cut all of them over the one that is process_group"
        )
    sizes = {term.vocabulary for term in local if not isinstance(term, Sparse)}
    if len(sizes) != 1:
        raise ValueError(f"this rank's terms have {sorted(sizes)} ids; cut all of them alike")
    return local, sizes.pop()


def _cut_dimension(term: Term, name: str) -> int | None:
    """The dimension of a term's tensor that counts ids; None if none does."""
    if isinstance(term, Logits):
        return -1
    return 0 if isinstance(term, Head) and name in ("weight", "bias") else None


def _local_term(index: int, term: Term, groups: list[ProcessGroup]) -> Term:
    local = {}
    for name, tensor in term.tensors.items():
        if is_dtensor(tensor):
            local[name], its = _local(f"terms[{index}].{name}", tensor, _cut_dimension(term, name))
            groups += its
    # Replaced together: a part of a weight fits a part of its bias only.
    return replace(term, **local) if local else term  # type: ignore[arg-type]


def _local(name: str, tensor: DTensor, dimension: int | None) -> tuple[Tensor, list[ProcessGroup]]:
    """The local part of a DTensor, cut along ``dimension`` and nowhere else, and the groups it is cut over.

    Where ``dimension`` is None it is whole on all ranks.
    """
    wanted = None if dimension is None else dimension % tensor.dim()
    cuts = [i for i, p in enumerate(tensor.placements) if wanted is not None and p.is_shard(wanted)]
    others = [p for i, p in enumerate(tensor.placements) if i not in cuts and not p.is_replicate()]
    if others or len(cuts) != (wanted is not None):
        what = "Replicate()" if wanted is None else f"Shard({wanted}) in one dimension of the mesh"
        raise ValueError(
            f"{name} is a DTensor placed as {tuple(tensor.placements)}; redistribute it to {what}, and "
            "Replicate() in the others"
        )
    return tensor.to_local(), [tensor.device_mesh.get_group(i) for i in cuts]


def with_own_entries(terms: Sequence[Term], shard: VocabularyShard) -> list[Term]:
    """The terms, ids of sparse ones counted from this rank's first; entries of other ranks add 0 to that."""
    result: list[Term] = []
    for term in terms:
        if isinstance(term, Sparse):
            here, ids = local_ids(term.ids, shard)
            term = like(term, ids=ids, values=torch.where(here, term.values, 0.0))
        result.append(term)
    return result


def local_ids(ids: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Which of the ids are this rank's, bool; and they, counted from its first, 0 for the others; int64."""
    moved = ids.long() - shard.first_id
    here = (moved >= 0) & (moved < shard.size)
    return here, torch.where(here, moved, 0)
