"""Products with weights that are packed once, for models that are not trained, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from auxkern.backends.choice import choose, refusal
from auxkern.core.packed import (
    ACTIVATIONS,
    BLOCK,
    BLOCK_BYTES,
    GROUP,
    STORED_COMPUTES,
    PackedWeight,
    StoredRows,
    check_compute,
)
from auxkern.ops.torch_ops import is_differentiated, operator

_BACKEND = "cpu"
_MAX_GROUP = 65_536  # of k whose integer sum stays in 32 bits
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pack_refusal() -> str | None:
    """Why no weight can be packed on this machine; None if ``pack`` works."""
    return refusal(_BACKEND, torch.device("cpu"), _DTYPES)


def pack(
    weight: Tensor | Sequence[Tensor],
    compute: str = "float32",
    *,
    group: int | None = None,
    row_group: int | None = None,
    gated: bool = False,
) -> PackedWeight:
    """Packs the weight of a linear layer for ``packed_linear``.

    With "float32" values keep their dtype and are multiplied exactly. With "bfloat16" both operands are
    rounded to it, and sums are float32. With "int8" both are rounded to 127 steps either side of 0, each
    run of K by its own scale; a NaN or an infinity in a row of x makes its results NaN.

    Args:
        weight: (N, K) float32, float16 or bfloat16, or several whose rows follow each other.
        compute: "float32", "bfloat16" or "int8".
        group: of int8, how many k share a scale of the weight, a multiple of 4; 0: all; None: 64.
        row_group: likewise of a row of x, a multiple or a divisor of ``group``; None: as ``group``.
        gated: the first N / 2 rows are a gate: the product is activation(gate) * the others.

    Returns:
        The packed weight, a copy.

    Raises:
        TypeError: a weight is not a CPU tensor of these dtypes.
        ValueError: shapes or groups do not fit, or a weight has values that int8 cannot keep.
        RuntimeError: there are no kernels on this machine.
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    _check_weights(weights, gated)
    check_compute(compute)
    N, K = sum(w.shape[0] for w in weights), weights[0].shape[1]
    kind, groups = _kind(weights, compute), (0, 0)
    if compute == "int8":
        groups = _groups(K, group, row_group)
    elif (group, row_group) != (None, None):
        raise ValueError(f"group and row_group go with compute='int8', not {compute!r}; leave them out")
    nothing = torch.empty(0, device="cpu")
    like = PackedWeight(kind, N, K, *groups, gated, nothing, nothing)
    dtypes = tuple(w.dtype for w in weights)
    return choose(_BACKEND, torch.device("cpu"), dtypes).pack([w.detach() for w in weights], like)


def pack_stored(
    stored: StoredRows | Sequence[StoredRows],
    compute: str = "float32",
    *,
    row_group: int | None = None,
    gated: bool = False,
) -> PackedWeight:
    """Packs a weight for ``packed_linear`` in the blocks that a GGUF file has it in.

    Integers, scales and minima stay what they are. With "float32" a product widens them, as readers of such
    files do, and multiplies in float32. With "int8" it multiplies the integers with rows of x that are
    rounded to 127 steps either side of 0; a NaN or an infinity in a row of x makes its results NaN.

    Args:
        stored: N rows of K values, or several of one kind whose rows follow each other.
        compute: "float32" or "int8".
        row_group: of int8, how many k of a row of x share a scale, a multiple of 32; 0: all; None: 32.
        gated: as in ``pack``.

    Returns:
        The packed weight, a copy.

    Raises:
        TypeError: blocks are not bytes on the CPU.
        ValueError: kinds, shapes or groups do not fit, or a scale or minimum is NaN or infinite.
        RuntimeError: there are no kernels on this machine.
    """
    parts = [stored] if isinstance(stored, StoredRows) else list(stored)
    _check_stored(parts, gated)
    kind, N, K = parts[0].kind, sum(part.N for part in parts), parts[0].K
    if compute not in STORED_COMPUTES:
        raise ValueError(
            f"compute is {compute!r}; stored blocks are multiplied in {' or '.join(STORED_COMPUTES)}: "
            "widen them and use pack"
        )
    if compute == "float32":
        if row_group is not None:
            raise ValueError("row_group goes with compute='int8', not 'float32'; leave it out")
        kind, row_group = f"{kind} widened", 0
    row_group = BLOCK if row_group is None else row_group
    if row_group < 0 or row_group % BLOCK:
        raise ValueError(f"row_group is {row_group}; it must be a multiple of {BLOCK}, or 0 for all")
    nothing = torch.empty(0, device="cpu")
    like = PackedWeight(kind, N, K, BLOCK, 0 if row_group >= K else row_group, gated, nothing, nothing)
    return choose(_BACKEND, torch.device("cpu"), (torch.float32,)).pack_stored(parts, like)


