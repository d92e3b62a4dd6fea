"""A trained pair and what makes its ids, ready to write texts; and models that write with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import safetensors
import torch

from auxkern.model.base import load_base, load_tokenizer
from auxkern.model.config import AuxTunedConfig
from auxkern.model.last_layers import LastLayers
from auxkern.model.modeling import AuxTunedForCausalLM
from auxkern.model.native import native_refusal
from auxkern.model.saving import pair_config
from auxkern.model.text import TextFormat


def open_pair(
    name_or_path: str,
    *,
    config: AuxTunedConfig | None = None,
    base: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    compute: str = "float32",
    allow_other_base: bool = False,
    max_length: int | None = None,
) -> tuple[AuxTunedForCausalLM, TextFormat]:
    """A pair in evaluation mode, on a CPU with auxkern's kernels where there are some, and its text format.

    Args:
        name_or_path: folder that was saved, or a Hub name.
        config: of the pair, if it has been read.
        base: name or path of the base, if it has moved.
        device: where it runs; a GPU if None and there is one.
        dtype: of the base, as ``load_base`` takes it.
        compute: of the base and the auxiliary, as ``load_base`` takes it.
        allow_other_base: whether a base with another fingerprint is taken.
        max_length: of the text format.

    Raises:
        OSError, ValueError: there is no such pair or base, it is damaged, or the base is another one.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    known: Any = config or pair_config(name_or_path)
    name = base or known.base_model_name_or_path
    if name is None:
        raise ValueError(f"{name_or_path} does not name its base; pass base (--base NAME)")
    try:
        tokenizer = load_tokenizer(name, revision=known.base_revision, gguf_file=known.base_gguf_file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the base {name!r} cannot be loaded: {str(error).rstrip('.')}; if it has moved, pass base "
            "(--base NAME)"
        ) from error
    try:
        model = AuxTunedForCausalLM.from_pretrained(
            name_or_path,
            config=known,
            lm=name,
            base_options={"device": place, "dtype": dtype, "compute": compute},
            allow_other_base=allow_other_base,
        )
    except safetensors.SafetensorError as error:
        raise ValueError(f"the weights of {name_or_path} or of its base are damaged: {error}") from error
    if place.type == "cpu" and native_refusal() is None:
        model.use_native_kernels(compute)
    elif isinstance(model.auxiliary, LastLayers):
        model.auxiliary.merge()
    return model.eval(), TextFormat.of(known, tokenizer, max_length)


def open_models(
    sources: Mapping[str, str],
    model: AuxTunedForCausalLM,
    tokenizer: Any,
    *,
    dtype: torch.dtype | str | None = None,
    compute: str = "float32",
) -> dict[str, Any]:
    """Language models that write texts together with a pair, by name, on its device.

    Args:
        sources: folder or Hub name of each, by the name that members of a mixture call it.
        model: the pair.
        tokenizer: its base's.
        dtype, compute: as ``load_base`` takes them.

    Raises:
        ValueError: one cannot be loaded, or has another tokenizer than the base; the message names it.
    """
    loaded, own = {}, tokenizer.get_vocab()
    for name, source in sources.items():
        try:
            other = load_tokenizer(source).get_vocab()
            if other != own:
                raise ValueError(
                    f"it has another tokenizer than the base ({len(other):,} and {len(own):,} tokens), and "
                    "members share one vocabulary"
                )
            loaded[name] = load_base(source, device=model.device, dtype=dtype, compute=compute)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"model {name!r} ({source}) cannot be a member: {error}") from error
    return loaded
