"""Compiles registered kernels for GPUs that need not be there, and judges what came out."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache

from auxkern.backends.triton.cases import VOCABULARIES, Case, Kernel
from auxkern.backends.triton.kernels import KERNELS
from auxkern.inspect.assembly import Assembly, read
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


def problems(kernel: Kernel, target: Target, made: Assembly, tensor_cores: bool | None = None) -> list[str]:
    """The rules that a compiled kernel breaks, in words.

    No spills; shared memory within the target's limit; on NVIDIA, 16-byte traffic in the inner
    loop of a memory-bound kernel; tensor cores where ``tensor_cores``, by default for every kernel
    that multiplies matrices, and never in a kernel that does not.
    """
    broken = []
    if made.spill_bytes:
        broken.append(f"spills {made.spill_bytes} bytes per thread")
    if made.shared_bytes > target.shared_per_program:
        broken.append(
            f"takes {made.shared_bytes} bytes of shared memory; {target.name} has {target.shared_per_program}"
        )
    narrow = sorted({width for width in made.load_bytes + made.store_bytes if width < 16})
    if kernel.vectors and target.backend == "cuda" and (narrow or not made.load_bytes):
        broken.append(
            f"moves {', '.join(map(str, narrow)) or 'no'} bytes at a time in its inner loop, not 16"
        )
    needed = kernel.dot if tensor_cores is None else tensor_cores
    if needed and not made.tensor_core:
        broken.append("has no tensor-core instruction")
    if made.tensor_core and not kernel.dot:
        broken.append(f"has {', '.join(made.tensor_core)}")
    return broken


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
    if made is not None:
        # Exact float32 products cannot run in tensor cores.
        broken = problems(kernel, target, made, launch.tensor_flops > 0)
    else:
        # AMD's compiler is not in every Triton; the table shows that it failed, and no more.
        broken = ["does not compile"] if target.backend == "cuda" else []
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
        problems=broken,
    )


def _floor(case: Case, target: Target, made: Assembly | None) -> Floor:
    launch, tile, loop_bytes = case.launch, case.launch.constants.get("BLOCK"), None
    if made is not None and tile is not None and made.loop_instructions:
        per_tile = (sum(made.load_bytes) + sum(made.store_bytes)) * launch.num_warps * target.warp
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
def _cases(index: int) -> list[tuple[Case, ...]]:
    """The cases of a kernel; each as a tuple with one entry per model."""
    return list(zip(*(KERNELS[index].cases(model) for model in VOCABULARIES), strict=True))


def _inspect(job: tuple[int, int, str]) -> Finding:
    kernel, case, target = job
    by_model = _cases(kernel)[case]
    return inspect_case(KERNELS[kernel], by_model[0], TARGETS[target], by_model)


def jobs(targets: Sequence[str], kernels: Sequence[str] = ()) -> list[tuple[int, int, str]]:
    """What ``survey`` has to do: (kernel, case, target), numbers counting from 0.

    Args:
        targets: keys of ``TARGETS``.
        kernels: names; all kernels if empty.
    """
    chosen = [i for i, kernel in enumerate(KERNELS) if not kernels or kernel.name in kernels]
    return [(k, c, t) for t in targets for k in chosen for c in range(len(_cases(k)))]


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
