"""Random calls over a cut vocabulary against the formulas in float64, in each of several processes.

Every rank makes the same call from its number.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import auxkern
from auxkern import Head, Logits, SamplingParams, Sparse, VocabularyShard
from tests.support.ranks import cut

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What a mask puts beside the logits. Two of the least finite numbers add up to -inf.
MASKS = (-torch.inf, torch.finfo(torch.float32).min, -1e9)


@dataclass
class Call:
    """One random call.

    Attributes:
        terms: with whole tensors, leaves.
        target: (N,).
        sizes: ids of each rank.
        options: of ``cross_entropy``.
        vocab_size: ids that count.
        autocast: dtype of the caller's autocast, or None.
    """

    terms: list[Any]
    target: Tensor
    sizes: list[int]
    vocab_size: int
    options: dict[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None


def _tensor(rng: random.Random, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    source = torch.Generator().manual_seed(rng.getrandbits(40))
    made = (scale * torch.randn(*shape, generator=source, dtype=torch.float64)).to(dtype)
    return made.requires_grad_(rng.random() < 0.8)


@torch.no_grad()
def _mask(rng: random.Random, values: Tensor, firsts: list[int]) -> None:
    """Ids that cannot be: single ones, those that shards begin with, a whole shard."""
    least = torch.finfo(values.dtype).min
    mask = max(rng.choice(MASKS), least) if rng.random() < 0.7 else -torch.inf
    V = values.shape[-1]
    kind = rng.randrange(4)
    if kind == 0:
        values[..., rng.sample(range(V), rng.randint(1, V))] = mask
    elif kind == 1:
        values[..., firsts] = mask
    elif kind == 2:
        shard = rng.randrange(len(firsts))
        values[..., firsts[shard] : [*firsts, V][shard + 1]] = mask
    elif values.dim() > 1 and values.shape[0]:
        values[rng.randrange(values.shape[0]), rng.randrange(V)] = mask


def _terms(
    rng: random.Random, N: int, V: int, used: int, firsts: list[int], dtypes: list[torch.dtype]
) -> list[Any]:
    terms: list[Any] = []
    for _ in range(rng.randint(1, 3)):
        scaling = {"scale": rng.choice((1.0, 1.0, 0.5, -0.7)), "softcap": rng.choice((None, None, 5.0))}
        if rng.random() < 0.5:
            values = _tensor(rng, N, V, dtype=rng.choice(dtypes), scale=rng.choice((1.0, 4.0)))
            if rng.random() < 0.4 and scaling["scale"] > 0:
                _mask(rng, values, firsts)
            terms.append(Logits(values, **scaling))
            continue
        D = rng.choice((1, 8, 17, 48))
        bias = _tensor(rng, V, dtype=rng.choice(dtypes)) if rng.random() < 0.5 else None
        if bias is not None and rng.random() < 0.5 and scaling["scale"] > 0:
            _mask(rng, bias, firsts)
        weight = _tensor(rng, V, D, dtype=rng.choice(dtypes), scale=rng.choice((0.1, 0.5)))
        terms.append(Head(_tensor(rng, N, D, dtype=rng.choice(dtypes)), weight, bias, **scaling))
    if rng.random() < 0.4:
        K = rng.randint(0, 4)
        ids = torch.tensor([[rng.randrange(used) for _ in range(K)] for _ in range(N)]).long().view(N, K)
        values = _tensor(rng, N, K, dtype=rng.choice(dtypes), scale=3.0)
        if K and N and rng.random() < 0.3:
            with torch.no_grad():
                values[rng.randrange(N), rng.randrange(K)] = rng.choice((-torch.inf, -1e4))
        terms.append(Sparse(ids, values))
    return terms


def call_of(number: int, world: int) -> Call:
    """The call of a number, for so many ranks."""
    rng = random.Random(number)
    sizes = [rng.choice((1, 2, 7, 16, 33, 64)) for _ in range(world)]
    firsts = [sum(sizes[:rank]) for rank in range(world)]
    V, N = sum(sizes), rng.choice((0, 1, 2, 7, 33))
    dtypes = [rng.choice(FLOATS)] if rng.random() < 0.5 else list(FLOATS[: rng.choice((2, 3, 3, 4))])
    used = V - rng.randrange(sizes[-1]) if rng.random() < 0.2 else V
    terms = _terms(rng, N, V, used, firsts, dtypes)
    ignore = rng.choice((-100, -1, 0))
    target = torch.tensor([ignore if rng.random() < 0.2 else rng.randrange(used) for _ in range(N)]).long()
    options: dict[str, Any] = {"ignore_index": ignore, "reduction": rng.choice(("mean", "sum", "none"))}
    if rng.random() < 0.3:
        options["label_smoothing"] = rng.choice((0.1, 1.0))
    if rng.random() < 0.3:
        options["z_loss"] = 1e-2
    if rng.random() < 0.3:
        options["return_stats"] = True
    if rng.random() < 0.3:
        options["chunk_rows"] = rng.choice((1, 4, 50))
    if used < V:
        options["vocab_size"] = used
    if rng.random() < 0.3:
        options["token_weight"] = torch.tensor([rng.choice((0.0, 0.5, 2.0)) for _ in range(N)])
    if rng.random() < 0.2:
        options["backend"] = "reference"
    autocast = rng.choice((torch.bfloat16, torch.float16)) if rng.random() < 0.2 else None
    return Call(terms, target, sizes, used, options, autocast)


# --- in float64 ---------------------------------------------------------------------------------


def exact_shares(call: Call) -> list[Tensor]:
    """(N, V) float64 of each term."""
    N, V = len(call.target), call.vocab_size
    shares = []
    for term in call.terms:
        if isinstance(term, Sparse):
            zero = torch.zeros(N, sum(call.sizes), dtype=torch.float64)
            for k in range(term.ids.shape[1]):
                # Not scatter_add of products: 0 times -inf is NaN.
                zero[torch.arange(N), term.ids[:, k]] += term.values[:, k].double()
            shares.append(zero[:, :V])
            continue
        x = (
            term.values.double()
            if isinstance(term, Logits)
            else term.hidden.double() @ term.weight.double().T
        )
        if isinstance(term, Head) and term.bias is not None:
            x = x + term.bias.double()
        x = x[:, :V]
        if term.softcap:
            x = term.softcap * torch.tanh(x / term.softcap)
        shares.append(term.scale * x)
    return shares


def _nll(z: Tensor, y: Tensor) -> Tensor:
    lse = z.logsumexp(-1)
    return torch.where(lse == -torch.inf, torch.nan, lse - z.gather(-1, y[:, None])[:, 0])


@torch.no_grad()
def expected(call: Call) -> dict[str, Any]:
    """Rows, and the gradient of their sum with weights 3, 4, 5, ... by tensor."""
    shares, options = exact_shares(call), call.options
    z = torch.stack(shares).sum(0)
    # The least numbers of float32 add up to -inf there.
    double = any(t.dtype == torch.float64 for term in call.terms for t in term.tensors.values())
    z = z if double else torch.where(z < torch.finfo(torch.float32).min, -torch.inf, z)
    counts = call.target != options["ignore_index"]
    y = call.target.masked_fill(~counts, 0)
    lse, nll = z.logsumexp(-1), _nll(z, y)
    s, q, V = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0), call.vocab_size
    row = nll if s == 0 else (1 - s) * nll + s * (lse[:, None] - z).mean(-1)
    row = row if q == 0 else row + q * lse.square()
    weight = options.get("token_weight", torch.ones(len(y))).double()
    weight = torch.where(counts, weight, 0.0)
    row = torch.where(counts, row if double else row.float().double(), 0.0)
    loss = row * weight
    g = weight * torch.arange(3, 3 + len(y)).double()
    if options["reduction"] != "none":
        total = weight.sum() if "token_weight" in options else counts.double().sum()
        divisor = total if options["reduction"] == "mean" and total > 0 else torch.ones(()).double()
        g, loss = 3 * weight / divisor, loss.sum() / divisor
    p = (z - lse[:, None]).exp()
    one = torch.nn.functional.one_hot(y, V).double()
    dz = g[:, None] * ((1 + 2 * q * lse)[:, None] * p - (1 - s) * one - s / V)
    live = (counts & (g != 0))[:, None]
    dz = torch.where(live, dz, 0.0)
    # What dz is a difference of.
    parts = g.abs()[:, None] * ((1 + (2 * q * lse).abs())[:, None] * p + s / V + one)
    parts = torch.where(live, parts, 0.0)
    each = [torch.where(counts, _nll(share, y), 0.0) for share in shares]
    stats = {"nll": torch.where(counts, nll, 0.0), "lse": torch.where(counts, lse, 0.0)}
    return {
        "row": row,
        "loss": loss,
        "z": z,
        "dz": dz,
        "parts": parts,
        "stats": stats,
        "term_nll": each,
        "live": live,
    }


@torch.no_grad()
def exact_gradients(
    call: Call, dz: Tensor, slack: Tensor, unit: float
) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Gradient of each tensor, and how far from it rounded sums may lie; from dz it is ``slack``."""
    V, padding = call.vocab_size, sum(call.sizes) - call.vocab_size
    found: list[dict[str, tuple[Tensor, Tensor]]] = []
    for term in call.terms:
        if isinstance(term, Sparse):
            d, e = dz.gather(1, term.ids), slack.gather(1, term.ids)
            found.append({"values": (d, e)})
            continue
        d, e = dz * term.scale, slack * abs(term.scale)
        if term.softcap:
            x = term.values.double() if isinstance(term, Logits) else _products(term)
            slope = 1 - torch.tanh(x[:, :V] / term.softcap) ** 2
            d, e = d * slope, e * slope + unit * d.abs()  # a small slope is a difference
        if isinstance(term, Logits):
            d, e = (torch.nn.functional.pad(t, (0, padding)) for t in (d, e))
            found.append({"values": (d, e)})
            continue
        h, w = term.hidden.double(), term.weight.double()[:V]
        sums = {"hidden": (d @ w, e @ w.abs()), "weight": (d.T @ h, e.T @ h.abs())}
        sums["weight"] = tuple(torch.nn.functional.pad(x, (0, 0, 0, padding)) for x in sums["weight"])
        if term.bias is not None:
            sums["bias"] = tuple(torch.nn.functional.pad(x, (0, padding)) for x in (d.sum(0), e.sum(0)))
        found.append(sums)
    return found


