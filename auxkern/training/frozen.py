"""Trained auxiliaries that stand in the sum, frozen, while another is trained on top of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from auxkern.model.config import AuxTunedConfig
from auxkern.model.frozen import auxiliary_fingerprint
from auxkern.model.modeling import DEFAULT, AuxTunedForCausalLM
from auxkern.model.native import compute_of, use_native_kernels
from auxkern.model.text import TextFormat

# A sum has 8 terms: the base's, two of the auxiliary that is trained, one of all frozen pointers.
_MOST_HEADS = 4


class FrozenSource(NamedTuple):
    """An auxiliary that is to be held frozen.

    Attributes:
        path: folder or Hub name.
        weight: of its logits in the sum; None for the one that it was trained with.
    """

    path: str
    weight: float | None


def frozen_sources(frozen: Mapping[str, Any]) -> dict[str, FrozenSource]:
    """What the setting ``frozen`` says: PATH[:WEIGHT] by name.

    Raises:
        TypeError: a value is not a str.
        ValueError: a name or a path is empty, a name is taken, or a weight is not finite.
    """
    sources = {}
    for name, written in frozen.items():
        if name in ("", DEFAULT):
            raise ValueError(
                f"frozen has an auxiliary named {name!r}; {DEFAULT!r} is the one that is trained"
            )
        if not isinstance(written, str):
            raise TypeError(f"frozen {name!r} must be PATH or PATH:WEIGHT, got {written!r}")
        path, colon, last = written.rpartition(":")
        weight = _number(last) if colon else None
        if weight is None:
            path = written
        elif not math.isfinite(weight):
            raise ValueError(f"frozen {name!r} has the weight {last}; give a finite number")
        if not path:
            raise ValueError(
                f"frozen {name!r} is {written!r}, which names no folder; write PATH or PATH:WEIGHT"
            )
        sources[name] = FrozenSource(path, weight)
    return sources


def shared_text_prefix(configs: Mapping[str, AuxTunedConfig], given: str | None) -> str | None:
    """What stands before every text: as the auxiliaries that are held frozen know it; ``given`` without any.

    Args:
        configs: of them, by name.
        given: what the user wants, or None.

    Raises:
        ValueError: one was trained on texts that begin with something else.
    """
    for name, config in configs.items():
        given = config.text_prefix if given is None else given
        if config.text_prefix != given:
            raise ValueError(
                f"frozen {name!r} was trained with text_prefix {config.text_prefix!r}, but here it is "
                f"{given!r}; all members of a sum read one text: make them with one text_prefix"
            )
    return given


def hold_frozen(
    model: AuxTunedForCausalLM, frozen: Mapping[str, Any], text_format: TextFormat
) -> dict[str, TextFormat]:
    """Puts trained auxiliaries into a pair's sum, frozen, for training its own on top of them.

    The loss of a batch of such examples is the cross entropy of base + weighted frozen auxiliaries + the
    pair's own. ``model.config.on_top_of`` records them, and is saved with the auxiliary.

    Args:
        model: changed in place: the auxiliaries are loaded under their names.
        frozen: PATH or PATH:WEIGHT of each, by name.
        text_format: of the pair.

    Returns:
        How the condition of each is written, for ``encode(..., frozen=...)``.

    Raises:
        OSError: there is no such auxiliary.
        ValueError: one was made for another base, a name is taken, a weight is not finite, texts begin
            otherwise, or more than four have output embeddings of their own.
    """
    sources = frozen_sources(frozen)
    formats, held = {}, {}
    for name, source in sources.items():
        model.load_auxiliary(name, source.path)
        other = model._named(name).requires_grad_(False)
        shared_text_prefix({name: other.config}, text_format.text_prefix)
        weight = model.auxiliary_scale(name) if source.weight is None else source.weight
        held[name] = {"path": source.path, "weight": weight, "fingerprint": auxiliary_fingerprint(other)}
        compute = compute_of(model.lm)
        if compute is not None:
            use_native_kernels(other, compute)
        formats[name] = TextFormat(text_format.tokenizer, other.config.condition_template)
    heads = [name for name in sources if model._named(name).config.head == "own"]
    if len(heads) > _MOST_HEADS:
        raise ValueError(
            f"frozen are {len(heads)} auxiliaries with output embeddings of their own, {', '.join(heads)}; "
            f'{_MOST_HEADS} can be: make them with head="shared", or hold fewer'
        )
    model.config.on_top_of = {**model.config.on_top_of, **held}
    return formats


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
