"""Attention over a cache, of positions that are not trained."""

from __future__ import annotations

import torch
from torch import Tensor

from auxkern.backends.choice import choose
from auxkern.ops.torch_ops import is_differentiated, operator


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """out[b, t, h] = sum over p of softmax over p of (scale * query[b, h, t] . key[b, g, p]) value[b, g, p].

    H query heads share the keys of G heads: g = h // (H // G). Positions see the columns p that the mask
    says. On a CPU with AVX2 a native kernel reads only those, and a row is the same to the last bit
    whatever padding or other rows stand beside it. Elsewhere it is
    ``torch.nn.functional.scaled_dot_product_attention``. It makes no gradients.

    Args:
        query: (B, H, T, D) of the last T positions.
        key, value: (B, G, P, D); G divides H.
        mask: (B or 1, 1, T or 1, P or 1) bool; None: each position sees those up to its own.
        scale: mostly D ** -0.5.
        backend: name of a backend, or None to choose.

    Returns:
        (B, T, H, D). A row that sees no column is 0 from the native kernel.

    Raises:
        ValueError: shapes or devices disagree.
        RuntimeError: the backend asked for cannot run, or a derivative is asked for.
    """
    _check(query, key, value, mask)
    if is_differentiated((query, key, value)):
        raise RuntimeError(
            "attention makes no derivatives, but one of query, key and value asks for them; call it "
            "under torch.no_grad(), or torch.nn.functional.scaled_dot_product_attention instead"
        )
    return _attention(query, key, value, mask, scale, backend or "")


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    shapes = f"query has shape {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
    agree = query.dim() == key.dim() == 4 and key.shape == value.shape
    if not agree or (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise ValueError(f"{shapes}; they must be (B, H, T, D) and (B, G, P, D)")
    (B, H, T, _), (_, G, P, _) = query.shape, key.shape
    if G == 0 or H % G:
        raise ValueError(f"{shapes}; G must divide H, but these are {G} and {H}")
    for name, tensor in (("key", key), ("value", value), ("mask", mask)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} but query on {query.device}; move it there")
    if mask is None:
        if P < T:
            raise ValueError(
                f"{shapes}; without a mask the last of P = {P} columns are the T = {T} positions'"
            )
    elif mask.dim() != 4 or any(a not in (1, b) for a, b in zip(mask.shape, (B, H, T, P), strict=True)):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; it must be (B or 1, 1, T or 1, P or 1), with B = {B}, "
            f"T = {T} and P = {P}"
        )


def attention_refusal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """Why ``attention`` would leave these to torch; None if a native kernel takes them."""
    return choose(None, query.device, (query.dtype, key.dtype)).attention_refusal(query, key, value, mask)


def _fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, backend: str
) -> Tensor:
    B, H, T, D = query.shape
    return query.new_empty((B, T, H, D))


@operator(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, str backend) -> Tensor",
    _fake,
)
def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, backend: str
) -> Tensor:
    kernel = choose(backend or None, query.device, (query.dtype, key.dtype))
    reason = kernel.attention_refusal(query, key, value, mask)
    if reason is None:
        out = _fake(query, key, value, mask, scale, backend)
        kernel.attention(query, key, value, mask, scale, out)
        return out
    if backend not in ("", "reference"):
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}. Pass backend=None")
    if mask is None:
        T, P = query.shape[2], key.shape[2]
        mask = torch.ones(T, P, dtype=torch.bool, device=query.device).tril(P - T)
    z = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return z.transpose(1, 2).contiguous()
