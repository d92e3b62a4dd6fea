"""What the compiler makes of every registered kernel, for GPUs that are not there."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

import auxkern.backends.triton as package  # noqa: E402
from auxkern.backends.triton import cases, kernels, tuned  # noqa: E402
from auxkern.backends.triton.logits_loss import launches as logits_loss  # noqa: E402
from auxkern.backends.triton.logits_loss.kernels import forward_kernel  # noqa: E402
from auxkern.core.loss import Loss  # noqa: E402
from auxkern.core.sums import Sum  # noqa: E402
from auxkern.core.terms import Logits  # noqa: E402
from auxkern.inspect import assembly, rules  # noqa: E402
from auxkern.inspect.targets import TARGETS  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(forward_kernel, triton.JITFunction),
    reason="TRITON_INTERPRET=1: nothing is compiled",
)


def _cases(kernel: cases.Kernel) -> Iterator[tuple[str, cases.Case]]:
    """Every case for one GPU, a few for the other two."""
    # GPT-2's 50,257 is odd: its rows begin anywhere.
    model = "GPT-2" if kernel.any_row else "Llama-3"
    for target in ("sm_90", "sm_80", "sm_100"):
        for case in kernel.cases(model, cases.gpu_of(TARGETS[target].capability)):
            mixed = case.label.startswith(("fp32x", "fp16x", "bf16x"))
            wide = target == "sm_100" and case.label in ("bf16 768+256, writes e", "bf16 256+256")
            if target == "sm_90" or mixed or wide or case.label in ("fp16", "fp32+fp32", "bf16+fp32"):
                yield target, case


# Of float16 what every target compiles; on an H100 a product of its own and the recipe in training beside it.
FLOAT16 = ("fp16", "fp16+fp32")
FLOAT16_ON_H100 = (*FLOAT16, "fp16 768+256", "fp32xfp16+sparse, e")


def _twins(label: str) -> set[str]:
    """The same in bfloat16, and two bfloat16 terms, which have fewer bytes for as many instructions."""
    return {re.sub(r"\bfp16|(?<=x)fp16", "bf16", label), label.replace("fp16+fp32", "bf16+bf16")} - {label}


def _parameters() -> list[Any]:
    """All of them; a float16 twin of a bfloat16 case is left to the slow tests."""
    parameters = []
    for kernel in kernels.KERNELS:
        listed = list(_cases(kernel))
        labels = {case.label for _, case in listed}
        for target, case in listed:
            own = FLOAT16_ON_H100 if target == "sm_90" else FLOAT16
            repeated = case.label not in own and _twins(case.label) & labels
            name = f"{target}-{kernel.name}-{case.label}"
            marks = pytest.mark.slow if repeated else ()
            parameters.append(pytest.param(target, kernel, case, id=name, marks=marks))
    return parameters


def _compiled(target: str, case: cases.Case) -> Any:
    gpu = TARGETS[target]
    return case.launch.compile(GPUTarget(gpu.backend, gpu.arch, gpu.warp))


@pytest.mark.parametrize(("target", "kernel", "case"), _parameters())
def test_default_configuration(target, kernel, case):
    made = assembly.read(_compiled(target, case))
    assert rules.judge(kernel, case, TARGETS[target], made).problems == []
    if kernel.vectors:
        assert made.loop_instructions > 0
        # A draw with log-probabilities stores two numbers of each part of a row.
        stores = kernel.name in ("backward_kernel", "fused_kernel", "sum_kernel") or "logprob" in case.label
        assert bool(made.store_bytes) == stores


def _measured() -> Iterator[tuple[str, cases.Case, cases.Kernel]]:
    """What a file that comes with the package has otherwise than the defaults."""
    for path in sorted(tuned.PACKAGED.glob("*.json")):
        file = tuned.Tuned.read(path)
        target = next(name for name, gpu in TARGETS.items() if gpu.capability == file.capability)
        usual = cases.gpu_of(file.capability)
        chosen = dataclasses.replace(usual, configs=tuned.configs_for(file.device, file.capability)[0])
        for kernel in kernels.KERNELS:
            pairs = zip(kernel.cases("Llama-3", usual), kernel.cases("Llama-3", chosen), strict=True)
            for before, case in pairs:
                if (before.launch.constants, before.launch.options) != (
                    case.launch.constants,
                    case.launch.options,
                ):
                    yield target, case, kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "case", "kernel"),
    [
        pytest.param(target, case, kernel, id=f"{target}-{kernel.name}-{case.label}")
        for target, case, kernel in _measured()
    ],
)
def test_choices_that_were_measured_obey_the_rules(target, case, kernel):
    problems = rules.judge(kernel, case, TARGETS[target], assembly.read(_compiled(target, case))).problems
    # A measured time outranks a model's.
    assert [problem for problem in problems if "in a model" not in problem] == []


@pytest.mark.parametrize("name", ["finish_kernel", "heads_combine_kernel"])
def test_more_than_one_pass_is_stated_as_it_is(name):
    kernel = _named(name)
    # Of compilers that unroll more and less.
    passes = [
        assembly.read(_compiled(target, case)).source.passes
        for target in ("sm_90", "gfx942")
        for case in kernel.cases("Llama-3", cases.gpu_of(TARGETS[target].capability))
    ]
    assert max(passes) == kernel.passes


def test_bfloat16_gradients_are_rounded_to_nearest():
    # The interpreter cuts them off, so that no test of it can tell.
    case = next(c for c in _named("backward_kernel").cases("GPT-2") if c.label == "bf16+bf16")
    assert "cvt.rn.bf16x2.f32" in _compiled("sm_90", case).asm["ptx"]


# Of float32 alone: what tensor cores do is no option of the compiler's.
FUSED = {"sm_90": r"\bfma\.rn\.f32\b", "gfx942": r"\bv_(?:pk_)?fmac?_f32"}


@pytest.mark.parametrize("target", FUSED)
def test_multiply_adds_are_fused_whatever_the_default(target, monkeypatch):
    launch = next(iter(_named("backward_kernel").cases("GPT-2"))).launch
    gpu = TARGETS[target]

    def fused(**options: bool) -> int:
        options = {**launch.options, **options}
        made = triton.compile(launch.source(), GPUTarget(gpu.backend, gpu.arch, gpu.warp), options)
        return len(re.findall(FUSED[target], made.asm["ptx" if gpu.backend == "cuda" else "amdgcn"]))

    usual, apart = fused(enable_fp_fusion=True), fused(enable_fp_fusion=False)
    # A vector of 8 columns in each thread, one product and sum for each at the least.
    assert usual >= apart + 8
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert fused() == usual


@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.name)
def test_dispatch_is_told_to_fuse(kernel):
    told = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **given: told.append((grid, given))

    for case in kernel.cases("Llama-3"):
        dataclasses.replace(case.launch, kernel=Recorder()).run()
        grid, given = told.pop()
        assert grid == case.launch.grid
        assert given["enable_fp_fusion"] is True
        assert given["num_warps"] == case.launch.num_warps


def test_forward_keeps_a_row_in_one_program_without_barriers_in_its_loop():
    for case in _named("forward_kernel").cases("GPT-2"):
        if "," not in case.label:
            ttgir = _compiled("sm_90", case).asm["ttgir"]
            loop = ttgir[ttgir.index("scf.for") : ttgir.index("scf.yield")]
            assert "convert_layout" not in loop


def _named(name: str) -> cases.Kernel:
    return next(kernel for kernel in kernels.KERNELS if kernel.name == name)


@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.name)
def test_one_binary_serves_every_vocabulary(kernel):
    # Where rows must begin at a boundary, those of an odd vocabulary take another one.
    models = [m for m, V in cases.VOCABULARIES.items() if kernel.any_row or V % 8 == 0]
    hashes = [{case.label: _hash(case.launch) for case in kernel.cases(model)} for model in models]
    assert all(other == hashes[0] for other in hashes)


def _hash(launch: Any) -> str:
    return f"{launch.source().hash()} {launch.options}"


def _launches(B: int, T: int, *, few: bool = False) -> list[Any]:
    """Launches for (B, T, V) logits beside a [:, :-1] view of longer ones."""
    whole = torch.empty(B, T, 50257, dtype=torch.float16, device="meta").view(1, B * T, 50257)
    sliced = torch.empty(B, T + 1, 50257, device="meta")[:, :-1]
    N = B * T
    target = cases.target_of(N)
    logits = Sum((Logits(whole), Logits(sliced)), 50257)
    forward = logits_loss.forward(logits, target, Loss(), cases.H100)[1]
    wanted = [{}, {"values": torch.empty(sliced.shape, device="meta")}]
    gradient = logits_loss.backward(logits, target, cases.slopes_of(N, 50257), wanted, cases.H100)
    return [*forward, gradient]


def test_new_batch_sizes_and_lengths_compile_nothing():
    seen = {_hash(launch) for launch in _launches(8, 512)}
    for B, T in ((2, 4096), (16, 128), (7, 331), (3, 1009), (1024, 16), (64, 64)):
        assert {_hash(launch) for launch in _launches(B, T)} <= seen
    # Few rows are split over programs; only the kernel that combines them is new.
    assert {_hash(launch) for launch in _launches(2, 5)} - seen == {_hash(_launches(3, 2)[1])}


@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.name)
def test_compiles_what_dispatch_would_compile(kernel):
    """``Launch.source`` names the types and alignments that Triton's own launcher finds."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    function = kernel.function
    bind = create_function_from_signature(function.signature, function.params, backend)
    # GPT-2's 50,257 is odd: its rows begin anywhere.
    for case in kernel.cases("GPT-2" if kernel.any_row else "Llama-3"):
        launch = case.launch
        bound, specialization, given = bind(**launch.arguments, **launch.constants, **launch.options)
        options, signature, constants, attributes = function._pack_args(
            backend, given, bound, specialization, given
        )
        assert options.enable_fp_fusion is True
        assert options.num_warps == launch.num_warps
        source = launch.source()
        assert source.signature == signature
        assert source.constants == constants
        assert source.attrs == {path: value for path, value in attributes.items() if value}


def _is_jit(node: ast.expr) -> bool:
    node = node.func if isinstance(node, ast.Call) else node
    return isinstance(node, ast.Attribute) and node.attr == "jit"


def test_every_entry_point_is_registered():
    """A jit function that no other jit function calls is a kernel, and must be in ``KERNELS``."""
    functions, called = set(), set()
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list)):
                functions.add(node.name)
                names = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
                called |= {n.id if isinstance(n, ast.Name) else getattr(n, "attr", "") for n in names}
    assert functions - called == {kernel.name for kernel in kernels.KERNELS}
