"""The name of a base: its weights, and what of its configuration changes its logits."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Fields of transformers' configs that change no logit of a model in evaluation mode: names and versions,
# what is returned and cached, and how it is computed, trained or generated from.
_NEUTRAL_NAMES = """
architectures auto_map chunk_size_feed_forward dtype gradient_checkpointing id2label label2id
max_position_embeddings model_type name_or_path num_labels output_attentions output_hidden_states
output_router_logits pretraining_tp problem_type quantization_config return_dict task_specific_params
tie_word_embeddings tokenizer_class torch_dtype transformers_version use_cache use_mamba_kernels
"""
_NEUTRAL = frozenset(_NEUTRAL_NAMES.split())
_NEUTRAL_PARTS = ("_implementation", "dropout", "pdrop", "initializer", "init_std", "token_id", "aux_loss")
_NEUTRAL_QUANTIZATION = ("dtype", "storage", "device", "_load", "desc_act_kernel")


def fingerprint(lm: Any) -> str:
    """64 hexadecimal digits that name a model: its weights, and the configuration that its logits depend on.

    SHA-256 over ``weights_fingerprint``, the buffers that a checkpoint holds, which quantised weights often
    are, and ``computing_fields``. The same checkpoint has one fingerprint loaded as float16, float32 or, if
    it was bfloat16, bfloat16, with any attention implementation; other rotary settings, windows, soft caps
    or norms' epsilons make another one, and so does quantisation: a quantised copy computes other logits.
    Of a sharded model all ranks must ask.

    Raises:
        ValueError: the weights are on the meta device, and have no values.
    """
    fields = json.dumps(computing_fields(lm), sort_keys=True, default=str)
    named = f"{weights_fingerprint(lm)} {_digest(buffers_of(lm, saved=True))} {fields}"
    return hashlib.sha256(named.encode()).hexdigest()


def weights_fingerprint(lm: Any) -> str:
    """64 hexadecimal digits of a model's parameters alone, as earlier versions named a base.

    SHA-256 over every parameter's name, shape and values in float16.

    Raises:
        ValueError: the weights are on the meta device, and have no values.
    """
    owners = dict(lm.named_modules())
    return _digest((name, p, owners[name.rpartition(".")[0]]) for name, p in lm.named_parameters())


def computing_fields(lm: Any) -> dict[str, Any]:
    """What of a model's configuration changes its logits, as JSON has it.

    Only what is not its family's default, so that a field that a later transformers adds changes nothing.
    """
    config = getattr(lm, "config", None)
    if config is None:
        return {}
    fields = {"family": config.model_type, **_without_neutral(config.to_diff_dict())}
    # Rotary embeddings that follow the length of the text start from it.
    if "dynamic" in json.dumps(fields.get("rope_parameters"), default=str):
        fields["max_position_embeddings"] = getattr(config, "max_position_embeddings", None)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        # A GGUF file's weights are widened, or blocks, whose bytes say everything; its name says nothing.
        if settings.get("quant_method") != "gguf":
            fields["quantization"] = {
                name: value
                for name, value in settings.items()
                if not any(part in name for part in _NEUTRAL_QUANTIZATION)
            }
    return fields


def _without_neutral(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_neutral(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in _NEUTRAL
        and not name.startswith("_")
        and not any(part in name for part in _NEUTRAL_PARTS)
    }


def buffers_of(module: nn.Module, *, saved: bool) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """Name, buffer and owner of those that a checkpoint holds, or of those that none does."""
    owners = dict(module.named_modules())
    for name, buffer in module.named_buffers():
        owner, _, own = name.rpartition(".")
        if saved == (own not in owners[owner]._non_persistent_buffers_set):
            yield name, buffer, owners[owner]


@torch.no_grad()
def _digest(tensors: Iterable[tuple[str, Tensor, nn.Module]]) -> str:
    """Of names, shapes and values; each tensor comes with the module that it is of."""
    digest = hashlib.sha256()
    for name, tensor, module in tensors:
        if tensor.device.type == "meta":
            raise ValueError(f"the base's {name} is on the meta device; load the base before it is paired")
        shape = getattr(getattr(tensor, "quant_state", None), "shape", tensor.shape)
        digest.update(f"{name} {tuple(shape)} ".encode())
        with torch.device("cpu"):  # transformers makes a pair on the meta device
            for values in _plain_tensors(tensor, module):
                values = values.to(torch.float16) if values.is_floating_point() else values
                digest.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_tensors(values: Tensor, module: nn.Module) -> Iterator[Tensor]:
    """The plain tensors in one of any class, the same before and after the module has run."""
    if isinstance(values, DTensor):
        yield values.full_tensor()
    elif is_traceable_wrapper_subclass(values):  # torchao's
        names, context = values.__tensor_flatten__()
        yield _bytes_of(f"{type(values).__name__} {names} {context}")
        for name in names:
            yield from _plain_tensors(getattr(values, name), module)
    elif (state := getattr(values, "quant_state", None)) is not None:
        yield from _four_bits(values, state)
    else:
        yield values.detach()
        scale = getattr(values, "SCB", None)  # bitsandbytes' 8 bits: on the weight until the first forward
        scale = getattr(getattr(module, "state", None), "SCB", None) if scale is None else scale
        if isinstance(scale, Tensor):
            yield scale


def _four_bits(codes: Tensor, state: Any) -> Iterator[Tensor]:
    """Codes and block maxima of a weight of bitsandbytes.

    On a CPU its first forward packs both anew, and rounds the maxima to bfloat16.
    """
    from bitsandbytes import functional

    yield _bytes_of(f"{state.quant_type} {state.blocksize}")
    if getattr(state, "packing_format_for_cpu", False):
        maxima = state.absmax.T
        codes, _ = functional._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
    else:
        maxima = state.absmax
        if state.nested:
            maxima = functional.dequantize_blockwise(maxima, state.state2) + state.offset
    yield codes.detach().as_subclass(Tensor)
    yield maxima.to(torch.bfloat16).flatten().view(torch.int16)


def _bytes_of(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
