"""Checks, then measures, every implementation on one case."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from auxkern.backends import choice
from auxkern.bench import losses, memory, sample
from auxkern.bench.operators import Implementation, Operator, step
from auxkern.bench.results import PASS_TITLES, CaseResult, Measured, Result, Timing
from auxkern.bench.timing import Call, Effort, clock_for, measure_in_turns
from auxkern.core.memory import available_bytes
from auxkern.machine import OtherWork

OPERATORS: dict[str, Operator] = {
    "cross_entropy": losses.CROSS_ENTROPY,
    "linear": losses.LINEAR,
    "sample": sample.OPERATOR,
}
NORMAL = Effort(seconds=8.0, min_rounds=5, max_rounds=50, attempts=6)
QUICK = Effort(seconds=2.5, min_rounds=3, max_rounds=20)

Progress = Callable[[float, str], None]  # (share done in [0, 1], what is happening)


def backends_for(
    device: torch.device, dtype: torch.dtype, asked: Iterable[str] | None
) -> tuple[list[str], list[str]]:
    """The auxkern backends to measure on ``device``, and remarks for the reader.

    Args:
        dtype: of the terms, on ``device``.
        asked: names from the user, each of which must run; None for all that are chosen there for speed.

    Raises:
        ValueError: there is no backend of a name.
        RuntimeError: a backend that was asked for cannot run.
    """
    if asked is not None:
        names = list(dict.fromkeys(asked))
        for name in names:
            choice.choose(name, device, (dtype,))
        return names, []
    reasons = {name: choice.refusal(name, device, (dtype,)) for name in choice.BACKENDS}
    # On a CPU Triton's interpreter proves kernels, it has no speed to measure.
    slow = ("reference", "triton") if device.type == "cpu" else ("reference",)
    fast = [name for name, reason in reasons.items() if reason is None and name not in slow]
    if fast:
        return fast, []
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    return ["reference"], [f"No fast backend runs here ({why}), so the reference is measured."]


def measure_case(
    case: CaseResult, device: torch.device, backends: Sequence[str] | None, effort: Effort, progress: Progress
) -> CaseResult:
    """Makes the case's inputs and measures every implementation on them.

    A case that needs more memory than there is comes back without results, with a note.

    Raises:
        ValueError, RuntimeError: see ``backends_for``.
    """
    operator, dtype = OPERATORS[case.op], getattr(torch, case.dtype)
    names, notes = backends_for(device, dtype, backends)
    case.notes += notes
    needed, available = operator.needed_bytes(case), available_bytes(device)
    if available is not None and needed > available:
        case.notes.append(
            f"Not run: it needs up to {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free. "
            "Ask for fewer rows with --n."
        )
        return case
    progress(0.0, "inputs")
    inputs = operator.inputs(case, device)
    implementations = operator.implementations(device, dtype, names)
    return measure_inputs(inputs, case, implementations, device, effort, progress)


def measure_inputs(
    inputs: Any,
    case: CaseResult,
    implementations: Sequence[Implementation],
    device: torch.device,
    effort: Effort,
    progress: Progress,
) -> CaseResult:
    """Fills ``case``, which describes the ``inputs``: check, peak memory, then times in turns."""
    progress(0.05, "reference")
    operator = OPERATORS[case.op]
    exact = operator.exact(inputs)
    memory_refusal = memory.refusal(device)
    if memory_refusal:
        case.notes.append(f"Peak memory is n/a: {memory_refusal}.")
    drop = partial(_drop_gradients, inputs)
    calls: dict[tuple[int, str], Call] = {}
    extra: dict[tuple[int, str], int] = {}
    for index, implementation in enumerate(implementations):
        progress(0.1 + 0.4 * index / len(implementations), f"checking {implementation.name}")
        case.results.append(_check(operator, inputs, exact, implementation, case))
        for name in case.pass_names if case.results[-1].status == "ok" else ():
            call = Call(partial(step, inputs, implementation, name), drop)
            calls[index, name] = call
            if not memory_refusal:
                drop()
                implementation.release()
                extra[index, name] = memory.peak_extra_bytes(call.run, device)
    floors = operator.floors(inputs)
    timings, busy = _calmest(
        [*calls.values(), *(Call(floor.run, drop) for floor in floors.values())],
        device,
        effort,
        lambda what, share: progress(0.5 + share / 2, what),
    )
    case.notes += [busy] if busy else []
    drop()
    titles = []
    for (index, name), timing in zip(calls, timings, strict=False):
        case.results[index].passes[name] = Measured(timing, extra.get((index, name)))
        titles.append(f"{case.results[index].name} ({PASS_TITLES[name]})")
    for (name, floor), timing in zip(floors.items(), timings[len(calls) :], strict=True):
        case.floor[name], case.floor_bytes[name], case.floor_flops[name] = timing, floor.bytes, floor.flops
        titles.append(f"floor ({PASS_TITLES[name]})")
    noisy = [title for title, timing in zip(titles, timings, strict=True) if timing.noisy]
    if noisy:
        case.notes.append(f"Noisy: quartiles more than 20% of the median apart for {', '.join(noisy)}.")
    return case


def _calmest(
    calls: Sequence[Call], device: torch.device, effort: Effort, on_round: Callable[[str, float], None]
) -> tuple[list[Timing], str | None]:
    """Times of every call from the first attempt that nothing disturbed, or else of the least disturbed one.

    Which attempt is kept depends on how the times scatter, not on who is fast.

    Args:
        on_round: told what happens, and the share of the attempt that is done, in [0, 1].

    Returns:
        The times, and what to tell the reader of other programs that ran meanwhile.
    """
    attempts: list[tuple[tuple[bool, int], list[Timing], str | None]] = []
    for _ in range(effort.attempts):
        what = "timing again, for times that do not scatter" if attempts else "timing in turns"
        other_work = OtherWork()
        timings = measure_in_turns(calls, clock_for(device), effort, partial(on_round, what))
        busy = other_work.remark() if device.type == "cpu" else None
        attempts.append(((busy is not None, sum(timing.noisy for timing in timings)), timings, busy))
        if attempts[-1][0] == (False, 0):
            break
    _, timings, busy = min(attempts, key=lambda one: one[0])
    return timings, busy


def _check(
    operator: Operator, inputs: Any, exact: Any, implementation: Implementation, case: CaseResult
) -> Result:
    result = Result(implementation.name, implementation.description, implementation.ours)
    _drop_gradients(inputs)
    start = time.perf_counter()
    try:
        names = case.pass_names
        outputs = dict(zip(names, map(partial(step, inputs, implementation), names), strict=True))
        result.first_call_seconds = time.perf_counter() - start
        errors = operator.check(inputs, exact, implementation, outputs)
    except Exception as error:  # a peer may raise anything; the others are still worth measuring
        lines = [line[:200] for line in str(error).strip().splitlines()[:1]]
        result.status, result.message = "failed", ": ".join([type(error).__name__, *lines])
        return result
    finally:
        _drop_gradients(inputs)
    for name in ("loss", "gradient", "draw"):
        setattr(result, f"{name}_error", errors.values.get(name))
    case.tolerance = errors.tolerance
    if not errors.passed:
        result.status, result.message = "wrong", str(errors)
    return result


def _drop_gradients(inputs: Any) -> None:
    # A training step starts from freed gradients too (zero_grad), so each run allocates its own.
    for leaf in inputs.leaves():
        leaf.grad = None
