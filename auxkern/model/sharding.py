"""Base and auxiliary sharded over ranks, with torch's FSDP2."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from auxkern.nn import FrozenEmbedding, FrozenLinear


def shard_base(lm: Any, mesh: DeviceMesh) -> Any:
    """A frozen base that keeps 1/R of its layers on each of R ranks, and gathers a layer when it runs.

    Embeddings, the last norm and the output head stay whole on every rank: losses, samplers and pointers
    read them directly. All ranks must then run the base equally often, as ``auxkern.training.loop.train`` and
    transformers' Trainer do. Nothing of the base has a gradient, so nothing of it is ever reduced.

    Args:
        lm: of ``load_base``, with ``native=False`` on a CPU; changed in place.
        mesh: of one dimension, R.

    Returns:
        The same base.

    Raises:
        ValueError: the mesh has more dimensions, or the base's layers cannot be sharded.
    """
    _check_one_dimension(mesh)
    if any(isinstance(module, (FrozenLinear, FrozenEmbedding)) for module in lm.modules()):
        raise ValueError(
            "the base runs in auxkern's CPU kernels, which read whole weights; load it with native=False"
        )
    if getattr(lm, "hf_quantizer", None) is not None:
        raise ValueError("the base is quantised; keep a copy of it on every rank")
    lists = [module for module in lm.base_model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        kind = type(lm.base_model).__name__
        raise ValueError(f"{kind} has no list of layers; keep a copy of it on every rank")
    # Only the layers: transformers finds what a model's class can record by its name, which FSDP changes.
    for layer in max(lists, key=lambda one: sum(parameter.numel() for parameter in one.parameters())):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return lm


def shard_auxiliary(model: Any, mesh: DeviceMesh) -> Any:
    """A pair whose auxiliary, its gradients and its optimizer's state are cut over R ranks.

    Gradients are summed over the ranks, not averaged, as ``auxkern.training.loop.train`` wants them. The
    base is not touched: see ``shard_base``.

    Args:
        model: an ``AuxTunedForCausalLM``; changed in place. Make its optimizer afterwards.
        mesh: of one dimension, R.

    Returns:
        The same model.

    Raises:
        ValueError: the mesh has more dimensions.
    """
    _check_one_dimension(mesh)
    # After an evaluation too the parameters are the shards, which the optimizer knows.
    sharded: FSDPModule = fully_shard(model, mesh=mesh, reshard_after_forward=True)
    sharded.set_gradient_divide_factor(1.0)
    # Gloo cannot multiply while it sums.
    sharded.set_force_sum_reduction_for_comms(True)
    return model


def _check_one_dimension(mesh: DeviceMesh) -> None:
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names}; pass one of them, such as mesh['dp']"
        )
