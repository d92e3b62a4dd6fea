"""Cases of a vocabulary that is cut over ranks, and what one rank computes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import auxkern
from auxkern import Head, Logits, Sparse, VocabularyShard
from tests.support.cases import generator

V, N = 101, 24

Case = tuple[list[Any], Tensor, dict[str, Any]]


def _leaf(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0, grad: bool = True) -> Tensor:
    made = scale * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
    return made.to(dtype).requires_grad_(grad)


def _target(seed: int = 0, shape: tuple[int, ...] = (N,)) -> Tensor:
    return torch.randint(0, V, shape, generator=generator(seed))


def logits_case(dtype: torch.dtype) -> Case:
    a, b = (_leaf(N, V, seed=i, dtype=dtype, scale=3.0) for i in (1, 2))
    target = _target()
    target[3] = -100
    return [Logits(a, scale=0.5, softcap=4.0), Logits(b)], target, {"return_stats": True, "z_loss": 1e-2}


def heads_case(dtype: torch.dtype) -> Case:
    lm = Head(_leaf(N, 16, seed=1, dtype=dtype, grad=False), _leaf(V, 16, seed=2, dtype=dtype, grad=False))
    aux = Head(
        _leaf(N, 8, seed=3, dtype=dtype),
        _leaf(V, 8, seed=4, dtype=dtype),
        _leaf(V, seed=5, dtype=dtype),
        scale=0.7,
    )
    return [lm, aux], _target(), {}


def everything_case(dtype: torch.dtype) -> Case:
    B, T = 4, 6
    terms = [
        Logits(_leaf(B, T, V, seed=1, dtype=dtype)),
        Head(_leaf(B, T, 8, seed=2, dtype=dtype), _leaf(V, 8, seed=3, dtype=dtype)),
        Sparse(_target(4, (B, T, 3)), _leaf(B, T, 3, seed=5, dtype=dtype)),
    ]
    options = {
        "return_stats": True,
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "shift": True,
        "token_weight": torch.rand(B, T, generator=generator(6), dtype=torch.float64).to(dtype),
    }
    return terms, _target(7, (B, T)), options


def sure_case() -> Case:
    z = _leaf(N, V, seed=1, dtype=torch.float32)
    target = _target()
    with torch.no_grad():
        z[torch.arange(N), target] += torch.linspace(5, 25, N)
        z += 1e4
    return [Logits(z)], target, {"reduction": "sum"}


def masked_case() -> Case:
    z = _leaf(N, V, seed=1, dtype=torch.float64)
    with torch.no_grad():
        z[:, [0, 51, 76]] = -torch.inf  # what a row is scored against where its target is elsewhere
    target = _target().clamp_min(1)
    target[target == 51] = 52
    target[target == 76] = 77
    return [Logits(z)], target, {"return_stats": True}


def padded_case() -> Case:
    head = Head(_leaf(N, 8, seed=2, dtype=torch.float64), _leaf(V, 8, seed=3, dtype=torch.float64))
    target = _target().clamp_max(96)
    target[::3] = 2
    return [head], target, {"vocab_size": 97, "ignore_index": 2, "return_stats": True}


def counted_case(valid: int) -> Case:
    rows = 330
    head = Head(_leaf(rows, 8, seed=2, dtype=torch.float64), _leaf(V, 8, seed=3, dtype=torch.float64))
    target = _target(1, (rows,))
    target[valid:] = -100
    return [head], target, {"normalizer": torch.tensor(float(max(1, valid)))}


CASES: dict[str, Callable[[], Case]] = {
    "logits, float64": lambda: logits_case(torch.float64),
    "logits, float32": lambda: logits_case(torch.float32),
    "heads, float64": lambda: heads_case(torch.float64),
    "heads, float32": lambda: heads_case(torch.float32),
    "everything, float64": lambda: everything_case(torch.float64),
    "everything, float32": lambda: everything_case(torch.float32),
    "sure targets, offset 1e4": sure_case,
    "ids that cannot be": masked_case,
    "padded vocabulary": padded_case,
    "64 rows count": lambda: counted_case(64),
    "320 rows count": lambda: counted_case(320),
    "no row counts": lambda: counted_case(0),
}


def draw_case(name: str) -> tuple[list[Any], dict[str, Any]]:
    """Terms, and what ``sample`` takes beside them."""
    B, T = 6, 8
    a, b = (_leaf(B, T, V, seed=i, dtype=torch.float64, scale=3.0, grad=False) for i in (1, 2))
    head = Head(
        _leaf(B, T, 8, seed=3, dtype=torch.float64, grad=False),
        _leaf(V, 8, seed=4, dtype=torch.float64, grad=False),
    )
    pointer = Sparse(_target(5, (B, T, 3)), _leaf(B, T, 3, seed=6, dtype=torch.float64, grad=False))
    seeds = {"seed": torch.arange(B * T).view(B, T) * 7919, "position": 11}
    if name == "plain":
        return [Logits(a, softcap=5.0), Logits(b)], {**seeds, "return_logprobs": True}
    if name == "temperatures":
        temperature = torch.linspace(0, 2, B * T, dtype=torch.float64)
        params = auxkern.SamplingParams(temperature=temperature)
        return [Logits(a), head, pointer], {**seeds, "params": params, "return_logprobs": True}
    if name == "filters":
        params = auxkern.SamplingParams(top_k=20, top_p=0.8, min_p=0.01, repetition_penalty=1.3)
        history = _target(8, (B, T, 5))
        return [Logits(a), head, pointer], {
            **seeds,
            "params": params,
            "history": history,
            "return_logprobs": True,
            "top_logprobs": 4,
        }
    if name == "fewer ids":
        return [Logits(a), head], {**seeds, "vocab_size": 97, "params": auxkern.SamplingParams(top_k=5)}
    a = a.clone()
    a[0, 0, 3], a[0, 1, 100], a[0, 2] = torch.nan, torch.inf, -torch.inf
    a[0, 3] = -torch.inf
    a[0, 3, [5, 30, 60, 100]] = 0.0
    return [Logits(a)], {**seeds, "return_logprobs": True}


DRAWS = ("plain", "temperatures", "filters", "fewer ids", "rows without a token")


def drawn(terms: list[Any], options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What ``sample`` returns, by name."""
    return vars(auxkern.sample(terms, **options, **more))


