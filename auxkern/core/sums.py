"""A sum of terms: N rows of logits over V ids, as one value."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from auxkern.core.memory import GradientMemory
from auxkern.core.terms import Head, Logits, Sparse, Term, as_number, like, unchecked

# For each term, by the name of its tensor, the memory that the gradient of this tensor is written to.
Wanted: TypeAlias = Sequence[Mapping[str, Tensor]]

Rows: TypeAlias = slice | Tensor  # some rows: a range, or (C,) indices

_LARGE = 1 << 20  # bytes; less memory is at hand already, without a system call
# How the tensors of each kind of term stand in a flat list.
_LOGITS, _HEAD, _HEAD_WITH_BIAS, _SPARSE = range(4)
_NAMES = (("values",), ("hidden", "weight"), ("hidden", "weight", "bias"), ("ids", "values"))


def row_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any input is, float32 otherwise: the dtype that logits, rows and sums have."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


@dataclass(frozen=True, eq=False)
class Sum:
    """N rows of logits, z[n, v] = the sum of the terms, over the first V ids.

    Attributes:
        terms: as rows: ``Logits`` (outer, inner, >= V), row n at [n // inner, n % inner]; ``Head`` (N, D)
            and (>= V, D); ``Sparse`` (N, K). A scale is a float or (N,).
        V: ids.
        chunk_rows: rows whose logits exist at a time, where they have to be made; None for a backend's
            choice.
    """

    terms: tuple[Term, ...]
    V: int
    chunk_rows: int | None = None

    @classmethod
    def of(cls, terms: Sequence[Term], V: int, chunk_rows: int | None = None) -> Sum:
        """The sum of terms with equal leading dimensions, flattened to rows; scales of rows in its dtype.

        Raises:
            ValueError: logits cannot be read as rows without a copy.
        """
        rows: list[Term] = []
        for index, term in enumerate(terms):
            row = term.as_rows(index)
            # The memory of a lazy negation holds what is to be negated.
            for tensor in row.tensors.values():
                if tensor.is_neg():
                    row = like(row, **{name: its.resolve_neg() for name, its in row.tensors.items()})
                    break
            if not isinstance(row, Sparse) and isinstance(row.scale, Tensor):
                row = like(row, scale=flat_rows(row.scale.resolve_neg(), row_dtype(tensors_of(terms))))
            rows.append(row)
        return cls(tuple(rows), V, chunk_rows)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Every tensor of every term but for scales, in order."""
        return tensors_of(self.terms)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of logits, rows and sums."""
        return row_dtype(self.tensors)

    @property
    def device(self) -> torch.device:
        """Of every tensor."""
        return self.tensors[0].device

    @property
    def N(self) -> int:
        """Rows."""
        return self.terms[0].leading.numel()

    @property
    def is_logits(self) -> bool:
        """Whether every term's logits exist already."""
        return all([isinstance(term, Logits) for term in self.terms])

    @property
    def logits(self) -> list[Logits]:
        """The terms whose logits exist."""
        return [term for term in self.terms if isinstance(term, Logits)]

    @property
    def heads(self) -> list[Head]:
        """The terms that are output embeddings."""
        return [term for term in self.terms if isinstance(term, Head)]

    @property
    def sparse(self) -> list[Sparse]:
        """The terms of a few ids."""
        return [term for term in self.terms if isinstance(term, Sparse)]

    @property
    def facts(self) -> Hashable:
        """All but the tensors; which of them there are is told."""
        terms = []
        for term in self.terms:
            factors: tuple[object, ...] = ()
            if not isinstance(term, Sparse):
                factors = (None if isinstance(term.scale, Tensor) else term.scale, term.softcap)
            terms.append((*term.tensors, *factors))
        return self.V, self.chunk_rows, tuple(terms)

    @property
    def every_tensor(self) -> list[Tensor]:
        """``tensors``, and scales of rows."""
        scales = [term.scale for term in self.terms if not isinstance(term, Sparse)]
        return [*self.tensors, *[scale for scale in scales if isinstance(scale, Tensor)]]

    def rows(self, rows: Rows) -> Sum:
        """Some rows, by a range or by (C,) indices."""
        return replace(self, terms=tuple([term.rows(rows) for term in self.terms]))

    def alone(self) -> Iterator[Sum]:
        """Each term as a sum of its own, in float64 if the whole sum is."""
        for term in self.terms:
            tensors = term.tensors
            if self.dtype == torch.float64:
                tensors = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
            yield replace(self, terms=(like(term, **tensors),))

    def places(self) -> Iterator[tuple[int, str]]:
        """(term, name) of each of ``tensors``."""
        for index, term in enumerate(self.terms):
            for name in term.tensors:
                yield index, name

    def entries(self) -> tuple[Tensor, Tensor]:
        """(N, K) int64 ids and values of all sparse terms together; ids outside [0, V) count for nothing."""
        sparse = self.sparse
        if not sparse:
            none = torch.empty((self.N, 0), dtype=self.dtype, device=self.device)
            return none.long(), none
        return (
            torch.cat([term.ids.long() for term in sparse], 1),
            torch.cat([term.values.to(self.dtype) for term in sparse], 1),
        )


class Layout(NamedTuple):
    """The terms of a sum but for their tensors: plain values, which torch's operators take.

    Attributes:
        kinds: of each term.
        scales: floats.
        softcaps: 0 for none.
    """

    kinds: tuple[int, ...]
    scales: tuple[float, ...]
    softcaps: tuple[float, ...]

    @staticmethod
    def vocabulary(tensors: Sequence[Tensor], kinds: Sequence[int]) -> int:
        """Ids of the first term that has a logit for every id, from flat tensors and the terms' kinds.

        Raises:
            ValueError: there is none.
        """
        first = 0
        for kind in kinds:
            if kind == _LOGITS:
                return tensors[first].shape[-1]
            if kind != _SPARSE:
                return tensors[first + 1].shape[0]
            first += len(_NAMES[kind])
        raise ValueError("terms are all Sparse")

    def sum(self, tensors: Sequence[Tensor], V: int, chunk_rows: int | None = None) -> Sum:
        """The sum that has these tensors, in the order of ``Sum.tensors``."""
        terms: list[Term] = []
        first = 0
        for kind, scale, softcap in zip(*self, strict=True):
            cap = softcap or None
            if kind == _LOGITS:
                terms.append(unchecked(Logits, values=tensors[first], scale=scale, softcap=cap))
                first += 1
                continue
            names = _NAMES[kind]
            own = dict(zip(names, tensors[first : first + len(names)], strict=True))
            first += len(names)
            if kind == _SPARSE:
                terms.append(unchecked(Sparse, **own))
            else:
                terms.append(unchecked(Head, **{"bias": None, **own}, scale=scale, softcap=cap))
        return Sum.of(terms, V, chunk_rows)


def layout_of(terms: Sequence[Term]) -> Layout:
    """The layout of terms whose scales are numbers."""
    kinds, scales, softcaps = [], [], []
    for term in terms:
        if isinstance(term, Sparse):
            kinds.append(_SPARSE)
            scales.append(1.0)
            softcaps.append(0.0)
            continue
        if isinstance(term, Logits):
            kinds.append(_LOGITS)
        else:
            kinds.append(_HEAD if term.bias is None else _HEAD_WITH_BIAS)
        scales.append(float(term.scale))
        softcaps.append(term.softcap or 0.0)
    return Layout(tuple(kinds), tuple(scales), tuple(softcaps))


def flat_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) contiguous, of (...) in this dtype; x itself if that is what it is, since each look costs time."""
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.dim() == 1 and x.is_contiguous() else x.reshape(-1).contiguous()


def tensors_of(terms: Sequence[Term]) -> list[Tensor]:
    """Every tensor of every term, but for scales."""
    tensors: list[Tensor] = []
    for term in terms:
        if isinstance(term, Logits):
            tensors.append(term.values)
        else:
            tensors += term.tensors.values()
    return tensors


def first_name(terms: Sequence[Term]) -> str:
    """Of the first tensor, for messages."""
    return f"terms[0].{next(iter(terms[0].tensors))}"


def one_device(terms: Sequence[Term]) -> torch.device:
    """The device that all tensors are on.

    Raises:
        ValueError: they are on several.
    """
    tensors = tensors_of(terms)
    device = tensors[0].device
    for place, tensor in enumerate(tensors):
        if tensor.device != device:
            names = [f"terms[{i}].{name}" for i, term in enumerate(terms) for name in term.tensors]
            raise ValueError(
                f"{names[place]} is on {tensor.device} but {names[0]} is on {device}; move them to one device"
            )
    return device


def check_rows(terms: Sequence[Term]) -> torch.Size:
    """(...): the rows of all terms.

    Raises:
        ValueError: they differ.
    """
    leading = terms[0].leading
    for index, term in enumerate(terms):
        if term.leading != leading:
            raise ValueError(
                f"terms[{index}] has rows {tuple(term.leading)} but terms[0] has {tuple(leading)}; "
                "give all terms the same rows"
            )
    return leading


def vocabulary_of(terms: Sequence[Term], vocab_size: int | None) -> int:
    """V: as ``checked_vocabulary`` gives it, or of the first term that has a logit for every id."""
    if vocab_size:
        return vocab_size
    for term in terms:
        if not isinstance(term, Sparse):
            return term.vocabulary
    raise ValueError("terms are all Sparse")


def check_sparse_ids(name: str, ids: Tensor, V: int) -> None:
    """Raises ValueError if one of the ids lies outside [0, V); looks at them, which stops a GPU."""
    if ids.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= V:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} holds {wrong}, outside [0, {V}); give padding id 0 and value 0")


def check_sparse_terms(terms: Sequence[Term], V: int) -> None:
    """``check_sparse_ids`` of every sparse term."""
    for index, term in enumerate(terms):
        if isinstance(term, Sparse):
            check_sparse_ids(f"terms[{index}].ids", term.ids, V)


def check_target_range(target: Tensor, V: int, ignore_index: int) -> None:
    """Raises ValueError if an id of (N,) lies outside [0, V) and is not ``ignore_index``."""
    if target.numel():
        low, high = torch.aminmax(target)
        if int(low) >= 0 and int(high) < V:
            return
    wrong = (target != ignore_index) & ((target < 0) | (target >= V))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"target[{row}] (flattened) is {int(target[row])}, outside [0, {V}); "
            f"use ignore_index={ignore_index} for rows that do not count"
        )


def look_at_ids(sum: Sum, target: Tensor, ignore_index: int) -> None:
    """Both checks, of targets (N,) and of sparse terms, where looking at ids stops no device."""
    if target.device.type == "cpu":
        check_target_range(target, sum.V, ignore_index)
        check_sparse_terms(sum.terms, sum.V)


def checked_vocabulary(terms: Sequence[Term], vocab_size: int | None) -> int | None:
    """``vocab_size`` as given, once it fits every term.

    Raises:
        TypeError: it is no int.
        ValueError: it is larger than a term's vocabulary, or None where these differ.
    """
    sizes = [(index, term.vocabulary) for index, term in enumerate(terms) if not isinstance(term, Sparse)]
    first, V = sizes[0]
    vocab_size = as_number(vocab_size)
    if vocab_size is None:
        for index, size in sizes:
            if size != V:
                raise ValueError(
                    f"{_of_ids(terms, index)} has {size} ids but {_of_ids(terms, first)} has {V}; pass "
                    f"vocab_size={min([size for _, size in sizes])} to use the shared ids only"
                )
    elif isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt)):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    else:
        V = vocab_size
    if V < 1:
        raise ValueError(f"the vocabulary has {V} ids; there must be at least 1")
    for index, size in sizes:
        if size < V:
            raise ValueError(
                f"vocab_size is {V} but {_of_ids(terms, index)} has {size} ids; pass "
                f"vocab_size={min([size for _, size in sizes])} or less"
            )
    return vocab_size


def _of_ids(terms: Sequence[Term], index: int) -> str:
    """The tensor that has an entry for each id, by name."""
    return f"terms[{index}].{'weight' if isinstance(terms[index], Head) else 'values'}"


def chunks_of_rows(counts: Tensor, C: int) -> list[Rows]:
    """The rows of each chunk of C: slices, or indices where rows that do not count are left out.

    Finding these would stop a GPU, so there they pass through, with zero gradients.

    Args:
        counts: (N,) bool.
    """
    N = counts.shape[0]
    if counts.device.type == "cpu":
        counted = counts.nonzero()[:, 0]
        if counted.shape[0] < N:
            return list(counted.split(C)) if counted.numel() else []
    return [slice(n, min(n + C, N)) for n in range(0, N, C)]


def clear(wanted: Wanted, first_id: int = 0) -> None:
    """0 in memory for gradients; in that of weights and biases from ``first_id`` on."""
    for gradients in wanted:
        for name, gradient in gradients.items():
            (gradient[first_id:] if name in ("weight", "bias") else gradient).zero_()


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one call, in large pages on a CPU where there is much of it."""
    if device.type == "cpu" and shape.numel() * dtype.itemsize >= _LARGE:
        return GradientMemory().empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)
