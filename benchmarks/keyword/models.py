"""The models of the study: pairs, and the LM itself, fine-tuned behind the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutput

import auxkern
from auxkern.core.seeds import mixed_seed
from auxkern.core.terms import Head
from auxkern.model import AuxTunedForCausalLM, use_native_kernels
from auxkern.model.base import cache_argument, freeze
from auxkern.model.native import native_refusal
from auxkern.model.packing import PackedRow, read_packed
from auxkern.model.prefix import PrefixStates
from auxkern.model.text import IGNORED
from benchmarks.keyword.presets import Preset

BASE_PROMPT = " {condition}:"  # how a base is told the keyword, behind examples that are told theirs so
# A word within a sentence has a space before it; with one before the text it has it everywhere.
WORDING = {"condition_template": " {condition}", "text_prefix": " "}


def new_pair(
    fields: dict[str, Any], lm: Any, prefix: Sequence[int] = (), seed: int = 0
) -> AuxTunedForCausalLM:
    """An untrained pair, from the seed's initial weights.

    Args:
        fields: of ``AuxTunedConfig``.
        lm: the base.
        prefix: ids that it reads before every text, told the keyword then; none for a base that is told
            nothing.
        seed: of the weights.
    """
    told = {"base_prompt": BASE_PROMPT, "base_prefix_ids": list(prefix)} if prefix else {}
    with torch.random.fork_rng():
        torch.manual_seed(mixed_seed(seed, "weights"))
        return AuxTunedForCausalLM.from_lm(lm, **WORDING, **told, **fields)


def silent_pair(lm: Any, prefix: Sequence[int] = ()) -> AuxTunedForCausalLM:
    """A pair with the smallest of auxiliaries, to write texts of the base alone; see ``new_pair``."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    return new_pair({"auxiliary_config": {"model_type": "llama", **small}}, lm, prefix)


class FineTunedLM(nn.Module):
    """A language model that is trained itself, whole or through LoRA, behind a prompt that it reads too.

    The prompt is read once for a batch, and gradients go through it; the texts behind it are one row. Layers
    train in bfloat16 mixed precision, with weights, head and loss in float32. ``state_dict()`` holds what is
    trained.

    Args:
        lm: a causal LM with all its own layers (``load_base(native=False)``); it is changed.
        prefix: ids that it reads before every text.
        rank: of LoRA's matrices in every linear layer but the output head; 0 trains all weights.
        seed: of LoRA's initial weights.
    """

    def __init__(self, lm: Any, prefix: Sequence[int], rank: int = 0, seed: int = 0) -> None:
        super().__init__()
        whole = lm
        if rank:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            with torch.random.fork_rng():
                torch.manual_seed(mixed_seed(seed, "weights"))
                whole = get_peft_model(lm, config)
            lm = whole.get_base_model()
        else:
            lm.requires_grad_(True)
        self.prefix = tuple(prefix)
        # Past nn.Module's registration: LoRA's base does not change, and need not be saved.
        object.__setattr__(self, "causal_lm", lm)
        object.__setattr__(self, "_whole", whole)
        trained = {name: one for name, one in lm.named_parameters() if one.requires_grad}
        self._kept: PrefixStates | None = None
        self.trained = nn.ParameterDict({name.replace(".", "-"): one for name, one in trained.items()})

    causal_lm: Any
    _whole: Any

    def train(self, mode: bool = True) -> FineTunedLM:
        self._kept = None
        self.causal_lm.train(mode)
        return super().train(mode)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor,
        **_: Any,
    ) -> CausalLMOutput:
        """The summed nll of the labels (B, T), over ``num_items_in_batch``; the keyword is in the ids."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.training):
            prefix = self._prefix_states(input_ids.device)

            def run(ids: Tensor, row: PackedRow) -> Tensor:
                return self._run(ids, row.positions, row.seen, prefix.cache(1))

            states = read_packed(input_ids, attention_mask, run, len(prefix), input_ids.numel())
        target = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        scored = target != IGNORED
        head = Head(states[scored].float(), self.causal_lm.get_output_embeddings().weight)
        loss = auxkern.cross_entropy([head], target[scored], reduction="sum", normalizer=num_items_in_batch)
        return CausalLMOutput(loss=loss)

    def _prefix_states(self, device: torch.device) -> PrefixStates:
        """Of the prompt; while nothing is trained they stay the same."""
        if self._kept is not None:
            return self._kept
        ids, cache = torch.tensor([self.prefix], device=device), DynamicCache()
        self._run(ids, torch.arange(len(self.prefix), device=device)[None], None, cache)
        states = PrefixStates([(layer.keys, layer.values) for layer in cache.layers])
        if not self.training:
            self._kept = states
        return states

    def _run(self, ids: Tensor, positions: Tensor, seen: Tensor | None, cache: Any) -> Tensor:
        """Final hidden states (1, N, D) of ids (1, N) behind what is in the cache, to which it adds."""
        body = self.causal_lm.base_model
        known = {cache_argument(body): cache, "position_ids": positions}
        states: Tensor = body(input_ids=ids, attention_mask=seen, use_cache=True, **known).last_hidden_state
        return states

    def merged(self) -> Any:
        """The causal LM as it is now, to write texts with; it can be trained no more."""
        lm = freeze(self._whole if self._whole is self.causal_lm else self._whole.merge_and_unload())
        return use_native_kernels(lm) if lm.device.type == "cpu" and native_refusal() is None else lm

    def save_pretrained(self, folder: str | Path) -> None:
        save_model(self, str(Path(folder) / "model.safetensors"))


def new_fine_tuned(preset: Preset, lm: Any, prefix: Sequence[int], seed: int, *, lora: bool) -> FineTunedLM:
    """The LM, ready to be trained whole or through LoRA."""
    return FineTunedLM(lm, prefix, preset.lora_rank if lora else 0, seed)


def trainable(model: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
