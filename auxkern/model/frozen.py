"""Auxiliaries that stand in a pair's sum, frozen, while its own is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from auxkern.core.terms import Term
from auxkern.model.caches import AuxiliaryRows
from auxkern.model.fingerprints import computing_fields, weights_fingerprint
from auxkern.model.inputs import BaseSide, PairInputs
from auxkern.model.interface import AuxiliaryOutput

# Of one auxiliary, by its name: condition_ids and condition_mask (B, K), and, where they are known, the parts
# of its output: hidden (B, T, D), and of a pointer pointer (B, T, K) and end (B, T).
Frozen = Mapping[str, Mapping[str, Tensor]]


@torch.no_grad()
def frozen_terms(
    model: Any, batch: PairInputs, frozen: Frozen, lm_states: Tensor | None
) -> tuple[Tensor | None, list[list[Term]]]:
    """What auxiliaries held frozen add to the logits of all positions, rows (B, T), without gradients.

    Args:
        model: has loaded the auxiliaries; ``config.on_top_of`` says with which weights they are held.
        batch: without a cache.
        frozen: what is known of each.
        lm_states: (B, T, 1 + L, D_lm) as in ``forward``, or None.

    Returns:
        lm_states of the model's own layers, where they are known now, so that the base need not run again;
        and each auxiliary's terms.

    Raises:
        ValueError: an auxiliary is not held, or lm_states lack a layer that it reads.
    """
    held, own = model.config.on_top_of, model.config.lm_layers
    for name in frozen:
        if name not in held or name not in model.auxiliary_names:
            raise ValueError(
                f"auxiliary {name!r} is not held frozen, those are {list(held)}; "
                "auxkern.training.frozen.hold_frozen does it"
            )
    unknown = [name for name, given in frozen.items() if "hidden" not in given]
    side = None
    if unknown and lm_states is None:
        side = base_side(model, batch, {*own, *model.layers_read(unknown)})
        if side.logits is None:
            lm_states = side.states[:, :, [0, *(1 + side.layers.index(layer) for layer in own)]]
    elif unknown and lm_states is not None:
        if not set(model.layers_read(unknown)) <= set(own):
            raise ValueError(
                f"lm_states are for lm_layers {own}, but auxiliaries held frozen read "
                f"{model.layers_read(unknown)}; cache their outputs, too (cache_frozen_outputs), or nothing"
            )
        side = BaseSide(lm_states, own, None, None)
    terms = []
    for name, given in frozen.items():
        ids, mask = given["condition_ids"], given["condition_mask"]
        inputs = PairInputs(batch.input_ids, batch.attention_mask, ids, mask, batch.told)
        if side is not None and name in unknown:
            output = frozen_output(model, name, inputs, side)
        else:
            output = AuxiliaryOutput(given["hidden"].float(), given.get("pointer"), given.get("end"))
        terms.append(model._named(name).auxiliary_terms(output, inputs, float(held[name]["weight"])))
    return lm_states, terms


def base_side(model: Any, batch: PairInputs, layers: Iterable[int]) -> BaseSide:
    """What the base makes of a batch, for auxiliaries that read these layers."""
    listed = sorted(layers)
    states, logits, *_ = model.run_lm(batch, listed, None, use_cache=False)
    return BaseSide(states, listed, logits, None)


@torch.no_grad()
def frozen_output(model: Any, name: str, batch: PairInputs, side: BaseSide) -> AuxiliaryOutput:
    """What an auxiliary makes of a batch with its own conditions.

    Args:
        model: has loaded it.
        name: its name.
        batch: without a cache.
        side: what the base made of it, with all layers that the auxiliary reads.
    """
    # In its own precision under a training loop's autocast, as the base is.
    with torch.autocast(batch.input_ids.device.type, enabled=False):
        output: AuxiliaryOutput = model.auxiliary_output(
            AuxiliaryRows(name, None, None), batch, side, use_cache=False
        )
    return output


def auxiliary_fingerprint(model: Any) -> str:
    """64 hexadecimal digits that name an auxiliary: its weights, its base, what else its output depends on.

    Where the base lies changes nothing.
    """
    moved = ("base_model_name_or_path", "base_revision", "base_gguf_file", "on_top_of")
    fields = {name: value for name, value in computing_fields(model).items() if name not in moved}
    text = json.dumps(fields, sort_keys=True, default=str)
    named = f"{weights_fingerprint(model)} {model.config.base_fingerprint} {text}"
    return hashlib.sha256(named.encode()).hexdigest()
