"""Which decoder layers of a model run as one native step, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from auxkern.core.memory import LargePages
from auxkern.core.packed import BLOCK_BYTES, STORED_COMPUTES
from auxkern.model.native.ahead import Stack
from auxkern.model.native.exchanged import exchanged
from auxkern.model.native.inputs import RecentInputs
from auxkern.model.native.layer import LayerStep, NativeLayer
from auxkern.model.native.norms import exchange_norm
from auxkern.model.native.packed_layers import ATTENTION
from auxkern.model.native.structures import FINAL_NORMS, UnknownLayerError, structure_of
from auxkern.model.native.trial import returns_tuple
from auxkern.nn import FrozenLinear

_REASON = "native_refusal"  # attribute of a layer that stays torch's


def exchange_layers(model: nn.Module, compute: str) -> None:
    """Puts native steps in the place of a model's decoder layers, each compared with the original first.

    A layer that stays keeps the reason, for ``explain``.

    Args:
        model: on the CPU, its attention "auxkern".
        compute: as in ``use_native_kernels``.
    """
    recent, memory = RecentInputs(), LargePages()
    for parent, name, layer in list(_decoder_layers(model)):
        if isinstance(layer, NativeLayer):
            layer.native_step.change(layer, compute)
            continue
        training = layer.training
        try:
            step = _step(layer.eval(), LayerStep(compute, recent, memory))
        except (UnknownLayerError, ValueError) as reason:
            setattr(layer, _REASON, str(reason))
            layer.train(training)
        else:
            setattr(parent, name, exchanged(layer, step, NativeLayer).train(training))
    for parent in list(model.modules()):
        for child in list(parent.children()):
            if isinstance(child, nn.ModuleList) and len(child) > 1 and _stack(child):
                for name in parent._modules.keys() & set(FINAL_NORMS):
                    exchange_norm(parent, name)


def _stack(layers: nn.ModuleList) -> bool:
    """Lets the layers run ahead, if every one of them is a native step; says whether they may."""
    if not all(isinstance(layer, NativeLayer) for layer in layers):
        return False
    stack = Stack(layers)
    layers.native_stack = stack  # type: ignore[assignment]
    for layer in layers:
        layer.native_step.stack = stack  # type: ignore[union-attr]
    return True


def shared_stack(layers: nn.ModuleList, some: Sequence[nn.Module]) -> nn.ModuleList:
    """Some of a model's layers for a view of it; they run ahead by themselves where all of them do."""
    shared = nn.ModuleList(some)
    if getattr(layers, "native_stack", None) is not None:
        shared.native_stack = Stack(shared)  # type: ignore[assignment]
    return shared


def _step(layer: nn.Module, step: LayerStep) -> LayerStep:
    """Raises UnknownLayerError: the layer stays, and why."""
    structure = structure_of(layer)
    width = step.pack(layer).width
    attention = getattr(layer, structure.attention).config._attn_implementation
    if attention != ATTENTION:
        raise UnknownLayerError(f"its attention is {attention!r}")
    exact = step if step.compute == "float32" else LayerStep("float32", RecentInputs(), LargePages())
    step.as_tuple = returns_tuple(layer, structure, exact, width)
    return step


def _decoder_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        if isinstance(parent, nn.ModuleList):
            for name, child in parent.named_children():
                if isinstance(child, GradientCheckpointingLayer):
                    yield parent, name, child


def leave(model: nn.Module, reason: str) -> None:
    """Has ``explain`` say why nothing of a model was exchanged."""
    setattr(model, _REASON, reason)


def explain(model: nn.Module) -> str:
    """Which decoder layers of a model run as one native step, which stay torch's and why, and the memory."""
    steps: dict[str, list[int]] = {}
    beside: list[int] = []
    kinds: list[str | None] = []
    inside: set[int] = set()
    reasons: dict[str, list[str]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, NativeLayer):
            step, reason = layer.native_step, layer.native_step.refusal
            if reason is None:
                steps.setdefault(step.compute, []).append(step.nbytes)
                kinds += step.kinds
                inside |= {id(one) for one in layer.modules()}
        else:
            reason = getattr(layer, _REASON, None)
            packed = (
                layer.last_packed if isinstance(layer, FrozenLinear) and id(layer) not in inside else None
            )
            if packed is not None:
                beside.append(packed.nbytes)
                kinds.append(packed.stored_kind)
        if reason is not None:
            reasons.setdefault(f"{type(layer).__name__}: {reason}", []).append(path or "the model")
    lines = [
        f"{len(sizes)} decoder layers run as one native step each, in {compute}; "
        f"packed weights take {sum(sizes) / 1e6:.1f} MB"
        for compute, sizes in steps.items()
    ]
    if beside:
        size = f"{sum(beside) / 1e6:.1f} MB"
        lines.append(f"{len(beside)} linear layers beside them have a packed weight; it takes {size}")
    if any(isinstance(layer, FrozenLinear) and layer.stored for layer in model.modules()):
        lines += _stored(kinds)
    lines += [f"{len(paths)} as they were, {', '.join(paths)}: {reason}" for reason, paths in reasons.items()]
    return "\n".join(lines or ["no decoder layers run as one native step; see use_native_kernels"])


def _stored(kinds: list[str | None]) -> list[str]:
    """How many packed weights are as a model's GGUF file has them, and why the others are not."""
    counts = {kind: kinds.count(kind) for kind in BLOCK_BYTES if kind in kinds}
    as_stored, rest = sum(counts.values()), len(kinds) - sum(counts.values())
    lines = []
    if as_stored:
        each = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        lines.append(f"{as_stored} packed weights are as stored in the file ({each})")
    if rest:
        lines.append(
            f"{rest} packed weights are of widened numbers: compute is not "
            f"{' or '.join(STORED_COMPUTES)}, no "
            f"tensor of {', '.join(BLOCK_BYTES)} in the file has these numbers, or a product joins two kinds"
        )
    return lines
