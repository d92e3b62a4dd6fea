"""The rules that compiled kernels are held to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from auxkern.backends.triton.cases import Case, Kernel
from auxkern.inspect.assembly import Assembly
from auxkern.inspect.issue import COLUMN, fits, issue_share, model_of, pairs
from auxkern.inspect.known import FAILURES, KnownFailure
from auxkern.inspect.opcodes import by_class
from auxkern.inspect.targets import Target

# Names of rules, as ``known.py`` gives them.
SPILLS, SHARED, WIDTH, LOOPS = "spills", "shared memory", "width", "loops"
TENSOR, EXACT, NO_PRODUCT = "tensor cores", "exact products", "no product"
PASSES, ISSUE, UNKNOWN = "passes", "issue", "unknown opcodes"
_UNKNOWN_SHARE = 0.03
_ISSUE_TARGET = "sm_90"


@dataclass(frozen=True)
class Verdict:
    """Broken rules of one binary in words: those to mend, and those that are known."""

    problems: list[str]
    known: list[str] = field(default_factory=list)


def judge(
    kernel: Kernel, case: Case, target: Target, made: Assembly, failures: Sequence[KnownFailure] = FAILURES
) -> Verdict:
    """Hold a compiled kernel to the rules.

    A failure that is known is no problem; one that is known and does not happen is.
    """
    broken = dict(broken_rules(kernel, case, target, made))
    problems, known = [], []
    for failure in failures:
        if failure.covers(kernel.name, case.label, target.name):
            if failure.rule in broken:
                known.append(f"{broken.pop(failure.rule)} ({failure.because})")
            else:
                problems.append(f'keeps the rule "{failure.rule}": take it from the known failures')
    return Verdict([*broken.values(), *problems], known)


def broken_rules(kernel: Kernel, case: Case, target: Target, made: Assembly) -> Iterator[tuple[str, str]]:
    """Names of the broken rules, each with what is wrong, in words.

    Everywhere: no spills; shared memory within the target's limit; no more passes than the kernel states.
    On NVIDIA, 16-byte traffic in the inner loop of a memory-bound kernel, and on an H100 fewer
    instructions than memory has time for; products with a 16-bit operand in tensor cores, and exact ones
    of float32 never; no instruction that the model does not know.
    """
    if made.spill_bytes:
        yield SPILLS, f"spills {made.spill_bytes} bytes per thread"
    if made.shared_bytes > (most := target.shared_per_program):
        yield SHARED, f"takes {made.shared_bytes} bytes of shared memory; {target.name} has {most}"
    passes = made.source.passes
    if passes is None or passes > kernel.passes:
        yield PASSES, f"reads {passes or 'an unknown number of'} times, not {kernel.passes}"
    if reason := _outside_tensor_cores(kernel, case, target, made):
        yield TENSOR, reason
    if made.tensor_core and not kernel.dot:
        yield NO_PRODUCT, f"has {', '.join(made.tensor_core)}"
    if target.backend != "cuda":
        return
    moved = made.load_bytes if kernel.sums else made.load_bytes + made.store_bytes
    narrow = sorted({width for width in moved if width < 16})
    if kernel.vectors and (narrow or not made.load_bytes):
        widths = ", ".join(map(str, narrow)) or "no"
        yield WIDTH, f"moves {widths} bytes at a time in its inner loop, not 16"
    if not fits(made):
        count = len(made.source.loops)
        yield LOOPS, f"has loops that the model does not know: {len(made.loops)} load, {count} in its source"
        return
    if any(exact and inside for exact, inside in products(made)):
        yield EXACT, "multiplies float32 in tensor cores, rounded, though told to be exact"
    model = model_of(made, case.launch, target)
    if model.unknown > _UNKNOWN_SHARE:
        yield UNKNOWN, f"consists of unknown instructions to {model.unknown:.0%}"
    if kernel.vectors and target.name == _ISSUE_TARGET and model.unit == COLUMN:
        share = issue_share(model, case, target)
        if share > 1:
            yield ISSUE, f"issues for {share:.3f} of the time that memory takes, in a model"


def products(made: Assembly) -> list[tuple[bool, bool]]:
    """For each product: whether its source wants float32 exactly, and whether tensor cores make it."""
    result = []
    for source, loop in pairs(made):
        if source.tensor_dots:
            opcodes = made.outside if loop is None else loop.opcodes
            result.append((not all(source.tensor_dots), by_class(opcodes)["tensor"] > 0))
    return result


def _outside_tensor_cores(kernel: Kernel, case: Case, target: Target, made: Assembly) -> str | None:
    """Why a product that tensor cores should make is not made there."""
    if not kernel.dot:
        return None
    if case.launch.tensor_flops and not made.tensor_core:
        return "has no tensor-core instruction"
    if target.backend != "cuda" or not any(case.half_operands) or not fits(made):
        return None
    # AMD's matrix instructions take float32 too, so that only NVIDIA's say which product they make.
    inside = [tensor for _, tensor in products(made)]
    if len(inside) != len(case.half_operands):
        return f"has {len(inside)} products in loops, not {len(case.half_operands)}"
    missed = [str(i) for i, half in enumerate(case.half_operands) if half and not inside[i]]
    return (
        f"multiplies the 16-bit operand of head {', '.join(missed)} outside of tensor cores"
        if missed
        else None
    )
