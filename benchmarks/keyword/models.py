"""The models of the study: pairs, the auxiliary without a language model, and the LM itself, fine-tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import auxkern
from auxkern.core.seeds import mixed_seed
from auxkern.core.terms import Head, rows_of
from auxkern.model import AuxTunedForCausalLM
from auxkern.model.base import positions_of
from auxkern.model.text import IGNORED
from benchmarks.keyword.presets import LORA, SCRATCH, Method, Preset


def uniform_lm(lm: Any) -> LlamaForCausalLM:
    """A base with the vocabulary of another and exactly equal logits, so that a pair is its auxiliary alone.

    Its one layer is 16 wide, so it costs next to nothing.
    """
    text = lm.config.get_text_config()
    config = LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=text.max_position_embeddings,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    uniform = LlamaForCausalLM(config)
    # All of them, so that it has one fingerprint, and a run can be resumed on it.
    for parameter in uniform.parameters():
        nn.init.zeros_(parameter)
    return uniform.to(lm.device).eval()


def new_pair(preset: Preset, method: Method, lm: Any, seed: int) -> AuxTunedForCausalLM:
    """An untrained pair of a method, or the auxiliary without the LM, from the seed's initial weights."""
    base = uniform_lm(lm) if method.kind == SCRATCH else lm
    with torch.random.fork_rng():
        torch.manual_seed(mixed_seed(seed, "weights"))
        return AuxTunedForCausalLM.from_lm(base, **{**preset.pair, **method.pair})


class FineTunedLM(nn.Module):
    """A language model that is trained itself, whole or through LoRA, in the place of a pair.

    Its layers train in bfloat16 mixed precision, with weights, head and loss in float32.

    Args:
        lm: a causal LM with all its own layers (``load_base(native=False)``); it is changed.
        rank: of LoRA's matrices in every linear layer but the output head; 0 trains all weights.
        seed: of LoRA's initial weights.
    """

    def __init__(self, lm: Any, rank: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.rank = rank
        if rank:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            with torch.random.fork_rng():
                torch.manual_seed(mixed_seed(seed, "weights"))
                lm = get_peft_model(lm, config).get_base_model()
        else:
            lm.requires_grad_(True)
        self.causal_lm = lm

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor,
        **_: Any,
    ) -> CausalLMOutput:
        """The summed nll of the labels (B, T), over ``num_items_in_batch``; the condition is in the ids."""
        lm = self.causal_lm
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.training):
            hidden = lm.base_model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=positions_of(attention_mask)
            ).last_hidden_state.float()
        target = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        rows = (target != IGNORED).flatten().nonzero()[:, 0]
        head = rows_of(Head(hidden, lm.get_output_embeddings().weight), rows)
        loss = auxkern.cross_entropy(
            [head], target.flatten()[rows], reduction="sum", normalizer=num_items_in_batch
        )
        return CausalLMOutput(loss=loss)

    def save_pretrained(self, folder: str | Path) -> None:
        save_model(self, str(Path(folder) / "model.safetensors"))


def new_fine_tuned(preset: Preset, method: Method, lm: Any, seed: int) -> FineTunedLM:
    """The LM, ready to be trained as a method says."""
    return FineTunedLM(lm, preset.lora_rank if method.kind == LORA else 0, seed)


def trainable(model: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
