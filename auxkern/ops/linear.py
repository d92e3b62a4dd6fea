"""Linear layers that are not trained, with weights narrower than what goes through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from auxkern.backends.choice import choose
from auxkern.ops.torch_ops import apart_from_autocast, is_differentiated, operator

HALF_DTYPES = (torch.float16, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y[m, n] = sum over k of x[m, k] * weight[n, k], plus bias[n]; computed in x's dtype.

    On a CPU with AVX2 a native kernel reads the weight as it stands, half precision too, and a row of
    y is the same to the last bit in whatever batch. Elsewhere, and where a gradient is wanted, it is
    ``torch.nn.functional.linear`` on the weight in x's dtype.

    Args:
        x: (..., K).
        weight: (N, K) of x's dtype, float16 or bfloat16.
        bias: (N,) or None.
        backend: name of a backend, or None to choose.

    Returns:
        (..., N) of x's dtype; differentiable.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the backend asked for cannot run.
    """
    if is_differentiated((x, weight, bias)):
        if backend not in (None, "reference"):
            raise RuntimeError(f"backend={backend!r} makes no gradients of a linear layer; pass backend=None")
        _check(x, weight, bias)
        return _plain(x, weight, bias)
    return _linear(x, weight, bias, backend or "")


def linear_refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why ``linear`` would leave these to torch; None if a kernel takes them."""
    return choose(None, x.device, (x.dtype, weight.dtype)).linear_refusal(x, weight)


class _Product(torch.autograd.Function):
    """x (..., K) @ weight (N, K).T + bias (N,), in one dtype.

    ``torch.nn.functional.linear``, but that its derivatives, of any order and mode, are made apart from
    the autocast of whoever asks for them, as the product itself is.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _apart(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        d_x, d_weight, d_bias = ctx.needs_input_grad
        return (
            product(g, weight.T) if d_x else None,
            product(rows.T, x.reshape(-1, x.shape[-1]).T) if d_weight else None,
            rows.sum(0) if d_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        parts = [] if d_bias is None else [d_bias.expand(*x.shape[:-1], -1)]
        if d_x is not None:
            parts.append(product(d_x, weight))
        if d_weight is not None:
            parts.append(product(x, d_weight))
        return sum(parts[1:], parts[0])


_apart = apart_from_autocast(torch.nn.functional.linear)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ weight (N, K).T + bias (N,), all of one dtype; differentiable, apart from autocast."""
    differentiable: Callable[..., Tensor] = _Product.apply
    return differentiable(x, weight, bias)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} but weight {tuple(weight.shape)}; they must be (..., K) and (N, K)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} but weight has {weight.shape[0]} rows; give (N,)"
        )
    if weight.dtype != x.dtype and weight.dtype not in HALF_DTYPES:
        raise ValueError(
            f"weight has dtype {weight.dtype} but x {x.dtype}; give x's dtype, float16 or bfloat16"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x on {x.device}; move it there")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@operator("linear(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor", _fake)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    _check(x, weight, bias)
    kernel = choose(backend or None, x.device, (x.dtype, weight.dtype))
    reason = kernel.linear_refusal(x, weight)
    if reason is not None:
        if backend not in ("", "reference"):
            raise RuntimeError(f"backend={backend!r} cannot run: {reason}. Pass backend=None")
        return _plain(x, weight, bias)
    N, K = weight.shape
    rows = x.reshape(-1, K)
    y = x.new_empty((rows.shape[0], N))
    kernel.linear(rows, weight, bias, y, False)
    return y.view(*x.shape[:-1], N)
