"""How the frozen LM alone does on a batch, to hold the pair against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auxkern.model.base import lm_term, run_base
from auxkern.ops.cross_entropy import cross_entropy


@torch.no_grad()
def lm_alone_nll(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed nll that the base gives the labels of a training batch.

    Args:
        model: an ``AuxTunedForCausalLM``.
        batch: input_ids, attention_mask, labels (B, T), and lm_states (B, T, 1 + L, D) if they are
            cached; then the base does not run.

    Returns:
        0-d float32, in nats.
    """
    states = batch.get("lm_states")
    own_logits = model.config.lm_term == "logits"
    logits = None
    if states is None or own_logits:
        output = run_base(model.lm, batch["input_ids"], batch["attention_mask"], want_logits=own_logits)
        states, logits = output.states, output.logits
    term = lm_term(model.lm, states[:, :, 0], logits)
    loss: Tensor = cross_entropy(
        [term], batch["labels"], shift=True, reduction="sum", vocab_size=model.config.vocab_size
    )
    return loss
