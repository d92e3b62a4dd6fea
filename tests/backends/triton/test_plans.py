"""Decisions that the Triton backend takes on the host: alignment, splits, refusals. No GPU needed."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from auxkern.backends.triton import BACKEND
from auxkern.backends.triton.cases import H100, VOCABULARIES, logits_of, slopes_of, target_of
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.heads_draw import launches as heads_draw
from auxkern.backends.triton.kernels import KERNELS
from auxkern.backends.triton.launch import alignment, splits
from auxkern.backends.triton.logits_draw import launches as logits_draw
from auxkern.backends.triton.logits_draw.cases import draws_of
from auxkern.backends.triton.logits_draw.launches import RowDraws
from auxkern.backends.triton.logits_loss import launches as logits_loss
from auxkern.core.loss import Loss
from auxkern.core.sums import Sum
from auxkern.core.terms import Head, Logits, Sparse

H, F = torch.float16, torch.float32


def logits(*shape: int, dtype: torch.dtype = F) -> torch.Tensor:
    """At an address that is a multiple of 16 bytes, as a device's allocator gives them."""
    return torch.empty(shape, dtype=dtype, device="meta")


def test_contiguous_terms_are_aligned_together_whatever_their_dtype():
    cut = alignment([logits(1, 5, 50257), logits(1, 5, 50257, dtype=H)])
    assert cut.aligned == (True, True)
    # Cut where the narrower dtype is at a boundary: the wider one then is, too.
    assert (cut.leader, cut.granule) == (1, 8)


def test_a_padded_view_is_not_aligned_with_a_contiguous_term():
    padded = logits(1, 5, 50304, dtype=H)[..., :50257]
    assert alignment([padded, logits(1, 5, 50257, dtype=H)]).aligned == (True, False)
    # The choice falls on the boundaries that serve the most bytes.
    assert alignment([padded, *[logits(1, 5, 50257, dtype=H)] * 2]).aligned == (False, True, True)


def test_rows_split_differently_but_equally_far_from_boundaries_are_aligned():
    whole, sliced = logits(1, 6, 50257), logits(2, 4, 50257)[:, :-1]
    assert alignment([whole, sliced]).aligned == (True, False)
    assert alignment([logits(1, 6, 50304), logits(2, 4, 50304)[:, :-1]]).aligned == (True, True)


def test_a_single_row_is_aligned_whatever_its_strides():
    row = logits(1, 50257, dtype=H).as_strided((1, 1, 50257), (0, 0, 1))
    assert alignment([row, logits(1, 1, 50257)]).aligned == (True, True)


def test_strided_columns_are_never_aligned():
    strided = logits(1, 100, 6).transpose(1, 2)
    assert alignment([strided]).leader == -1
    assert alignment([strided, logits(1, 6, 100)]).aligned == (False, True)


@pytest.mark.parametrize(
    ("rows", "tiles", "expected"), [(1, 25, 25), (1, 1000, 128), (100, 25, 6), (528, 25, 1), (8192, 25, 1)]
)
def test_rows_are_split_until_every_multiprocessor_has_its_programs(rows, tiles, expected):
    assert splits(rows, tiles, multiprocessors=132, programs=4) == expected


def test_nothing_is_allocated_for_a_frozen_term():
    values = [logits(1, 4, 129, dtype=H), logits(1, 4, 129)]
    terms = Sum(tuple(map(Logits, values)), 129)
    wanted = [{}, {"values": torch.empty_like(values[1])}]
    launch = logits_loss.backward(terms, target_of(4), slopes_of(4, 129), wanted, H100)
    assert [g.logits.shape for g in launch.arguments["gradients"]] == [(1, 4, 129)]
    assert len(launch.arguments["gradients"]) == 1


def head(dtype: torch.dtype = F, **options: object) -> Head:
    return Head(logits(4, 16, dtype=dtype), logits(129, 16, dtype=dtype), **options)


def test_heads_go_by_tiles_and_what_does_not_says_why():
    beside = Sparse(torch.empty(4, 2, dtype=torch.int64, device="meta"), logits(4, 2))
    for terms in (
        [head()],
        [head(softcap=3.0), head(H, scale=0.5)],
        [head(scale=logits(4))] * 4,
        [beside, head(), beside],
    ):
        for loss in (Loss(), Loss(label_smoothing=0.1, stats=True)):
            route = BACKEND.route(Sum.of(terms, 129), loss)
            assert (route.name, route.fused, route.rescales, route.refusals) == ("tiles", True, True, {})
    narrow = Head(logits(4, 0), logits(129, 0))
    for terms, reason in (
        ([head()] * 5, "there are 5 heads; kernels take 4 at most"),
        ([head(), Logits(logits(4, 129))], "there are other terms beside the heads"),
        ([head(), beside, Logits(logits(4, 129))], "there are other terms beside the heads"),
        ([head(), narrow], "a head has hidden states of width 0"),
    ):
        route = BACKEND.route(Sum.of(terms, 129), Loss())
        assert (route.name, route.refusals) == ("chunks of logits", {"tiles": reason})


A100 = Gpu("A100", 8, multiprocessors=108, cache_bytes=40 << 20)
B200 = Gpu("B200", 10, multiprocessors=148, cache_bytes=126 << 20)


