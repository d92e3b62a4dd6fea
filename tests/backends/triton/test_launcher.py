"""Triton's own JIT and launcher, on CPU tensors: what they compile, and what reaches the driver.

Runs in a process whose driver records; ``test_launched.py`` starts it.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Logits, SamplingParams, Sparse

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from auxkern.backends.triton.kernels import KERNELS
from auxkern.core.sums import tensors_of
from auxkern.core.terms import as_terms
from tests.support.driver.recording import (
    A100,
    H100,
    STREAM,
    VARIABLE,
    Launched,
    Parameter,
    Recorder,
    flat,
    parameters,
    recorder,
)

pytestmark = [
    pytest.mark.launcher,
    pytest.mark.skipif(
        VARIABLE not in os.environ, reason="test_launched.py builds the driver and starts this"
    ),
]

H, B, F = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def gpu() -> Iterator[Recorder]:
    with recorder(Path(os.environ[VARIABLE])) as started:
        yield started


# --- calls of the public operators ------------------------------------------------------------


def logits(N: int, V: int, dtype: torch.dtype = F, *, trained: bool = False) -> Tensor:
    return torch.zeros(N, V, dtype=dtype, requires_grad=trained)


def head(N: int, V: int, D: int, dtype: torch.dtype = H, *, trained: bool = False, **options: Any) -> Head:
    return Head(logits(N, D, dtype, trained=trained), logits(V, D, dtype, trained=trained), **options)


def pointer(N: int, *, trained: bool = False) -> Sparse:
    return Sparse(torch.arange(2).expand(N, 2), logits(N, 2, trained=trained))


Call = Callable[[], None]


def loss(*terms: Any, rows: tuple[int, ...], target: Tensor | None = None, **options: Any) -> Call:
    """The loss of these rows, and the gradients of what is trained."""
    target = torch.zeros(rows, dtype=torch.int64) if target is None else target
    trained = [x for x in tensors_of(as_terms(terms)) if x.requires_grad]

    def call() -> None:
        result = auxkern.cross_entropy(terms, target, **options)
        loss = result[0] if options.get("return_stats") else result
        if trained:
            torch.autograd.grad(loss.sum() if loss.dim() else loss, trained)

    return call


def draw(
    *terms: Any,
    rows: int,
    position: int | Tensor = 3,
    history: int = 0,
    return_logprobs: bool = False,
    **params: Any,
) -> Call:
    """A token for each of these rows, drawn with ``params``."""
    settings, seed = SamplingParams(**params), torch.arange(rows)
    given = torch.zeros(rows, history, dtype=torch.int64) if history else None

    def call() -> None:
        auxkern.sample(
            terms, settings, seed=seed, position=position, history=given, return_logprobs=return_logprobs
        )

    return call


FORWARD, BACKWARD, COMBINE = "forward_kernel", "backward_kernel", "combine_kernel"
COUNT, FUSED = "count_kernel", "fused_kernel"
TILES, ORDER = ("heads_forward_kernel", "heads_combine_kernel"), "entries_order_kernel"
FILTERS = ("peak_kernel", "histogram_kernel", "gather_kernel", "finish_kernel")
# What each call launches on an H100: an extra launch is a change that somebody has to mean.
CALLS: dict[str, tuple[Call, tuple[str, ...]]] = {
    "loss (5, 1031)": (loss(logits(5, 1031, H), logits(5, 1031), rows=(5,)), (COUNT, FORWARD)),
    "loss and gradient (5, 1031)": (
        loss(logits(5, 1031, H), logits(5, 1031, trained=True), rows=(5,)),
        (COUNT, FORWARD, BACKWARD),
    ),
    "loss and gradient in one pass (132, 1031)": (
        loss(logits(132, 1031, H), logits(132, 1031, trained=True), rows=(132,)),
        (COUNT, FUSED, BACKWARD),
    ),
    "losses and gradient of few rows (2, 5003)": (
        loss(logits(2, 5003, H), logits(2, 5003, trained=True), rows=(2,), reduction="none"),
        (FORWARD, COMBINE, BACKWARD),
    ),
    "loss of heads (5, 300)": (
        loss(head(5, 300, 64), head(5, 300, 32), rows=(5,)),
        (COUNT, *TILES),
    ),
    "loss and gradients of narrow heads (5, 300)": (
        loss(head(5, 300, 64), head(5, 300, 32, trained=True), rows=(5,)),
        (COUNT, *TILES, "heads_gradient_kernel"),
    ),
    "loss and gradients of heads in float32 (5, 300)": (
        loss(head(5, 300, 64, F), head(5, 300, 32, F, trained=True), rows=(5,)),
        (COUNT, *TILES, "heads_scale_kernel"),
    ),
    "loss and gradients of frozen head, head and pointer (5, 300)": (
        loss(head(5, 300, 64), head(5, 300, 80, F, trained=True), pointer(5, trained=True), rows=(5,)),
        (COUNT, ORDER, *TILES, "heads_scale_kernel", "entries_gradient_kernel"),
    ),
    "loss and gradient of a pointer alone (5, 300)": (
        loss(head(5, 300, 64), pointer(5, trained=True), rows=(5,)),
        (COUNT, ORDER, *TILES, "entries_gradient_kernel"),
    ),
    "loss and statistics of head and pointer (5, 300)": (
        loss(head(5, 300, 64), pointer(5), rows=(5,), return_stats=True),
        (COUNT, ORDER, *TILES, ORDER, "entries_nll_kernel"),
    ),
    "draw (4, 3001)": (draw(logits(4, 3001, H), logits(4, 3001), rows=4), ("draw_kernel", "choose_kernel")),
    "draw with log-probabilities (4, 3001)": (
        draw(logits(4, 3001, H), logits(4, 3001), rows=4, return_logprobs=True),
        ("draw_kernel", "choose_kernel", FORWARD, COMBINE),
    ),
    "draw with filters (4, 3001)": (
        draw(logits(4, 3001, H), logits(4, 3001), rows=4, top_k=5, top_p=0.9),
        ("sum_kernel", *FILTERS),
    ),
    "draw with penalties (4, 3001)": (
        draw(logits(4, 3001, H), logits(4, 3001), rows=4, history=5, repetition_penalty=1.2),
        ("sum_kernel", "seen_kernel", "adjust_kernel", "draw_kernel", "choose_kernel"),
    ),
    "draw of heads (4, 300)": (
        draw(head(4, 300, 64), head(4, 300, 32), rows=4),
        ("heads_draw_kernel", "heads_choose_kernel"),
    ),
    "draw of heads with filters (4, 300)": (
        draw(head(4, 300, 64), head(4, 300, 32), rows=4, top_k=5),
        ("heads_draw_kernel", *FILTERS),
    ),
}


def _names(launched: list[Launched]) -> tuple[str, ...]:
    return tuple(one.launch.kernel.fn.__name__ for one in launched)


def _launched(gpu: Recorder, call: Call) -> list[Launched]:
    with gpu.kept() as launched:
        call()
    return launched


@pytest.mark.parametrize(("call", "names"), CALLS.values(), ids=CALLS)
def test_launches_of_an_operator(gpu, call, names):
    before = gpu.launches
    assert _names(_launched(gpu, call)) == names
    assert gpu.launches - before == len(names)


def test_the_calls_launch_every_kernel(gpu):
    launched = {name for call, _ in CALLS.values() for name in _names(_launched(gpu, call))}
    assert launched == {kernel.name for kernel in KERNELS}


# By the profiler: what has no kernel of its own, and looks at ids, which is done on a CPU alone.
VIEWS = {
    f"aten::{name}"
    for name in (
        "_reshape_alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
        "new_empty", "ones_like", "reshape", "select", "to", "unsqueeze", "view",
    )
}  # fmt: skip
LOOKS = {"aten::aminmax", "aten::item"}


def _torch_launches(event: Any) -> list[str]:
    """Operations of torch's in an event, each of which a GPU would be launched for."""
    if event.name in LOOKS:
        return []
    if event.name.startswith("aten::") and event.name not in VIEWS:
        return [event.name]
    return [name for child in event.cpu_children for name in _torch_launches(child)]


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("loss and gradient (5, 1031)", 6),
        ("loss and gradient in one pass (132, 1031)", 6),
        ("losses and gradient of few rows (2, 5003)", 4),
    ],
)
def test_launches_of_torch_beside_the_kernels(gpu, name, most):
    call, _ = CALLS[name]
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    launches = [
        name for event in profile.events() if event.cpu_parent is None for name in _torch_launches(event)
    ]
    assert len(launches) <= most, launches
    # The loss's sum and the gradient of 1 that autograd begins with are among them: they are counted.
    assert {"aten::sum", "aten::fill_"} <= set(launches)


