"""Cases and measures shared by the tests: backends, logits, the exact answer, tolerances.

Shapes: N rows, V vocabulary. The expectation is the textbook formula with ``F.cross_entropy`` and
autograd; it shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from auxkern.backends import choice

FLOAT32_ULP = 2.0**-24  # relative rounding error of float32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IGNORE = -100

# A float32 row sum of V rounded additions in lanes, an exp and a log of a few ulp each.
ROW_ERROR = 32 * FLOAT32_ULP


# What exp(t), t <= 0, makes of the rounding on its way, in FLOAT32_ULP for each unit of |t|, relative.
# Everywhere t = z - max is rounded, by half an ulp of t: 1. On a GPU exp is ex2(t * log2(e)): the product
# is rounded as well, another 1, and log2(e) is off by 0.22 ulp: 2.25 in all (torch's own exp there is at
# 7.5e-6 for t = -80, of 1.07e-5). A CPU's exp takes t apart without rounding it.
EXP_ERROR = {"cpu": 1.0, "cuda": 2.25}
# On a GPU also 1 - tanh(u)**2 = 4 e / (1 + e)**2, e = exp(-2 |u|), is made so, for each unit of |u|: the
# exponent is 2 |u|, u = x * (1 / softcap) is rounded twice, and exp as above, but that 2 |u| is exact.
SLOPE_ERROR = {"cpu": 0.0, "cuda": 2 * (2.0 + 1.25)}


# --- backends ---------------------------------------------------------------------------------


def device_of(backend: str) -> str:
    """The device on which the tests run ``backend``."""
    return "cuda" if backend == "triton" else "cpu"


def available_backends(*dtypes: torch.dtype) -> list[Any]:
    """Backends that can run ``dtypes`` (float32 if none) here, as pytest parameters.

    Triton joins on a CUDA device, marked ``gpu``. Its interpreter is tested in tests/backends/triton.
    """
    listed = []
    for name in choice.BACKENDS:
        if name == "triton" and not torch.cuda.is_available():
            continue
        if choice.refusal(name, torch.device(device_of(name)), dtypes or (torch.float32,)) is None:
            listed.append(pytest.param(name, marks=[pytest.mark.gpu] if name == "triton" else [], id=name))
    return listed


def fast_backends() -> list[Any]:
    """``available_backends`` without the reference, which is in no hurry and spares no memory."""
    return [p for p in available_backends() if p.values[0] != "reference"]


# --- logits -----------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", spread: float = 3.0, seed: int = 0
) -> Tensor:
    """Normal logits of standard deviation ``spread``."""
    return (spread * torch.randn(shape, generator=generator(seed))).to(dtype).to(device)


def random_target(
    *shape: int, V: int, device: str = "cpu", ignored: float = 0.0, ignore_index: int = IGNORE, seed: int = 1
) -> Tensor:
    """Uniform ids in [0, V), a share ``ignored`` of them ``ignore_index``."""
    source = generator(seed)
    target = torch.randint(V, shape, generator=source)
    hidden = torch.rand(shape, generator=source) < ignored
    return target.masked_fill(hidden, ignore_index).to(device)


def confident_logits(
    N: int, V: int, p: float, *, target_is_top: bool = True, offset: float = 0.0, seed: int = 2
) -> tuple[Tensor, Tensor]:
    """float32 (N, V) logits that give one id the probability ``p``, and targets.

    The target is that id, or with ``target_is_top=False`` another one, which is then unlikely.
    """
    z = random_logits(N, V, seed=seed).double()
    top = random_target(N, V=V, seed=seed + 1)
    rest = z.scatter(-1, top[:, None], -math.inf).logsumexp(-1)
    z.scatter_(-1, top[:, None], (rest + math.log(p / (1 - p)))[:, None])
    target = top if target_is_top else (top + 1 + random_target(N, V=V - 1, seed=seed + 2)) % V
    return (z + offset).float(), target


def hard_logits(kind: str, N: int, V: int) -> tuple[list[Tensor], Tensor]:
    """float32 terms on which careless arithmetic fails, and targets. ``kind`` is one of ``HARD``."""
    target = random_target(N, V=V, ignored=0.2)
    z = random_logits(N, V)
    if kind == "sharp":
        return [random_logits(N, V, spread=30.0)], target
    if kind == "wide":
        return [torch.linspace(-300, 300, V).expand(N, V) + z], target
    if kind == "offset":
        return [z + 1e4], target
    if kind == "negative offset":
        return [z - 1e4, random_logits(N, V, seed=5)], target
    if kind == "opposite offsets":
        return [z, torch.full((N, V), 1e4), torch.full((N, V), -1e4)], target
    if kind == "row offsets":
        return [z + torch.linspace(-1e4, 1e4, N)[:, None]], target
    if kind == "flat":
        return [torch.zeros(N, V)], target
    if kind == "late maximum":
        return [z + torch.linspace(0, 80, V)], target
    if kind == "early maximum":
        return [z + torch.linspace(80, 0, V)], target
    if kind == "-inf tiles":
        # Ids outside a narrow window are impossible: whole tiles of any width up to V / 2 hold -inf.
        start, width = V // 2, max(V // 50, 1)
        masked = torch.full((N, V), -math.inf)
        masked[:, start : start + width] = z[:, start : start + width]
        return [masked, random_logits(N, V, seed=5)], torch.where(target < 0, target, start + target % width)
    raise ValueError(f"kind is {kind!r}; choose one of {HARD}")


HARD = (
    "sharp",
    "wide",
    "offset",
    "negative offset",
    "opposite offsets",
    "row offsets",
    "flat",
    "late maximum",
    "early maximum",
    "-inf tiles",
)


# --- the exact answer -------------------------------------------------------------------------


@dataclass
class Result:
    """One loss with its gradients (None where none was asked for) and stats (ours only)."""

    loss: Tensor
    gradients: list[Tensor | None]
    stats: auxkern.CrossEntropyStats | None = None


@dataclass
class Expected(Result):
    """The textbook answer, and what tolerances are made of. Rows are flattened, N of them."""

    nll: Tensor = None  # (N,) without smoothing, weights and reduction; 0 where ignored
    lse: Tensor = None  # (N,)
    argmax: Tensor = None  # (N,) -1 where ignored
    term_nll: Tensor = None  # (I, N)
    row: Tensor = None  # (N,) the row's loss before weights and reduction
    weight: Tensor = None  # (N,) d loss / d row, of absolute value
    probability: Tensor = None  # (N, V)
    counts: Tensor = None  # (N,) bool: not ignored
    target: Tensor = None  # (N,) shifted if asked


def as_terms(terms: Sequence[auxkern.Logits | Tensor]) -> list[auxkern.Logits]:
    return [t if isinstance(t, auxkern.Logits) else auxkern.Logits(t) for t in terms]


def share(term: auxkern.Logits, values: Tensor, dtype: torch.dtype, V: int) -> Tensor:
    """(N, V): what the term adds to z, in ``dtype``."""
    x = values[..., :V].to(dtype).reshape(-1, V)
    if term.softcap is not None:
        x = term.softcap * torch.tanh(x / term.softcap)
    return term.scale * x


def formula(
    terms: Sequence[auxkern.Logits | Tensor],
    target: Tensor,
    dtype: torch.dtype = torch.float64,
    *,
    grad_output: Tensor | None = None,
    ignore_index: int = IGNORE,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = False,
    vocab_size: int | None = None,
) -> Expected:
    """The loss and every gradient by ``F.cross_entropy`` and autograd on the summed logits.

    With float64 it is the exact answer, from the inputs as given; with float32 it is what a
    PyTorch user computes today, gradients in the dtypes of the inputs.
    """
    terms = as_terms(terms)
    V = vocab_size or terms[0].values.shape[-1]
    exact = dtype == torch.float64
    leaves = [(t.values.detach().double() if exact else t.values.detach()).requires_grad_() for t in terms]
    shares = [share(t, leaf, dtype, V) for t, leaf in zip(terms, leaves, strict=True)]
    z = shares[0]
    for s in shares[1:]:
        z = z + s

    y = target.long()
    weight = None if token_weight is None else token_weight.to(dtype)
    if shift:
        y = F.pad(y[..., 1:], (0, 1), value=ignore_index)
        weight = None if weight is None else F.pad(weight[..., 1:], (0, 1))
    y = y.reshape(-1)
    counts = y != ignore_index
    lse = torch.where(counts, z.logsumexp(-1), 0)
    options = {"ignore_index": ignore_index, "reduction": "none"}
    row = F.cross_entropy(z, y, label_smoothing=label_smoothing, **options) + z_loss * lse**2
    row.retain_grad()
    weighted = row if weight is None else row * torch.where(counts, weight.reshape(-1), 0)
    loss = _reduced(weighted, counts, weight, reduction, normalizer)
    loss = loss.view(target.shape) if reduction == "none" else loss
    loss.backward(None if grad_output is None else grad_output.to(dtype))

    with torch.no_grad():
        y0 = y.masked_fill(~counts, 0)
        return Expected(
            loss=loss.detach(),
            gradients=[leaf.grad for leaf in leaves],
            nll=F.cross_entropy(z, y, **options),
            lse=lse.detach(),
            argmax=torch.where(counts, z.argmax(-1), -1),
            term_nll=torch.stack([F.cross_entropy(s, y, **options) for s in shares]),
            row=row.detach(),
            weight=row.grad.abs(),
            probability=z.softmax(-1),
            counts=counts,
            target=y0,
        )


def _reduced(
    row: Tensor, counts: Tensor, weight: Tensor | None, reduction: str, normalizer: float | Tensor | None
) -> Tensor:
    if reduction == "none":
        return row
    total = row.sum()
    if normalizer is not None:
        return total / normalizer
    if reduction == "sum" or not counts.any():
        return total
    return total / (counts.sum() if weight is None else weight.reshape(-1)[counts].sum())


# --- ours against it --------------------------------------------------------------------------


def ours(
    terms: Sequence[auxkern.Logits | Tensor],
    target: Tensor,
    backend: str | None,
    *,
    grad_output: Tensor | None = None,
    wanted: Sequence[int] | None = None,
    **options: Any,
) -> Result:
    """``auxkern.cross_entropy`` with gradients for the terms in ``wanted`` (all of them if None).

    The values themselves are leaves: their strides reach the operator.
    """
    terms = as_terms(terms)
    wanted = range(len(terms)) if wanted is None else wanted
    leaves = [t.values.detach().requires_grad_(i in wanted) for i, t in enumerate(terms)]
    given = [auxkern.Logits(x, t.scale, t.softcap) for x, t in zip(leaves, terms, strict=True)]
    out = auxkern.cross_entropy(given, target, backend=backend, **options)
    loss, stats = out if options.get("return_stats") else (out, None)
    if wanted:
        loss.backward(grad_output)
    return Result(loss.detach(), [leaf.grad for leaf in leaves], stats)


def sum_rounding(terms: Sequence[auxkern.Logits | Tensor], vocab_size: int | None = None) -> float:
    """Largest error of a float32 z, absolute: 0 for one plain term, which needs no arithmetic."""
    terms = as_terms(terms)
    if len(terms) == 1 and terms[0].scale == 1.0 and terms[0].softcap is None:
        return 0.0
    V = vocab_size or terms[0].values.shape[-1]
    shares = [share(t, t.values.detach(), torch.float64, V).abs() for t in terms]
    size = torch.stack(shares).sum(0)
    finite = size[size.isfinite()]
    return 2 * FLOAT32_ULP * len(terms) * float(finite.max()) if finite.numel() else 0.0


def assert_contract(
    result: Result,
    terms: Sequence[auxkern.Logits | Tensor],
    target: Tensor,
    *,
    grad_output: Tensor | None = None,
    **options: Any,
) -> None:
    """Holds a loss, its gradients and its stats to the numerical contract.

    Every other id's gradient must be right relative to its own size. Losses, and the gradient at
    the target (1 - p cancels in float32), may be as wrong as PyTorch's float32 path, and no more.
    """
    options.pop("return_stats", None)
    exact = formula(terms, target, grad_output=grad_output, **options)
    torchs = formula(terms, target, torch.float32, grad_output=grad_output, **options)
    rounding = sum_rounding(terms, options.get("vocab_size"))
    _assert_loss(result.loss, exact, torchs, rounding, options)
    for index, term in enumerate(as_terms(terms)):
        if result.gradients[index] is not None:
            _assert_gradient(result.gradients[index], index, term, exact, torchs, rounding, options)
    if result.stats is not None:
        assert_stats(result.stats, terms, exact, torchs, rounding, options)


def _within(name: str, ours: Tensor, exact: Tensor, allowed: Tensor | float) -> None:
    error = (ours.double() - exact).abs()
    # Infinite losses are equal, not close; NaN compares false and so is an error.
    good = (error <= allowed) | (ours.double() == exact)
    if not bool(good.all()):
        worst = torch.where(good, -math.inf, torch.where(error.isnan(), math.inf, error)).argmax()
        bound = torch.as_tensor(allowed, device=error.device).expand_as(error).reshape(-1)[worst]
        raise AssertionError(
            f"{name}: {int((~good).sum())} of {good.numel()} entries are off; entry {int(worst)} is "
            f"{ours.reshape(-1)[worst].item()!r}, exact {exact.reshape(-1)[worst].item()!r}, "
            f"allowed error {float(bound):.3g}"
        )


def _assert_loss(
    loss: Tensor, exact: Expected, torchs: Expected, rounding: float, options: dict[str, Any]
) -> None:
    assert loss.shape == exact.loss.shape
    steepness = 1 + 2 * options.get("z_loss", 0.0) * exact.lse.abs()
    row_error = ROW_ERROR * (1 + exact.row.abs()) + steepness * rounding
    row_error = torch.where(exact.counts & exact.row.isfinite(), row_error, 0)
    if options.get("reduction") == "none":
        weight = options.get("token_weight")
        row_error = row_error.view(loss.shape)
        if weight is not None:
            weight = F.pad(weight[..., 1:], (0, 1)) if options.get("shift") else weight
            row_error = row_error * torch.where(exact.counts.view(loss.shape), weight.double().abs(), 0)
    else:
        row_error = (row_error * exact.weight.nan_to_num()).sum()
    torch_error = (torchs.loss.double() - exact.loss).abs().nan_to_num(0)
    _within("loss", loss, exact.loss, torch_error + row_error)


def _assert_gradient(
    gradient: Tensor,
    index: int,
    term: auxkern.Logits,
    exact: Expected,
    torchs: Expected,
    rounding: float,
    options: dict[str, Any],
) -> None:
    assert gradient.shape == term.values.shape
    assert gradient.dtype == term.values.dtype
    N, V = exact.probability.shape
    expected = exact.gradients[index]
    smoothing = options.get("label_smoothing", 0.0)
    coefficient = exact.weight * (1 + 2 * options.get("z_loss", 0.0) * exact.lse.abs())
    # Size of the pieces that are subtracted from one another; a difference is as exact as they are.
    size = coefficient[:, None] * exact.probability + (exact.weight * smoothing / V)[:, None]
    exponent = exact.probability.log().abs().nan_to_num(0, 0)
    units = EXP_ERROR[gradient.device.type] * exponent
    if term.softcap is not None:
        u = (term.values.detach()[..., :V].double().reshape(N, V) / term.softcap).abs()
        units = units + SLOPE_ERROR[gradient.device.type] * torch.where(u.isfinite(), u, 0.0)
    allowed = (ROW_ERROR + 2 * rounding + FLOAT32_ULP * units) * size * abs(term.scale)
    at_target = exact.target[:, None]

    def column(x: Tensor) -> Tensor:
        return x[..., :V].reshape(N, V).double().gather(-1, at_target)

    target_error = (column(torchs.gradients[index]) - column(expected)).abs()
    # One row of torch's may be right by luck: the worst row, weighed as this one, is the measure.
    per_weight = (target_error / exact.weight.clamp_min(1e-300)[:, None]).nan_to_num(0, 0, 0)
    worst = per_weight.amax() if N else 0.0
    slack = worst * exact.weight[:, None] + (ROW_ERROR + 2 * rounding) * column(expected).abs()
    if term.softcap is not None:  # 1 - tanh**2 cancels where the cap is reached
        slack = slack + (4 * FLOAT32_ULP * abs(term.scale)) * exact.weight[:, None]
    allowed.scatter_add_(-1, at_target, slack)
    allowed = torch.where(exact.counts[:, None], allowed, 0)

    wide = torch.zeros(expected.shape, dtype=torch.float64, device=expected.device)
    wide[..., :V] = allowed.view(*expected.shape[:-1], V)
    finfo = torch.finfo(gradient.dtype)
    half_ulp = finfo.eps / 2 * expected.abs() * (1 + 1e-3)
    # float16 holds the smallest gradients as subnormals; float32 may flush a probability below its own.
    subnormal = finfo.smallest_normal * finfo.eps / 2
    flushed = 2.0**-126 * coefficient.nan_to_num()[:, None] * abs(term.scale)
    tiny = torch.zeros_like(wide)
    tiny[..., :V] = torch.where(exact.counts[:, None], subnormal + flushed, 0).view(*expected.shape[:-1], 1)
    _within(f"gradient of terms[{index}]", gradient, expected, wide + half_ulp + tiny)


def assert_stats(
    stats: auxkern.CrossEntropyStats,
    terms: Sequence[auxkern.Logits | Tensor],
    exact: Expected,
    torchs: Expected,
    rounding: float,
    options: dict[str, Any],
) -> None:
    z_loss = options.get("z_loss", 0.0)
    nll = torchs.nll.double() - exact.nll
    slack = torch.where(exact.counts, 1.0, 0.0)
    near = slack * rounding

    def flat(x: Tensor) -> Tensor:
        assert not x.requires_grad
        return x.reshape(-1)

    _within(
        "stats.nll",
        flat(stats.nll),
        exact.nll,
        nll.abs().nan_to_num(0) + ROW_ERROR * slack * (1 + exact.nll) + near,
    )
    lse_error = ROW_ERROR * (slack + exact.lse.abs()) + near
    _within("stats.lse", flat(stats.lse), exact.lse, lse_error)
    z_error = z_loss * (2 * exact.lse.abs() * lse_error) * 1.01 + 4 * FLOAT32_ULP * z_loss * exact.lse**2
    _within("stats.z_loss", flat(stats.z_loss), z_loss * exact.lse**2, z_error)
    for index in range(len(exact.term_nll)):
        expected = exact.term_nll[index]
        error = (torchs.term_nll[index].double() - expected).abs().nan_to_num(0)
        allowed = error + ROW_ERROR * slack * (1 + expected.abs()) + near
        _within(f"stats.term_nll[{index}]", flat(stats.term_nll[index]), expected, allowed)
    chosen = exact.probability.gather(-1, stats.argmax.reshape(-1, 1).clamp_min(0))[:, 0]
    # Two ids may tie within float32; then either is the largest.
    near_top = chosen >= exact.probability.amax(-1) * (1 - ROW_ERROR - 4 * rounding)
    assert bool(torch.where(exact.counts, near_top, flat(stats.argmax) == -1).all())


def check(
    terms: Sequence[auxkern.Logits | Tensor], target: Tensor, backend: str | None, **options: Any
) -> Result:
    """Runs ours, holds it to the contract, and checks that no input was written to."""
    terms = as_terms(terms)
    before = [t.values.detach().clone() for t in terms]
    target_before = target.clone()
    kept = {"grad_output", "wanted"}
    result = ours(terms, target, backend, **options)
    for term, copy in zip(terms, before, strict=True):
        assert torch.equal(term.values.detach().nan_to_num(7.25), copy.nan_to_num(7.25)), (
            "an input was written to"
        )
    assert torch.equal(target, target_before), "target was written to"
    assert result.loss.dtype == torch.float32
    expected_options = {k: v for k, v in options.items() if k not in kept}
    assert_contract(result, terms, target, grad_output=options.get("grad_output"), **expected_options)
    return result


# --- memory -----------------------------------------------------------------------------------


def peak_extra_bytes(function: Callable[[], Any], device: str) -> int:
    """Most memory ``function`` held at once beyond what was held before it, in bytes.

    On a CPU it is the process's peak resident memory (Linux), so native scratch counts too;
    blocks must be large (over 32 MiB) for freed ones to go back to the system.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    except OSError as error:
        pytest.skip(f"this system does not let a process reset its peak memory: {error}")
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
