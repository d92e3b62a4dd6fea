"""Compiles registered kernels for GPUs that need not be there, and judges what came out."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache

from auxkern.backends.triton.cases import VOCABULARIES, Case, Kernel, gpu_of
from auxkern.backends.triton.kernels import KERNELS
from auxkern.inspect.assembly import Assembly, read
from auxkern.inspect.issue import Bound, IssueModel, bound_of, fits, model_of, turns_in_loop
from auxkern.inspect.rules import Verdict, judge
from auxkern.inspect.targets import TARGETS, Target


@dataclass(frozen=True)
class Floor:
    """The least that one launch costs, whatever the kernel.

    Attributes:
        model: key of ``cases.VOCABULARIES``.
        rows: N.
        vocabulary: V.
        bytes_moved: of logits and gradients, each once.
        flops: floating-point operations outside tensor cores.
        tensor_flops: those in tensor cores; the two kinds run at the same time.
        memory_us, compute_us: microseconds at the data-sheet rates of the target's GPU.
        loop_bytes: what the compiled inner loop moves in the whole launch, if a turn of it is one
            tile; more than ``bytes_moved`` if something is read twice. None where no tile is known.
    """

    model: str
    rows: int
    vocabulary: int
    bytes_moved: int
    flops: int
    memory_us: float
    compute_us: float
    loop_bytes: int | None = None
    tensor_flops: int = 0


@dataclass(frozen=True)
class Finding:
    """One kernel, as one launch configuration, compiled for one target.

    Attributes:
        kernel, case, target: their names.
        block: columns in a tile; None if the kernel has none.
        num_warps: per program.
        seconds: that compiling and reading took.
        error: what the compiler said, if it failed; then ``made`` is None.
        made: what the compiler made.
        resident_warps: on a multiprocessor, of at most ``resident_limit``.
        floors: one for each model; the binary is the same for all of them.
        problems: broken rules, in words; empty if all is well.
        known: those that ``known.py`` expects, with its reason.
        issue: the MODEL of its instructions; None for AMD, and where it cannot be told.
        bounds: in the MODEL, one for each model of ``floors``.
    """

    kernel: str
    case: str
    target: str
    block: int | None
    num_warps: int
    seconds: float
    error: str | None = None
    made: Assembly | None = None
    resident_warps: int = 0
    resident_limit: int = 0
    floors: list[Floor] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    issue: IssueModel | None = None
    bounds: list[Bound] = field(default_factory=list)


def inspect_case(kernel: Kernel, case: Case, target: Target, floors: Sequence[Case] = ()) -> Finding:
    """Compile one launch for ``target`` and describe it.

    Args:
        floors: the same launch for every model whose floor is wanted.
    """
    from triton.backends.compiler import GPUTarget

    begin = time.perf_counter()
    launch, made, error = case.launch, None, None
    try:
        made = read(launch.compile(GPUTarget(target.backend, target.arch, target.warp)))
    except Exception as reason:  # the compiler's own errors have no common class; all are reported
        error = f"{type(reason).__name__}: {reason}".strip()
    # AMD's compiler is not in every Triton; the table shows that it failed, and no more.
    verdict = Verdict(["does not compile"] if target.backend == "cuda" else [])
    issue, bounds = None, []
    if made is not None:
        verdict = judge(kernel, case, target, made)
        if target.backend == "cuda" and fits(made):
            issue = model_of(made, launch, target)
            bounds = [bound_of(made, other, target) for other in floors]
    warps = launch.num_warps
    return Finding(
        kernel=kernel.name,
        case=case.label,
        target=target.name,
        block=launch.constants.get("BLOCK"),
        num_warps=warps,
        seconds=time.perf_counter() - begin,
        error=error,
        made=made,
        resident_warps=target.resident_warps(made.registers, made.shared_bytes, warps) if made else 0,
        resident_limit=target.warps,
        # A tile of a kernel that is bound by products is read more than once, and should be.
        floors=[_floor(other, target, made if kernel.vectors else None) for other in floors],
        problems=verdict.problems,
        known=verdict.known,
        issue=issue,
        bounds=bounds,
    )


def _floor(case: Case, target: Target, made: Assembly | None) -> Floor:
    launch, tile, loop_bytes = case.launch, case.launch.constants.get("BLOCK"), None
    if made is not None and tile is not None and made.loop_instructions:
        threads = launch.num_warps * target.warp
        per_turn = (sum(made.load_bytes) + sum(made.store_bytes)) * threads
        per_tile = per_turn / turns_in_loop(made, threads)
        loop_bytes = round(per_tile / tile * case.rows * VOCABULARIES[case.model])
    return Floor(
        model=case.model,
        rows=case.rows,
        vocabulary=VOCABULARIES[case.model],
        bytes_moved=launch.bytes_moved,
        flops=launch.flops,
        memory_us=launch.bytes_moved / target.bandwidth * 1e6,
        compute_us=max(launch.flops / target.flops, launch.tensor_flops / target.tensor_flops) * 1e6,
        loop_bytes=loop_bytes,
        tensor_flops=launch.tensor_flops,
    )


@cache
def _cases(index: int, capability: int, exact: str) -> list[tuple[Case, ...]]:
    """The cases of a kernel; each as a tuple with one entry per model."""
    by_model = [KERNELS[index].cases(model, gpu_of(capability, exact)) for model in VOCABULARIES]
    return list(zip(*by_model, strict=True))


def _inspect(job: tuple[int, int, str]) -> Finding:
    kernel, case, target = job
    by_model = _cases_on(kernel, target)[case]
    return inspect_case(KERNELS[kernel], by_model[0], TARGETS[target], by_model)


def _cases_on(kernel: int, target: str) -> list[tuple[Case, ...]]:
    return _cases(kernel, TARGETS[target].capability, TARGETS[target].exact)


def jobs(targets: Sequence[str], kernels: Sequence[str] = ()) -> list[tuple[int, int, str]]:
    """What ``survey`` has to do: (kernel, case, target), numbers counting from 0.

    Args:
        targets: keys of ``TARGETS``.
        kernels: names; all kernels if empty.
    """
    chosen = [i for i, kernel in enumerate(KERNELS) if not kernels or kernel.name in kernels]
    return [(k, c, t) for t in targets for k in chosen for c in range(len(_cases_on(k, t)))]


def survey(
    work: Sequence[tuple[int, int, str]], processes: int, done: Callable[[], None] = lambda: None
) -> list[Finding]:
    """Inspect every job, in its order.

    Args:
        work: from ``jobs``.
        processes: that compile at once; with 1 this process does it all.
        done: called after each job.
    """
    if processes == 1:
        findings = []
        for job in work:
            findings.append(_inspect(job))
            done()
        return findings
    # Forking a process that has threads, as torch has, may deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(_inspect, job) for job in work]
        try:
            for _ in as_completed(futures):
                done()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def failures(findings: Sequence[Finding]) -> Iterator[str]:
    """One line for each broken rule."""
    for finding in findings:
        for problem in finding.problems:
            reason = f": {finding.error.splitlines()[-1]}" if finding.error else ""
            yield f"{finding.kernel} [{finding.case}] on {finding.target} {problem}{reason}"


def known_failures(findings: Sequence[Finding]) -> Iterator[str]:
    """One line for each broken rule that is expected."""
    for finding in findings:
        for problem in finding.known:
            yield f"known: {finding.kernel} [{finding.case}] on {finding.target} {problem}"
