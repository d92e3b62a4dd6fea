"""The two auxiliary models that come with the package."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, EncoderDecoderCache

from auxkern.model.base import cache_argument, counts_positions, mask_with_cache, positions_of
from auxkern.model.config import AuxTunedConfig
from auxkern.model.interface import AuxiliaryCache, AuxiliaryInputs, AuxiliaryOutput
from auxkern.model.layers import ZeroLinear
from auxkern.model.pointer import Coverage, Pointer


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
        self.projection = (
            nn.Linear(config.lm_embedding_size, D, bias=False) if self.shared and not exact else None
        )
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


class _Order(NamedTuple):
    """Positions of a batch with all padding first: windows, convolutions and states then meet none between.

    Attributes:
        mask: (B, S') int64, 1 for real tokens, in the new order.
        positions: (B, S') int64, where each stood.
        places: (B, S) int64, where each went; any place for padding that was left out.
    """

    mask: Tensor
    positions: Tensor
    places: Tensor

    def take(self, vectors: Tensor) -> Tensor:
        """(B, S, D) -> (B, S', D)"""
        return vectors.take_along_dim(self.positions[:, :, None], 1)

    def restore(self, hidden: Tensor) -> Tensor:
        """(B, S', D) -> (B, S, D)"""
        return hidden.take_along_dim(self.places[:, :, None], 1)


def _padding_first(mask: Tensor) -> _Order:
    """The order for a mask (B, S)."""
    real = (mask != 0).long()
    positions = real.argsort(dim=1, stable=True)
    places = positions.argsort(1)
    # Columns that are padding in every row; on a GPU a host would have to wait for their number.
    counted = mask.device.type == "cpu" and mask.numel() > 0
    spare = mask.shape[1] - max(1, int(real.sum(1).max())) if counted else 0
    return _Order(real.sort(1).values[:, spare:], positions[:, spare:], (places - spare).clamp_min(0))


class DecoderAuxiliary(nn.Module):
    """A decoder-only transformer whose input is the condition, then the text."""

    def __init__(self, config: AuxTunedConfig) -> None:
        super().__init__()
        body = config.body_config()
        self.hidden_size: int = body.hidden_size
        self.body = _without_embedding(body)
        self.inputs = InputVectors(config, self.hidden_size)
        self.pointer = _pointer(config, self.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, inputs: AuxiliaryInputs) -> AuxiliaryOutput:
        first, T = inputs.cache is None, inputs.input_ids.shape[1]
        coverage, marks = _coverage(self.pointer, inputs)
        vectors = self.inputs.text(inputs, marks)
        mask = inputs.attention_mask[:, -T:]
        if first:
            vectors = torch.cat([self.inputs.condition(inputs), vectors], 1)
            order = _padding_first(torch.cat([inputs.condition_mask, mask], 1))
            vectors, mask = order.take(vectors), order.mask
        else:
            mask = torch.cat([inputs.cache.mask, mask], 1)
        options: dict[str, Any] = {"use_cache": inputs.use_cache}
        if counts_positions(self.body):
            options["position_ids"] = positions_of(mask)[:, -vectors.shape[1] :]
        if not first:
            options[cache_argument(self.body)] = inputs.cache.attention
        read = mask if first else mask_with_cache(inputs.cache.attention, mask, T)
        output = self.body(inputs_embeds=vectors, attention_mask=read, **options)
        attention = output[cache_argument(self.body)] if inputs.use_cache else None
        hidden = self.dropout(output.last_hidden_state)
        hidden = order.restore(hidden) if first else hidden
        # At the first call the condition's states stand before the text's.
        condition, hidden = hidden.split([hidden.shape[1] - T, T], 1)
        keys = None
        if self.pointer is not None:
            keys = self.pointer.keys(condition) if first else inputs.cache.keys
        return _output(self.pointer, hidden, inputs, coverage, attention, mask, None, keys)


class EncoderDecoderAuxiliary(nn.Module):
    """An encoder reads the condition; a decoder over the text attends to it (the T5 family)."""

    def __init__(self, config: AuxTunedConfig) -> None:
        super().__init__()
        body = config.body_config()
        self.hidden_size: int = body.d_model
        self.body = _without_embedding(body)
        self.inputs = InputVectors(config, self.hidden_size)
        self.pointer = _pointer(config, self.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, inputs: AuxiliaryInputs) -> AuxiliaryOutput:
        first = inputs.cache is None
        if first:
            memory = self.body.encoder(
                inputs_embeds=self.inputs.condition(inputs), attention_mask=inputs.condition_mask
            ).last_hidden_state
            keys = None if self.pointer is None else self.pointer.keys(memory)
            attention = self._new_cache() if inputs.use_cache else None
        else:
            memory, keys, attention = inputs.cache.memory, inputs.cache.keys, inputs.cache.attention
        coverage, marks = _coverage(self.pointer, inputs)
        mask = inputs.attention_mask[:, -inputs.input_ids.shape[1] :]
        mask = mask if first else torch.cat([inputs.cache.mask, mask], 1)
        options = {} if attention is None else {cache_argument(self.body.decoder): attention}
        output = self.body.decoder(
            inputs_embeds=self.inputs.text(inputs, marks),
            attention_mask=mask,
            encoder_hidden_states=memory,
            encoder_attention_mask=inputs.condition_mask,
            use_cache=inputs.use_cache,
            **options,
        )
        hidden = self.dropout(output.last_hidden_state)
        return _output(self.pointer, hidden, inputs, coverage, attention, mask, memory, keys)

    def _new_cache(self) -> EncoderDecoderCache:
        config = self.body.config
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))


def _pointer(config: AuxTunedConfig, D: int) -> Pointer | None:
    if not config.pointer:
        return None
    reads, exact = config.pointer_reads_lm, bool(config.from_lm_layers)
    return Pointer(D, config.pointer_size, reads_lm=reads, exact=exact)


def _coverage(pointer: Pointer | None, inputs: AuxiliaryInputs) -> tuple[Coverage | None, Tensor | None]:
    """What of the condition stands in the text, and how the text's input vectors are told."""
    if pointer is None:
        return None, None
    coverage = pointer.coverage(inputs, None if inputs.cache is None else inputs.cache.stretches)
    return coverage, pointer.marks(coverage)


def _output(
    pointer: Pointer | None,
    hidden: Tensor,
    inputs: AuxiliaryInputs,
    coverage: Coverage | None,
    attention: Any,
    mask: Tensor,
    memory: Tensor | None,
    keys: Tensor | None,
) -> AuxiliaryOutput:
    """With the pointer's part; the last four are the cache's."""
    scores, end, stretches = None, None, None
    if pointer is not None and coverage is not None and keys is not None:
        hidden, scores, end = pointer(hidden, keys, inputs, coverage)
        stretches = coverage.stretches
    cache = AuxiliaryCache(attention, mask, memory, keys, stretches) if inputs.use_cache else None
    return AuxiliaryOutput(hidden, scores, end, cache)


def _without_embedding(config: Any) -> Any:
    """The transformer of a config, without the table of embeddings: it is given vectors."""
    config.vocab_size, config.pad_token_id = 1, 0
    body = AutoModel.from_config(config)
    body.set_input_embeddings(None)
    return body


def build_auxiliary(config: AuxTunedConfig) -> nn.Module:
    """The auxiliary module that a config describes, with new weights.

    Raises:
        ValueError: the architecture is "custom", which only a caller can build.
    """
    if config.architecture == "decoder":
        return DecoderAuxiliary(config)
    if config.architecture == "encoder-decoder":
        return EncoderDecoderAuxiliary(config)
    raise ValueError('architecture is "custom"; pass the module itself as auxiliary=')