def sizes(world: int) -> list[int]:
    """Ids of each rank: V is no multiple of 2 or 4."""
    each = -(-V // world)
    return [min(each, V - rank * each) for rank in range(world)]


def cut(term: Any, ids: slice) -> Any:
    """A rank's part of a term, of leaves of its own."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    if isinstance(term, Sparse):
        return Sparse(term.ids, leaf(term.values))
    if isinstance(term, Logits):
        return Logits(leaf(term.values[..., ids]), term.scale, term.softcap)
    bias = None if term.bias is None else leaf(term.bias[ids])
    return Head(leaf(term.hidden), leaf(term.weight[ids]), bias, term.scale, term.softcap)


def result(terms: list[Any], target: Tensor, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Loss, stats and gradients of a case."""
    found = auxkern.cross_entropy(terms, target, **options, **more)
    loss, stats = found if options.get("return_stats") else (found, None)
    (loss * 3.0).backward()
    gradients = [
        {name: tensor.grad for name, tensor in term.tensors.items() if tensor.requires_grad} for term in terms
    ]
    return {"loss": loss.detach(), "stats": stats and stats._asdict(), "gradients": gradients}


def rank_result(folder: Path, rank: int, world: int) -> dict[str, Any]:
    first = sum(sizes(world)[:rank])
    ids = slice(first, first + sizes(world)[rank])
    shard = VocabularyShard.of(dist.group.WORLD, sizes(world)[rank])
    found = {}
    for name, make in CASES.items():
        terms, target, options = make()
        # Asked anew by the one, known beforehand by the other.
        group = dist.group.WORLD if name.endswith("float64") else shard
        found[name] = result([cut(term, ids) for term in terms], target, options, process_group=group)
    draws = {}
    for name in DRAWS:
        drawing, settings = draw_case(name)
        draws[name] = drawn([cut(term, ids) for term in drawing], settings, process_group=shard)
    known = (shard.first_id, shard.size, shard.vocab_size)
    return {"shard": known, "cases": found, "draws": draws}
