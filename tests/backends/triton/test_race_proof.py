"""Race freedom of compiled kernels, proved by ``sentryward`` from their PTX, for every schedule.

Nothing runs: the verifier follows every thread of a launch, knows which access comes before which,
and asks a solver whether two that are not ordered can meet. What it proves holds for one shape, the
first two programs of each axis, and where memory decides, for one choice: an access under a condition
that memory decides is taken to happen, of two branches it follows one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
sentryward = pytest.importorskip("sentryward")
from auxkern.backends.triton import kernels  # noqa: E402
from auxkern.backends.triton.cases import H100  # noqa: E402
from auxkern.backends.triton.launch import Launch  # noqa: E402
from auxkern.backends.triton.logits_loss.kernels import forward_kernel  # noqa: E402
from tests.support.ptx.runner import Ptx, compile_ptx, flattened  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(forward_kernel, triton.JITFunction),
    reason="TRITON_INTERPRET=1: nothing is compiled",
)


@dataclass(frozen=True)
class Verdict:
    """What the verifier says of a kernel's first case.

    Attributes:
        V: ids of the launch.
        result: "race_free", or why not.
        code: of the first diagnostic; None if there is none.
        slow: whether it takes more than a few seconds.
        loops: whether a loop's number of turns comes from memory or an address; it is then unrolled as
            often as the verifier likes.
    """

    V: int
    result: str = "race_free"
    code: str | None = None
    slow: bool = False
    loops: bool = False


# A verdict that changes, either way, is to be looked at: the kernel, Triton's code or the verifier has.
VERDICTS = {
    "combine_kernel": Verdict(50257),
    "count_kernel": Verdict(1031),
    "heads_combine_kernel": Verdict(1024),
    # Two programs of a row: one with a whole tile, one with the rest.
    "sum_kernel": Verdict(2056),
    "peak_kernel": Verdict(2056),
    "heads_scale_kernel": Verdict(1024, slow=True),
    # Entries lie where sorting puts them, or say where a tile has left z: addresses from memory.
    "entries_order_kernel": Verdict(1024, "unsupported", "allocation_alias_relation_unknown", slow=True),
    "entries_gradient_kernel": Verdict(1024, "unsupported", "allocation_alias_relation_unknown", slow=True),
    "entries_nll_kernel": Verdict(1024),
    "draw_kernel": Verdict(2056),
    "heads_choose_kernel": Verdict(1024, slow=True),
    # Where two programs write is read from memory: the ids of a row's history.
    "adjust_kernel": Verdict(1031, "unsupported", "dynamic_address_overlap_unresolved"),
    # Where whole vectors of a row begin is computed from the row's address, of which nothing is known.
    "forward_kernel": Verdict(
        1031, "unsupported", "allocation_alias_relation_unknown", slow=True, loops=True
    ),
    "backward_kernel": Verdict(
        1031, "unsupported", "dynamic_address_overlap_unresolved", slow=True, loops=True
    ),
}
# Matrix products, searches in lists, groups of columns that memory chooses: no verdict in 40 to 110 seconds,
# whatever small shape was tried. The atomic additions of a histogram the verifier does not know.
NO_VERDICT = {
    "fused_kernel",
    "heads_forward_kernel",
    "heads_gradient_kernel",
    "heads_draw_kernel",
    "choose_kernel",
    "seen_kernel",
    "histogram_kernel",
    "gather_kernel",
    "finish_kernel",
}
SECONDS = 240  # of which the slowest of the others take a fifth


def _launch(name: str) -> Launch:
    kernel = next(kernel for kernel in kernels.KERNELS if kernel.name == name)
    return next(launch for _, launch in kernel.launches(VERDICTS[name].V, H100))


def _arguments(launch: Launch, ptx: str) -> list[dict[str, object]]:
    """Numbers as they are; a pointer stands for memory of its own, of which nothing is known."""
    declared = re.findall(
        r"\.param \.([usfb]\d+)( \.ptr)?.* (\w+)", ptx[ptx.index(".entry") : ptx.index("\n)")]
    )
    given = [value for _, value in flattened(launch)]
    assert len(declared) == len(given) + 2  # and two pointers to scratch memory, which no kernel of ours has
    numbers = []
    for (kind, pointer, name), value in zip(declared, given, strict=False):
        if not pointer:
            number = value if kind[0] == "f" else value % 2 ** int(kind[1:])
            numbers.append({"parameter": name, "type": kind, "value": number})
    return numbers


def _verified(launch: Launch, ptx: Ptx, folder: Path, loops: bool) -> dict[str, Any]:
    two_programs = [min(size, 2) for size in launch.grid]
    given = {
        "schema": "spverify.kernel-input/v1",
        "launch": {
            "grid_dim": two_programs + [1] * (3 - len(two_programs)),
            "block_dim": [32 * launch.num_warps, 1, 1],
            "dynamic_shared_bytes": ptx.shared,
        },
        "arguments": _arguments(launch, ptx.text),
        "assumptions": {"representative_branches": True, "bounded_computation_loops": loops},
    }
    (folder / "kernel.ptx").write_text(ptx.text)
    (folder / "input.json").write_text(json.dumps(given))
    return sentryward.verify(folder / "kernel.ptx", input=folder / "input.json", timeout_seconds=SECONDS)


def _parameters() -> Iterator[Any]:
    for name, verdict in VERDICTS.items():
        for arch in (80, 90):
            slow = verdict.slow or arch == 90
            yield pytest.param(arch, name, id=f"sm_{arch}-{name}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("arch", "name"), list(_parameters()))
def test_verdict(arch, name, tmp_path):
    launch, expected = _launch(name), VERDICTS[name]
    result = _verified(launch, compile_ptx(launch, arch), tmp_path, expected.loops)
    diagnostics = result.get("diagnostics") or [{"code": None}]
    assert (result["result"], diagnostics[0]["code"]) == (expected.result, expected.code)
    # Whatever stops a proof of memory, no schedule comes out of step or waits for ever.
    assert result["checks"]["synchronization"] == "passed"


def test_every_kernel_has_a_verdict():
    assert {kernel.name for kernel in kernels.KERNELS} == VERDICTS.keys() | NO_VERDICT


def test_a_barrier_less_is_a_race(tmp_path):
    launch = _launch("heads_combine_kernel")
    ptx = compile_ptx(launch, 80)
    barriers = list(re.finditer(r"\tbar\.sync.*\n", ptx.text))
    # The first stands before any access to shared memory.
    begin, end = barriers[1].span()
    damaged = Ptx(ptx.text[:begin] + ptx.text[end:], ptx.shared)
    result = _verified(launch, damaged, tmp_path, loops=False)
    assert result["result"] == "potential_race"
    assert result["checks"]["memory"] == "failed"
