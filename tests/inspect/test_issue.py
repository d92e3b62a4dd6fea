"""The issue model of ``python -m auxkern.inspect``, and the rules that rest on it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("rich")

from triton.backends.compiler import GPUTarget  # noqa: E402

from auxkern.backends.triton import cases, kernels  # noqa: E402
from auxkern.backends.triton.gpu import Gpu  # noqa: E402
from auxkern.backends.triton.logits_loss.kernels import forward_kernel  # noqa: E402
from auxkern.inspect import __main__ as command  # noqa: E402
from auxkern.inspect import assembly, flow, issue, known, opcodes, rules, source, survey  # noqa: E402
from auxkern.inspect.known import KnownFailure  # noqa: E402
from auxkern.inspect.targets import TARGETS  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(forward_kernel, triton.JITFunction),
    reason="TRITON_INTERPRET=1: nothing is compiled",
)

H100 = TARGETS["sm_90"]

LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FMUL R4, R4, 1.4426950216293334961 ;
        /*0040*/              @!P0 FMUL R4, R4, 0.5 ;
        /*0050*/                   MUFU.EX2 R5, R4 ;
        /*0060*/                   HFMA2.MMA R6, -RZ, RZ, 0, 0 ;
        /*0070*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0080*/                   I2F.RP R7, UR12 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR7], R4 ;
        /*00b0*/              @!P2 BRA `(.L_x_3) ;
.L_x_4:
        /*00c0*/                   WHATEVER R8, R8 ;
        /*00d0*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*00e0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath) ;
        /*00f0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0100*/                   EXIT ;
.L_x_3:
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR7], R4 ;
        /*0120*/              @!P2 BRA `(.L_x_3) ;
        /*0130*/                   BRA `(.L_x_4) ;
        .weak           $__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath
        /*0140*/                   FADD R4, R4, R4 ;
        /*0150*/                   RET.REL.NODEC R8 `(kernel) ;
.L_x_5:
        /*0160*/                   BRA `(.L_x_5);
        /*0170*/                   NOP;
"""

CODE = """
module {
  tt.func public @kernel(%z: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("z"(#loc)), %stride: i32 loc("s"(#loc))) attributes {noinline = false} {
    %c0 = arith.constant 0 : i32 loc(#loc)
    %c1 = arith.constant 1 : i32 loc(#loc)
    %c8 = arith.constant 8 : i32 loc(#loc)
    %c1024 = arith.constant 1024 : i32 loc(#loc)
    %range = tt.make_range {end = 1024 : i32, start = 0 : i32} : tensor<1024xi32> loc(#loc)
    %whole = arith.divsi %stride, %c1024 : i32 loc(#loc)
    %over = scf.for %step = %c0 to %c8 step %c1 iter_args(%prefix = %c0) -> (i32)  : i32 {
      %sum = scf.for %start = %c0 to %stride step %c1024 iter_args(%total = %prefix) -> (i32)  : i32 {
        %at = tt.splat %start : i32 -> tensor<1024xi32> loc(#loc)
        %ids = arith.addi %at, %range : tensor<1024xi32> loc(#loc)
        %base = tt.splat %z : !tt.ptr<f32> -> tensor<1024x!tt.ptr<f32>> loc(#loc)
        %address = tt.addptr %base, %ids : tensor<1024x!tt.ptr<f32>>, tensor<1024xi32> loc(#loc)
        %x = tt.load %address : tensor<1024x!tt.ptr<f32>> loc(#loc)
        scf.yield %total : i32 loc(#loc)
      } loc(#loc)
      scf.yield %sum : i32 loc(#loc)
    } loc(#loc)
    scf.for %start = %c0 to %whole step %c1024  : i32 {
      %at = tt.addptr %z, %start : !tt.ptr<f32>, i32 loc(#loc)
      %base = tt.splat %at : !tt.ptr<f32> -> tensor<1024x!tt.ptr<f32>> loc(#loc)
      %y = tt.load %base : tensor<1024x!tt.ptr<f32>> loc(#loc)
    } loc(#loc)
    scf.for %start = %whole to %stride step %c1024  : i32 {
      %at = tt.addptr %z, %start : !tt.ptr<f32>, i32 loc(#loc)
      %base = tt.splat %at : !tt.ptr<f32> -> tensor<1024x!tt.ptr<f32>> loc(#loc)
      %y = tt.load %base : tensor<1024x!tt.ptr<f32>> loc(#loc)
    } loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""  # noqa: E501


def _kernel(name: str) -> cases.Kernel:
    return next(kernel for kernel in kernels.KERNELS if kernel.name == name)


def _case(kernel: str, label: str, model: str = "Llama-3", gpu: Gpu = cases.H100) -> cases.Case:
    return next(case for case in _kernel(kernel).cases(model, gpu) if case.label == label)


def _read(case: cases.Case, target: str) -> assembly.Assembly:
    gpu = TARGETS[target]
    return assembly.read(case.launch.compile(GPUTarget(gpu.backend, gpu.arch, gpu.warp)))


def _made(text: str, loops: Iterator[source.SourceLoop] = ()) -> assembly.Assembly:
    made = assembly._assembly(assembly._SASS, text.splitlines(), registers=32, spill=0, shared=0)
    return dataclasses.replace(made, source=source.Source(list(loops), 1))


def _over_a_row(step: int) -> source.SourceLoop:
    # 4096 columns of 4 bytes: the 16 bytes of the listing's load, 8 times over, for each of 128 threads.
    return source.SourceLoop(None, None, step, loads=[source.Load(512, 4)])


def test_a_jump_backwards_out_of_rare_code_is_no_loop():
    listing = flow.read_flow(LISTING.splitlines())
    opcodes_of = [[listing.instructions[place].opcode for place in loop] for loop in listing.loops]
    # The loop holds the code that waits again, which has a loop of its own.
    assert [len(loop) for loop in opcodes_of] == [15, 2]
    assert opcodes_of[1] == ["SYNCS", "BRA"]


def test_a_call_of_a_label_is_a_jump():
    """As the assembler for sm_80 leaves a long loop."""
    text = """
