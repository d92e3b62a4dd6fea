"""What norms and activations compute, told by trying them: they have many classes and few formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from auxkern.core.decoder import Norm
from auxkern.model.native.structures import UnknownLayerError

# Both sides round a few operations of float32; another formula is off by far more.
_TOLERANCE = 1e-5
# Rows of usual size, and so small that eps counts.
_SIZES = (1.0, 1e-3)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
}


def recognised_activation(module: nn.Module) -> str:
    """The name of what an activation computes, as ``DecoderParts`` has it.

    Raises:
        UnknownLayerError: none that the kernels know.
    """
    x = torch.linspace(-9, 9, 401, dtype=torch.float32, device="cpu")
    y = module(x)
    for name, formula in ACTIVATIONS.items():
        if torch.allclose(y, formula(x), rtol=_TOLERANCE, atol=_TOLERANCE):
            return name
    raise UnknownLayerError(f"its activation {type(module).__name__} has no native kernel")


def recognised_norm(module: nn.Module, width: int) -> Norm:
    """What a norm of rows of a width computes.

    Raises:
        UnknownLayerError: neither a root-mean-square norm nor a layer norm.
    """
    weight, bias = (_numbers(getattr(module, name, None)) for name in ("weight", "bias"))
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-5))
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    rows = torch.cat([x * size for size in _SIZES])
    y = module(rows)
    # Gemma's weight is what is added to 1.
    raised = [] if weight is None else [1 + weight]
    for kind in ("rms", "layer"):
        for factors in (weight, *raised):
            norm = Norm(kind, factors, bias, float(eps))
            if torch.allclose(y, normed(norm, rows), rtol=_TOLERANCE, atol=_TOLERANCE):
                return norm
    raise UnknownLayerError(
        f"its norm {type(module).__name__} is neither of root mean squares nor a layer norm"
    )


def _numbers(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().float().contiguous()


def normed(norm: Norm, x: Tensor) -> Tensor:
    """The formula of a norm, of rows (..., width)."""
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    y = y if norm.weight is None else y * norm.weight
    return y if norm.bias is None else y + norm.bias
