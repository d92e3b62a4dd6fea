"""``python -m auxkern.inspect``: reading compiled kernels, and the rules they are held to."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("rich")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from auxkern.backends.triton import cases, kernels  # noqa: E402
from auxkern.backends.triton.gpu import Gpu  # noqa: E402
from auxkern.backends.triton.launch import Launch  # noqa: E402
from auxkern.backends.triton.logits_loss.kernels import forward_kernel  # noqa: E402
from auxkern.inspect import __main__ as command  # noqa: E402
from auxkern.inspect import assembly, issue, rules, survey, tables  # noqa: E402
from auxkern.inspect.targets import TARGETS  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(forward_kernel, triton.JITFunction),
    reason="TRITON_INTERPRET=1: nothing is compiled",
)


@triton.jit
def product(a, b, out, stride, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    c = tl.dot(tl.load(a + rows * stride + columns), tl.load(b + rows * stride + columns))
    tl.store(out + rows * stride + columns, c)


def _kernel(name: str) -> cases.Kernel:
    return next(kernel for kernel in kernels.KERNELS if kernel.name == name)


def _with_a_huge_tile(V: int, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    label, launch = next(_kernel("forward_kernel").launches(V, gpu))
    constants = launch.constants | {"BLOCK": 8192}
    yield label, dataclasses.replace(launch, constants=constants, num_warps=1)


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")],
)
def test_finds_tensor_core_instructions(target, instruction):
    gpu = TARGETS[target]
    signature = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "stride": "i32", "SIZE": "constexpr"}
    source = ASTSource(product, signature, {"SIZE": 128})
    made = assembly.read(triton.compile(source, target=GPUTarget(gpu.backend, gpu.arch, gpu.warp)))
    assert any(name.startswith(instruction) for name in made.tensor_core)
    assert made.shared_bytes > 0
    # Where no kernel was to multiply matrices, that is a broken rule.
    kernel = _kernel("combine_kernel")
    broken = rules.broken_rules(kernel, next(kernel.cases("GPT-2")), gpu, made)
    assert any(instruction in problem for _, problem in broken)


def test_reads_the_innermost_busiest_loop():
    text = """
.L_x_1:
        /*0010*/  LDG.E.U16.CONSTANT R1, desc[UR4][R2.64] ;
.L_x_2:
        /*0020*/  LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/  LDG.E.LTC128B.64 R4, desc[UR4][R2.64] ;
        /*0040*/  STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/  @P0 BRA `(.L_x_2) ;
        /*0060*/  STG.E desc[UR4][R2.64], R4 ;
        /*0070*/  BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/  BRA `(.L_x_3) ;
"""
    made = assembly._assembly(assembly._SASS, text.splitlines(), registers=32, spill=0, shared=0)
    assert made.load_bytes == (16, 8)
    assert made.store_bytes == (16,)
    assert made.loop_instructions == 4
    assert made.instructions == 8


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, 64),
        ("sm_90", 80, 0, 4, 24),
        ("sm_90", 255, 0, 4, 8),
        ("sm_90", 32, 100 * 1024, 4, 8),
        ("sm_90", 16, 0, 1, 32),  # no more than 32 programs
        ("gfx942", 57, 0, 4, 32),
        ("gfx942", 128, 0, 4, 16),
    ],
)
def test_resident_warps(target, registers, shared, warps, expected):
    assert TARGETS[target].resident_warps(registers, shared, warps) == expected


def test_a_huge_tile_breaks_the_spill_rule(monkeypatch, capsys):
    broken = dataclasses.replace(_kernel("forward_kernel"), launches=_with_a_huge_tile)
    monkeypatch.setattr(survey, "KERNELS", (broken,))
    survey._cases.cache_clear()
    try:
        status = command.main(["--target", "sm_90", "--jobs", "1", "--kernel", "forward_kernel"])
    finally:
        survey._cases.cache_clear()
    assert status == 1
    printed = capsys.readouterr().out
    assert "forward_kernel [fp16] on sm_90 spills" in printed
    assert "1 binaries, 1 broken rules" in printed


def test_command_prints_and_writes_json(tmp_path, capsys):
    path = tmp_path / "found.json"
    arguments = ["--target", "sm_80", "--target", "gfx942", "--kernel", "combine_kernel"]
    assert command.main([*arguments, "--jobs", "2", "--model", "Gemma", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "Floors for Gemma" in printed
    assert "data-sheet rates" in printed
    assert "…" not in printed
    content = json.loads(path.read_text())
    assert content["command"].endswith(f"--json {path}")
    assert list(content["targets"]) == ["sm_80", "gfx942"]
    first = content["findings"][0]
    assert first["made"]["registers"] > 0
    assert first["problems"] == []
    assert [floor["model"] for floor in first["floors"]] == list(cases.VOCABULARIES)
    assert [bound["model"] for bound in first["bounds"]] == list(cases.VOCABULARIES)
    assert first["issue"]["unit"] == "program"
    assert first["issue"]["instructions"]["integer"] > 0
    assert "Issue MODEL of sm_80" in printed
    amd = next(finding for finding in content["findings"] if finding["target"] == "gfx942")
    assert amd["issue"] is None


def test_blocks_of_an_amd_loop_are_found_by_their_remarks():
    text = """