# --- what is compiled, and what the driver gets -----------------------------------------------


def _check_compiled(one: Launched, arch: int) -> None:
    """The JIT has specialised as ``Launch.source`` says: what is inspected ahead of time is what runs."""
    ours, jits = one.launch.source(), one.kernel.src
    assert jits.signature == ours.signature
    assert jits.constants == ours.constants
    assert {path: value for path, value in jits.attrs.items() if value} == ours.attrs
    target = GPUTarget("cuda", arch, 32)
    assert one.kernel.metadata.target == target
    # Metadata have gone through JSON, which has no tuples.
    options = json.loads(json.dumps(vars(make_backend(target).parse_options(one.launch.options))))
    del options["extern_libs"]  # where they lie: Triton's cache may be another installation's
    assert {name: getattr(one.kernel.metadata, name) for name in options} == options


_WIDTHS = {"i32": 4, "i64": 8, "fp32": 4}


def _bytes_of(value: Tensor | int | float, type: str, declared: Parameter) -> bytes:
    """A value as the kernel reads it, whose type stands in our source and in the PTX."""
    if isinstance(value, Tensor):
        assert type.startswith("*")
        assert declared == Parameter("u64", pointer=True)
        return value.data_ptr().to_bytes(8, "little")
    assert declared.size == _WIDTHS[type]
    assert not declared.pointer
    assert (declared.type[0] == "f") == isinstance(value, float)
    if isinstance(value, float):
        return torch.tensor(value, dtype=F).numpy().tobytes()
    return value.to_bytes(declared.size, "little", signed=True)


