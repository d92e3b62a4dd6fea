"""Checks, then measures, every implementation on one case."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from auxkern.backends import choice
from auxkern.bench import memory
from auxkern.bench.cases import DTYPES, Case
from auxkern.bench.operators import Implementation, Operator
from auxkern.bench.results import PASS_TITLES, CaseResult, Measured, Result
from auxkern.bench.timing import Call, OtherWork, clock_for, measure_in_turns


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: time for the rounds of one case.
        min_rounds, max_rounds: bounds on their number.
    """

    seconds: float
    min_rounds: int
    max_rounds: int


NORMAL = Effort(seconds=8.0, min_rounds=5, max_rounds=50)
QUICK = Effort(seconds=2.5, min_rounds=3, max_rounds=20)

Progress = Callable[[float, str], None]  # (share done in [0, 1], what is happening)


def backends_for(
    device: torch.device,
    dtype: torch.dtype,
    asked: Iterable[str] | None,
    kernel: str = "losses",
) -> tuple[list[str], list[str]]:
    """The auxkern backends to measure on ``device``, and remarks for the reader.

    Args:
        device: where the tensors live.
        dtype: of the terms.
        asked: backend names from the user, each of which must run; None for every backend that
            is chosen on this device for speed.
        kernel: the method that a backend must have.

    Raises:
        ValueError: there is no backend of a name.
        RuntimeError: a backend that was asked for cannot run.
    """
    if asked is not None:
        names = list(dict.fromkeys(asked))
        for name in names:
            choice.choose(name, device, (dtype,))
            if not hasattr(choice.load(name), kernel):
                raise RuntimeError(f"backend {name!r} has no kernel for this operator")
        return names, []
    reasons = {name: choice.refusal(name, device, (dtype,)) for name in choice.BACKENDS}
    for name, reason in reasons.items():
        if reason is None and not hasattr(choice.load(name), kernel):
            reasons[name] = "it has no kernel for this operator"
    fast = [name for name, reason in reasons.items() if reason is None and name != "reference"]
    if device.type == "cpu" and "triton" in fast:
        fast.remove("triton")  # its interpreter proves kernels, it has no speed to measure
    if fast:
        return fast, []
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    return ["reference"], [f"No fast backend runs here ({why}), so the reference is measured."]


def measure_case(
    operator: Operator,
    case: Case,
    device: torch.device,
    backends: Sequence[str] | None,
    effort: Effort,
    progress: Progress,
) -> CaseResult:
    """Makes the case's inputs and measures every implementation on them.

    A case that needs more memory than there is comes back without results, with a note.

    Raises:
        ValueError, RuntimeError: see ``backends_for``.
    """
    names, notes = backends_for(device, DTYPES[case.dtype], backends, operator.kernel)
    needed, available = operator.needed_bytes(case), memory.available_bytes(device)
    result = CaseResult(
        case.op,
        case.model,
        case.V,
        case.N,
        case.dtype,
        case.terms,
        notes=notes,
        widths=list(case.widths),
        filters=case.filters,
    )
    if available is not None and needed > available:
        result.notes.append(
            f"Not run: it needs up to {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free. "
            "Ask for fewer rows with --n."
        )
        return result
    progress(0.0, "inputs")
    inputs = operator.inputs(case, device)
    implementations = operator.implementations(device, DTYPES[case.dtype], names)
    return measure_inputs(operator, inputs, result, implementations, device, effort, progress)


