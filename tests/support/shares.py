"""One shard's rows and gradients on a backend against the formulas in float64; no process group is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from auxkern import Head, Logits, Sparse, VocabularyShard
from auxkern.core.loss import NO_TARGET, Loss, RowSlopes, RowSums
from auxkern.core.sums import layout_of, tensors_of
from auxkern.ops.parallel.share import IGNORED, Share

N, V, SIZES = 12, 60, (23, 37)


def _leaf(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def _terms(name: str) -> list[Logits | Head | Sparse]:
    """Terms with all ids."""
    half = torch.bfloat16 if name == "bfloat16 logits" else torch.float16
    logits = [
        Logits(_leaf(N, V, seed=1, dtype=half, scale=3), scale=0.5),
        Logits(_leaf(N, V, seed=2, dtype=half)),
    ]
    heads = [
        Head(_leaf(N, 32, seed=3, dtype=half), _leaf(V, 32, seed=4, dtype=half, scale=0.3)),
        Head(
            _leaf(N, 16, seed=5, dtype=torch.float32),
            _leaf(V, 16, seed=6, dtype=torch.float32, scale=0.3),
            _leaf(V, seed=7, dtype=torch.float32),
            scale=0.7,
        ),
    ]
    pointer = Sparse(
        torch.arange(2 * N).view(N, 2) * 5 % V, _leaf(N, 2, seed=8, dtype=torch.float32, scale=3)
    )
    capped = Head(heads[0].hidden, heads[0].weight, softcap=2.0)
    return {
        "float16 logits": logits,
        "bfloat16 logits": logits,
        "logits with a cap": [Logits(_leaf(N, V, seed=1, dtype=torch.float32, scale=3), softcap=4.0)],
        "heads": heads,
        "float16 head": heads[:1],
        "head with a cap": [capped, heads[1]],
        "heads and pointer": [*heads, pointer],
        "everything": [*logits, *heads, pointer],
    }[name]


CASES = (
    "float16 logits",
    "bfloat16 logits",
    "logits with a cap",
    "heads",
    "float16 head",
    "head with a cap",
    "heads and pointer",
    "everything",
)
# Its products are made of bfloat16's bits where it is interpreted.
_TOLERANCE = 2.0**-19


def _cut(term: Logits | Head | Sparse, ids: slice) -> Logits | Head | Sparse:
    if isinstance(term, Sparse):
        return term
    if isinstance(term, Logits):
        return Logits(term.values[:, ids], term.scale, term.softcap)
    bias = None if term.bias is None else term.bias[ids]
    return Head(term.hidden, term.weight[ids], bias, term.scale, term.softcap)


def _dense(terms: list[Logits | Head | Sparse]) -> Tensor:
    z = torch.zeros(N, V, dtype=torch.float64)
    for term in terms:
        if isinstance(term, Sparse):
            z = z.scatter_add(1, term.ids, term.values.double())
            continue
        x = (
            term.values.double()
            if isinstance(term, Logits)
            else term.hidden.double() @ term.weight.double().T
        )
        x = x + term.bias.double() if isinstance(term, Head) and term.bias is not None else x
        z = z + term.scale * (term.softcap * torch.tanh(x / term.softcap) if term.softcap else x)
    return z


def check(backend: str, name: str, device: str = "cpu", smoothing: float = 0.0) -> None:
    """Both shards of a case: rows with and without their target, ignored ones, shards of nothing but -inf."""
    whole = [_moved(term, device) for term in _terms(name)]
    if isinstance(whole[0], Logits):
        whole[0].values[4, : SIZES[0]] = whole[0].values[5] = -torch.inf
    target = (torch.arange(N) * 7 % V).to(device)
    target[7] = IGNORED
    z = _dense([_moved(term, "cpu") for term in whole])
    g = torch.linspace(0.5, 2, N, dtype=torch.float64)
    first = 0
    for rank, size in enumerate(SIZES):
        ids = slice(first, first + size)
        local = torch.where((target >= first) & (target < first + size), target - first, NO_TARGET)
        local = torch.where(target == IGNORED, IGNORED, local)
        terms = [_cut(term, ids) for term in whole]
        tensors = tensors_of(terms)
        share = Share(layout_of(terms), VocabularyShard(None, rank, SIZES), V, 5, backend)
        _check_rows(share, tensors, local, z[:, ids], smoothing)
        _check_gradients(share, tensors, local, z, g, ids, smoothing)
        first += size


def _moved(term: Logits | Head | Sparse, device: str) -> Logits | Head | Sparse:
    tensors = {name: tensor.clone().to(device) for name, tensor in term.tensors.items()}
    if isinstance(term, Sparse):
        return Sparse(**tensors)
    return type(term)(**tensors, scale=term.scale, softcap=term.softcap)


def _check_rows(share: Share, tensors: list[Tensor], local: Tensor, z: Tensor, smoothing: float) -> None:
    rows = share.rows(tensors, local, Loss(label_smoothing=smoothing, stats=True))[0]
    counts, here = (local != IGNORED).cpu(), (local >= 0).cpu()
    top = z.amax(-1)
    log_sum = (z - top.masked_fill(top == -torch.inf, 0)[:, None]).logsumexp(-1)
    nll = torch.where(here, (z.logsumexp(-1) - z[torch.arange(N), local.cpu().clamp(min=0)]), torch.inf)
    expected = {"nll": nll, "row_max": top, "log_sum": log_sum}
    if smoothing:
        expected["smooth"] = (z.logsumexp(-1)[:, None] - z).mean(-1)
    for key, value in expected.items():
        ours = getattr(rows, key).cpu().double()
        assert bool((ours[~counts] == 0).all()), key
        # A shard of nothing but -inf says so by its maximum and its sum.
        seen = counts & ((top > -torch.inf) | (key in ("row_max", "log_sum")))
        torch.testing.assert_close(
            ours[seen], value[seen], rtol=_TOLERANCE, atol=8 * _TOLERANCE, msg=f"{key}: {ours} for {value}"
        )
    best = counts & (top > -torch.inf)
    assert torch.equal(rows.argmax.cpu()[best], z.argmax(-1)[best])


def _check_gradients(
    share: Share, tensors: list[Tensor], local: Tensor, z: Tensor, g: Tensor, ids: slice, smoothing: float
) -> None:
    """Of the loss over all ids, on this shard."""
    # The row of nothing but -inf has no gradient.
    finite = z.isfinite().any(-1)
    local = torch.where(finite.to(local.device), local, IGNORED)
    counts = local != IGNORED
    lse, top = z.logsumexp(-1), z.amax(-1).masked_fill(~finite, 0)
    y = (torch.arange(N) * 7 % V)[:, None]
    sums = RowSums(lse - z.gather(1, y)[:, 0], top, lse - top)
    sums = RowSums(*(x.masked_fill(~finite, 0).to(local.device) for x in sums))
    slopes = RowSlopes(g.to(local.device), sums, counts, Loss(IGNORED, smoothing, 0.01), V)
    one = torch.zeros(N, V, dtype=torch.float64).scatter(1, y, 1.0)
    dz = (1 + 0.02 * lse)[:, None] * (z - lse[:, None]).exp() - (1 - smoothing) * one - smoothing / V
    dz = torch.where(counts.cpu()[:, None], g[:, None] * dz, 0.0)[:, ids]
    wanted = [i for i, tensor in enumerate(tensors) if tensor.is_floating_point()]
    found = share.gradients(tensors, local, slopes, wanted)
    leaves = [t.detach().cpu().double().requires_grad_(t.is_floating_point()) for t in tensors]
    _products(share, leaves, ids).backward(dz)
    for i in wanted:
        ours, value = found[i].cpu().double().view(leaves[i].shape), leaves[i].grad
        assert value is not None
        # dz is rounded to 16 bits where both operands of the products are, and logits' gradients are.
        eps = max(torch.finfo(tensors[i].dtype).eps, _TOLERANCE)
        error, size = (ours - value).abs().amax(), value.abs().amax()
        assert error <= 4 * eps * size, (i, error.item(), size.item())


def _products(share: Share, leaves: list[Tensor], ids: slice) -> Tensor:
    """(N, ids) sum of the terms from float64 leaves, with -inf read as 0: it has no gradient."""
    total, first = torch.zeros(N, ids.stop - ids.start, dtype=torch.float64), 0
    for kind, scale, softcap in zip(*share.layout, strict=True):
        if kind == 0:
            x, used = leaves[first], 1
            x = torch.where(x.isfinite(), x, 0.0)
        elif kind == 3:
            where = leaves[first].long()
            inside = (where >= ids.start) & (where < ids.stop)
            values = torch.where(inside, leaves[first + 1], 0.0)
            total = total.scatter_add(1, torch.where(inside, where - ids.start, 0), values)
            first += 2
            continue
        else:
            used = 1 + kind
            x = leaves[first] @ leaves[first + 1].T
            x = x + leaves[first + 2] if kind == 2 else x
        total = total + scale * (softcap * torch.tanh(x / softcap) if softcap else x)
        first += used
    return total