def _check_arguments(one: Launched) -> None:
    launch, record, declared = one.launch, one.record, parameters(one.kernel.asm["ptx"])
    names = [name for name in launch.kernel.arg_names if name in launch.arguments]
    values = [value for name in names for value in flat(launch.arguments[name])]
    types = [type for name in names for type in flat(launch.source().signature[name])]
    *taken, scratch, profile = declared  # Triton adds two pointers, which are null for our kernels
    expected = b"".join(map(_bytes_of, values, types, taken))
    assert len(values) == len(types) == len(taken)
    assert (scratch.size, profile.size) == (8, 8)
    assert bytes(record.arguments[: record.bytes]) == expected + bytes(16)


def _check_grid(one: Launched) -> None:
    launch, record = one.launch, one.record
    assert tuple(record.grid) == (*launch.grid, 1, 1)[:3]
    assert tuple(record.block) == (32 * launch.num_warps, 1, 1)
    assert record.shared == one.kernel.metadata.shared
    assert (record.stream, record.attributes) == (STREAM, 0)


def _check(gpu: Recorder, call: Call, arch: int = 90) -> None:
    for one in _launched(gpu, call):
        _check_compiled(one, arch)
        _check_arguments(one)
        _check_grid(one)


@pytest.mark.parametrize("call", [call for call, _ in CALLS.values()], ids=CALLS)
def test_what_is_compiled_and_what_the_driver_gets(gpu, call):
    _check(gpu, call)


