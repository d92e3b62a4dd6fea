"""The Triton kernels on a CUDA device: real vocabularies, and what only a device can show.

The tests of the operator run on the device as well (``cases.available_backends``).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Logits
from tests.support.cases import IGNORE, check, confident_logits, ours, peak_extra_bytes, random_target

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

H, B, F = torch.float16, torch.bfloat16, torch.float32
VOCABULARIES = (50257, 128256, 262144)
SUMS = {"fp32": (F,), "bf16": (B,), "bf16+bf16": (B, B), "fp16+fp32": (H, F), "3 terms": (F, B, H)}


def logits(*shape: int, dtype: torch.dtype = F, spread: float = 3.0, seed: int = 0) -> Tensor:
    source = torch.Generator("cuda").manual_seed(seed)
    return (spread * torch.randn(shape, generator=source, device="cuda")).to(dtype)


def terms_of(dtypes: tuple[torch.dtype, ...], *shape: int) -> list[Tensor]:
    return [logits(*shape, dtype=dtype, seed=seed) for seed, dtype in enumerate(dtypes)]


def run(terms: list[Any], target: Tensor, **options: Any) -> Any:
    return check(terms, target, "triton", **options)


# --- the matrix, at the sizes of real models --------------------------------------------------


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("V", [1, 7, 1031, 2049, *VOCABULARIES])
@pytest.mark.parametrize("dtypes", SUMS.values(), ids=SUMS)
def test_shapes_and_dtypes(dtypes, V):
    for N in (1, 5, 33):
        target = random_target(N, V=V, device="cuda", ignored=0.2)
        run(terms_of(dtypes, N, V), target, return_stats=True, label_smoothing=0.1, z_loss=1e-4)


@pytest.mark.parametrize("V", VOCABULARIES)
def test_many_rows_take_one_program_each(V):
    N = 600
    run(terms_of((B, F), N, V), random_target(N, V=V, device="cuda", ignored=0.2), wanted=[1])


def test_eight_terms_with_scales_and_softcaps():
    dtypes = (F, H, B, F, H, B, F, H)
    terms = [
        Logits(x, scale=(-1.0) ** i * 0.5, softcap=None if i % 2 else 10.0)
        for i, x in enumerate(terms_of(dtypes, 3, 50257))
    ]
    run(terms, random_target(3, V=50257, device="cuda"), return_stats=True)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_confident_target_is_as_exact_as_torch(p, offset):
    z, target = confident_logits(64, 50257, p, offset=offset)
    run([z.cuda()], target.cuda(), label_smoothing=0.1)
    run([z.cuda()], target.cuda())


def test_layouts():
    N, V = 9, 50257
    target = random_target(N, V=V, device="cuda", ignored=0.2)
    contiguous = logits(N, V, dtype=H, seed=7)
    padded = logits(N, V + 47, dtype=H)[:, :V]
    for other in (
        padded,
        logits(N, V + 1, dtype=B)[:, 1:],
        logits(V, N).T,
        logits(N, 2 * V, dtype=B)[:, ::2],
        logits(1, V).expand(N, V),
    ):
        run([contiguous, other], target, return_stats=True)
    run([padded, logits(N, V + 47)], target, vocab_size=V)
    sliced, transposed = logits(3, 4, V, dtype=H)[:, :-1], logits(3, 3, V).transpose(0, 1)
    run([sliced, transposed], target.view(3, 3))


def test_tiles_of_minus_infinity_and_bad_rows():
    z = torch.full((4, 50257), -math.inf, device="cuda")
    z[:, 30000:30010] = logits(4, 10)
    z[2, 30003] = math.nan
    target = torch.tensor([30000, 30009, 30001, 30002], device="cuda")
    result = ours([z], target, "triton", reduction="sum", return_stats=True)
    assert result.stats.nll.isnan().tolist() == [False, False, True, False]
    assert result.gradients[0].isnan().any(-1).tolist() == [False, False, True, False]


def test_target_out_of_range_is_nan_in_its_row_only():
    z = logits(4, 50257).requires_grad_()
    target = torch.tensor([5, 50257, -1, 50256], device="cuda")
    row = auxkern.cross_entropy([z], target, reduction="none", backend="triton")
    assert row.isnan().tolist() == [False, True, True, False]
    row.sum().backward()
    assert z.grad.isnan().any(-1).tolist() == [False, True, True, False]


def test_ignored_rows_are_not_read():
    z = logits(3, 50257)
    z[1] = math.nan
    target = torch.tensor([4, IGNORE, 5], device="cuda")
    result = ours([z], target, "triton")
    assert bool(result.loss.isfinite())
    assert bool((result.gradients[0][1] == 0).all())


# --- offsets ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_last_row_beyond_2_31_logits():
    V = 262144
    N = 2**31 // V + 3
    if torch.cuda.mem_get_info()[0] < 3 * 2 * N * V:
        pytest.skip(f"needs {3 * 2 * N * V / 2**30:.0f} GiB of free GPU memory")
    z = logits(1, V, dtype=H).repeat(N, 1)
    z[-1] = logits(V, dtype=H, seed=1)
    target = random_target(N, V=V, device="cuda")
    whole = ours([z], target, "triton", reduction="sum", return_stats=True)
    last = ours([z[-1:].clone()], target[-1:], "triton", reduction="sum", return_stats=True)
    torch.testing.assert_close(whole.stats.nll[-1:], last.stats.nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.gradients[0][-1:], last.gradients[0], rtol=2e-3, atol=1e-7)


# --- what only a device can show --------------------------------------------------------------


def _step(terms: list[Tensor], target: Tensor) -> Tensor:
    loss = auxkern.cross_entropy(terms, target, label_smoothing=0.1, z_loss=1e-4, backend="triton")
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("N", [2, 700])
def test_no_host_synchronisation(N):
    lm, aux = terms_of((H, F), N, 50257)
    aux.requires_grad_()
    target = random_target(N, V=50257, device="cuda", ignored=0.2)
    _step([lm, aux], target)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step([lm, aux], target)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("N", [2, 700])
def test_cuda_graph_replays(N):
    lm, aux = terms_of((H, F), N, 50257)
    aux.requires_grad_()
    target = random_target(N, V=50257, device="cuda", ignored=0.2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _step([lm, aux], target)
    torch.cuda.current_stream().wait_stream(stream)

    aux.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step([lm, aux], target)
    for seed in (11, 12):
        lm.copy_(logits(N, 50257, dtype=H, seed=seed))
        target.copy_(random_target(N, V=50257, device="cuda", ignored=0.2, seed=seed))
        aux.grad.zero_()
        graph.replay()
        eager = ours([lm, aux], target, "triton", wanted=[1], label_smoothing=0.1, z_loss=1e-4)
        assert torch.equal(captured, eager.loss)
        assert torch.equal(aux.grad, eager.gradients[1])


@pytest.mark.parametrize("N", [1, 3, 700])
def test_runs_are_bitwise_equal(N):
    terms, target = terms_of((B, F), N, 128256), random_target(N, V=128256, device="cuda")
    first = ours(terms, target, "triton", return_stats=True)
    for _ in range(5):
        again = ours(terms, target, "triton", return_stats=True)
        assert torch.equal(first.stats.nll, again.stats.nll)
        assert all(map(torch.equal, first.gradients, again.gradients))


def test_memory_is_one_gradient_and_none_for_a_frozen_term():
    N, V = 512, 50257
    lm, aux = terms_of((H, H), N, V)
    target = random_target(N, V=V, device="cuda")
    gradient = 2 * N * V
    ours([lm, aux], target, "triton", wanted=[1])

    def forward_only() -> Any:
        return ours([lm, aux], target, "triton", wanted=[])

    def one_gradient() -> Any:
        return ours([lm, aux], target, "triton", wanted=[1])

    assert peak_extra_bytes(forward_only, "cuda") < 2**20
    assert peak_extra_bytes(one_gradient, "cuda") < gradient + 2**22


def test_new_batch_sizes_compile_nothing(monkeypatch):
    def step(N: int, V: int) -> None:
        aux = logits(N, V).requires_grad_()
        _step([logits(N, V, dtype=H), aux], random_target(N, V=V, device="cuda"))

    step(3, 50257)
    step(700, 50257)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **call: compiled.append(call["repr"]))
    for N, V in ((1, 50257), (16, 50257), (17, 128256), (701, 50257), (512, 49152)):
        step(N, V)
    assert compiled == []


def test_runs_on_the_current_stream():
    terms, target = terms_of((B, F), 64, 50257), random_target(64, V=50257, device="cuda")
    expected = ours(terms, target, "triton").loss
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = [x.clone() for x in terms]
        loss = ours(late, target.clone(), "triton").loss
    stream.synchronize()
    assert torch.equal(loss, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_tensors():
    z = logits(4, 50257)
    target = random_target(4, V=50257, device="cuda")
    there = ours([z.to("cuda:1")], target.to("cuda:1"), "triton")
    here = ours([z], target, "triton")
    assert there.loss.device == torch.device("cuda", 1)
    assert torch.equal(there.loss.cpu(), here.loss.cpu())


def test_is_chosen_on_a_gpu():
    assert auxkern.explain("cuda", H, F).backend == "triton"
    loss = auxkern.cross_entropy([logits(3, 129)], torch.tensor([1, 2, 3], device="cuda"))
    assert loss.device.type == "cuda"


# --- output heads -----------------------------------------------------------------------------


def _heads(
    N: int,
    V: int,
    widths: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    hidden: torch.dtype | None = None,
    **options: Any,
) -> list[Head]:
    return [
        Head(
            logits(N, D, dtype=hidden or dtype, spread=1.0, seed=i),
            logits(V, D, dtype=dtype, spread=2 / math.sqrt(D), seed=10 + i),
            **options,
        )
        for i, (D, dtype) in enumerate(zip(widths, dtypes, strict=True))
    ]


def _head_step(heads: list[Head], target: Tensor, wanted: tuple[int, ...] = (1,), **options: Any) -> Any:
    """(loss, gradients of the wanted heads' hidden states and weights), by the Triton backend."""
    leaves = [
        [x.detach().requires_grad_(i in wanted) for x in head.tensors.values()]
        for i, head in enumerate(heads)
    ]
    terms = [Head(*xs, scale=h.scale, softcap=h.softcap) for xs, h in zip(leaves, heads, strict=True)]
    loss = auxkern.cross_entropy(terms, target, backend="triton", **options)
    loss.backward()
    return loss.detach(), [x.grad for i in wanted for x in leaves[i]]


def _head_formula(heads: list[Head], target: Tensor, wanted: tuple[int, ...] = (1,)) -> Any:
    """The same in float64 on the whole logits."""
    leaves = [[x.detach().double().requires_grad_() for x in head.tensors.values()] for head in heads]
    z = 0.0
    for head, (hidden, weight) in zip(heads, leaves, strict=True):
        x = hidden @ weight.T
        z = z + head.scale * (x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap))
    loss = torch.nn.functional.cross_entropy(z, target, ignore_index=IGNORE)
    loss.backward()
    return loss.detach(), [x.grad for i in wanted for x in leaves[i]]


