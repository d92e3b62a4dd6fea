"""What ranks say of calls that one of them, or all, must refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from auxkern import Head, Logits, SamplingParams, Sparse, VocabularyShard, cross_entropy, sample

V, N, D = 16, 4, 8


class Calls:
    """Calls of one of two ranks, each with half of the ids; ``whole`` tensors are the same on both."""

    def __init__(self, rank: int, group: Any) -> None:
        torch.manual_seed(0)
        self.rank, self.group = rank, group
        self.whole, self.target, self.hidden = torch.randn(N, V), torch.randint(V, (N,)), torch.randn(N, D)
        self.logits = self.whole[:, rank * 8 : rank * 8 + 8]

    def loss(self, terms: Any = None, target: Any = None, **options: Any) -> Any:
        options = {"process_group": self.group, **options}
        terms = self.logits if terms is None else terms
        return cross_entropy(terms, self.target if target is None else target, **options)

    def draw(self, terms: Any = None, **options: Any) -> Any:
        options = {"process_group": self.group, "seed": torch.arange(N), "position": 0, **options}
        return sample([self.logits] if terms is None else terms, **options)

    def sparse(self, id: int) -> Sparse:
        return Sparse(torch.full((N, 1), id), torch.ones(N, 1))

    def fsdp(self, **options: Any) -> Any:
        """A head whose weight FSDP2 has sharded, on a batch of this rank's own."""
        module = torch.nn.Linear(D, V, bias=False)
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=options.pop("names", None))
        fully_shard(module, mesh=mesh)
        torch.manual_seed(self.rank)
        target = torch.randint(V, (N,)) if options.pop("own", True) else self.target
        head = Head(torch.randn(N, D), module.weight)
        if options.pop("drawn", False):
            return sample([head], seed=torch.arange(N), position=0)
        return cross_entropy(head, target, **options)

    def all(self) -> dict[str, Callable[[], Any]]:
        """Name and call; ``first`` marks what is wrong on the first rank only, ``last`` on the last."""
        shard = VocabularyShard(self.group, self.rank, (8, 8))
        first, last = self.rank == 0, self.rank == 1
        beyond, short = self.target.clone(), torch.randn(N, 5)
        beyond[2] = V
        long = self.target if first else torch.cat([self.target, self.target])
        return {
            "sparse id, last": lambda: self.loss([self.logits, self.sparse(V if last else 0)]),
            "sparse id": lambda: self.loss([self.logits, self.sparse(V)]),
            "sparse id drawn, last": lambda: self.draw([self.logits, self.sparse(-1 if last else 0)]),
            "target beyond, first": lambda: self.loss(target=beyond if first else self.target),
            "target": lambda: self.loss(target=(self.target + self.rank) % V),
            "target's rows, last": lambda: self.loss(target=long),
            "target's dtype, first": lambda: self.loss(target=self.target.float() if first else self.target),
            "whole logits, last": lambda: self.loss(self.whole if last else self.logits, process_group=shard),
            "whole logits beside a head, first": lambda: self.loss(
                [self.whole if first else self.logits, Head(self.hidden, torch.randn(8, D))]
            ),
            "vocab_size": lambda: self.loss(vocab_size=8),
            "vocab_size, last": lambda: self.loss(vocab_size=15 if last else 16),
            "vocab_size's type, first": lambda: self.loss(vocab_size="15" if first else 15),
            "label_smoothing, last": lambda: self.loss(label_smoothing=2.0 if last else 0.1),
            "label_smoothing": lambda: self.loss(label_smoothing=0.1 * self.rank),
            "return_stats": lambda: self.loss(return_stats=first),
            "gradient": lambda: self.loss(self.logits.clone().requires_grad_(first)),
            "terms": lambda: self.loss([self.logits] if first else [self.logits, self.logits]),
            "no terms, last": lambda: self.loss([] if last else [self.logits]),
            "no term, first": lambda: self.draw(["z"] if first else [self.logits]),
            "scale": lambda: self.loss(Logits(self.logits, scale=1.0 + self.rank)),
            "group or shard": lambda: self.loss(process_group=shard if first else self.group),
            "backend, last": lambda: self.loss(backend="triton" if last else None),
            "seed": lambda: self.draw(seed=torch.arange(N) + self.rank),
            "top_logprobs, first": lambda: self.draw(top_logprobs=99 if first else 1),
            "params, last": lambda: self.draw(params={"top_k": 1} if last else SamplingParams(top_k=1)),
            "rows, last": lambda: self.draw([self.logits, short[:, :0] if last else self.logits]),
            "fsdp": self.fsdp,
            "fsdp, named": lambda: self.fsdp(names=("dp",)),
            "fsdp, same target": lambda: self.fsdp(own=False),
            "fsdp drawn": lambda: self.fsdp(drawn=True),
            "fsdp, group": lambda: self.fsdp(process_group=self.group),
            "no rows": lambda: self.loss(self.logits[:0], self.target[:0]),
            "no rows of a head": lambda: self.loss(
                Head(self.hidden[:0], torch.randn(8, D, requires_grad=True)),
                self.target[:0],
                return_stats=True,
            )[0],
            "no rows drawn": lambda: (
                self.draw([self.logits[:0]], seed=torch.arange(0), return_logprobs=True).tokens
            ),
            "no rows filtered": lambda: (
                self.draw(
                    [self.logits[:0]], seed=torch.arange(0), params=SamplingParams(top_k=2), top_logprobs=2
                ).tokens
            ),
            "0-d": lambda: self.loss(self.logits[0], self.target[0], return_stats=True)[1].nll,
            "0-d head": lambda: self.loss(
                Head(self.hidden[0], torch.ones(8, D)), self.target[0], label_smoothing=0.1
            ),
            "0-d drawn": lambda: self.draw([self.logits[0]], seed=3, return_logprobs=True).logprob.shape,
        }


def rank_result(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """What each call raised or returned."""
    calls = Calls(rank, dist.group.WORLD)
    found = {}
    for name, call in calls.all().items():
        try:
            result = call()
            found[name] = result.detach() if isinstance(result, torch.Tensor) else result
        except (TypeError, ValueError, RuntimeError) as error:
            found[name] = error
    return {"found": found, "whole": calls.whole, "target": calls.target}