def _products(head: Head) -> Tensor:
    x = head.hidden.double() @ head.weight.double().T
    return x if head.bias is None else x + head.bias.double()


# --- over ranks ---------------------------------------------------------------------------------


def _differs(ours: Tensor, exact: Tensor, bound: Tensor | float) -> bool:
    # The least numbers of float32 add up to -inf there.
    ours, exact = ours.double(), exact.to(ours.dtype).double()
    same = (ours == exact) | (ours.isnan() & exact.isnan())
    same |= ours.isinf() & (exact.abs() > 1e36)  # a sum that is divided afterwards
    return not bool((same | ((ours - exact).abs() <= bound)).all())


def wrong_with(number: int, rank: int, world: int, group: Any) -> list[str]:
    """Sentences about the loss of one call."""
    call = call_of(number, world)
    exact = expected(call)
    tops = exact["z"].amax(-1) if len(call.target) else torch.zeros(0)
    if bool(((tops < -300) & (tops > -torch.inf)).any()):
        return []  # float32 has no digits left for what such a row's logits differ in
    beyond = (tops == -torch.inf) | (exact["row"] > 1e36)
    if bool((beyond & ~exact["live"][:, 0]).any()):
        return []  # NaN or infinity times a weight of 0
    first = sum(call.sizes[:rank])
    ids = slice(first, first + call.sizes[rank])
    terms = [cut(term, ids) for term in call.terms]
    shard = group if number % 2 else VocabularyShard(group, rank, tuple(call.sizes))
    with torch.autocast("cpu", dtype=call.autocast or torch.bfloat16, enabled=call.autocast is not None):
        found = auxkern.cross_entropy(terms, call.target, process_group=shard, **call.options)
    loss, stats = found if call.options.get("return_stats") else (found, None)
    # Sums of V rounded products, and an exponential of them, in float32 or float64.
    double = loss.dtype == torch.float64
    unit = 2.0**-48 if double else 2.0**-21
    sizes = [s[s.isfinite()].abs().amax().item() if s.isfinite().any() else 0.0 for s in exact_shares(call)]
    large = 1 + sum(min(size, 100.0) for size in sizes)
    wrong = []
    if _differs(loss.detach(), exact["loss"], unit * large * (1 + exact["loss"].abs())):
        wrong.append(f"loss {loss.tolist()} for {exact['loss'].tolist()}")
    for name, value in exact["stats"].items() if stats else ():
        if _differs(getattr(stats, name), value, unit * large * (1 + value.abs())):
            wrong.append(f"{name} {getattr(stats, name).tolist()} for {value.tolist()}")
    for i, value in enumerate(exact["term_nll"] if stats else ()):
        if _differs(stats.term_nll[i], value, unit * large * (1 + value.abs())):
            wrong.append(f"term_nll {i} {stats.term_nll[i].tolist()} for {value.tolist()}")
    if loss.requires_grad:
        weights = torch.arange(3, 3 + len(call.target)) if loss.dim() else torch.tensor(3)
        loss.backward(weights.to(loss.dtype))
        wrong += _wrong_gradients(call, terms, exact, ids, unit * large)
    return [f"call {number}, rank {rank} of {world}: {sentence}" for sentence in wrong]