# A gradient is rounded to 16 bits as dz and as the result; errors of many entries average out.
_HEAD_TOLERANCE = {F: 1e-5, H: 2.0**-10, B: 2.0**-7}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("V", [1, 131, 50257])
@pytest.mark.parametrize("N", [1, 33, 300])
@pytest.mark.parametrize(
    ("widths", "dtypes"),
    [
        ((768, 256), (B, B)),
        ((576, 256), (H, H)),
        ((128, 64), (B, B)),
        ((768, 256), (H, F)),
        ((96, 40), (F, F)),
        ((768, 256), (B, H)),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}], ids=["plain", "softcap"])
def test_heads(widths, dtypes, N, V, options):
    heads = _heads(N, V, widths, dtypes, **options)
    target = random_target(N, V=V, device="cuda", ignored=0.2)
    target[0] = 0
    loss, gradients = _head_step(heads, target, (0, 1))
    right, exact = _head_formula(heads, target, (0, 1))
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-6)
    for found, expected in zip(gradients, exact, strict=True):
        error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-6)
        # An error of one head's dtype reaches the other through dz.
        assert float(error) < max(_HEAD_TOLERANCE[dtype] for dtype in dtypes)


# Hidden states of one dtype beside weights of others: products in parts.
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("N", [1, 300])
@pytest.mark.parametrize(("hidden", "dtypes"), [(F, (B, F)), (F, (H, B)), (B, (F, H)), (H, (F, B))], ids=str)
def test_heads_of_mixed_dtypes(hidden, dtypes, N):
    heads = _heads(N, 50257, (768, 256), dtypes, hidden)
    target = random_target(N, V=50257, device="cuda")
    loss, gradients = _head_step(heads, target, (0, 1))
    right, exact = _head_formula(heads, target, (0, 1))
    # Tensor cores cut sums off where float32 rounds them.
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-6)
    for found, expected in zip(gradients, exact, strict=True):
        assert float((found.double() - expected).norm() / expected.norm()) < _HEAD_TOLERANCE[found.dtype]


