"""One of several processes, and the bytes that it hands to collectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import auxkern
from auxkern import Head, Logits, VocabularyShard
from auxkern.model.sharding import shard_auxiliary, shard_base
from auxkern.training.collator import AuxCollator
from auxkern.training.loop import train
from auxkern.training.settings import LoopSettings
from tests.support.batches import texts
from tests.support.tiny import KIND, PAD, tiny_pair

N, V, D_LM, D_AUX = 24, 100, 16, 8


class Traffic(TorchDispatchMode):
    """Bytes that go into each collective, by its kind: "allreduce", "allgather", "reduce_scatter"."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname.strip("_")
            # What is received stands before what is sent, where they are two.
            sent = args[0] if name.startswith(("allreduce", "broadcast", "barrier")) else args[1]
            size = sum(leaf.nbytes for leaf in tree_leaves(sent) if isinstance(leaf, Tensor))
            self.calls.append((name.removesuffix("_base"), size))
        return func(*args, **(kwargs or {}))


def loss_traffic(shard: VocabularyShard, rank: int) -> list[tuple[str, int]]:
    """Of the loss of two heads, the LM's frozen, in float32."""

    def made(*shape: int, grad: bool) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).requires_grad_(grad)

    lm = Head(made(N, D_LM, grad=False), made(shard.size, D_LM, grad=False))
    aux = Head(made(N, D_AUX, grad=True), made(shard.size, D_AUX, grad=True))
    with Traffic() as traffic:
        auxkern.cross_entropy([lm, aux], torch.arange(N), process_group=shard).backward()
    return traffic.calls


def draw_traffic(shard: VocabularyShard, **options: Any) -> list[tuple[str, int]]:
    """Of drawing a token for each row."""
    terms = [Logits(torch.zeros(N, shard.size))]
    with Traffic() as traffic:
        auxkern.sample(terms, seed=torch.arange(N), position=0, process_group=shard, **options)
    return traffic.calls


def step_traffic(
    folder: Path, mesh: Any, *, steps: int = 3, batches: int = 4, shard: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Of so many steps of so many batches, and the sizes of the pair."""
    model = tiny_pair(KIND, trained=False).train()
    body = model.lm.base_model
    found = {
        "P": sum(p.numel() for p in model.parameters()),
        "tensors": sum(1 for _ in model.parameters()),
        "layers": sum(p.numel() for p in body.layers.parameters()),
    }
    if "base" in shard:
        shard_base(model.lm, mesh)
    if "auxiliary" in shard:
        shard_auxiliary(model, mesh)
    passes = []
    handle = body.register_forward_hook(lambda *_: passes.append(1))
    settings = LoopSettings(
        output=str(folder),
        steps=steps,
        batch_size=2,
        gradient_accumulation=batches,
        learning_rate=1e-3,
        log_every=1,
        save_every=10**6,
    )
    examples = texts(2 * batches)
    with Traffic() as traffic:
        train(model, examples, settings, collate=AuxCollator(PAD), process_group=mesh)
    handle.remove()
    return {**found, "calls": traffic.calls, "forward passes of the base": len(passes)}


def rank_result(folder: Path, rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    shard = VocabularyShard.of(dist.group.WORLD, V // world)
    return {
        "loss": loss_traffic(shard, rank),
        "draw": draw_traffic(shard),
        "filtered draw": draw_traffic(shard, params=auxkern.SamplingParams(top_k=5)),
        "three steps": step_traffic(folder / "three", mesh),
        "five steps": step_traffic(folder / "five", mesh, steps=5),
        "more batches": step_traffic(folder / "more", mesh, batches=6),
        "sharded base": step_traffic(folder / "base", mesh, shard=("base",)),
        "sharded auxiliary": step_traffic(folder / "auxiliary", mesh, shard=("auxiliary",)),
    }