def measure_inputs(
    operator: Operator,
    inputs: Any,
    result: CaseResult,
    implementations: Sequence[Implementation],
    device: torch.device,
    effort: Effort,
    progress: Progress,
) -> CaseResult:
    """Fills ``result``: check, peak memory, then times in turns.

    Args:
        operator: what is measured.
        inputs: its tensors, on ``device``.
        result: describes the case; floors, results and notes are added to it.
        implementations: what to compare.
        device: where the tensors live.
        effort: how long to measure.
        progress: told how far it is.

    Returns:
        ``result``.
    """
    progress(0.05, "reference")
    exact = operator.exact(inputs)
    memory_refusal = memory.refusal(device)
    if memory_refusal:
        result.notes.append(f"Peak memory is n/a: {memory_refusal}.")
    extra: dict[tuple[str, str], int | None] = {}
    for index, implementation in enumerate(implementations):
        progress(0.1 + 0.4 * index / len(implementations), f"checking {implementation.name}")
        row = _check(operator, inputs, exact, implementation, result)
        result.results.append(row)
        if row.status != "ok":
            continue
        for name in result.pass_names:
            extra[implementation.name, name] = (
                None if memory_refusal else _extra_bytes(operator, inputs, implementation, name, device)
            )
    good = [
        (row, implementation)
        for row, implementation in zip(result.results, implementations, strict=True)
        if row.status == "ok"
    ]
    _time(operator, inputs, result, good, extra, device, effort, progress)
    return result


def _time(
    operator: Operator,
    inputs: Any,
    result: CaseResult,
    good: list[tuple[Result, Implementation]],
    extra: dict[tuple[str, str], int | None],
    device: torch.device,
    effort: Effort,
    progress: Progress,
) -> None:
    floors = operator.floors(inputs)
    names = result.pass_names
    keys = [(row, name) for row, _ in good for name in names]
    calls = [_call(operator, inputs, implementation, name) for _, implementation in good for name in names]
    calls += [Call(floor.run, before=lambda: _drop_gradients(inputs)) for floor in floors.values()]
    other_work = OtherWork()
    timings = measure_in_turns(
        calls,
        clock_for(device),
        seconds=effort.seconds,
        min_rounds=effort.min_rounds,
        max_rounds=effort.max_rounds,
        on_round=lambda share: progress(0.5 + share / 2, "timing in turns"),
    )
    busy = other_work.remark() if device.type == "cpu" else None
    if busy:
        result.notes.append(busy)
    _drop_gradients(inputs)
    for (row, name), timing in zip(keys, timings, strict=False):
        row.passes[name] = Measured(timing, extra[row.name, name])
    for (name, floor), timing in zip(floors.items(), timings[len(keys) :], strict=True):
        result.floor[name] = timing
        result.floor_bytes[name] = floor.bytes
        result.floor_flops[name] = floor.flops
    noisy = [
        f"{row.name} ({PASS_TITLES[name]})"
        for row, _ in good
        for name in names
        if row.passes[name].time.noisy
    ]
    noisy += [f"floor ({PASS_TITLES[name]})" for name, timing in result.floor.items() if timing.noisy]
    if noisy:
        result.notes.append(f"Noisy: quartiles more than 20% of the median apart for {', '.join(noisy)}.")


def _check(
    operator: Operator, inputs: Any, exact: Any, implementation: Implementation, case: CaseResult
) -> Result:
    row = Result(implementation.name, implementation.description, implementation.ours)
    _drop_gradients(inputs)
    start = time.perf_counter()
    try:
        made = {name: operator.step(inputs, implementation, name) for name in case.pass_names}
        row.first_call_seconds = time.perf_counter() - start
        errors = operator.check(inputs, exact, implementation, made)
    except Exception as error:  # a peer may raise anything; the others are still worth measuring
        row.status = "failed"
        row.message = _first_line(error)
        return row
    finally:
        _drop_gradients(inputs)
    row.loss_error = errors.values.get("loss")
    row.gradient_error = errors.values.get("gradient")
    row.draw_error = errors.values.get("draw")
    case.tolerance = errors.tolerance
    if not errors.passed:
        row.status = "wrong"
        row.message = str(errors)
    return row


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _extra_bytes(
    operator: Operator, inputs: Any, implementation: Implementation, name: str, device: torch.device
) -> int:
    call = _call(operator, inputs, implementation, name)
    call.before()
    implementation.release()
    return memory.peak_extra_bytes(call.run, device)


def _call(operator: Operator, inputs: Any, implementation: Implementation, name: str) -> Call:
    return Call(
        run=lambda: operator.step(inputs, implementation, name), before=lambda: _drop_gradients(inputs)
    )


def _drop_gradients(inputs: Any) -> None:
    # A training step starts from freed gradients too (zero_grad), so each run allocates its own.
    for leaf in inputs.leaves():
        leaf.grad = None