# Types, strides, addresses and numbers that Triton could specialise on: 1, multiples of 16, beyond 32 bits.
LAYOUTS: dict[str, Call] = {
    "one id": loss(logits(1, 1), logits(1, 1, trained=True), rows=(1,)),
    "16 rows of 16": loss(logits(16, 16, B), logits(16, 16, B, trained=True), rows=(16,)),
    "shifted by a column": loss(logits(5, 34, H)[:, 1:], logits(5, 34)[:, 1:], rows=(5,)),
    "stored by columns": loss(logits(33, 5, H).T, logits(33, 5, trained=True).T, rows=(5,)),
    "a row for all": loss(logits(1, 33, H).expand(5, 33), logits(5, 33, trained=True), rows=(5,)),
    "shifted in time": loss(logits(15, 33, H).view(3, 5, 33)[:, :-1], rows=(3, 4)),
    "a target that begins anywhere": loss(
        logits(5, 33, trained=True), rows=(5,), target=torch.zeros(6, dtype=torch.int64)[1:]
    ),
    "a wide ignore_index": loss(logits(5, 33, trained=True), rows=(5,), ignore_index=-(2**40)),
    "options of a loss": loss(
        Logits(logits(2, 9001, trained=True), scale=-0.3, softcap=7.0),
        rows=(2,),
        label_smoothing=0.1,
        z_loss=1e-3,
        return_stats=True,
    ),
    "a bias and soft caps": loss(
        head(5, 300, 64, trained=True, bias=torch.zeros(300), softcap=5.0),
        head(5, 300, 32, trained=True, scale=0.3),
        rows=(5,),
    ),
    "heads with stats": loss(
        head(5, 300, 16), head(5, 300, 16, F), rows=(5,), label_smoothing=0.1, return_stats=True
    ),
    "one id of a head": loss(head(1, 1, 1, trained=True), rows=(1,)),
    "weights stored by columns": loss(Head(logits(5, 32), logits(32, 300, trained=True).T), rows=(5,)),
    "a draw of one id": draw(logits(1, 1), rows=1, top_k=1),
    "16 rows of 16, all filters": draw(
        logits(16, 16), rows=16, history=16, top_k=16, top_p=0.5, min_p=0.1, presence_penalty=1.0
    ),
    "one id in the history": draw(logits(3, 33), rows=3, history=1, frequency_penalty=0.5),
    "scales, positions and parameters of rows": draw(
        Logits(logits(3, 33, B), scale=torch.ones(3)),
        rows=3,
        position=torch.arange(3),
        temperature=torch.ones(3),
        top_k=torch.ones(3, dtype=torch.int64),
    ),
    "a bias of ids, and a pointer": draw(logits(3, 33), pointer(3), rows=3, logit_bias={5: 1.0}),
    "many rows of heads": draw(head(70, 300, 64), pointer(70), rows=70, return_logprobs=True),
}


# A compilation or two each: these go first, the others are slow.
_QUICK = ("one id", "shifted by a column", "16 rows of 16, all filters")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(call, id=name, marks=[] if name in _QUICK else pytest.mark.slow)
        for name, call in LAYOUTS.items()
    ],
)
def test_layouts(gpu, call):
    _check(gpu, call)


@pytest.mark.slow
@pytest.mark.parametrize("call", [call for call, _ in CALLS.values()], ids=CALLS)
def test_on_an_a100(gpu, call):
    gpu.driver.device = A100
    try:
        _check(gpu, call, 80)
    finally:
        gpu.driver.device = H100


# --- compilations -----------------------------------------------------------------------------


def _shifted(B: int, T: int, V: int) -> Call:
    """Next tokens: a view of an LM's logits, as long as it read, beside an auxiliary model's."""
    longer = logits(B * (T + 1), V, H).view(B, T + 1, V)
    return loss(longer[:, :-1], torch.zeros(B, T, V, requires_grad=True), rows=(B, T))