@pytest.mark.parametrize("scheme", [True, False], ids=["one-write", "recompute"])
def test_both_schemes_of_heads(scheme, monkeypatch):
    from auxkern.backends.triton.heads_loss import launches as heads_loss

    monkeypatch.setattr(heads_loss, "one_write", lambda *_: scheme)
    heads, target = _heads(300, 50257, (768, 256), (B, B)), random_target(300, V=50257, device="cuda")
    found, exact = _head_step(heads, target)[1], _head_formula(heads, target)[1]
    for a, b in zip(found, exact, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 2.0**-7


def test_heads_do_not_stop_the_device_and_repeat_to_the_bit():
    heads = _heads(700, 50257, (768, 256), (B, B))
    target = random_target(700, V=50257, device="cuda", ignored=0.2)
    first = _head_step(heads, target, chunk_rows=256)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = _head_step(heads, target, chunk_rows=256)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first[0], again[0])
    assert all(map(torch.equal, first[1], again[1]))


def test_heads_take_a_bounded_chunk_and_nothing_for_a_frozen_head():
    N, V, C = 2048, 128256, 256
    heads, target = _heads(N, V, (1024, 256), (B, B)), random_target(N, V=V, device="cuda")
    _head_step(heads, target, chunk_rows=C)
    chunk, d_weight = 2 * C * (V + 128), (4 + 2) * V * 256
    used = peak_extra_bytes(lambda: _head_step(heads, target, chunk_rows=C), "cuda")
    assert used < 1.25 * chunk + d_weight + 2**25
    with torch.no_grad():
        whole = peak_extra_bytes(lambda: auxkern.cross_entropy(heads, target), "cuda")
    assert whole < N * V * 2 // 16