.L_x_1:
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0010*/               @P0 CALL.REL.NOINC `(.L_x_2) ;
        /*0020*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0040*/                   EXIT ;
"""
    made = _made(text)
    assert [loop.opcodes for loop in made.loops] == [{"LDG": 1, "CALL": 1, "BRA": 1}]
    assert made.outside == {"STG": 1, "EXIT": 1}


def test_instructions_of_a_listing_are_counted_by_what_executes_them():
    made = _made(LISTING, [_over_a_row(512)])
    launch = dataclasses.replace(
        _case("forward_kernel", "fp32").launch, constants={"BLOCK": 512}, num_warps=4
    )
    model = issue.model_of(made, launch, H100)
    # 128 threads take 4 columns each. HFMA2.MMA is no tensor-core instruction, I2F no integer one.
    assert model.unit == "column"
    assert {name: count * 4 for name, count in model.instructions.items()} == {
        "fma": 3, "mufu": 2, "integer": 1, "memory": 1, "tensor": 0, "control": 7, "other": 1,
    }  # fmt: skip
    assert model.barriers == 1
    # Neither what is called nor what follows the end belongs to the program.
    assert made.outside == {"S2R": 1, "BRA": 1, "CALL": 1, "STG": 1, "EXIT": 1}


def test_an_unrolled_loop_counts_for_the_tiles_that_it_takes():
    launch = dataclasses.replace(
        _case("forward_kernel", "fp32").launch, constants={"BLOCK": 128}, num_warps=4
    )
    # The listing loads 16 bytes a thread, a tile of the source has 4 for each.
    loop = dataclasses.replace(_over_a_row(128), loads=[source.Load(128, 4)])
    model = issue.model_of(_made(LISTING, [loop]), launch, H100)
    assert model.instructions["fma"] == 3 / 4
    assert model.barriers == 1 / 4


def test_bounds_are_counts_over_rates():
    made = assembly.Assembly(32, 0, 0, 10, (), (), 0, (), (), {"FADD": 6, "MUFU": 3, "F2I": 1})
    case = _case("combine_kernel", "fp16+fp32")
    launch = dataclasses.replace(case.launch, grid=(1000,), num_warps=8, bytes_moved=67, tensor_flops=989)
    bound = issue.bound_of(made, dataclasses.replace(case, launch=launch), H100)
    # 8,000 warps on 132 multiprocessors; 4 of their instructions in a clock, 16 lanes of MUFU.
    assert bound.issue_us == pytest.approx(8000 * 10 / (132 * 4 * 1980))
    assert bound.mufu_us == pytest.approx(8000 * 4 * 32 / (132 * 16 * 1980))
    assert bound.memory_us == pytest.approx(67 / 3.35e6)
    assert bound.tensor_us == pytest.approx(989 / 989e6)
    assert bound.largest == ("mufu", bound.mufu_us)
    # Five programs keep five multiprocessors busy: they take as long as 132 do on all of them.
    few = issue.bound_of(made, dataclasses.replace(case, launch=dataclasses.replace(launch, grid=(5,))), H100)
    assert few.issue_us == pytest.approx(bound.issue_us * 132 / 1000)


def test_clocks_and_multiprocessors_give_the_float32_rate():
    operations = {"sm_80": 64 * 2, "sm_90": 128 * 2, "sm_100": 128 * 2, "gfx942": 64 * 4}  # in a clock
    for name, target in TARGETS.items():
        # Data sheets round to two or three digits.
        rate = target.clock * target.multiprocessors * operations[name]
        assert rate == pytest.approx(target.flops, rel=0.01), name


def test_source_tells_turns_repeats_and_passes():
    read = source.read_source(CODE)
    searched, whole, rest = read.loops
    assert (searched.turns, searched.length, searched.step) == (None, "stride", 1024)
    assert (searched.repeats, whole.repeats) == (8, 1)
    assert searched.loads == [source.Load(1024, 4)]
    assert (whole.continues, rest.continues) == (False, True)
    assert read.passes == 8 + 1


def test_a_loop_as_long_as_memory_says_counts_once():
    """As code that a branch may skip: how often it turns stands nowhere."""
    code = """\
tt.func public @kernel(%p: !tt.ptr<i32>, %q: !tt.ptr<f32>, %n: i32) {
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %a = tt.load %p : !tt.ptr<i32>
  %end = arith.subi %a, %n : i32
  scf.for %i = %c0 to %END step %c1 : i32 {
    %at = tt.addptr %q, %i : tensor<64x!tt.ptr<f32>>, tensor<64xi32>
    %x = tt.load %at : tensor<64x!tt.ptr<f32>>
  }
}"""
    (read,) = source.read_source(code.replace("%END", "%end")).loops
    (given,) = source.read_source(code.replace("%END", "%n")).loops
    assert (read.read, read.length) == (True, None)
    assert (given.read, given.length) == (False, "n")
    once = dataclasses.replace(read, read=False, turns=1)
    case = _case("combine_kernel", "fp16+fp32")
    assert issue.bound_of(_made(LISTING, [read]), case, H100) == issue.bound_of(
        _made(LISTING, [once]), case, H100
    )


def test_products_of_the_source_name_their_operands():
    code = CODE.replace(
        "%y = tt.load",
        """%a = tt.dot %p, %q, %r : tensor<64x16xf16> * tensor<16x64xf16> -> tensor<64x64xf32> loc(#loc)
      %b = tt.dot %p, %q, %r : tensor<64x16xf32> * tensor<16x64xf32> -> tensor<64x64xf32> loc(#loc)
      %c = tt.dot %p, %q, %r, inputPrecision = tf32 : tensor<4x4xf32> * tensor<4x4xf32> -> tensor<4x4xf32>
      %y = tt.load""",
    )
    assert source.read_source(code).loops[1].tensor_dots == [True, False, True]


def test_an_opcode_stands_in_one_class():
    names = [name for text in opcodes.OPCODES.values() for name in text.split()]
    assert len(names) == len(set(names))
    assert opcodes.by_class({"NEVERSEEN": 2, "FADD": 1})["other"] == 2


def test_unknown_instructions_break_a_rule():
    kernel, case = _kernel("forward_kernel"), _case("forward_kernel", "fp32")
    launch = dataclasses.replace(case.launch, constants={"BLOCK": 512}, num_warps=4)
    case = dataclasses.replace(case, launch=launch)
    broken = dict(rules.broken_rules(kernel, case, H100, _made(LISTING, [_over_a_row(512)])))
    assert broken["unknown opcodes"] == "consists of unknown instructions to 7%"  # 1 of 15
    renamed = _made(LISTING.replace("WHATEVER", "IADD3"), [_over_a_row(512)])
    assert "unknown opcodes" not in dict(rules.broken_rules(kernel, case, H100, renamed))


def test_loops_that_do_not_match_break_a_rule():
    kernel, case = _kernel("forward_kernel"), _case("forward_kernel", "fp32")
    assert "loops" in dict(rules.broken_rules(kernel, case, H100, _made(LISTING)))
    copied = _made(LISTING.replace("WHATEVER", "UTMALDG"), [_over_a_row(512)])
    assert "loops" in dict(rules.broken_rules(kernel, case, H100, copied))


def test_loop_of_the_forward_against_its_listing():
    """Counted once in the listing for sm_90, from the label of the loop without masks to its branch.

    353 instructions, 36 of them MUFU: 32 exponentials, and 4 to move the sums of 4 groups of columns to
    their new maximum. 128 threads share 4,096 columns. A compiler of another version may need a few more
    or less.
    """
    model = issue.model_of(_read(case := _case("forward_kernel", "bf16"), "sm_90"), case.launch, H100)
    assert model.total == pytest.approx(353 / 32, abs=0.5)
    assert model.instructions["mufu"] == 36 / 32
    assert (model.unit, model.barriers, model.passes) == ("column", 0, 1)


def test_loop_of_the_draw_against_its_listing():
    """Counted as for the forward: 355 instructions, no BAR; 128 threads share 2,048 columns."""
    model = issue.model_of(_read(case := _case("draw_kernel", "bf16+bf16"), "sm_90"), case.launch, H100)
    assert model.total == pytest.approx(355 / 16, rel=0.03)
    assert model.barriers == 0


@pytest.mark.parametrize(("label", "width"), [("bf16 768+256", 1024), ("bf16 4096+512", 4608)])
def test_tensor_core_instructions_are_those_of_the_products(label, width):
    """An HGMMA of a tile 256 wide is 64 x 256 x 16 products of 128 threads, in a loop or unrolled."""
    model = issue.model_of(_read(case := _case("heads_forward_kernel", label), "sm_90"), case.launch, H100)
    assert sum(case.launch.constants["D"]) == width
    assert model.unit == "1,000 products"
    assert model.instructions["tensor"] == pytest.approx(1000 * 128 / (64 * 256 * 16))


def test_exact_products_take_an_instruction_each():
    """A float32 product outside of tensor cores is one FFMA of one thread; the rest of a tile is small."""
    whole = cases.gpu_of(9, "ieee")
    case = _case("heads_forward_kernel", "fp32 768+256, writes e", gpu=whole)
    model = issue.model_of(_read(case, "sm_90"), case.launch, H100)
    assert 1000 <= model.instructions["fma"] < 1020


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("label", ["fp32xfp16+fp32 768+256", "fp32xbf16+fp32 768+256"])
def test_a_16_bit_weight_beside_float32_states_is_multiplied_in_tensor_cores(label, target):
    gpu = cases.gpu_of(TARGETS[target].capability)
    kernel, case = _kernel("heads_forward_kernel"), _case("heads_forward_kernel", label, gpu=gpu)
    assert case.half_operands == [True, True]
    made = _read(case, target)
    assert [inside for _, inside in rules.products(made)] == [True, True]
    assert rules.judge(kernel, case, TARGETS[target], made).problems == []


def test_a_known_failure_that_passes_is_a_problem():
    kernel, case = _kernel("combine_kernel"), _case("combine_kernel", "fp16+fp32")
    made = _read(case, "sm_90")
    failure = KnownFailure("spills", "combine_kernel", ("fp16+fp32",), ("sm_90",), "it once did")
    verdict = rules.judge(kernel, case, H100, made, failures=(failure,))
    assert verdict.problems == ['keeps the rule "spills": take it from the known failures']
    assert verdict.known == []
    elsewhere = dataclasses.replace(failure, targets=("sm_80",))
    assert rules.judge(kernel, case, H100, made, failures=(elsewhere,)).problems == []


def test_no_rule_is_known_to_be_broken():
    assert known.FAILURES == ()


@pytest.fixture
def with_kernels(monkeypatch):
    def register(*replaced: cases.Kernel) -> None:
        monkeypatch.setattr(survey, "KERNELS", replaced)
        survey._cases.cache_clear()

    yield register
    survey._cases.cache_clear()


def test_the_command_fails_on_more_passes_than_are_stated(with_kernels, capsys):
    with_kernels(dataclasses.replace(_kernel("heads_combine_kernel"), passes=6))
    status = command.main(["--target", "sm_90", "--jobs", "1", "--kernel", "heads_combine_kernel"])
    assert status == 1
    printed = capsys.readouterr().out
    assert "heads_combine_kernel [bf16, smooth, stats] on sm_90 reads 7 times, not 6" in printed
    assert "3 binaries, 1 broken rules, 0 known failures" in printed


def test_the_command_does_not_fail_on_a_known_failure(with_kernels, monkeypatch, capsys):
    kernel, label = _kernel("combine_kernel"), "fp16+fp32"
    launches = lambda V, gpu: (case for case in kernel.launches(V, gpu) if case[0] == label)  # noqa: E731
    with_kernels(dataclasses.replace(kernel, launches=launches, passes=0))
    known_one = KnownFailure("passes", "combine_kernel", (label,), ("sm_90",), "no kernel reads nothing")
    monkeypatch.setattr(survey, "judge", functools.partial(rules.judge, failures=(known_one,)))
    assert command.main(["--target", "sm_90", "--jobs", "1", "--kernel", "combine_kernel"]) == 0
    printed = capsys.readouterr().out
    assert f"known: combine_kernel [{label}] on sm_90 reads" in printed
    assert "1 binaries, 0 broken rules, 1 known failures" in printed