def _check_stored(parts: Sequence[StoredRows], gated: bool) -> None:
    if not parts:
        raise ValueError("stored is an empty list; give at least one weight")
    kinds = {part.kind for part in parts}
    if len(kinds) > 1 or not kinds <= BLOCK_BYTES.keys():
        raise ValueError(f"stored has kinds {sorted(kinds)}; it must be one of {', '.join(BLOCK_BYTES)}")
    for part in parts:
        blocks = part.blocks
        if blocks.dtype != torch.uint8 or blocks.device.type != "cpu" or blocks.layout != torch.strided:
            raise TypeError(f"blocks are {blocks.dtype} on {blocks.device}; give bytes on the CPU")
    shapes, size = [tuple(part.blocks.shape) for part in parts], BLOCK_BYTES[parts[0].kind]
    if any(len(s) != 2 or 0 in s or s[1] % size or s[1] != shapes[0][1] for s in shapes):
        raise ValueError(f"blocks have shapes {shapes}; they must be (N, blocks * {size}), and not empty")
    if gated and sum(shape[0] for shape in shapes) % 2:
        raise ValueError(f"a gated weight has as many rows of gate as of the rest; shapes are {shapes}")


def _check_weights(weights: Sequence[Tensor], gated: bool) -> None:
    if not weights:
        raise ValueError("weight is an empty list; give at least one (N, K)")
    for w in weights:
        if w.dtype not in _DTYPES or w.device.type != "cpu" or w.layout != torch.strided:
            raise TypeError(
                f"a weight is {w.dtype} on {w.device}; "
                "packed are those of float32, float16 or bfloat16 on the CPU"
            )
    shapes = [tuple(w.shape) for w in weights]
    if any(len(shape) != 2 or 0 in shape or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"weight has shapes {shapes}; they must be (N, K) with one K, and not empty")
    if gated and sum(shape[0] for shape in shapes) % 2:
        raise ValueError(f"a gated weight has as many rows of gate as of the rest; shapes are {shapes}")


def _kind(weights: Sequence[Tensor], compute: str) -> str:
    if compute != "float32":
        return "int8" if compute == "int8" else "bfloat16 pairs"
    dtypes = {w.dtype for w in weights}
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32"


def _groups(K: int, group: int | None, row_group: int | None) -> tuple[int, int]:
    """Of the weight and of the rows; the first at most K, the second 0 where it would be more."""
    group = GROUP if group is None else group or K
    group = min(group, K)
    row_group = group if row_group is None else row_group
    row_group = 0 if row_group >= K else row_group
    if group < 1 or row_group < 0 or (group % 4 and group != K) or row_group % 4:
        raise ValueError(
            f"group is {group} and row_group {row_group}; they must be multiples of 4, or 0 for all"
        )
    if group > _MAX_GROUP:
        raise ValueError(
            f"group is {group}, more than {_MAX_GROUP}, whose integer sum might overflow; pass 64"
        )
    if row_group and group != K and row_group % group and group % row_group:
        raise ValueError(f"row_group is {row_group} but group {group}; one must be a multiple of the other")
    return group, row_group


def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, activation: str = "identity"
) -> Tensor:
    """activation(x @ weight.T + bias) with a packed weight; activation(gate) * up with a gated one.

    A row of the result is the same to the last bit in whatever batch, on however many threads.

    Args:
        x: (..., K) float32 on the CPU.
        packed: the weight (N, K).
        bias: (N,) or None.
        activation: "identity", "silu", "gelu_tanh", "gelu" or "relu".

    Returns:
        (..., N) float32; (..., N / 2) with a gated weight. It has no gradient.

    Raises:
        TypeError: x is not float32 on the CPU.
        ValueError: shapes disagree, or the activation is unknown.
        RuntimeError: a gradient is wanted, or there are no kernels on this machine.
    """
    if is_differentiated((x, bias)):
        raise RuntimeError(
            "a packed weight makes no gradients; use auxkern.ops.linear.linear, or torch.no_grad()"
        )
    sizes = [packed.N, packed.K, packed.group, packed.row_group, int(packed.gated)]
    return _packed_linear(x, packed.values, packed.scales, bias, packed.kind, sizes, activation)


def _check(x: Tensor, packed: PackedWeight, bias: Tensor | None, activation: str) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"x has dtype {x.dtype}; products with packed weights take float32")
    if x.dim() < 1 or x.shape[-1] != packed.K:
        raise ValueError(
            f"x has shape {tuple(x.shape)} but the packed weight ({packed.N}, {packed.K}); give (..., K)"
        )
    if bias is not None and (bias.shape != (packed.N,) or bias.device != x.device):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; give ({packed.N},), where x is")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(map(repr, ACTIVATIONS))}")


def _packed(kind: str, sizes: Sequence[int], values: Tensor, scales: Tensor) -> PackedWeight:
    N, K, group, row_group, gated = sizes
    return PackedWeight(kind, N, K, group, row_group, bool(gated), values, scales)


def _fake(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    kind: str,
    sizes: Sequence[int],
    activation: str,
) -> Tensor:
    packed = _packed(kind, sizes, values, scales)
    _check(x, packed, bias, activation)
    return x.new_empty((*x.shape[:-1], packed.width))


@operator(
    "packed_linear(Tensor x, Tensor values, Tensor scales, Tensor? bias, str kind, int[] sizes, "
    "str activation) -> Tensor",
    _fake,
)
def _packed_linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    kind: str,
    sizes: Sequence[int],
    activation: str,
) -> Tensor:
    packed = _packed(kind, sizes, values, scales)
    _check(x, packed, bias, activation)
    kernel = choose(_BACKEND, x.device, (x.dtype,))
    rows = x.reshape(-1, packed.K)
    y = x.new_empty((rows.shape[0], packed.width))
    kernel.packed_linear(rows, packed, bias, y, False, activation)
    return y.view(*x.shape[:-1], packed.width)