# By rows and ids.
SIZED: dict[str, Callable[[int, int], Call]] = {
    "loss": lambda N, V: loss(logits(N, V, H), logits(N, V, trained=True), rows=(N,)),
    "loss of a view": lambda N, V: _shifted(N, N // 2 + 1, V),
    "loss of heads": lambda N, V: loss(head(N, V, 64), head(N, V, 32, trained=True), rows=(N,)),
    "loss of heads in float32": lambda N, V: loss(
        head(N, V, 64, F), head(N, V, 32, F, trained=True), rows=(N,)
    ),
    "draw": lambda N, V: draw(logits(N, V, H), logits(N, V), rows=N, position=V),
    "draw with all": lambda N, V: draw(
        logits(N, V), rows=N, position=torch.arange(N), history=N, top_k=N, repetition_penalty=1 + 1 / N
    ),
    "draw of heads": lambda N, V: draw(head(N, V, 64), head(N, V, 32), rows=N, position=N),
}
# A few rows, which are split, and more than a tile of heads has; then N, T and histories that are multiples
# of 16 and are not, beside an odd V, whose rows begin anywhere, and beside multiples of 8 and of 16.
SIZES = {
    "odd V": (((2, 5003), (70, 1031), (132, 1031)), ((3, 7005), (16, 1043), (33, 257), (128, 131), (5, 17))),
    "V of whole vectors": (
        ((2, 5000), (70, 1032), (132, 1032)),
        ((1, 2064), (16, 1048), (33, 256), (128, 136), (5, 16)),
    ),
}


@pytest.mark.parametrize(("first", "others"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("sized", SIZED.values(), ids=SIZED)
def test_other_sizes_compile_nothing(gpu, sized, first, others):
    gpu.forget()
    for N, V in first:
        sized(N, V)()
    compiled = list(gpu.compiled)
    assert compiled
    for N, V in others:
        sized(N, V)()
    assert gpu.compiled == compiled


def test_a_single_row_begins_at_a_boundary_whatever_V_is(gpu):
    """So it is read in whole vectors, by a second binary, which serves every odd V."""
    gpu.forget()
    SIZED["draw"](70, 1031)()
    assert gpu.compiled == ["draw_kernel", "choose_kernel"]
    for V in (1033, 257, 7005):
        SIZED["draw"](1, V)()
    assert gpu.compiled == ["draw_kernel", "choose_kernel", "draw_kernel"]


# --- calls that look like earlier ones ----------------------------------------------------------


def _varied() -> Iterator[Call]:
    """Calls of equal shapes that differ in one thing."""
    for scale, softcap in ((1.0, None), (0.5, None), (1.0, 30.0), (1.0, 20.0)):
        terms = (Logits(logits(4, 3001, H), scale, softcap), logits(4, 3001, trained=True))
        yield loss(*terms, rows=(4,))
        yield loss(*terms, rows=(4,), label_smoothing=0.1)
        yield loss(*terms, rows=(4,), label_smoothing=0.2, z_loss=1e-4)
        yield loss(*terms, rows=(4,), return_stats=True)
        yield loss(*terms, rows=(4,), ignore_index=3)
        yield loss(*terms, rows=(4,), vocab_size=3000)
        yield draw(*terms, rows=4)
        yield draw(*terms, rows=4, position=4)
        yield draw(*terms, rows=4, temperature=0.5)
        yield draw(*terms, rows=4, return_logprobs=True)
        yield draw(*terms, rows=4, top_k=5)
        yield draw(*terms, rows=4, top_k=50, top_p=0.5, min_p=0.1)
        yield draw(*terms, pointer(4), rows=4)
        yield draw(*terms, rows=4, history=5, repetition_penalty=1.2)
    yield draw(Logits(logits(4, 3001), torch.ones(4)), rows=4)
    yield draw(Logits(logits(4, 3001), 1.0), rows=4)


def test_what_is_launched_again_is_what_would_be_planned(gpu):
    calls = list(_varied())
    for call in [*calls, *calls]:  # what comes twice is kept
        call()
    gpu.checks_replays, gpu.replayed = True, 0
    try:
        for call in calls:
            call()
    finally:
        gpu.checks_replays = False
    assert gpu.replayed >= len(calls) / 2


def _launched_again(gpu: Recorder, call: Callable[[], object]) -> None:
    """Calls until what is launched is kept, and fails if it is not."""
    for _ in range(2):
        call()
    planned = gpu.plans
    call()
    assert gpu.plans == planned


def _sampled(z: Tensor, *more: Any, **options: Any) -> Callable[[], object]:
    return lambda: auxkern.sample([z, *more], **{"seed": torch.arange(4), "position": 3} | options)


OTHERS: dict[str, tuple[Any, dict[str, Any], type[Exception]]] = {
    "a seed too few": ((), {"seed": torch.arange(3)}, ValueError),
    "a seed of floats": ((), {"seed": torch.zeros(4)}, TypeError),
    "a flag for a number": ((), {"vocab_size": True}, TypeError),
    "a position that is none": ((), {"position": True}, TypeError),
    "a position of 65 bits": ((), {"position": 2**64}, ValueError),
    "a history of other rows": ((), {"history": torch.zeros(3, 1, dtype=torch.int64)}, ValueError),
    "more log-probabilities than ids": ((), {"top_logprobs": 3002}, ValueError),
    "a term of other rows": ((torch.zeros(3, 3001),), {}, ValueError),
}


@pytest.mark.parametrize(("more", "options", "error"), OTHERS.values(), ids=OTHERS)
def test_a_call_unlike_a_known_one_is_checked(gpu, more, options, error):
    z = logits(4, 3001)
    _launched_again(gpu, _sampled(z))
    _launched_again(gpu, _sampled(z, vocab_size=1))
    with pytest.raises(error):
        _sampled(z, *more, **options)()


def test_ids_are_looked_at_in_every_call(gpu):
    ids = torch.zeros(4, 1, dtype=torch.int64)
    call = _sampled(logits(4, 3001), Sparse(ids, logits(4, 1)))
    for _ in range(3):
        call()
    ids[2] = 3001
    with pytest.raises(ValueError, match="3001"):
        call()


def test_a_negation_that_is_to_be_done_is_done_in_every_call(gpu):
    z = logits(4, 3001)
    _launched_again(gpu, _sampled(z))
    assert gpu.was_given(z)
    _sampled(torch._neg_view(z))()
    assert not gpu.was_given(z)


# --- time on the host -------------------------------------------------------------------------

# Microseconds of CPU time, measured on a server's core that other work shared. Three times as long is a
# failure: machines differ by less, and compiling or inspecting anything in a call costs more.
LAUNCH = 20.0
EXPECTED = {
    "loss (5, 1031)": 120.0,
    "loss and gradient (5, 1031)": 420.0,
    "loss and gradients of narrow heads (5, 300)": 1200.0,
    "loss and gradients of frozen head, head and pointer (5, 300)": 1400.0,
    "draw (4, 3001)": 60.0,
    "draw with filters (4, 3001)": 75.0,
    "draw with penalties (4, 3001)": 75.0,
    "draw of heads (4, 300)": 65.0,
}


def _microseconds(call: Call, times: int = 150) -> float:
    """The median; the first calls, which compile and fill caches, are not counted."""
    for _ in range(20):
        call()
    seconds = []
    for _ in range(times):
        # Not the wall's clock: other processes would count.
        begin = time.process_time()
        call()
        seconds.append(time.process_time() - begin)
    return 1e6 * statistics.median(seconds)


@pytest.mark.parametrize("name", EXPECTED)
def test_microseconds_of_a_call_on_the_host(gpu, name, record_property):
    """Tensors are the CPU's: PyTorch's own operations around the launches take other times than on a GPU."""
    call, names = CALLS[name]
    launches = [one.launch for one in _launched(gpu, call)]

    def launch_alone() -> None:
        for launch in launches:
            launch.run()

    whole, alone = _microseconds(call), _microseconds(launch_alone)
    text = f"{whole:.0f} us, {alone:.0f} of them in {len(names)} launches"
    record_property(f"{name} on the host", text)
    print(f"\n{name} on the host: {text}")
    assert whole < 3 * EXPECTED[name]
    assert alone < 3 * LAUNCH * len(names)
