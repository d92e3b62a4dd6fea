"""Which derivatives are asked of an operator, and the refusal of those it does not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(tensor: Tensor) -> bool:
    """Whether forward mode or a transform of ``torch.func`` (jvp, grad, vmap, ...) follows a tensor.

    ``requires_grad`` tells neither; a kernel that reads the memory would drop tangents without a word.
    """
    # torch.compile, which cannot trace the first question, resolves the transforms itself.
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


def is_differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a derivative of any order or mode may be asked with respect to one of these."""
    given = [t for t in tensors if t is not None]
    return (torch.is_grad_enabled() and any(t.requires_grad for t in given)) or any(
        map(is_transformed, given)
    )


def refuse_transforms(what: str) -> None:
    """Raises RuntimeError for what takes no transform.

    Args:
        what: the argument that is in the way.
    """
    raise RuntimeError(
        f"{what} takes no forward mode and no transforms of torch.func (jvp, jacfwd, grad, vmap, ...); "
        "leave it out, or use torch.nn.functional.cross_entropy on auxkern.ops.dense.dense_logits(terms)"
    )


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient made with ``create_graph=True``: differentiating it again is an error.

    torch's ``once_differentiable`` raises only if the incoming gradient requires one; otherwise a
    penalty on this gradient would take it for a constant and train on a wrong derivative.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(
            "auxkern.cross_entropy has no second derivatives; for a penalty on its gradient use "
            "torch.nn.functional.cross_entropy on auxkern.ops.dense.dense_logits(terms)"
        )


def refuse_second_derivatives(
    gradients: tuple[Tensor | None, ...], inputs: Iterable[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients as they are, but differentiating them again, under ``create_graph``, is an error.

    torch.compile refuses second derivatives itself, and traces a backward under enabled gradients.

    Args:
        inputs: all that the gradients depend on, the incoming gradient among them.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return tuple(None if d is None else _OnceDifferentiable.apply(d, *inputs) for d in gradients)
