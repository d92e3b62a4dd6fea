"""What the compiler makes of the kernels of output heads, beside the cases that ``kernels.py`` registers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

from auxkern.backends.triton.cases import Case, coefficients_of, gpu_of, heads_of, target_of  # noqa: E402
from auxkern.backends.triton.gpu import Gpu  # noqa: E402
from auxkern.backends.triton.heads import heads_sum  # noqa: E402
from auxkern.backends.triton.heads_loss import cases as heads_loss_cases  # noqa: E402
from auxkern.backends.triton.heads_loss import launches as heads_loss  # noqa: E402
from auxkern.backends.triton.launch import Launch  # noqa: E402
from auxkern.backends.triton.logits_loss.kernels import forward_kernel  # noqa: E402
from auxkern.core.loss import Loss  # noqa: E402
from auxkern.core.terms import Head  # noqa: E402
from auxkern.inspect import assembly  # noqa: E402
from auxkern.inspect.issue import bound_of  # noqa: E402
from auxkern.inspect.targets import TARGETS  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(forward_kernel, triton.JITFunction),
    reason="TRITON_INTERPRET=1: nothing is compiled",
)

H, B, F = torch.float16, torch.bfloat16, torch.float32
V = 128256
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


def made(target: str, launch: Launch) -> Any:
    gpu = TARGETS[target]
    found = assembly.read(launch.compile(GPUTarget(gpu.backend, gpu.arch, gpu.warp)))
    assert found.spill_bytes == 0
    assert found.shared_bytes <= gpu.shared_per_program
    return found


@pytest.mark.parametrize("target", TENSOR_CORES)
def test_16_bit_products_take_the_tensor_cores_of_every_target(target):
    gpu = gpu_of(TARGETS[target].capability)
    wide = heads_loss_cases.sum_of(V, (4096, 512), (B, B), gpu=gpu)
    narrow = heads_loss_cases.sum_of(V, (256, 256), (H, H), gpu=gpu)
    for launch in (heads_loss_cases.one_write_launch(wide), heads_loss_cases.gradient_launch(narrow, H)):
        assert made(target, launch).tensor_core == (TENSOR_CORES[target],)
        assert launch.tensor_flops == 2 * heads_loss_cases.ROWS * V * sum(launch.constants["D"])


def float32_launches(gpu: Gpu) -> list[Launch]:
    heads = heads_loss_cases.sum_of(V, (768, 256), (F, F), gpu=gpu)
    separate = heads_loss_cases.sum_of(V, (768, 256), (F, F), stats=True, gpu=gpu)
    return [
        heads_loss_cases.one_write_launch(heads),
        heads_loss_cases.gradient_launch(heads, F),
        heads_loss_cases.forward_launches(separate, stats=True)[0],
    ]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_float32_products_are_exact_unless_asked_otherwise(target):
    for launch in float32_launches(gpu_of(TARGETS[target].capability, "ieee")):
        assert made(target, launch).tensor_core == ()


@pytest.mark.parametrize("target", TENSOR_CORES)
def test_float32_products_take_the_tensor_cores_in_parts(target):
    for launch in float32_launches(gpu_of(TARGETS[target].capability)):
        assert made(target, launch).tensor_core == (TENSOR_CORES[target],)
        assert launch.tensor_flops == 6 * 2 * heads_loss_cases.ROWS * V * (768 + 256)


@pytest.mark.parametrize("target", TENSOR_CORES)
def test_tf32_products_take_tiles_that_keep_the_tensor_cores_busy(target):
    gpu, ROWS = TARGETS[target], heads_loss_cases.ROWS
    choices = gpu_of(gpu.capability).configs
    summed = heads_sum(heads_of(ROWS, V, (768, 256), (F, F)).heads, V, False, "tf32", choices=choices)
    capped = heads_of(ROWS, V, (768, 256), (F, F), cap=30.0).heads
    slopes = heads_sum(capped, V, False, "tf32", choices=choices)
    forward = heads_loss_cases.one_write_launch(summed)
    for launch in (forward, heads_loss_cases.gradient_launch(slopes, F, (0, 1))):
        assert made(target, launch).tensor_core == (TENSOR_CORES[target],)
    bound = bound_of(made(target, forward), Case("", "Llama-3", ROWS, forward), gpu)
    products = 2 * ROWS * V * (768 + 256) / (gpu.tensor_flops / 2) * 1e6  # µs; TF32 has half of the rate
    # To issue takes no longer than tensor cores need, which are idle for less than half of the time.
    assert bound.issue_us < products


def test_e_is_stored_16_bytes_at_a_time():
    launch = heads_loss_cases.one_write_launch(heads_loss_cases.sum_of(50257, (768, 256), (B, B)))
    # 128 x 256 numbers of 2 bytes over 256 threads are 16 stores; the rest are a row's statistics.
    assert made("sm_90", launch).store_bytes.count(16) == 16


def test_four_separate_accumulators_fit():
    heads = heads_loss_cases.sum_of(V, (768, 256, 256, 128), (B,) * 4, cap=20.0, scales=(1.0,) * 4)
    made("sm_90", heads_loss_cases.forward_launches(heads)[0])
    made("sm_90", heads_loss_cases.gradient_launch(heads, B, (0, 1, 2, 3)))


def _hashes(N: int) -> set[str]:
    """Of all launches for N rows of sliced hidden states."""
    hidden = [torch.empty(N + 5, D, dtype=B, device="meta")[:N] for D in (768, 256)]
    heads = [Head(h, torch.empty(V, h.shape[1], dtype=B, device="meta")) for h in hidden]
    summed = heads_sum(heads, V, False, "ieee")
    target, coefficients = target_of(N), coefficients_of(N)
    _, tops, launches = heads_loss.forward(summed, target, Loss(), summed.buffer(H))
    launches.append(heads_loss.scale(summed, target, summed.buffer(H), tops, coefficients, B)[1])
    launches.append(heads_loss.gradient(summed, target, coefficients, [-1], B)[1])
    return {f"{launch.source().hash()} {launch.options}" for launch in launches}


def test_new_batch_sizes_compile_nothing():
    seen = _hashes(4096)
    for N in (1, 2, 16, 33, 1009, 2048, 8191):
        assert _hashes(N) == seen


PAIRS = {
    "bf16": (B, B),
    "fp32xbf16": (F, B),
    "fp32xfp16": (F, H),
    "bf16xfp32": (B, F),
    "fp16xfp32": (H, F),
    "fp32": (F, F),
    "tf32": (F, F),
}


@pytest.mark.slow
@pytest.mark.parametrize("adjacent", [True, False], ids=["", "D of 75, stored (D, V)"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("float32_beside", [False, True], ids=["", "+fp32"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("target", TENSOR_CORES)
def test_no_combination_spills(target, pair, float32_beside, bias, adjacent):
    """Smooth forward passes, one that writes e and one with soft caps, and the gradient of the latter."""
    D, gpu = 256 if adjacent else 75, gpu_of(TARGETS[target].capability)

    def head(hidden: torch.dtype, weight: torch.dtype, cap: float | None) -> Head:
        w = torch.empty((V, D) if adjacent else (D, V), dtype=weight, device="meta")
        w = w if adjacent else w.T
        b = torch.empty(V, dtype=weight, device="meta") if bias else None
        return Head(torch.empty(heads_loss_cases.ROWS, D, dtype=hidden, device="meta"), w, b, 0.5, cap)

    second, precision = (F, F) if float32_beside else PAIRS[pair], "tf32" if pair == "tf32" else gpu.exact
    for cap in (None, 30.0):
        given = [head(*PAIRS[pair], cap), head(*second, cap)]
        heads = heads_sum(given, V, False, precision, crowded=True, choices=gpu.configs)
        assert heads.in_tensor_cores == (pair != "tf32")
        e = None if cap else heads.buffer(H if heads.in_tensor_cores else F)
        loss, y = Loss(label_smoothing=0.1), target_of(heads.N)
        # A kernel that found no room in a B200's tensor memory would have none of their instructions.
        assert made(target, heads_loss.forward(heads, y, loss, e)[2][0]).tensor_core
        if cap is not None:
            made(target, heads_loss_cases.gradient_launch(heads, F, (0, 1)))