@pytest.mark.parametrize(
    ("N", "V", "dtypes", "gpu", "reason"),
    [
        (8192, 50257, (H, H), H100, None),
        (
            8192,
            49152,
            (H, F),
            H100,
            "132 rows of 294,912 bytes are in flight; they take more than 60% of a cache",
        ),
        (8192, 128256, (H,), H100, "132 rows of 256,512 bytes"),
        (8192, 128256, (H,), B200, None),
        (8192, 50257, (H, H), A100, None),
        # A second round of which 124 rows are missing counts as a whole one: 264 rows twice, 140 three times.
        (
            140,
            50257,
            (H, H),
            H100,
            "140 rows leave multiprocessors idle: as if 106,142,784 bytes were moved in ",
        ),
        (180, 50257, (H, H), H100, None),
        (88, 50257, (H, H), H100, "88 rows leave multiprocessors idle"),
    ],
)
def test_logits_are_read_once_where_that_moves_less(N, V, dtypes, gpu, reason):
    summed = Sum(tuple(Logits(logits(1, N, V, dtype=dtype)) for dtype in dtypes), V)
    refused = logits_loss.one_pass_refusal(summed, Loss(), gpu)
    assert refused is None if reason is None else refused.startswith(reason)


def test_explain_says_whether_logits_are_read_once():
    route = BACKEND.route(Sum.of([Logits(logits(4, 129))], 129), Loss())
    assert (route.name, route.fused, route.mends, route.refusals) == ("logits, read once", True, True, {})
    route = BACKEND.route(Sum.of([Logits(logits(129, 4).T)], 129), Loss())
    reason = "the columns of a term do not lie side by side"
    assert (route.name, route.fused, route.refusals) == ("logits", False, {"logits, read once": reason})


def test_draws_write_logits_for_what_rewrites_them_alone():
    pointer = Sparse(torch.empty(4, 2, dtype=torch.int64, device="meta"), logits(4, 2))
    plain, seen, filtered = (
        draws_of(plain=name != "filtered", history=3 * (name == "seen"), rows=4)
        for name in ("plain", "seen", "filtered")
    )
    drawn = ["draw_kernel", "choose_kernel"]
    from_heads = ["entries_order_kernel", "heads_draw_kernel", "heads_choose_kernel"]
    existing = Logits(logits(1, 4, 129))
    for terms, draws, kernels in (
        ([head()], plain, from_heads[1:]),
        ([head(H, scale=logits(4)), pointer], plain, from_heads),
        ([head(), pointer], seen, ["heads_draw_kernel", "seen_kernel", "adjust_kernel", *drawn]),
        ([existing], plain, drawn),
        ([existing, pointer], plain, ["sum_kernel", "adjust_kernel", *drawn]),
        ([existing, pointer], filtered, ["sum_kernel", "adjust_kernel", "peak_kernel"]),
        ([head()], filtered, ["heads_draw_kernel", "peak_kernel"]),
    ):
        plan = heads_draw.plan if isinstance(terms[0], Head) else logits_draw.plan
        summed = Sum(tuple(terms), 129)
        launches = plan(summed, RowDraws.of(summed, draws), True, H100)[1]
        assert [launch.kernel.fn.__name__ for launch in launches][: len(kernels)] == kernels
        assert (len(launches) == len(kernels)) == draws.plain


def test_refusals_name_the_reason():
    cpu = torch.device("cpu")
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert "TRITON_INTERPRET" in BACKEND.refusal(cpu, [F])
    assert "reference" in BACKEND.refusal(torch.device("cuda"), [H, torch.float64])
    assert BACKEND.refusal(torch.device("cuda"), [H, F]) is None
    assert "mps" in BACKEND.refusal(torch.device("mps"), [F])


def test_importing_auxkern_does_not_import_triton():
    code = "import sys, auxkern; sys.exit('auxkern.backends.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("rows", [1, 64, 600])
@pytest.mark.parametrize("source", ["logits", "heads"])
def test_a_filtered_draw_passes_over_a_row_four_times_with_the_whole_device(source, rows):
    V, draws = VOCABULARIES["Llama-3"], draws_of(plain=False, rows=rows)
    if source == "logits":
        summed = logits_of(rows, V, (H, F))
        launches = logits_draw.plan(summed, RowDraws.of(summed, draws), True, H100)[1]
    else:
        heads = Sum.of([Head(logits(rows, 16, dtype=H), logits(V, 16, dtype=H))], V)
        launches = heads_draw.plan(heads, RowDraws.of(heads, draws), True, H100, "ieee")[1]
    passes = {kernel.name: kernel.passes for kernel in KERNELS}
    *over_rows, last = launches
    assert sum(passes[launch.kernel.fn.__name__] for launch in over_rows) <= 4
    for launch in over_rows:
        assert math.prod(launch.grid) >= 63  # as many as one row has of the widest tiles
    # The last one takes lists, and the row itself only where they are too short.
    assert last.grid == (rows,)
    capacity, splits = last.arguments["capacity"], last.arguments["splits"]
    assert last.arguments["parts"].listed.shape == (rows, splits, capacity)
    assert splits * capacity < V / 3
