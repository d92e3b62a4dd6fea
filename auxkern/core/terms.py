"""The vocabulary of the package: what a row of logits is a sum of.

    z[n, v] = sum over the terms of
                  scale * softcap(values[n, v])                              Logits
                  scale * softcap(hidden[n, :] . weight[v, :] + bias[v])     Head
                  sum_k values[n, k] [ids[n, k] = v]                         Sparse

Shapes: N rows (leading dimensions flattened), V vocabulary, D hidden width, K entries, T positions,
B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, TypeVar

import torch
from torch import Tensor

from auxkern.core.packed import PackedWeight

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

MAX_TERMS = 8
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (int, float, bool)
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits that already exist: the term ``scale * softcap(values)``.

    ``softcap(x) = softcap * tanh(x / softcap)``, and the identity when ``softcap`` is None.

    Args:
        values: (..., V) float16, bfloat16, float32 or float64 logits, any strides; they are
            read where they lie, never copied.
        scale: finite float that multiplies the (soft-capped) logits; a constant, no gradient. In
            ``auxkern.sample`` also a floating-point tensor (...), one for each row. 0 times an infinite
            logit is NaN, as in torch: leave a term out instead, or cap it.
        softcap: positive finite float or None (Gemma 2 Team 2024, arXiv 2408.00118, section 2).

    Raises:
        TypeError: ``values`` is not a strided floating-point tensor, or ``scale`` or ``softcap`` is
            not a number.
        ValueError: ``values`` has no vocabulary dimension, or ``scale`` or ``softcap`` is
            out of range.
    """

    values: Tensor
    scale: float | Tensor = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        _float_tensor("Logits.values", self.values, "(..., V)", 1)
        _set_scaling(self)

    @property
    def leading(self) -> torch.Size:
        """(...): the rows' dimensions."""
        return self.values.shape[:-1]

    @property
    def vocabulary(self) -> int:
        """Ids per row."""
        return self.values.shape[-1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name and tensor of every input."""
        return {"values": self.values}

    def as_rows(self, index: int = 0) -> Logits:
        """The same logits as (outer, inner, V) without a copy: row n is [n // inner, n % inner].

        Args:
            index: of the term in its sum, for the message.

        Raises:
            ValueError: no strides of three dimensions describe them.
        """
        if self.values.dim() == 2:
            return unchecked(Logits, values=self.values[None], scale=self.scale, softcap=self.softcap)
        return like(self, values=_strided_rows(f"terms[{index}].values", self.values))

    def rows(self, rows: slice | Tensor) -> Logits:
        """Some rows of ``as_rows()``: a view for a range where there is one outer index."""
        values = self.values
        if values.shape[0] == 1:
            return like(self, values=values[:, rows], scale=_of_rows(self.scale, rows))
        n = torch.arange(values.shape[0] * values.shape[1], device=values.device)[rows]
        chosen = values[n // values.shape[1], n % values.shape[1]][None]
        return like(self, values=chosen, scale=_of_rows(self.scale, rows))


@dataclass(frozen=True, eq=False)
class Head:
    """An output embedding on hidden states: the term ``scale * softcap(hidden @ weight.T + bias)``.

    Its logits are made chunk by chunk and never held as a whole.

    Args:
        hidden: (..., D) hidden states; flattened to (N, D), a copy only if no view can do it.
        weight: (V, D) output embedding, of any width D of its own; dtypes may differ.
        bias: (V,) or None.
        scale, softcap: as in ``Logits``.
        packed: the weight once more, as ``auxkern.ops.packed.pack`` makes it, for products on a CPU in its
            arithmetic; read where no gradient is wanted and no graph is traced, else the weight is.

    Raises:
        TypeError: a tensor is missing or not floating-point.
        ValueError: widths or sizes disagree.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float | Tensor = 1.0
    softcap: float | None = None
    packed: PackedWeight | None = None

    def __post_init__(self) -> None:
        _float_tensor("Head.hidden", self.hidden, "(..., D)", 1)
        _float_tensor("Head.weight", self.weight, "(V, D)", 2)
        if self.weight.dim() != 2:
            raise ValueError(f"Head.weight has shape {tuple(self.weight.shape)}; it must be (V, D)")
        if self.hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"Head.hidden is {self.hidden.shape[-1]} wide but Head.weight is {self.weight.shape[1]}; "
                "project one of them"
            )
        if self.bias is not None:
            _float_tensor("Head.bias", self.bias, "(V,)", 1)
            if self.bias.shape != self.weight.shape[:1]:
                raise ValueError(
                    f"Head.bias has shape {tuple(self.bias.shape)} but Head.weight has "
                    f"{self.weight.shape[0]} rows; give each id one bias"
                )
        if self.packed is not None and (self.packed.width, self.packed.K) != self.weight.shape:
            raise ValueError(
                f"Head.packed is ({self.packed.width}, {self.packed.K}) but Head.weight has shape "
                f"{tuple(self.weight.shape)}; pack that weight"
            )
        _set_scaling(self)

    @property
    def leading(self) -> torch.Size:
        """(...): the rows' dimensions."""
        return self.hidden.shape[:-1]

    @property
    def vocabulary(self) -> int:
        """Ids per row."""
        return self.weight.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name and tensor of every input."""
        inputs = {"hidden": self.hidden, "weight": self.weight}
        return inputs if self.bias is None else {**inputs, "bias": self.bias}

    def as_rows(self, index: int = 0) -> Head:
        """The same head of (N, D) hidden states."""
        return self if self.hidden.dim() == 2 else like(self, hidden=_flat(self.hidden))

    def rows(self, rows: slice | Tensor) -> Head:
        """Some rows of ``as_rows()``."""
        return like(self, hidden=self.hidden[rows], scale=_of_rows(self.scale, rows))


@dataclass(frozen=True, eq=False)
class Sparse:
    """Values added to a few logits of each row: a pointer over a condition's tokens, a logit bias.

    Args:
        ids: (..., K) integer ids in [0, V); the values of equal ids add up.
        values: (..., K) floating-point values.

    Raises:
        TypeError: ids are not integers, or values not floating-point.
        ValueError: shapes disagree.
    """

    ids: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        _float_tensor("Sparse.values", self.values, "(..., K)", 1)
        if not isinstance(self.ids, Tensor) or self.ids.dtype not in INTEGER_DTYPES:
            kind = self.ids.dtype if isinstance(self.ids, Tensor) else type(self.ids).__name__
            raise TypeError(f"Sparse.ids must be an integer tensor, got {kind}")
        if self.ids.shape != self.values.shape:
            raise ValueError(
                f"Sparse.ids has shape {tuple(self.ids.shape)} but Sparse.values has "
                f"{tuple(self.values.shape)}; give each id one value"
            )

    @property
    def leading(self) -> torch.Size:
        """(...): the rows' dimensions."""
        return self.ids.shape[:-1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name and tensor of every input."""
        return {"ids": self.ids, "values": self.values}

    def as_rows(self, index: int = 0) -> Sparse:
        """The same entries as (N, K)."""
        if self.ids.dim() == 2:
            return self
        return like(self, ids=_flat(self.ids), values=_flat(self.values))

    def rows(self, rows: slice | Tensor) -> Sparse:
        """Some rows of ``as_rows()``."""
        return like(self, ids=self.ids[rows], values=self.values[rows])


Term: TypeAlias = Logits | Head | Sparse
Terms: TypeAlias = Sequence[Term | Tensor] | Term | Tensor  # as operators take a sum
_Kind = TypeVar("_Kind", bound=Term)
_Value = TypeVar("_Value")


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a ``DTensor``; without importing those, which takes a second."""
    return type(tensor).__name__ == "DTensor"


def has_dtensors(terms: Terms) -> bool:
    """Whether a tensor of these terms, which are not checked yet, is a ``DTensor``."""
    for term in terms if isinstance(terms, (list, tuple)) else [terms]:
        for tensor in [term] if isinstance(term, Tensor) else getattr(term, "tensors", {}).values():
            if is_dtensor(tensor):
                return True
    return False


def softcapped(z: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(z / softcap), or z where there is no soft cap (Gemma 2); shaped like z."""
    return softcap * torch.tanh(z / softcap) if softcap else z


def as_number(value: _Value) -> _Value:
    """A Python number in place of NumPy's, of a 0-d array, and of a 0-d tensor on the CPU; else ``value``."""
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value  # a look at it would stop the device
    array: Any = value
    return array.item() if getattr(array, "shape", None) == () else value


def rows_of(term: Term, rows: slice | Tensor) -> Term:
    """The same term for some rows, of one leading dimension.

    Args:
        term: of rows (...).
        rows: (R,) int64 indices into the rows, flattened; or a range of them, for a view.
    """
    if isinstance(term, Logits):
        return like(term, values=term.values.flatten(0, -2)[rows], scale=_of_rows(term.scale, rows))
    return term.as_rows().rows(rows)


def unchecked(kind: type[_Kind], **fields: object) -> _Kind:
    """A term of fields that fit each other, which are not looked at again."""
    term = object.__new__(kind)
    for name, value in fields.items():
        # torch.compile of PyTorch 2.11 knows no __dict__ of such a class.
        object.__setattr__(term, name, value)
    return term


def like(term: _Kind, **fields: object) -> _Kind:
    """The same term but for these fields, which fit the others."""
    return unchecked(type(term), **{**term.__dict__, **fields})


def _of_rows(scale: float | Tensor, rows: slice | Tensor) -> float | Tensor:
    return scale.flatten()[rows] if isinstance(scale, Tensor) else scale


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _strided_rows(name: str, values: Tensor) -> Tensor:
    """(..., V) as (outer, inner, V) without a copy."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(values.shape[:-1], values.stride()[:-1], strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    if len(groups) > 2:
        raise ValueError(
            f"{name} of shape {tuple(values.shape)} and strides {tuple(values.stride())} "
            "cannot be read as rows without a copy; pass values.contiguous()"
        )
    while len(groups) < 2:
        groups.insert(0, (1, 0))
    (outer, outer_stride), (inner, inner_stride) = groups
    return values.as_strided(
        (outer, inner, values.shape[-1]), (outer_stride, inner_stride, values.stride(-1))
    )


def _float_tensor(name: str, tensor: object, shape: str, dimensions: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; use float16, bfloat16, float32 or float64")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name} has layout {tensor.layout}; pass a strided tensor, such as "
            f"{name.split('.')[1]}.to_dense()"
        )
    if tensor.dim() < dimensions:
        missing = "no dimensions" if tensor.dim() == 0 else f"{tensor.dim()} dimension(s)"
        raise ValueError(f"{name} has {missing}; its shape must be {shape}")


def _set_scaling(term: Logits | Head) -> None:
    name = type(term).__name__
    if isinstance(term.scale, Tensor):
        _check_row_scale(f"{name}.scale", term.scale, term.leading)
    else:
        object.__setattr__(term, "scale", _number(f"{name}.scale", term.scale))
    if term.softcap is not None:
        softcap = _number(f"{name}.softcap", term.softcap)
        if softcap <= 0:
            raise ValueError(f"{name}.softcap is {softcap}; it must be positive, or None for no cap")
        if softcap < torch.finfo(torch.float32).tiny:
            raise ValueError(f"{name}.softcap is {softcap}, which float32 arithmetic takes for no cap")
        object.__setattr__(term, "softcap", softcap)


def _check_row_scale(name: str, scale: Tensor, leading: torch.Size) -> None:
    if scale.requires_grad:
        raise TypeError(
            f"{name} is a tensor that requires grad; pass a Python float. To learn a scale, multiply the "
            "values by it before they become a term"
        )
    if not scale.is_floating_point():
        raise TypeError(f"{name} has dtype {scale.dtype}; it must be a float or a floating-point tensor")
    if scale.shape != leading:
        raise ValueError(
            f"{name} is a tensor of shape {tuple(scale.shape)}, but the rows have {tuple(leading)}; pass a "
            "Python float, or one scale for each row"
        )


def _number(name: str, value: object) -> float:
    if type(value) is float and -_LARGEST <= value <= _LARGEST:
        return value
    if isinstance(value, Tensor):
        gradient = " that requires grad" if value.requires_grad else ""
        raise TypeError(
            f"{name} is a tensor{gradient}; pass a Python float. To learn a scale, multiply the "
            "values by it before they become a term"
        )
    value = as_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name} is {value}; it must be finite in float32, at most {_LARGEST:.2e}")
    return float(value)


def as_terms(terms: Terms) -> list[Term]:
    """The terms of a sum as a list; bare tensors become ``Logits``.

    Args:
        terms: a sequence of 1 to 8 ``Logits``, ``Head``, ``Sparse`` or (..., V) tensors, or one of
            these alone.

    Raises:
        TypeError: an entry is neither a term nor a tensor.
        ValueError: there are no terms, more than 8, or only sparse ones.
    """
    if isinstance(terms, (Tensor, Logits, Head, Sparse)):
        terms = [terms]
    if not isinstance(terms, Sequence) or isinstance(terms, (str, bytes)):
        raise TypeError(
            f"terms must be a sequence of auxkern.Logits, Head, Sparse or tensors, got {type(terms).__name__}"
        )
    if not 1 <= len(terms) <= MAX_TERMS:
        raise ValueError(f"terms has {len(terms)} entries; a sum has 1 to {MAX_TERMS} terms")
    listed: list[Term] = []
    for index, term in enumerate(terms):
        if isinstance(term, Tensor):
            _float_tensor("Logits.values", term, "(..., V)", 1)
            term = unchecked(Logits, values=term, scale=1.0, softcap=None)
        elif not isinstance(term, (Logits, Head, Sparse)):
            raise TypeError(
                f"terms[{index}] is a {type(term).__name__}; use auxkern.Logits, Head, Sparse or a "
                "(..., V) tensor"
            )
        listed.append(term)
    if all([isinstance(term, Sparse) for term in listed]):
        raise ValueError("terms are all Sparse; a sum needs a Logits or a Head to give every id a logit")
    return listed