.LBB0_1:                               ;   in Loop: Header=BB0_2 Depth=1
\tglobal_store_dwordx4 v[20:21], v[0:3], off
.LBB0_2:                               ; %.lr.ph
                                       ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx2 v[4:7], v[2:3], off
; %bb.3:                               ;   in Loop: Header=BB0_2 Depth=1
\ts_branch .LBB0_1
.LBB0_4:
\tglobal_load_ushort v4, v[4:5], off
\ts_branch .LBB0_2
"""
    made = assembly._assembly(assembly._GCN, text.splitlines(), registers=32, spill=0, shared=0)
    assert made.load_bytes == (8,)
    assert made.store_bytes == (16,)
    assert made.loop_instructions == 3
    assert made.instructions == 5


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
def test_the_inner_loop_moves_each_logit_once(name, target):
    kernel = _kernel(name)
    for case in kernel.cases("GPT-2"):
        if case.label in ("fp16+fp32", "bf16+bf16"):
            finding = survey.inspect_case(kernel, case, TARGETS[target], [case])
            assert finding.floors[0].loop_bytes == finding.floors[0].bytes_moved


def test_tables_fit_100_columns(capsys):
    """With every kernel and case that there is, as if each were compiled to large figures."""
    made = assembly.Assembly(255, 1024, 232448, 9999, (16,) * 200, (16,) * 16, 0, ("v_mfma_f32_32x32x8_f16",))
    wide = dataclasses.replace(made, tensor_core=("UTCHMMA",))
    large = {
        "fma": 2222,
        "mufu": 333,
        "integer": 22222,
        "memory": 4444,
        "tensor": 16,
        "control": 999,
        "other": 1,
    }
    findings = []
    for target, gpu in TARGETS.items():
        for kernel in kernels.KERNELS:
            for case in kernel.cases("Gemma"):
                floor = survey._floor(case, gpu, made)
                shown = wide if gpu.backend == "cuda" else made
                finding = survey.Finding(
                    kernel.name, case.label, target, 4096, 8, 1.0, None, shown, 64, 64, [floor]
                )
                if gpu.backend == "cuda":
                    model = issue.IssueModel("1,000 products", large, 999, 19)
                    bound = issue.Bound("Gemma", 99999, 0, 0, 0)
                    finding = dataclasses.replace(finding, issue=model, bounds=[bound])
                findings.append(finding)
    tables.show(findings, "Gemma")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "…" not in printed
    assert "MFMA" in printed


def test_bytes_of_an_unrolled_loop_are_those_of_one_tile():
    kernel = _kernel("sum_kernel")
    case = next(c for c in kernel.cases("Llama-3") if c.label == "fp32+fp32")
    finding = survey.inspect_case(kernel, case, TARGETS["sm_90"], [case])
    assert finding.floors[0].loop_bytes == finding.floors[0].bytes_moved


def test_floor_of_a_product_is_at_the_rate_of_tensor_cores():
    kernel, gpu = _kernel("heads_forward_kernel"), TARGETS["sm_90"]
    case = next(c for c in kernel.cases("GPT-2") if c.label == "bf16 4096+512")
    floor = survey._floor(case, gpu, None)
    assert floor.tensor_flops == 2 * case.rows * 50257 * (4096 + 512)
    assert floor.compute_us == pytest.approx(floor.tensor_flops / 989e12 * 1e6)


def test_floor_is_bytes_over_bandwidth():
    kernel, gpu = _kernel("backward_kernel"), TARGETS["sm_90"]
    case = next(c for c in kernel.cases("GPT-2") if c.label == "fp16+fp32")
    floor = survey._floor(case, gpu, None)
    # Reads both terms, writes the gradient of the second.
    assert floor.bytes_moved == 8192 * 50257 * (2 + 4 + 4)
    assert floor.memory_us == pytest.approx(floor.bytes_moved / 3.35e12 * 1e6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "softmax"], "forward_kernel"),
        (["--model", "BERT"], "Llama-3"),
        (["--jobs", "0"], "at least 1"),
        (["--target", "sm_75"], "sm_80"),
        (["--json", "/no/such/folder/x.json"], "does not exist"),
    ],
)
def test_bad_options_name_the_choices(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_triton_is_one_clear_line(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    with pytest.raises(SystemExit) as stopped:
        command.main([])
    assert stopped.value.code == 2
    assert "triton is not installed; pip install" in capsys.readouterr().err


def test_compiler_errors_are_reported_not_raised():
    kernel = _kernel("combine_kernel")
    case = next(iter(kernel.cases("GPT-2")))
    constants: dict[str, Any] = case.launch.constants | {"LANES": 3}  # not a power of 2
    wrong = dataclasses.replace(case, launch=dataclasses.replace(case.launch, constants=constants))
    finding = survey.inspect_case(kernel, wrong, TARGETS["sm_90"])
    assert finding.made is None
    assert finding.problems == ["does not compile"]
    assert list(survey.failures([finding]))
