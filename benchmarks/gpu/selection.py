"""``python3 -m benchmarks.gpu.selection``: a few losses, gradients and draws for compute-sanitizer, checked.

Small on purpose, since instrumented kernels are a hundred times slower, yet every kernel runs: rows
split over programs and rows of one program, tails, misaligned and padded rows, every output.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import auxkern

_H, _B, _F = torch.float16, torch.bfloat16, torch.float32
_ALL = {"label_smoothing": 0.1, "z_loss": 1e-4, "return_stats": True}


@dataclass(frozen=True)
class Example:
    """One call of ``auxkern.cross_entropy``, on the CPU.

    Attributes:
        name: what is special about it.
        terms: of the sum; the tensors of the last one ask for gradients.
        target: (N,) int64.
        options: keyword arguments.
        dtype: of the coarsest tensor; decides the tolerance.
    """

    name: str
    terms: list[Any]
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


def examples() -> Iterator[Example]:
    """The selection; the same numbers in every run."""
    source = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = _F) -> Tensor:
        return (3 * torch.randn(shape, generator=source)).to(dtype)

    def target(N: int, V: int) -> Tensor:
        ids = torch.randint(V, (N,), generator=source)
        ids[N // 2] = -100
        ids[-1] = V - 1
        return ids

    few, many, V = 3, 300, 5003  # rows that are split over programs, rows that are not; V is prime
    yield Example("few rows", [normal(few, V)], target(few, V))
    yield Example("few rows, all outputs", [normal(few, V), normal(few, V)], target(few, V), _ALL)
    yield Example("many rows", [normal(many, 1031, dtype=_B)] * 2, target(many, 1031), {}, _B)
    mixed = [normal(many, 1031, dtype=_H), auxkern.Logits(normal(many, 1031), scale=0.5, softcap=20.0)]
    yield Example("mixed dtypes, softcap", mixed, target(many, 1031), _ALL, _H)
    padded = [normal(many, 1088, dtype=_H)[:, 1:1032], normal(1031, many, dtype=_H).T]
    yield Example("misaligned and transposed", padded, target(many, 1031), {}, _H)
    heads = [
        auxkern.Head(normal(40, 24) / 8, normal(V, 24)),
        auxkern.Sparse(torch.randint(V, (40, 4), generator=source), normal(40, 4)),
        auxkern.Head(normal(40, 16) / 8, normal(V, 16)),
    ]
    yield Example("heads and a sparse term", heads, target(40, V), {"chunk_rows": 16})
    for dtype in (_F, _B):
        alone = [auxkern.Head((normal(70, D) / 8).to(dtype), normal(1031, D, dtype=dtype)) for D in (40, 24)]
        yield Example(f"heads alone, {dtype}", alone, target(70, 1031), {"chunk_rows": 64}, dtype)
    capped = [auxkern.Head(normal(70, D) / 8, normal(1031, D), softcap=20.0) for D in (40, 24)]
    yield Example("heads with soft caps, all outputs", capped, target(70, 1031), _ALL)
    for dtype in (_H, _B):
        # A frozen model of 16 bits whose states are float32, an auxiliary in float32 and a pointer.
        recipe = [
            auxkern.Head(normal(70, 40) / 8, normal(1031, 40, dtype=dtype)),
            auxkern.Sparse(torch.randint(1031, (70, 6), generator=source), normal(70, 6)),
            auxkern.Head(normal(70, 24) / 8, normal(1031, 24)),
        ]
        yield Example(f"the recipe's sum, {dtype}", recipe, target(70, 1031), {"chunk_rows": 64}, dtype)
        yield Example(f"the recipe's sum, all outputs, {dtype}", recipe, target(70, 1031), _ALL, dtype)
    # More rows than an H100 has multiprocessors, twice and no more: all are read once. Others are read twice:
    # few rows leave multiprocessors idle, and transposed columns have no vectors.
    once = [normal(264, 520, dtype=_B), normal(264, 520)]
    yield Example("rows for one pass", once, target(264, 520), {}, _B)
    yield Example("rows for one pass, all outputs", once, target(264, 520), _ALL, _B)
    yield Example("few rows, in two passes", [normal(5, 9001, dtype=_B)] * 2, target(5, 9001), {}, _B)


def tensors(term: Any) -> list[Tensor]:
    """The floating-point tensors of a term."""
    given = [term] if isinstance(term, Tensor) else term.tensors.values()
    return [tensor for tensor in given if tensor.is_floating_point()]


def moved(term: Any, device: torch.device, *, double: bool = False, wanted: bool = False) -> Any:
    """A copy of a term on ``device`` with its strides, in float64 if ``double``, leaves if ``wanted``."""

    def one(tensor: Tensor) -> Tensor:
        # A copy keeps the strides of what is dense; a view of a larger tensor takes it along.
        whole = tensor if tensor._base is None else tensor._base
        whole = whole.to(device, copy=True)
        there = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        if not tensor.is_floating_point():
            return there
        return (there.double() if double else there).detach().requires_grad_(wanted)

    if isinstance(term, Tensor):
        return one(term)
    if isinstance(term, auxkern.Logits):
        return auxkern.Logits(one(term.values), _scale(term, device, double), term.softcap)
    if isinstance(term, auxkern.Sparse):
        return auxkern.Sparse(one(term.ids), one(term.values))
    bias = None if term.bias is None else one(term.bias)
    return auxkern.Head(one(term.hidden), one(term.weight), bias, _scale(term, device, double), term.softcap)


def _scale(term: Any, device: torch.device, double: bool) -> Any:
    if not isinstance(term.scale, Tensor):
        return term.scale
    return term.scale.to(device, torch.float64 if double else term.scale.dtype)


def run(example: Example, device: torch.device, backend: str, *, double: bool = False) -> list[Tensor]:
    """Loss, gradients of the last term and stats, on the CPU."""
    last = len(example.terms) - 1
    terms = [moved(t, device, double=double, wanted=i == last) for i, t in enumerate(example.terms)]
    out = auxkern.cross_entropy(terms, example.target.to(device), backend=backend, **example.options)
    loss, stats = out if example.options.get("return_stats") else (out, ())
    loss.backward()
    gradients = [tensor.grad for tensor in tensors(terms[-1])]
    return [loss.detach().cpu(), *(x.cpu() for x in gradients if x is not None), *(x.cpu() for x in stats)]


def error(example: Example, device: torch.device, backend: str) -> float:
    """Largest error of any result, relative to the largest entry of it, against float64."""
    found = run(example, device, backend)
    exact = run(example, torch.device("cpu"), "reference", double=True)
    worst = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300)).item()
        for a, b in zip(found, exact, strict=True)
    ]
    return float(torch.tensor(worst).max())  # max() could lose a NaN


@dataclass(frozen=True)
class DrawExample:
    """One call of ``auxkern.sample``, on the CPU; fields as in ``Example``."""

    name: str
    terms: list[Any]
    params: auxkern.SamplingParams
    history: Tensor


def draw_examples() -> Iterator[DrawExample]:
    """The draws; the same numbers in every run."""
    source = torch.Generator().manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = _F) -> Tensor:
        return (3 * torch.randn(shape, generator=source)).to(dtype)

    history = torch.randint(-1, 1031, (20, 9), generator=source)
    everything = auxkern.SamplingParams(
        0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.1
    )
    logits = [normal(20, 1031), auxkern.Logits(normal(20, 1031, dtype=_B), scale=0.5, softcap=5.0)]
    heads = [auxkern.Head(normal(20, D) / 8, normal(1031, D)) for D in (40, 24)]
    sparse = auxkern.Sparse(torch.randint(1031, (20, 4), generator=source), normal(20, 4))
    for name, terms in (("logits", logits), ("heads", heads), ("heads, sparse", [*heads, sparse])):
        yield DrawExample(f"draw from {name}", terms, auxkern.SamplingParams(), history[:, :0])
        yield DrawExample(f"draw from {name}, all filters", terms, everything, history)
    weights = torch.rand(20, generator=source)
    scaled = [auxkern.Logits(normal(20, 1031), scale=weights), normal(20, 1031)]
    yield DrawExample("draw from rows of own scales", scaled, auxkern.SamplingParams(), history[:, :0])
    scaled = [auxkern.Head(normal(20, D) / 8, normal(1031, D), scale=weights) for D in (40, 24)]
    yield DrawExample(
        "draw from heads with rows of own scales", scaled, auxkern.SamplingParams(), history[:, :0]
    )
    filters = {"top-k": {"top_k": 40}, "top-p": {"top_p": 0.8}, "min-p": {"min_p": 0.05}}
    filters["all of them"] = {"top_k": 400, "top_p": 0.95, "min_p": 1e-3}
    # Wide rows are read by many programs, one row by as many as there are tiles. Flat rows have more ids at
    # their threshold than lists hold.
    wide = {"20 rows": normal(20, 9001), "a row": normal(1, 20003), "flat rows": torch.zeros(2, 20003)}
    wide["flat rows"][1] = 1e-5 * torch.rand(20003, generator=source)
    for name, row in wide.items():
        for filter, options in filters.items():
            params = auxkern.SamplingParams(0.9, **options)
            yield DrawExample(f"{filter} from {name}", [row], params, history[: len(row), :0])


def differing_tokens(example: DrawExample, device: torch.device, backend: str) -> int:
    """Rows whose token is not the reference's."""
    tokens = []
    for where, name in ((device, backend), (torch.device("cpu"), "reference")):
        drawn = auxkern.sample(
            [moved(term, where) for term in example.terms],
            example.params,
            seed=torch.arange(len(example.history), device=where),
            position=3,
            history=example.history.to(where),
            backend=name,
        )
        tokens.append(drawn.tokens.cpu())
    return int((tokens[0] != tokens[1]).sum())


def main(argv: list[str] | None = None) -> int:
    """Runs and checks the selection.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0, or 1 if a result is wrong.
    """
    parser = argparse.ArgumentParser(description="Run and check a few losses, gradients and draws.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    options = parser.parse_args(argv)
    wrong = 0
    count = 0
    for example in examples():
        # Products of heads may round their operands to tf32 where PyTorch was told so; it is not here.
        allowed = max(2 * torch.finfo(example.dtype).eps, 1e-4)
        worst = error(example, torch.device(options.device), options.backend)
        right = worst <= allowed
        print(f"{'right' if right else 'WRONG'}: {example.name}: error {worst:.1e}, {allowed:.1e} is allowed")
        wrong += not right
        count += 1
    for draw in draw_examples():
        different = differing_tokens(draw, torch.device(options.device), options.backend)
        rows = len(draw.history)
        print(f"{'WRONG' if different else 'right'}: {draw.name}: {different} of {rows} tokens differ")
        wrong += different > 0
        count += 1
    print(f"{wrong} of {count} cases are wrong" if wrong else f"{count} cases are right", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
