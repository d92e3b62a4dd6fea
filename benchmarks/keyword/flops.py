"""Training FLOPs, counted from the sizes of the products.

A product of (N, K) and (K, M) takes 2NKM. Counted are linear layers and output heads, for real tokens
only; left out are attention's products of queries and keys (below 1% at these lengths), embeddings, norms
and the optimizer. A backward pass through a layer takes as much as its forward pass for the gradient of
its input, and as much again for that of its weight where it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.keyword.models import FineTunedLM
from benchmarks.keyword.presets import SCRATCH, Method


@dataclass(frozen=True)
class TokenCost:
    """FLOPs of training, for each token of a kind.

    Attributes:
        read: for a token that the trained model reads: of the condition, of the text, or the start.
        lm: for a token that the frozen LM reads: the text's and the start.
        label: for a token to be learnt: output heads, forward and backward.
    """

    read: int
    lm: int
    label: int

    def of(self, read: int, lm: int, labels: int) -> int:
        """For so many tokens."""
        return self.read * read + self.lm * lm + self.label * labels


def token_cost(model: Any, method: Method) -> TokenCost:
    """What training a model costs per token.

    Args:
        model: a pair or a ``FineTunedLM``.
        method: which it is.
    """
    if isinstance(model, FineTunedLM):
        return _fine_tuned(model)
    config = model.config
    V, D = config.vocab_size, model.auxiliary.hidden_size
    body = 6 * _linear(model.auxiliary)
    if method.kind == SCRATCH:
        return TokenCost(body, 0, 6 * V * D)
    D_lm = config.lm_hidden_size
    lm_body = 2 * _linear(model.lm.base_model)
    if config.head == "shared":
        # One product of the summed hidden states forward, its gradient backward, and the projection.
        return TokenCost(body, lm_body, 4 * V * D_lm + 6 * D * D_lm)
    return TokenCost(body, lm_body, 2 * V * D_lm + 6 * V * D)


def _fine_tuned(model: FineTunedLM) -> TokenCost:
    lm = model.causal_lm
    head = lm.get_output_embeddings().weight.numel()
    if not model.rank:
        return TokenCost(6 * _linear(lm.base_model), 0, 6 * head)
    adapters = sum(p.numel() for p in lm.base_model.parameters() if p.requires_grad)
    frozen = _linear(lm.base_model) - adapters
    return TokenCost(4 * frozen + 6 * adapters, 0, 4 * head)


def _linear(module: nn.Module) -> int:
    """Weights of all linear layers, LoRA's among them."""
    # A native layer is no nn.Linear, and a matrix like one.
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in module.parameters() if p.dim() == 2 and id(p) not in embeddings)
