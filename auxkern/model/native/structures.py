"""What decoder layers of transformers are made of: one description for each structure, no forward copied.

A description names a layer's children. A layer is of a structure where it has these children and no
others; what they compute is then told by trying them (``recognised_norm``, ``recognised_activation``),
and the layer as a whole is compared with the original before it is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

# Without an effect where nothing is trained.
SILENT_MODULES = (nn.Dropout, nn.Identity)
FINAL_NORMS = ("norm", "final_layernorm", "ln_f")  # names of what stands behind a model's layers


@dataclass(frozen=True)
class Structure:
    """Names of a layer's children, as paths from the layer.

    Attributes:
        name: what a person calls it.
        attention: the module of attention.
        mlp: the module of the MLP.
        projections: to queries, keys and values; one if they are fused.
        output: of attention.
        up: gate and up, or one: of both where ``gated``, else up alone.
        down: from the inner width.
        activation: the MLP's.
        gated: whether the activated gate multiplies what goes up.
        attention_norm, attention_after, mlp_norm, mlp_after: norms before attention and of what it adds,
            before the MLP and of what that adds; None where there is none.
        query_norm, key_norm: of attention, where it has them.
        rotary: whether positions turn queries and keys; an attribute of attention, "use_rope", may deny it.
        parallel: whether the MLP reads what attention reads.
    """

    name: str
    attention: str = "self_attn"
    mlp: str = "mlp"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    activation: str = "act_fn"
    gated: bool = True
    attention_norm: str | None = "input_layernorm"
    attention_after: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_after: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    rotary: bool = True
    parallel: bool = False

    def children(self, part: str) -> set[str]:
        """Names that "layer", "attention" or "mlp" must have, but for silent ones."""
        if part == "layer":
            norms = (self.attention_norm, self.attention_after, self.mlp_norm, self.mlp_after)
            return {self.attention, self.mlp, *filter(None, norms)}
        if part == "attention":
            return {*self.projections, self.output, *filter(None, (self.query_norm, self.key_norm))}
        return {*self.up, self.down, self.activation}


_LLAMA = Structure("pre-norm, gated")
_NORMED_HEADS = {"query_norm": "q_norm", "key_norm": "k_norm"}
_SANDWICH = {
    "attention_after": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_after": "post_feedforward_layernorm",
}
_AFTER = {
    "attention_norm": None,
    "attention_after": "post_attention_layernorm",
    "mlp_norm": None,
    "mlp_after": "post_feedforward_layernorm",
}
_PHI = {
    "output": "dense",
    "up": ("fc1",),
    "down": "fc2",
    "activation": "activation_fn",
    "gated": False,
    "mlp_norm": None,
    "parallel": True,
}


def _like(name: str, **changes: Any) -> Structure:
    return Structure(
        **{**{f.name: getattr(_LLAMA, f.name) for f in fields(Structure)}, "name": name, **changes}
    )


STRUCTURES = (
    _LLAMA,
    _like("pre-norm, gated, normed heads", **_NORMED_HEADS),
    _like("sandwich norms", **_SANDWICH),
    _like("sandwich norms, normed heads", **_SANDWICH, **_NORMED_HEADS),
    _like("norms after", **_AFTER),
    _like("norms after, normed heads", **_AFTER, **_NORMED_HEADS),
    _like("parallel", **_PHI),
    _like("parallel, normed heads", **_PHI, query_norm="q_layernorm", key_norm="k_layernorm"),
    _like(
        "pre-norm, fused projections",
        projections=("qkv_proj",),
        up=("gate_up_proj",),
        activation="activation_fn",
    ),
    _like(
        "pre-norm, learned positions",
        attention="attn",
        projections=("c_attn",),
        output="c_proj",
        up=("c_fc",),
        down="c_proj",
        activation="act",
        gated=False,
        attention_norm="ln_1",
        mlp_norm="ln_2",
        rotary=False,
    ),
)


class UnknownLayerError(ValueError):
    """A layer cannot be described, and why."""


def structure_of(layer: nn.Module) -> Structure:
    """The structure that a layer has.

    Raises:
        UnknownLayerError: none of those that are known.
    """
    for structure in STRUCTURES:
        if _fits(layer, structure):
            return structure
    names = ", ".join(name for name, _ in layer.named_children())
    raise UnknownLayerError(f"a {type(layer).__name__} of {names} has no structure that is known")


def _fits(layer: nn.Module, structure: Structure) -> bool:
    if _names(layer) != structure.children("layer"):
        return False
    attention, mlp = getattr(layer, structure.attention), getattr(layer, structure.mlp)
    return _names(attention) == structure.children("attention") and _names(mlp) == structure.children("mlp")


def _names(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_children() if not isinstance(child, SILENT_MODULES)}


def parts_of(layer: nn.Module, structure: Structure) -> Iterator[tuple[str, nn.Module]]:
    """The layer's children that compute, by their paths."""
    attention, mlp = getattr(layer, structure.attention), getattr(layer, structure.mlp)
    for owner, part in ((layer, "layer"), (attention, "attention"), (mlp, "mlp")):
        for name in sorted(structure.children(part)):
            yield f"{part}.{name}", getattr(owner, name)
