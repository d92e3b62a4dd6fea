"""The two auxiliary models that come with the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, EncoderDecoderCache

from auxkern.core.coverage import Coverage
from auxkern.model.base import cache_argument, counts_positions, mask_with_cache, positions_of
from auxkern.model.config import LAST_LAYERS, AuxTunedConfig
from auxkern.model.interface import AuxiliaryCache, AuxiliaryInputs, AuxiliaryOutput, AuxiliaryTraits
from auxkern.model.last_layers import LastLayers
from auxkern.model.layers import ZeroLinear
from auxkern.model.native import final_states
from auxkern.model.order import padding_first
from auxkern.model.pointer import Pointer


class InputVectors(nn.Module):
    """Vectors of ids, and of what the base made of them."""

    def __init__(self, config: AuxTunedConfig, D: int) -> None:
        super().__init__()
        if config.vocab_size is None or config.lm_hidden_size is None or config.lm_embedding_size is None:
            raise ValueError(
                "config.vocab_size or a size of the base is unset; they are filled in from the base"
            )
        L, D_lm = len(config.lm_layers), config.lm_hidden_size
        self.shared = config.input_embedding == "shared"
        # A copy of the base's first layers reads the base's embedding as it is.
        exact = bool(config.from_lm_layers)
        self.embedding = None if self.shared else nn.Embedding(config.vocab_size, D)
        projected = self.shared and not exact
        self.projection = nn.Linear(config.lm_embedding_size, D, bias=False) if projected else None
        # Hidden states in the middle of a language model hold single values in the tens of thousands.
        self.norms = nn.ModuleList(nn.LayerNorm(D_lm) for _ in range(L))
        feature = ZeroLinear if exact else nn.Linear
        self.features = feature(L * D_lm, D, bias=False) if L else None
        self.embedded = nn.Identity()  # where hooks find the vectors of ids, see get_input_embeddings
        self.condition_type = nn.Parameter(torch.zeros(D))
        self.dropout = nn.Dropout(config.dropout)

    def _vectors(self, ids: Tensor, inputs: AuxiliaryInputs) -> Tensor:
        if self.embedding is not None:
            return self.embedded(self.embedding(ids))
        vectors = nn.functional.embedding(ids, inputs.lm_embedding).to(self.condition_type.dtype)
        return self.embedded(vectors if self.projection is None else self.projection(vectors))

    def text(self, inputs: AuxiliaryInputs, marks: Tensor | None) -> Tensor:
        """(B, T, D), with marks (B, T, D) added."""
        vectors = self._vectors(inputs.input_ids, inputs)
        if self.features is not None:
            states = inputs.lm_states.to(self.condition_type.dtype)
            normed = [norm(states[:, :, i]) for i, norm in enumerate(self.norms)]
            vectors = vectors + self.features(torch.cat(normed, -1))
        return self.dropout(vectors if marks is None else vectors + marks)

    def condition(self, inputs: AuxiliaryInputs) -> Tensor:
        """(B, K, D)"""
        return self.dropout(self._vectors(inputs.condition_ids, inputs) + self.condition_type)


class TransformerAuxiliary(AuxiliaryTraits, nn.Module):
    """A transformer of any kind between input vectors and, where the config has one, a pointer."""

    def __init__(self, config: AuxTunedConfig) -> None:
        super().__init__()
        body = config.body_config()
        self.hidden_size: int = body.hidden_size
        # Without the table of embeddings: it is given vectors.
        body.vocab_size, body.pad_token_id = 1, 0
        self.body: Any = AutoModel.from_config(body)
        self.body.set_input_embeddings(None)
        self.inputs = InputVectors(config, self.hidden_size)
        self.pointer: Pointer | None = None
        if config.pointer:
            reads, exact = config.pointer_reads_lm, bool(config.from_lm_layers)
            self.pointer = Pointer(self.hidden_size, config.pointer_size, reads_lm=reads, exact=exact)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def transformer_config(self) -> Any:
        return self.body.config

    @property
    def input_vectors(self) -> nn.Module:
        return self.inputs.embedded

    def _text(self, inputs: AuxiliaryInputs) -> tuple[Tensor, Coverage | None]:
        """(B, T, D) the text's input vectors, and what of the condition stands in it, which they are told."""
        if self.pointer is None:
            return self.inputs.text(inputs, None), None
        coverage = self.pointer.coverage(inputs, None if inputs.cache is None else inputs.cache.stretches)
        return self.inputs.text(inputs, coverage.marks), coverage

    def _keys(self, condition: Tensor) -> Tensor | None:
        """The pointer's keys of the condition's states (B, K, D)."""
        return None if self.pointer is None else self.pointer.keys(condition)

    def _output(
        self, hidden: Tensor, inputs: AuxiliaryInputs, coverage: Coverage | None, cache: AuxiliaryCache
    ) -> AuxiliaryOutput:
        """With the pointer's part, and what it keeps."""
        scores = end = None
        if self.pointer is not None and coverage is not None and cache.keys is not None:
            hidden, scores, end = self.pointer(hidden, cache.keys, inputs, coverage)
            cache.stretches = coverage.stretches
        return AuxiliaryOutput(hidden, scores, end, cache if inputs.use_cache else None)


