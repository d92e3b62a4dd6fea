"""What the executor sees of broken code: kernels damaged in one place, and what reports each damage.

Without this a clean report would say little. A damage must be reported as what it is, and the same
text undamaged must leave nothing to report.
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Logits, SamplingParams, Sparse
from tests.support import heads as head_cases
from tests.support.cases import IGNORE
from tests.support.machines import INTERPRETED, compiled

pytest.importorskip("triton")
from auxkern.backends.triton.kernels import KERNELS
from auxkern.backends.triton.logits_loss import launches as logits_loss
from auxkern.core.loss import Loss
from auxkern.core.sums import Sum
from tests.support import mutations
from tests.support.executed import BENIGN, executed
from tests.support.gpus import with_multiprocessors
from tests.support.mutations import Mutation
from tests.support.ptx.machine import ORDERS, Settings
from tests.support.ptx.parser import PtxError, parse
from tests.support.ptx.report import Benign, Place, Report
from tests.support.ptx.runner import Executor, compile_ptx
from tests.support.recorded import Recorded, Recorder

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled"),
]
SM_80, SM_90 = compiled()
H, B, F = torch.float16, torch.bfloat16, torch.float32

# --- what runs: small, but every loop that has a barrier goes round at least twice ---------------


def random(*shape: int, dtype: torch.dtype = F, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def logits(rows: int = 4, V: int = 5000, reduction: str = "none") -> None:
    terms = [random(rows, V, dtype=dtype, seed=i).requires_grad_() for i, dtype in enumerate((H, F))]
    target = torch.tensor([V - 1, IGNORE, 5, V // 2])[:rows]
    options = {"return_stats": True, "label_smoothing": 0.1, "reduction": reduction}
    auxkern.cross_entropy(terms, target, backend="triton", **options)[0].sum().backward()


def heads(
    rows: int, V: int, widths: Iterable[int], dtype: torch.dtype, softcap: float | None, stats: bool
) -> None:
    terms = [
        Head(
            (0.8 * random(rows, D, seed=D)).to(dtype).requires_grad_(),
            (0.8 * random(V, D, seed=D + 1)).to(dtype).requires_grad_(),
            softcap=softcap,
        )
        for D in widths
    ]
    options: dict[str, Any] = {"return_stats": True, "label_smoothing": 0.1} if stats else {}
    result = auxkern.cross_entropy(terms, torch.arange(rows), backend="triton", **options)
    (result[0] if stats else result).backward()


def head_and_pointer(rows: int, V: int, K: int) -> None:
    """Entries of each tile, some equal."""
    ids = torch.randint(0, V // 2, (rows, K), generator=torch.Generator().manual_seed(0)) * 2
    terms = [
        Head((0.8 * random(rows, 16)).to(B), (0.8 * random(V, 16, seed=1)).to(B)),
        Sparse(ids, random(rows, K, seed=2).requires_grad_()),
    ]
    loss, _ = auxkern.cross_entropy(terms, torch.arange(rows), backend="triton", return_stats=True)
    loss.backward()


def draw(terms: list[Any], rows: int, params: SamplingParams | None = None, **options: Any) -> None:
    options |= {"seed": torch.arange(rows), "position": 7, "return_logprobs": True}
    auxkern.sample(terms, params, backend="triton", **options)


def near_ties() -> list[Tensor]:
    """Logits of two programs a row, of which one has whole tiles and a rest.

    Two columns of different groups are so large that their bounds, with what rounding may have taken, do not
    decide between them: both groups are read.
    """
    z = random(4, 6200)
    z[:, [8, 3000]] = 1e7
    return [random(4, 6200, dtype=H), z]


def adjust() -> None:
    rows, V = 4, 1100
    source = torch.Generator().manual_seed(0)
    history = torch.randint(0, V, (rows, 600), generator=source)  # of blocks of 256
    history[:, 300:310] = history[:, :10]
    ids = torch.randint(0, V, (rows, 3), generator=source)
    ids[:, 1] = ids[:, 0]
    twice = Sparse(ids, random(rows, 3))
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.2, logit_bias=twice)
    # Of two turns of 32.
    draw([random(rows, V), twice], rows, params, prompt=history[:, 280:320], history=history)


@dataclass(frozen=True)
class Scenario:
    """A call, and the kernels among its launches whose loops are worth a sweep."""

    call: Callable[[], None]
    kernels: tuple[str, ...]


_FILTER_KERNELS = ("peak_kernel", "histogram_kernel", "gather_kernel", "finish_kernel")
# More ids than are all listed, so that some are drawn from where they lie.
_FILTERS = SamplingParams(top_k=400, top_p=0.9, min_p=0.01)
SCENARIOS = {
    "logits": Scenario(logits, ("forward_kernel", "backward_kernel")),
    "logits in one pass": Scenario(lambda: logits(2, 8200, "mean"), ("fused_kernel", "count_kernel")),
    "one row": Scenario(lambda: logits(1, 4100), ("combine_kernel",)),
    "two heads": Scenario(
        lambda: heads(20, 100, (200, 144), B, None, False), ("heads_forward_kernel", "heads_gradient_kernel")
    ),
    "capped head": Scenario(
        lambda: heads(20, 100, (200,), B, 3.0, True), ("heads_forward_kernel", "heads_gradient_kernel")
    ),
    # 33 tiles, of which 32 are combined at a time.
    "float head": Scenario(
        lambda: heads(4, 2100, (40,), F, None, True),
        ("heads_forward_kernel", "heads_combine_kernel", "heads_scale_kernel"),
    ),
    "head and pointer": Scenario(
        lambda: head_and_pointer(20, 200, 40),
        ("heads_forward_kernel", "entries_order_kernel", "entries_gradient_kernel", "entries_nll_kernel"),
    ),
    "draw": Scenario(lambda: draw(near_ties(), 4), ("draw_kernel", "choose_kernel")),
    "sum": Scenario(lambda: draw(near_ties(), 4, SamplingParams(top_k=5)), ("sum_kernel",)),
    "adjust": Scenario(adjust, ("seen_kernel", "adjust_kernel")),
    # Of few values, so that a nucleus ends between equal logits.
    "filter": Scenario(lambda: draw([random(1, 1100).round()], 1, _FILTERS), _FILTER_KERNELS),
    "draw from a head": Scenario(
        lambda: draw([Head(random(20, 200, dtype=B), random(100, 200, dtype=B))], 20),
        ("heads_draw_kernel", "heads_choose_kernel"),
    ),
}

Record = Callable[[int, str], dict[str, Recorded]]


def recorded(arch: int, call: Callable[[], None]) -> dict[str, Recorded]:
    """Launches of a call on one multiprocessor, by kernel; undamaged they leave nothing to report."""
    recorder = Recorder(arch, report=Report(BENIGN))
    with pytest.MonkeyPatch.context() as patch, executed(recorder, patch, 1):
        call()
    assert not recorder.report.faults, str(recorder.report)
    return {launch.kernel: launch for launch in recorder.launches}


@pytest.fixture(scope="module")
def record() -> Record:
    """Launches of a scenario, once for each GPU."""
    known: dict[tuple[int, str], dict[str, Recorded]] = {}

    def record(arch: int, scenario: str) -> dict[str, Recorded]:
        if (arch, scenario) not in known:
            known[arch, scenario] = recorded(arch, SCENARIOS[scenario].call)
        return known[arch, scenario]

    return record


def assert_reported(launch: Recorded, damaged: Iterable[Mutation], kind: str, file: str) -> None:
    """Every damage, of which there is one at least, is reported as ``kind`` at lines of ``file``."""
    listed = list(damaged)
    assert listed
    for mutation in listed:
        report = launch.execute(mutation.text).report
        places = [place for known, place in report.faults if known == kind]
        assert places, f"{mutation.kind}, line {mutation.line}: {mutation.before}\n{report}"
        assert all(place.instruction.path.endswith(f"/{file}") for place in places), str(report)


# --- copies and products in flight --------------------------------------------------------------


@pytest.mark.parametrize("arch", compiled())
def test_a_shorter_wait_for_copies(record, arch):
    launch = record(arch, "two heads")["heads_forward_kernel"]
    # In a loop the next products read what the wait was for. (Behind the last one nothing reads it.)
    in_loops = [m for m in mutations.loosened(launch.ptx, "cp.async") if not m.before.endswith("0;")]
    assert_reported(launch, in_loops, "shared: read while a copy is in flight", "device/tiles.py")
    assert len(in_loops) == 2


@pytest.mark.parametrize("arch", [SM_90])
def test_a_shorter_wait_for_products(record, arch):
    launch = record(arch, "two heads")["heads_forward_kernel"]
    *others, last = mutations.loosened(launch.ptx, "wgmma")
    assert_reported(launch, others, "shared: write while a product reads", "device/tiles.py")
    assert_reported(launch, [last], "register of a product in flight", "device/terms.py")


@pytest.mark.parametrize("arch", [SM_90])
def test_fences_that_are_missing(record, arch):
    launch = record(arch, "two heads")["heads_forward_kernel"]
    proxies = mutations.removed(launch.ptx, r"fence\.proxy\.async")
    assert_reported(launch, proxies, "shared: product without a proxy fence", "device/tiles.py")
    fences = mutations.removed(launch.ptx, r"wgmma\.fence")
    assert_reported(launch, fences, "accumulator changed behind wgmma.fence", "device/tiles.py")


@pytest.mark.parametrize("arch", [SM_80])
def test_fragments_in_the_wrong_order_show_in_the_result_only(monkeypatch, arch):
    given, y = head_cases.heads(16, 64, (64,), (H,)), head_cases.targets(16, 64)
    expected = float(head_cases.exact(given, y)[0])
    errors = []
    for damage in (lambda ptx: ptx, lambda ptx: next(mutations.swapped(ptx)).text):
        executor = Executor(
            arch,
            report=Report(BENIGN),
            edit=lambda launch, ptx, damage=damage: damage(ptx) if "mma." in ptx else ptx,
        )
        with executed(executor, monkeypatch):
            errors.append(abs(float(head_cases.ours(given, y)[0]) / expected - 1))
        assert not executor.report.faults
    # Losses are held to 1e-6; here rows of one product among four have changed places.
    assert errors[0] < 1e-6
    assert errors[1] > 1e-3


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", compiled())
def test_a_vector_that_is_not_aligned(record, arch):
    launch = record(arch, "logits")["backward_kernel"]
    whole = [m for m in mutations.moved(launch.ptx, r"st\.global\.v4", 4) if "@" not in m.before]
    assert_reported(launch, whole, "global write misaligned", "logits_loss/kernels.py")


@pytest.mark.parametrize("arch", compiled())
def test_a_read_without_its_mask(arch):
    V = 1031

    def padded() -> None:
        # Only the first row counts, and its padding is as wide as a tile: what is read too much is padding.
        terms = [random(3, 4096, dtype=dtype)[:, :V] for dtype in (H, F)]
        auxkern.cross_entropy(terms, torch.tensor([5, IGNORE, IGNORE]), backend="triton")

    launch = recorded(arch, padded)["forward_kernel"]
    reported = 0
    for mutation in mutations.unguarded(launch.ptx, r"ld\.global\S*"):
        faults = launch.execute(mutation.text).report.faults
        assert {kind for kind, _ in faults} <= {"global read out of bounds"}
        assert all(place.instruction.line == mutation.line for _, place in faults)
        for fault in faults.values():
            nbytes, name, offset, span = re.search(
                r"(\d+) bytes at (\S+)\+(\d+) of (\d+) bytes", fault.detail
            ).groups()
            assert name.startswith("terms.")
            assert int(offset) + int(nbytes) <= int(span)
        reported += bool(faults)
    assert reported >= 6


@pytest.mark.parametrize("arch", compiled())
def test_a_write_without_its_mask(record, arch):
    launch = record(arch, "logits")["backward_kernel"]
    caught = Counter()
    for mutation in mutations.unguarded(launch.ptx, r"st\.global\S*"):
        caught.update(launch.execute(mutation.text).report.kinds)
    # Behind the last row; behind another one, over what another program writes.
    assert caught["global write out of bounds"] >= 6
    assert any("write after write" in kind for kind in caught)


@pytest.mark.parametrize("arch", compiled())
def test_a_row_offset_of_32_bits(arch):
    # Rows 2**31 + 8 elements apart, in memory that the system maps only where it is written.
    stride, V = 2**31 + 8, 129
    flat = torch.from_numpy(np.frombuffer(mmap.mmap(-1, 2 * (stride + V)), dtype=np.float16))
    z = flat.as_strided((1, 2, V), (0, stride, 1))
    z.copy_(random(1, 2, V))
    exact = z[0].double().logsumexp(-1)
    rows, (launch,) = logits_loss.forward(
        Sum((Logits(z),), V), torch.tensor([1, V - 1]), Loss(stats=True), with_multiprocessors(1)
    )
    ptx = compile_ptx(launch, arch).text

    def error(text: str) -> tuple[float, Report]:
        executor = Executor(arch, races=False, edit=lambda launch, ptx: text)
        executor.run(launch)
        return float((rows.row_max + rows.log_sum - exact).abs().max()), executor.report

    caught = 0
    for text in (ptx, *(mutation.text for mutation in mutations.narrowed(ptx))):
        wrong, report = error(text)
        if text == ptx:
            assert not report.faults
        # A product that stays small may keep 32 bits; one that does not is no quiet error. (1e-5: float32.)
        assert wrong < 1e-5 or report.kinds == {"global read out of bounds"}
        caught += bool(report.faults)
    assert caught == 1


@pytest.mark.parametrize("arch", compiled())
def test_shared_memory_that_nobody_wrote(record, arch):
    launch = record(arch, "logits")["forward_kernel"]
    # Of the first exchange between warps, a maximum: others find what an earlier one left there.
    first_read = launch.ptx[: launch.ptx.index("ld.shared")].count("\n")
    stores = [m for m in mutations.removed(launch.ptx, r"st\.shared\S*") if m.line < first_read]
    assert_reported(launch, stores, "shared: nobody wrote", "standard.py")
    assert len(stores) == 1


# --- orders of warps ------------------------------------------------------------------------------

FAMILIES = {
    "logits": ("forward_kernel", "backward_kernel"),
    "logits in one pass": ("fused_kernel", "count_kernel"),
    "two heads": ("heads_forward_kernel",),
    "head and pointer": ("entries_order_kernel", "entries_gradient_kernel", "entries_nll_kernel"),
    "draw": ("draw_kernel",),
    "draw from a head": ("heads_draw_kernel",),
}


# Not among those of the other tests: there it is what the missing barrier behind the store looks like.
_DEAD_READ = Benign(
    "adjust_kernel",
    "global z_out: race, read after write",
    "before = tl.load(z_row + at, exists, 0.0)",
    "a warp behind thread 0's store reads what it does not use; thread 0 alone stores",
)


def assert_same_in_all_orders(launch: Recorded) -> None:
    first, *others = (
        launch.execute(launch.ptx, Settings(order=order), Report((*BENIGN, _DEAD_READ))) for order in ORDERS
    )
    for outcome in (first, *others):
        assert not outcome.report.faults, str(outcome.report)
        assert outcome.contents == first.contents


@pytest.mark.parametrize("arch", compiled()[1:])
@pytest.mark.parametrize("scenario", FAMILIES)
def test_warps_may_run_in_any_order(record, arch, scenario):
    for kernel in FAMILIES[scenario]:
        assert_same_in_all_orders(record(arch, scenario)[kernel])


@pytest.mark.slow
@pytest.mark.parametrize("arch", compiled())
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_warps_of_every_kernel_may_run_in_any_order(record, arch, scenario):
    for launch in record(arch, scenario).values():
        assert_same_in_all_orders(launch)


@pytest.mark.parametrize("arch", compiled())
def test_without_a_barrier_the_order_matters(record, arch):
    launch = record(arch, "logits")["forward_kernel"]
    # Between the first warp's store of the first maximum of all warps and their loads of it.
    _, between, *_ = mutations.removed(launch.ptx, r"bar\.sync")
    exact = launch.execute(launch.ptx).contents
    together, forward, backwards = (
        launch.execute(between.text, Settings(order=order)) for order in ("together", "forward", "reversed")
    )
    # Nobody overtakes where the first warp runs first; the report sees the race all the same.
    assert together.contents == forward.contents == exact
    assert backwards.contents != exact
    for outcome in (together, forward, backwards):
        assert "shared: race, read after write" in outcome.report.kinds


# --- every barrier --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needless:
    """Barriers that may go; judged by hand, by reading the PTX around them.

    Attributes:
        text: the line of the source that the compiler put them in.
        barriers: how many of that line, by compute capability.
    """

    scenario: str
    kernel: str
    text: str
    barriers: dict[int, int]
    reason: str


_LOAD, _LOOP = "x = tl.load(x_at, mask=(here < D)[None, :], other=0.0)", "for d in range(0, D, BLOCK_D):"
_FIRST_COPIES = (
    "between the copies of the first and the second step of a product: threads have only copied so far,"
    " each to bytes of its own, and all meet at the loop's barrier before they read"
)
_AGAIN = (
    "between two products: behind the last reads lies the barrier at the end of the loop's turn, and then a"
    " thread copies to the bytes that it copied to before"
)
_NOTHING_YET = "before a kernel's first access of shared memory"
_OWN = "a thread stores to the bytes that it alone has read, for another exchange"
NEEDLESS = (
    Needless("two heads", "heads_forward_kernel", _LOAD, {80: 2, 90: 2}, _FIRST_COPIES),
    Needless("two heads", "heads_forward_kernel", _LOOP, {80: 1}, _AGAIN),
    Needless("two heads", "heads_gradient_kernel", _LOAD, {80: 2, 90: 2}, _FIRST_COPIES),
    Needless("two heads", "heads_gradient_kernel", _LOOP, {80: 1}, _AGAIN),
    Needless("capped head", "heads_forward_kernel", _LOAD, {80: 1, 90: 1}, _FIRST_COPIES),
    Needless("capped head", "heads_gradient_kernel", _LOAD, {80: 1, 90: 1}, _FIRST_COPIES),
    Needless("draw from a head", "heads_draw_kernel", _LOAD, {80: 1, 90: 1}, _FIRST_COPIES),
    Needless(
        "head and pointer",
        "entries_order_kernel",
        "sooner = (its < key[:, None]) | ((its == key[:, None]) & (other[None, :] < lane[:, None]))",
        {80: 1, 90: 1},
        _OWN,
    ),
    Needless(
        "draw from a head",
        "heads_choose_kernel",
        "return core.reduce(input, axis, _elementwise_max, keep_dims=keep_dims)",
        {80: 1, 90: 1},
        _NOTHING_YET,
    ),
)


class _FaultError(Exception):
    """The first fault of an execution, which need not go on."""


class _FirstFault(Report):
    def add(self, kind: str, place: Place, detail: str) -> None:
        super().add(kind, place, detail)
        if self.faults:
            raise _FaultError(kind)


def caught_by(launch: Recorded, text: str) -> tuple[str, str] | None:
    """(kind of the first fault, order of warps in which it shows); None if there is none."""
    for order in ("together", "forward", "reversed"):
        try:
            launch.execute(text, Settings(order=order), _FirstFault(BENIGN))
        except _FaultError as caught:
            return str(caught), order
        except PtxError:
            return "does not end", order
    return None


@pytest.mark.slow
@pytest.mark.parametrize("arch", compiled())
def test_every_barrier_is_missed_or_needless(record, arch, record_property):
    swept: dict[str, Counter[str]] = {kernel.name: Counter() for kernel in KERNELS}
    caught, silent = Counter(), Counter()
    for name, scenario in SCENARIOS.items():
        launches = record(arch, name)
        for kernel in scenario.kernels:
            launch = launches[kernel]
            lines = {i.line: i.text for i in parse(launch.ptx).instructions}
            swept[kernel]["launches"] += 1
            for mutation in mutations.removed(launch.ptx, r"bar\.sync"):
                how = caught_by(launch, mutation.text)
                swept[kernel]["silent" if how is None else "reported"] += 1
                if how is None:
                    silent[name, kernel, lines[mutation.line]] += 1
                else:
                    caught[how] += 1
    for kernel, counts in swept.items():
        print(f"sm_{arch} {kernel}: {counts['reported']} reported, {counts['silent']} silent")
    for (kind, order), times in caught.most_common():
        print(f"sm_{arch} {kind}, warps {order}: {times}")
    record_property("reported", caught.total())
    record_property("silent", silent.total())
    assert all(counts["launches"] for counts in swept.values()), swept
    judged = {(n.scenario, n.kernel, n.text): n.barriers.get(arch, 0) for n in NEEDLESS}
    assert silent == Counter(judged)
    assert caught.total() >= 0.85 * (caught.total() + silent.total())
