"""A transformers decoder layer as ``DecoderParts``, packed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from auxkern.core.decoder import DecoderParts, Heads, Norm, Projection
from auxkern.core.packed import StoredRows
from auxkern.model.native.recognised import recognised_activation, recognised_norm
from auxkern.model.native.structures import Structure, UnknownLayerError, structure_of
from auxkern.nn import FrozenLinear
from auxkern.ops.packed import pack, pack_stored

_GRANULE = 16  # what a head's width is a multiple of
_SOFT_CAPS = ("attn_logit_softcapping", "softcap")


class _Linear(NamedTuple):
    """A linear layer: (N, K) weight, the same as its file has it or None, and (N,) bias or None."""

    weight: Tensor
    stored: StoredRows | None
    bias: Tensor | None


def described(layer: nn.Module, compute: str) -> DecoderParts:
    """What a layer is made of.

    Args:
        layer: of a transformers model, in float32 but for the weights of its products.
        compute: as in ``use_native_kernels``.

    Raises:
        UnknownLayerError: it is of no structure that is known, or of one with a part that is not.
    """
    structure = structure_of(layer)
    attention, mlp = getattr(layer, structure.attention), getattr(layer, structure.mlp)
    _check_own(layer, attention, mlp)
    projections = [_linear(attention, name, compute) for name in structure.projections]
    heads = _heads(attention, [one.weight.shape[0] for one in projections])
    D = projections[0].weight.shape[1]
    norms = {
        name: recognised_norm(getattr(layer, child), D)
        for name in ("attention_norm", "attention_after", "mlp_norm", "mlp_after")
        if (child := getattr(structure, name)) is not None
    }
    heads = _add_head_norms(norms, attention, structure, heads)
    up = [_linear(mlp, name, compute) for name in structure.up]
    fused = structure.gated and len(up) == 1
    if fused:
        up = [half for one in up for half in _halves(one)]
    return DecoderParts(
        heads=heads,
        norms=norms,
        qkv=_packed(projections, compute),
        output=_packed([_linear(attention, structure.output, compute)], compute),
        up=_packed(up, compute, gated=structure.gated),
        down=_packed([_linear(mlp, structure.down, compute)], compute),
        activation=recognised_activation(getattr(mlp, structure.activation)),
        gated=structure.gated,
        parallel=structure.parallel,
        # As narrow as the products: it is read from memory at every step.
        cache_dtype=torch.float32 if compute == "float32" else torch.bfloat16,
    )


def turns_heads(layer: nn.Module, structure: Structure) -> bool:
    """Whether positions turn the layer's queries and keys."""
    return structure.rotary and bool(getattr(getattr(layer, structure.attention), "use_rope", True))


def _check_own(*modules: nn.Module) -> None:
    """Parameters that stand beside the children, such as attention sinks, have no place in a description."""
    for module in modules:
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if names:
            raise UnknownLayerError(f"{type(module).__name__} has {', '.join(names)} of its own")
        for parameter in module.parameters():
            if parameter.is_inference():
                raise UnknownLayerError("its parameters are inference tensors, whose changes cannot be seen")


def _linear(owner: nn.Module, name: str, compute: str) -> _Linear:
    """What a child holds."""
    child = getattr(owner, name)
    forward = type(child).forward
    if isinstance(child, nn.Linear) and forward in (nn.Linear.forward, FrozenLinear.forward):
        stored = child.stored_rows(compute) if isinstance(child, FrozenLinear) else None
        return _Linear(child.weight.detach(), stored, None if child.bias is None else child.bias.detach())
    if isinstance(child, Conv1D) and forward is Conv1D.forward:
        return _Linear(child.weight.detach().T, None, child.bias.detach())
    raise UnknownLayerError(f"its {name} is a {type(child).__name__}, which is no linear layer")


def _halves(one: _Linear) -> list[_Linear]:
    middle = one.weight.shape[0] // 2
    return [
        _Linear(
            one.weight[half],
            None if one.stored is None else one.stored.of(half),
            None if one.bias is None else one.bias[half],
        )
        for half in (slice(middle), slice(middle, None))
    ]


def _packed(linears: list[_Linear], compute: str, *, gated: bool = False) -> Projection:
    weights = [one.weight for one in linears]
    biases = [one.bias for one in linears]
    bias = None
    if any(one is not None for one in biases):
        filled = [
            torch.zeros(weight.shape[0], dtype=torch.float32) if one is None else one.float()
            for weight, one in zip(weights, biases, strict=True)
        ]
        bias = torch.cat(filled)
    stored = [one.stored for one in linears if one.stored is not None]
    # Blocks of several kinds make no panel.
    if len(stored) == len(linears) and len({rows.kind for rows in stored}) == 1:
        return Projection(pack_stored(stored, compute, gated=gated), bias)
    return Projection(pack(weights, compute, gated=gated), bias)


def _heads(attention: Any, outputs: list[int]) -> Heads:
    width = int(attention.head_dim)
    if width % _GRANULE:
        raise UnknownLayerError(f"its heads have a width of {width}, which is no multiple of {_GRANULE}")
    if len(outputs) == 3:
        queries, keys = outputs[0] // width, outputs[1] // width
    else:
        queries = int(getattr(attention, "num_heads", attention.config.num_attention_heads))
        keys = (outputs[0] // width - queries) // 2
    if sum(outputs) != (queries + 2 * keys) * width or min(queries, keys) < 1 or queries % keys:
        raise UnknownLayerError(f"its projections have {outputs} outputs, which are not heads of {width}")
    for name in _SOFT_CAPS:
        if getattr(attention, name, None) is not None:
            raise UnknownLayerError("attention has a soft cap, which the native one lacks")
    if not getattr(attention, "is_causal", True):
        raise UnknownLayerError("attention is not causal")
    scale = float(getattr(attention, "scaling", width**-0.5))
    clip = getattr(getattr(attention, "config", None), "clip_qkv", None)
    return Heads(queries, keys, width, scale, float(clip or 0.0))


def _add_head_norms(norms: dict[str, Norm], attention: Any, structure: Structure, heads: Heads) -> Heads:
    """Adds norms of queries and keys; returns the heads as these take them."""
    whole = []
    for name, number in (("query_norm", heads.queries), ("key_norm", heads.keys)):
        child = getattr(structure, name)
        if child is None:
            continue
        module = getattr(attention, child)
        width = module.weight.shape[-1]
        if module.weight.shape != (width,) or width not in (heads.width, number * heads.width):
            raise UnknownLayerError(
                f"its {child} is over {tuple(module.weight.shape)}, neither a head nor all"
            )
        norms[name] = recognised_norm(module, width)
        whole.append((width == number * heads.width and number > 1, number))
    if not any(is_whole for is_whole, _ in whole):
        return heads
    # One head is all heads.
    if not all(is_whole or number == 1 for is_whole, number in whole):
        raise UnknownLayerError("norms of queries and keys are not over the same")
    return Heads(heads.queries, heads.keys, heads.width, heads.scale, heads.clip, whole_norms=True)