def _wrong_gradients(
    call: Call, terms: list[Any], exact: dict[str, Any], ids: slice, unit: float
) -> list[str]:
    wrong = []
    for i, (term, sums) in enumerate(
        zip(terms, exact_gradients(call, exact["dz"], unit * exact["parts"], unit), strict=True)
    ):
        for name, (value, bound) in sums.items():
            tensor = getattr(term, name)
            if not tensor.requires_grad:
                continue
            if name in ("weight", "bias"):
                value, bound = value[ids], bound[ids]
            elif isinstance(term, Logits):
                value, bound = value[:, ids], bound[:, ids]
            # Rounded to the tensor's dtype once; the smallest numbers of 16 bits are coarse.
            rounding = torch.finfo(tensor.dtype).eps * value.abs() + torch.finfo(tensor.dtype).tiny
            if _differs(tensor.grad, value, bound + rounding):
                over = (tensor.grad.double() - value).abs() / (bound + rounding)
                worst = int(over.nan_to_num(torch.inf).argmax())
                numbers = [float(x.reshape(-1)[worst]) for x in (tensor.grad, value, over)]
                wrong.append("terms[{}].{}: gradient {} for {}, {} bounds away".format(i, name, *numbers))
    return wrong


def wrong_with_draw(number: int, rank: int, world: int, group: Any) -> list[str]:
    """Sentences about drawing from the terms of one call, in float64: no sum there decides a token."""
    call = call_of(number, world)
    N, first = len(call.target), sum(call.sizes[:rank])
    with torch.no_grad():
        terms = [term for term in call.terms if not isinstance(term, Sparse)]
        whole = [Logits(exact_shares(Call([t], call.target, call.sizes, sum(call.sizes)))[0]) for t in terms]
        whole += [Sparse(t.ids, t.values.double()) for t in call.terms if isinstance(t, Sparse)]
    rng = random.Random(number)
    filters: dict[str, Any] = {}
    if rng.random() < 0.6:
        filters = {
            "top_k": rng.choice((0, 3)),
            "top_p": rng.choice((1.0, 0.8)),
            "min_p": rng.choice((0, 0.05)),
        }
    temperature = rng.choice((0.7, 1.0)) if filters else rng.choice((0.0, 1.0, 2.0))
    penalty = rng.choice((1.0, 1.3))
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, **filters)
    options: dict[str, Any] = {"seed": torch.arange(N) + number, "position": number % 7, "params": params}
    options |= {
        "history": torch.randint(sum(call.sizes), (N, 3), generator=torch.Generator().manual_seed(number))
    }
    options |= {"return_logprobs": True, "top_logprobs": min(3, call.vocab_size)}
    if call.vocab_size < sum(call.sizes):
        options["vocab_size"] = call.vocab_size
    parts = [cut(term, slice(first, first + call.sizes[rank])) for term in whole]
    ours, theirs = auxkern.sample(parts, process_group=group, **options), auxkern.sample(whole, **options)
    wrong = []
    for name in ("tokens", "status", "top_ids"):
        if not torch.equal(getattr(ours, name), getattr(theirs, name)):
            wrong.append(f"{name} {getattr(ours, name).tolist()} for {getattr(theirs, name).tolist()}")
    for name in ("logprob", "processed_logprob", "term_logprobs", "top_logprobs"):
        exact = getattr(theirs, name)
        if _differs(getattr(ours, name), exact, 1e-9 * (1 + exact.abs())):
            wrong.append(f"{name} {getattr(ours, name).tolist()} for {exact.tolist()}")
    return [f"draw {number}, rank {rank} of {world}: {sentence}" for sentence in wrong]


def rank_result(folder: Path, rank: int, world: int) -> list[str]:
    """What was wrong with the calls that FOLDER/calls names, "FIRST LAST"."""
    first, last = map(int, (folder / "calls").read_text().split())
    wrong: list[str] = []
    for number in range(first, last):
        wrong += wrong_with(number, rank, world, dist.group.WORLD)
        if number % 5 == 0:
            wrong += wrong_with_draw(number, rank, world, dist.group.WORLD)
    return wrong