class DecoderAuxiliary(TransformerAuxiliary):
    """A decoder-only transformer whose input is the condition, then the text."""

    @property
    def counts_positions(self) -> bool:
        return counts_positions(self.body)

    def forward(self, inputs: AuxiliaryInputs) -> AuxiliaryOutput:
        first, T = inputs.cache is None, inputs.input_ids.shape[1]
        vectors, coverage = self._text(inputs)
        mask = inputs.attention_mask[:, -T:]
        if first:
            vectors = torch.cat([self.inputs.condition(inputs), vectors], 1)
            order = padding_first(torch.cat([inputs.condition_mask, mask], 1))
            vectors, mask = order.take(vectors), order.mask
        else:
            mask = torch.cat([inputs.cache.mask, mask], 1)
        options: dict[str, Any] = {"use_cache": inputs.use_cache}
        if self.counts_positions:
            options["position_ids"] = positions_of(mask, vectors.shape[1])
        if not first:
            options[cache_argument(self.body)] = inputs.cache.attention
        options["attention_mask"] = mask if first else mask_with_cache(inputs.cache.attention, mask, T)
        options["inputs_embeds"] = vectors
        cache_name = cache_argument(self.body) if inputs.use_cache else None
        hidden, attention, _ = final_states(self.body, options, cache_name)
        hidden = self.dropout(hidden)
        if first:
            hidden = order.restore(hidden)
            # The condition's states stand before the text's.
            condition, hidden = hidden.split([hidden.shape[1] - T, T], 1)
        keys = self._keys(condition) if first else inputs.cache.keys
        return self._output(hidden, inputs, coverage, AuxiliaryCache(attention, mask, None, keys, None))


class EncoderDecoderAuxiliary(TransformerAuxiliary):
    """An encoder reads the condition; a decoder over the text attends to it (the T5 family)."""

    @property
    def needs_condition(self) -> bool:
        return True

    def forward(self, inputs: AuxiliaryInputs) -> AuxiliaryOutput:
        first = inputs.cache is None
        if first:
            memory = self.body.encoder(
                inputs_embeds=self.inputs.condition(inputs), attention_mask=inputs.condition_mask
            ).last_hidden_state
            keys, attention = self._keys(memory), None
            if inputs.use_cache:
                own, crossed = (DynamicCache(config=self.body.config) for _ in range(2))
                attention = EncoderDecoderCache(own, crossed)
        else:
            memory, keys, attention = inputs.cache.memory, inputs.cache.keys, inputs.cache.attention
        vectors, coverage = self._text(inputs)
        mask = inputs.attention_mask[:, -inputs.input_ids.shape[1] :]
        mask = mask if first else torch.cat([inputs.cache.mask, mask], 1)
        options = {} if attention is None else {cache_argument(self.body.decoder): attention}
        output = self.body.decoder(
            inputs_embeds=vectors,
            attention_mask=mask,
            encoder_hidden_states=memory,
            encoder_attention_mask=inputs.condition_mask,
            use_cache=inputs.use_cache,
            **options,
        )
        hidden = self.dropout(output.last_hidden_state)
        return self._output(hidden, inputs, coverage, AuxiliaryCache(attention, mask, memory, keys, None))


def build_auxiliary(config: AuxTunedConfig) -> nn.Module:
    """The auxiliary module that a config describes, with new weights.

    Raises:
        ValueError: the architecture is "custom", which only a caller can build.
    """
    if config.architecture == "decoder":
        return DecoderAuxiliary(config)
    if config.architecture == "encoder-decoder":
        return EncoderDecoderAuxiliary(config)
    if config.architecture == LAST_LAYERS:
        return LastLayers(config)
    raise ValueError('architecture is "custom"; pass the module itself as auxiliary=')
