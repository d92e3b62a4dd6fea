"""A transformers model on a CPU in auxkern's kernels: through its own extension points, no forward copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from auxkern.core.packed import check_compute
from auxkern.model.native.exchange import exchange_layers
from auxkern.model.native.masks import step_mask
from auxkern.model.native.packed_layers import ATTENTION
from auxkern.model.stored import StoredWeights
from auxkern.nn import FrozenEmbedding, FrozenLinear
from auxkern.ops.attention import attention, attention_refusal
from auxkern.ops.linear import linear_refusal

_UNKNOWN = ("position_bias", "cache", "softcap")  # what the kernel would have to know of


def native_refusal() -> str | None:
    """Why a model runs on this machine's CPU as it is; None if ``use_native_kernels`` makes it faster."""
    x = torch.empty(1, 1, dtype=torch.float32, device="cpu")
    return None if linear_refusal(x, x) is None else "there are no native kernels for AVX2 or AVX-512 here"


def use_native_kernels(
    module: nn.Module, compute: str = "float32", *, stored: StoredWeights | None = None
) -> nn.Module:
    """Puts auxkern's kernels in a model that runs on a CPU and is not trained.

    Linear layers and embeddings keep their weights' dtype, float16 or another; everything else, and all
    that is computed, is in float32. Parameters, their names and ``state_dict`` stay what they are. Of
    transformers models "sdpa" attention becomes "auxkern", and decoder layers of a structure that is known
    run as one native step each, if they agree with the original on random input; ``explain`` says which
    do. A row then does not depend, to the last bit, on the rows or the padding beside it. Where gradients
    are wanted, or on a GPU, torch's own functions are called.

    A native step, and a linear layer outside of them, reads a packed copy of its weights, so these take
    memory twice: as many bytes again in float32, half of float32's in bfloat16, a bit more than a quarter
    in int8. Weights that change are packed again when they are next used.

    Args:
        module: such as a base or an auxiliary; changed in place.
        compute: the arithmetic of products: "float32"; "bfloat16", whose products are of bfloat16
            and summed in float32; or "int8", whose products are of bytes with a scale for each 64.
        stored: the file that the model was loaded from: weights that it has are packed as they stand there,
            and widened in float32's products, or multiplied in int8 with rows that have a scale for each 32.

    Returns:
        The same module.

    Raises:
        ValueError: there is no such arithmetic.
        RuntimeError: there are no kernels for this machine.
    """
    check_compute(compute)
    reason = native_refusal()
    if reason is not None:
        raise RuntimeError(f"native kernels cannot run: {reason}; leave the model as it is")
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            # Subclasses that compute otherwise stay.
            if isinstance(child, nn.Linear) and type(child).forward is nn.Linear.forward:
                setattr(parent, name, frozen := FrozenLinear.of(child))
                frozen.stored = None if stored is None else stored.rows_of
            elif isinstance(child, nn.Embedding) and type(child).forward is nn.Embedding.forward:
                setattr(parent, name, FrozenEmbedding.of(child))
    for layer in module.modules():
        for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            narrow = isinstance(layer, (FrozenLinear, FrozenEmbedding)) and name == "weight"
            if tensor.is_floating_point() and not narrow:
                tensor.data = tensor.data.float()
    for model in module.modules():
        if isinstance(model, PreTrainedModel) and model.config._attn_implementation == "sdpa":
            AttentionInterface.register(ATTENTION, _attention_function)
            AttentionMaskInterface.register(ATTENTION, step_mask)
            model.set_attn_implementation(ATTENTION)
    # Layers are compared as they are: what is packed beside them is so afterwards.
    exchange_layers(module, compute)
    for layer in module.modules():
        if isinstance(layer, FrozenLinear):
            layer.compute = compute
    return module


def compute_of(module: nn.Module) -> str | None:
    """The arithmetic that ``use_native_kernels`` gave a model; None if it has not been called."""
    layers = (layer for layer in module.modules() if isinstance(layer, FrozenLinear))
    return next((layer.compute for layer in layers), None)


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: (B, H, T, D) and (B, G, P, D) to (B, T, H, D)."""
    T, P, D = query.shape[2], key.shape[2], query.shape[3]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    taken = (
        not wants_gradient
        and dropout == 0.0
        and all(options.get(name) is None for name in _UNKNOWN)
        and (attention_mask is not None or T == 1 or (causal and T == P))
        and attention_refusal(query, key, value, attention_mask) is None
    )
    if taken:
        scale = D**-0.5 if scaling is None else scaling
        return attention(query, key, value, attention_mask, scale=scale), None
    options |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
