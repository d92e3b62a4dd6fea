"""Auxiliaries that stand in a pair's sum, frozen, while its own is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from auxkern.core.terms import Term
from auxkern.model import base
from auxkern.model.caches import AuxiliaryRows
from auxkern.model.fingerprints import computing_fields, weights_fingerprint
from auxkern.model.inputs import BaseSide, PairInputs
from auxkern.model.interface import AuxiliaryOutput

if TYPE_CHECKING:
    from auxkern.model.modeling import AuxTunedForCausalLM

# Of one auxiliary, by its name: condition_ids and condition_mask (B, K), and, where they are known, the parts
# of its output: hidden (B, T, D), and of a pointer pointer (B, T, K) and end (B, T).
Frozen = Mapping[str, Mapping[str, Tensor]]


@torch.no_grad()
def frozen_terms(
    model: AuxTunedForCausalLM, batch: PairInputs, frozen: Frozen, lm_states: Tensor | None
) -> tuple[Tensor | None, list[list[Term]]]:
    """What auxiliaries held frozen add to the logits of all positions, rows (B, T), without gradients.

    The base runs at most once, for them and for the model's own auxiliary.

    Args:
        model: has loaded the auxiliaries; ``config.on_top_of`` says with which weights they are held.
        batch: without a cache.
        frozen: what is known of each.
        lm_states: (B, T, 1 + L, D_lm) as in ``forward``, or None.

    Returns:
        lm_states of the model's own layers, where they are known now, and each auxiliary's terms.

    Raises:
        ValueError: an auxiliary is not held, or lm_states lack a layer that it reads.
    """
    held = model.config.on_top_of
    for name in frozen:
        if name not in held or name not in model.auxiliary_names:
            raise ValueError(
                f"auxiliary {name!r} is not held frozen, those are {list(held)}; "
                "auxkern.training.frozen.hold_frozen does it"
            )
    unknown = [name for name, given in frozen.items() if "hidden" not in given]
    side = None
    if unknown:
        lm_states, side = _base_side(model, batch, unknown, lm_states)
    added = []
    for name, given in frozen.items():
        inputs = PairInputs(
            batch.input_ids, batch.attention_mask, given["condition_ids"], given["condition_mask"]
        )
        other, weight = model._named(name), float(held[name]["weight"])
        if side is not None and name in unknown:
            part = AuxiliaryRows(name, None, None)
            # In their own precision under the training loop's autocast, as the base is.
            with torch.autocast(batch.input_ids.device.type, enabled=False):
                _, terms = model.auxiliary_part(part, inputs, side, weight, use_cache=False, keep=0)
        else:
            output = AuxiliaryOutput(given["hidden"].float(), given.get("pointer"), given.get("end"))
            terms = other.auxiliary_terms(output, inputs, weight)
        added.append(terms)
    return lm_states, added


def _base_side(
    model: AuxTunedForCausalLM, batch: PairInputs, names: list[str], lm_states: Tensor | None
) -> tuple[Tensor | None, BaseSide]:
    """The model's own lm_states, where they can stand for a pass of the base, and what all of them read."""
    own = model.config.lm_layers
    layers = sorted({*own, *model.layers_read(names)})
    if lm_states is not None:
        if layers != own:
            raise ValueError(
                f"lm_states are for lm_layers {own}, but auxiliaries held frozen read "
                f"{model.layers_read(names)}; cache their outputs, too (cache_frozen_outputs), or nothing"
            )
        return lm_states, BaseSide(lm_states, layers, None, base.output_head(model.lm))
    want_logits = model.config.lm_term == "logits"
    ids, mask = batch.input_ids, batch.attention_mask
    states, logits, _ = base.run_base(model.lm, ids, mask, layers=layers, want_logits=want_logits)
    if want_logits:
        # Its states do not stand for its logits: it runs once more.
        return None, BaseSide(states, layers, logits, None)
    chosen = states[:, :, [0, *(1 + layers.index(layer) for layer in own)]]
    return chosen, BaseSide(states, layers, None, base.output_head(model.lm))


def auxiliary_fingerprint(model: AuxTunedForCausalLM) -> str:
    """64 hexadecimal digits that name an auxiliary: its weights, its base, what else its output depends on.

    Where the base lies changes nothing.
    """
    moved = ("base_model_name_or_path", "base_revision", "base_gguf_file", "on_top_of")
    fields = {name: value for name, value in computing_fields(model).items() if name not in moved}
    text = json.dumps(fields, sort_keys=True, default=str)
    named = f"{weights_fingerprint(model)} {model.config.base_fingerprint} {text}"
    return hashlib.sha256(named.encode()).hexdigest()


def trained_on_top_of(on_top_of: Mapping[str, Any]) -> str:
    """The auxiliaries of ``AuxTunedConfig.on_top_of`` in words."""
    return ", ".join(
        f"{name} ({held['path']}, weight {held['weight']:g})" for name, held in on_top_of.items()
    )
