"""An auxiliary that goes on where the base's last layers begin: a copy of them, trained by LoRA or whole."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache
from transformers.cache_utils import DynamicLayer

from auxkern.model.base import cache_argument, counts_positions, mask_with_cache, positions_of, transformer
from auxkern.model.config import AuxTunedConfig
from auxkern.model.interface import AuxiliaryCache, AuxiliaryInputs, AuxiliaryOutput, AuxiliaryTraits
from auxkern.model.native import final_states, use_native_kernels
from auxkern.model.packing import MOST, PackedRow, packing_refusal, read_packed
from auxkern.model.pointer import Pointer
from auxkern.model.prefix import PrefixStates, read_behind

_log = logging.getLogger(__name__)
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_ADAPTER = "default"
_READ = 128  # width of what the pointer reads


class LastLayers(AuxiliaryTraits, nn.Module):
    """The base's last k layers and its norm, on the base's own hidden states below them.

    Its output is what its final states h' add to the base's, h' - h, so that the sum of both at weight 1
    has the logits of h', and an untrained one adds nothing. With ``lora_rank`` the copy has the base's own
    weights, by reference, and low-rank matrices beside them that are all that is trained and saved (Hu et
    al. 2021); without, it has weights of its own. Of the base's prefix it attends to the base's own keys and
    values.

    Args:
        config: of the pair, with the base's last layers as its ``auxiliary_config``.
    """

    def __init__(self, config: AuxTunedConfig) -> None:
        super().__init__()
        body_config = config.body_config()
        self.hidden_size: int = body_config.hidden_size
        self._config, self._first = config, config.lm_layers[0]
        body_config.vocab_size, body_config.pad_token_id = 1, 0
        self._body_config = body_config
        self.adapters: nn.ModuleDict | None = None
        self._own: Any = None  # past nn.Module's registration where its weights are the base's
        self._merged: Any = None
        self._compute: str | None = None  # of the merged layers
        self._packs: bool | None = None  # whether they can read packed texts, once it was tried
        if config.lora_rank:
            body = self._with_adapters()
            object.__setattr__(self, "_own", body)
            self.adapters = nn.ModuleDict(
                {
                    name.replace(".", "-"): nn.ModuleDict({"A": part.lora_A, "B": part.lora_B})
                    for name, part in _adapted(body)
                }
            )
        else:
            self.body = self._new_body()
        self.embedded = nn.Identity()  # where hooks find its input vectors
        self.pointer: Pointer | None = None
        if config.pointer:
            self.reads = nn.Linear(self.hidden_size, _READ)
            self.names = nn.Linear(config.lm_embedding_size or 0, _READ)
            self.tells = nn.Linear(_READ, self.hidden_size, bias=False)
            reads_lm = config.pointer_reads_lm
            self.pointer = Pointer(_READ, config.pointer_size, reads_lm=reads_lm, exact=True)

    # ------------------------------------------------------------------------------------- its layers

    def _new_body(self) -> Any:
        body: Any = AutoModel.from_config(self._body_config)
        body.set_input_embeddings(None)
        return body

    def _with_adapters(self) -> Any:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"lora_rank is {self._config.lora_rank}, for which PEFT is needed; "
                "pip install 'auxkern[lora]'"
            ) from error
        rank = self._config.lora_rank
        with torch.device("meta"):
            body = self._new_body().requires_grad_(False)
        settings = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=self._config.dropout
        )
        body = inject_adapter_in_model(settings, body, _ADAPTER)
        for _, part in _adapted(body):
            for matrices in (part.lora_A, part.lora_B):
                matrices.to_empty(device=torch.empty(0).device)
            part.reset_lora_parameters(_ADAPTER, init_lora_weights=True)
            for matrix in (part.lora_A[_ADAPTER], part.lora_B[_ADAPTER]):
                matrix._is_hf_initialized = True  # transformers would draw both anew
        return body

    @torch.no_grad()
    def copy_weights(self, lm: Any) -> None:
        """Begins as the base's layers are, where it has weights of its own.

        Raises:
            ValueError: as ``share_weights``.
        """
        if self.adapters is None:
            source = _tensors(transformer(lm))
            for name, parameter in self.body.named_parameters():
                parameter.copy_(self._of_base(name, parameter, source))

    def share_weights(self, lm: Any) -> None:
        """Takes the base's weights by reference, where LoRA stands beside them: again after these have moved.

        Raises:
            ValueError: the base lacks one, by name or shape, or keeps it in another form.
        """
        if self.adapters is None:
            return
        source = _tensors(transformer(lm))
        for name, module in self._own.named_modules():
            for kind in (module._parameters, module._buffers):
                for own_name, tensor in kind.items():
                    if tensor is None or "lora_" in name:
                        continue
                    path = f"{name}.{own_name}".replace(".base_layer", "")
                    kind[own_name] = self._of_base(path, tensor, source)
        if self._merged is not None:
            self.merge(self._compute)

    def _of_base(self, name: str, own: Tensor, source: dict[str, Tensor]) -> Tensor:
        # The first number of a name is that of a layer, whatever a family calls their list.
        there = _LAYER.sub(lambda found: str(int(found[0]) + self._first), name, count=1)
        tensor = source.get(there)
        if tensor is None or tensor.shape != own.shape or not tensor.is_floating_point():
            has = "nothing of that name" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(
                f'architecture="last-layers" needs {there} of shape {tuple(own.shape)}, but the base has '
                f"{has}; use a base whose weights are not quantised, or another architecture"
            )
        return tensor

    @torch.no_grad()
    def merge(self, compute: str | None = None) -> None:
        """Adds LoRA's matrices to a copy of the layers, for texts and scores: one product in place of three.

        Args:
            compute: run the copy in auxkern's CPU kernels, as ``use_native_kernels`` does; None for torch's.
        """
        if self.adapters is None:
            if compute is not None:
                use_native_kernels(self.body, compute)
            return
        with torch.device("meta"):
            body = self._new_body().requires_grad_(False)
        own = _tensors(self._own)
        deltas = {name: part.get_delta_weight(_ADAPTER) for name, part in _adapted(self._own)}
        for name, module in list(body.named_modules()):
            for kind in (module._parameters, module._buffers):
                for own_name, tensor in kind.items():
                    if tensor is None:
                        continue
                    adapted = name in deltas
                    value = own[f"{name}{'.base_layer' if adapted else ''}.{own_name}".removeprefix(".")]
                    if adapted and own_name == "weight":
                        value = (value.float() + deltas[name].float()).to(value.dtype)
                    kind[own_name] = nn.Parameter(value, False) if kind is module._parameters else value
        body.eval()
        object.__setattr__(self, "_merged", body if compute is None else use_native_kernels(body, compute))
        self._compute = compute

    def train(self, mode: bool = True) -> LastLayers:
        if mode:
            object.__setattr__(self, "_merged", None)  # they change from now on
        if self._own is not None:
            self._own.train(mode)
        return super().train(mode)

    @property
    def transformer(self) -> Any:
        """The layers that run."""
        if self.adapters is None:
            return self.body
        return self._own if self._merged is None else self._merged

    # --------------------------------------------------------------------------------- what it is like

    @property
    def counts_positions(self) -> bool:
        return counts_positions(self.transformer)

    @property
    def transformer_config(self) -> Any:
        return self._body_config

    @property
    def input_vectors(self) -> nn.Module:
        return self.embedded

    @property
    def reads_prefix(self) -> bool:
        return True

    # ------------------------------------------------------------------------------- what it computes

    def forward(self, inputs: AuxiliaryInputs) -> AuxiliaryOutput:
        first, T = inputs.cache is None, inputs.input_ids.shape[1]
        # A batch's attention is in the layers' own dtype.
        vectors, final = inputs.lm_states[:, :, 0], inputs.lm_final
        if final is None:
            raise ValueError("lm_final is missing, to which the last layers add")
        coverage = None
        if self.pointer is not None:
            coverage = self.pointer.coverage(inputs, None if first else inputs.cache.stretches)
            vectors = vectors.float()
            size = vectors.square().mean(-1, keepdim=True).sqrt()
            vectors = vectors + size * self.tells(coverage.marks)
        vectors = self.embedded(vectors.to(self._dtype()))
        mask = inputs.attention_mask[:, -T:]
        before = inputs.prefix.last(self._body_config.num_hidden_layers) if inputs.prefix else None
        attention = None
        if first and self._is_packed(inputs, vectors, mask, before):
            hidden = self._packed(vectors, mask, before)
        elif before is not None:
            read = read_behind(before, vectors, mask, self._run, keeps=inputs.use_cache)
            (hidden,), attention, mask = read
        else:
            past = None if first else inputs.cache.attention
            mask = mask if first else torch.cat([inputs.cache.mask, mask], 1)
            (hidden,), attention = self._run(vectors, mask, past, keeps=inputs.use_cache)
        kept = AuxiliaryCache(attention, mask, None, None, None)
        added = hidden.float() - final.float()
        scores = end = None
        if self.pointer is not None and coverage is not None:
            dtype = self.reads.weight.dtype
            if first:
                named = nn.functional.embedding(inputs.condition_ids, inputs.lm_embedding).to(dtype)
                kept.keys = self.pointer.keys(_normed(self.names(named)))
            else:
                kept.keys = inputs.cache.keys
            kept.stretches = coverage.stretches
            # Final states are of any size in a language model, and the pointer's parts learn fast.
            if inputs.scores_of is not None and self._config.pointer_reads_lm:
                # What the sum gives the condition's tokens without the pointer.
                inputs = replace(inputs, lm_scores=inputs.scores_of(hidden.detach()))
            _, scores, end = self.pointer(_normed(self.reads(hidden.to(dtype))), kept.keys, inputs, coverage)
        return AuxiliaryOutput(added, scores, end, kept if inputs.use_cache else None)

    def _run(
        self, vectors: Tensor, mask: Tensor, cache: Any, *, keeps: bool = True
    ) -> tuple[tuple[Tensor], Any]:
        """Final states (B, T, D) of vectors (B, T, D), with a mask (B, P + T), and the cache."""
        body, T = self.transformer, vectors.shape[1]
        options: dict[str, Any] = {"inputs_embeds": vectors, "attention_mask": mask, "use_cache": keeps}
        if self.counts_positions:
            options["position_ids"] = positions_of(mask, T)
        if cache is not None:
            options[cache_argument(body)] = cache
            options["attention_mask"] = mask_with_cache(cache, mask, T)
        hidden, attention, _ = final_states(body, options, cache_argument(body) if keeps else None)
        return (hidden,), attention

    def _is_packed(
        self, inputs: AuxiliaryInputs, vectors: Tensor, mask: Tensor, before: PrefixStates | None
    ) -> bool:
        """Whether a batch that is trained on is read packed: on a CPU, where a step is its arithmetic."""
        if inputs.use_cache or not self.training or len(mask) == 1 or vectors.device.type != "cpu":
            return False
        if self._packs is None:
            refusal = self._packing_refusal(vectors, mask, before)
            if refusal is not None:
                _log.info("batches are padded: %s", refusal)
            self._packs = refusal is None
        return self._packs

    def _packing_refusal(self, vectors: Tensor, mask: Tensor, before: PrefixStates | None) -> str | None:
        kinds = {type(layer) for layer in DynamicCache(config=self._body_config).layers}
        if not self.counts_positions or kinds != {DynamicLayer}:
            return "not all layers attend to all tokens, by positions that they are given"

        def padded() -> Tensor:
            if before is None:
                return self._run(vectors, mask, None, keeps=False)[0][0]
            return read_behind(before, vectors, mask, self._run, keeps=False).outputs[0]

        body = self.transformer
        body.eval()  # dropout would draw twice
        try:
            return packing_refusal(lambda: self._packed(vectors, mask, before), padded, mask)
        finally:
            body.train()

    def _packed(self, vectors: Tensor, mask: Tensor, before: PrefixStates | None) -> Tensor:
        """Final states (B, T, D) of vectors (B, T, D), with a mask (B, T)."""
        body = self.transformer

        def run(vectors: Tensor, row: PackedRow) -> Tensor:
            cache = {} if before is None else {cache_argument(body): before.cache(1)}
            made: Tensor = body(
                inputs_embeds=vectors,
                attention_mask=row.seen,
                position_ids=row.positions,
                use_cache=before is not None,
                **cache,
            ).last_hidden_state
            return made

        return read_packed(vectors, mask, run, 0 if before is None else len(before), MOST)

    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.transformer.parameters()).dtype
        return dtype


def _normed(x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:])


def _adapted(body: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers with LoRA's matrices beside them."""
    return ((name, part) for name, part in body.named_modules() if hasattr(part, "lora_A"))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
