"""Training FLOPs, counted from the sizes of the products.

A product of (N, K) and (K, M) takes 2NKM. Counted are linear layers and output heads, for real tokens
only; left out are attention's products of queries and keys (a few in a hundred behind a prompt), embeddings,
norms and the optimizer. A backward pass through a layer takes as much as its forward pass for the gradient of
its input, and as much again for that of its weight where it is trained: LoRA's frozen weights take 4 for each
of their numbers and token, weights that are trained 6. What is evaluated is not counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from auxkern.model.last_layers import LastLayers
from auxkern.model.text import IGNORED
from auxkern.training.examples import Items
from benchmarks.keyword.models import FineTunedLM


class TokenCost(NamedTuple):
    """FLOPs for each token of a kind.

    Attributes:
        read: for a token of the text, the start or the base prompt that the trained model reads.
        condition: for a token of the condition that it reads beside.
        label: for a token to be learnt: output heads, forward and backward.
        state: for a token that the frozen LM reads once, for its states; 0 where it is trained itself.
        shown: tokens that the trained model reads in each step before all texts.
    """

    read: int
    condition: int
    label: int
    state: int
    shown: int = 0


class RunCost(NamedTuple):
    """FLOPs of a run.

    Attributes:
        step: of an average step.
        states: of all its sentences' states and the prompt's, made once.
    """

    step: float
    states: int


def token_cost(model: Any) -> TokenCost:
    """What training a pair or a ``FineTunedLM`` costs per token."""
    if isinstance(model, FineTunedLM):
        lm = model.causal_lm
        weight = lm.get_output_embeddings().weight
        head = (6 if weight.requires_grad else 4) * weight.numel()
        return TokenCost(_training(lm.base_model), 0, head, 0, len(model.prefix))
    config = model.config
    V, D, D_lm = config.vocab_size, model.auxiliary.hidden_size, config.lm_hidden_size
    state = 2 * sum(_linear(model.lm.base_model))
    if isinstance(model.auxiliary, LastLayers):
        last = model.auxiliary
        named = _training(last.names, last.pointer.key) if last.pointer is not None else 0
        layers = _training(last, last.transformer) - named
        # The sum of both hidden states goes through the frozen head once.
        return TokenCost(layers, named, 4 * V * D_lm, state)
    body = _training(model.auxiliary)
    # One product of the summed hidden states forward, its gradient backward, and the projection.
    head = 4 * V * D_lm + 6 * D * D_lm if config.head == "shared" else 2 * V * D_lm + 6 * V * D
    return TokenCost(body, body, head, state)


def run_cost(cost: TokenCost, examples: Items, sentences: int, prefix: int) -> RunCost:
    """What a run on encoded examples costs.

    Args:
        cost: of its model.
        examples: all that it trains on.
        sentences: in a step.
        prefix: tokens that a frozen LM reads before all texts, once.
    """
    read, condition, labels = 0, 0, 0
    for i in range(len(examples)):
        example = examples[i]
        read += len(example["input_ids"]) - 1  # the end is not read
        condition += len(example["condition_ids"])
        labels += sum(label != IGNORED for label in example["labels"][1:])
    whole = cost.read * read + cost.condition * condition + cost.label * labels
    return RunCost(whole * sentences / len(examples) + cost.read * cost.shown, cost.state * (read + prefix))


def _training(*modules: nn.Module) -> int:
    """FLOPs of a forward and a backward pass of one token through their linear layers."""
    frozen, trained = _linear(*modules)
    return 4 * frozen + 6 * trained


def _linear(*modules: nn.Module) -> tuple[int, int]:
    """Numbers in the weights of all linear layers, LoRA's among them: frozen ones, and trained ones."""
    # A native layer is no nn.Linear, and a matrix like one.
    inside = [module for one in modules for module in one.modules()]
    embeddings = {id(module.weight) for module in inside if isinstance(module, nn.Embedding)}
    matrices = {id(p): p for one in modules for p in one.parameters() if p.dim() == 2}
    counts = [0, 0]
    for key, matrix in matrices.items():
        if key not in embeddings:
            counts[matrix.requires_grad] += matrix.numel()
    return counts[0], counts[1]
