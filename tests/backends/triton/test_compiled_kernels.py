"""Every kernel as compiled for two GPUs, executed: on awkward shapes, split or not, exact and with noise.

A selection that is quick; the slow tests execute all that the interpreter runs (``test_*_kernels.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from auxkern import Head, Logits, SamplingParams, Sparse
from tests.support.cases import IGNORE, check, formula, ours, random_logits, random_target
from tests.support.draws import PARAMS, assert_equal, logits, seeds
from tests.support.heads import D32 as F
from tests.support.heads import B, H, heads, targets
from tests.support.heads import run as run_heads
from tests.support.machines import PROCESSORS, compiled, one_compiled

pytest.importorskip("triton")
from tests.support.executed import BENIGN, Machine, executed
from tests.support.ptx.approximate import Noise
from tests.support.ptx.machine import Settings
from tests.support.ptx.report import Report
from tests.support.ptx.runner import Executor

pytestmark = pytest.mark.usefixtures("poisoned_memory")

On = Callable[..., AbstractContextManager[Machine]]
EVERYTHING: dict[str, Any] = {"return_stats": True, "label_smoothing": 0.1, "z_loss": 1e-3}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, codes: dict[str, Any]) -> On:
    """A GPU with so many multiprocessors, whose code must leave nothing to report."""

    @contextmanager
    def on(arch: int, processors: int, noise: Noise | None = None) -> Iterator[Machine]:
        executor = Executor(arch, Settings(noise=noise), Report(BENIGN), codes=codes)
        with executed(executor, monkeypatch, processors) as machine:
            yield machine
        assert not executor.report.faults, str(executor.report)

    return on


def _quick(names: Iterable[str], quick: set[str]) -> list[Any]:
    """Parameters, of which all but ``quick`` are left to the slow tests."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


# 1,031 is prime; a tile of one 16-bit term has 4,096 columns, of two terms 2,048.
LOSSES = {
    "fp32": ((F,), 1031),
    "fp16": ((H,), 4097),
    "bf16": ((B,), 4095),
    "fp16+fp32": ((H, F), 2049),
    "bf16+fp32": ((B, F), 2047),
    "3 terms": ((F, B, H), 1031),
}


@pytest.mark.parametrize("arch", one_compiled())
@pytest.mark.parametrize("name", _quick(LOSSES, {"fp16", "fp16+fp32", "3 terms"}))
def test_losses_and_gradients(on, arch, name):
    dtypes, V = LOSSES[name]
    terms = [random_logits(3, V, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
    target = torch.tensor([V - 1, IGNORE, 5])
    for processors in (1, 2, 132):
        options = EVERYTHING if processors == 2 or len(dtypes) > 2 else {"return_stats": False}
        with on(arch, processors):
            check(terms, target, "triton", **options)


@pytest.mark.parametrize("arch", compiled())
def test_losses_of_strided_capped_and_bad_logits(on, arch):
    wide = random_logits(4, 1050, dtype=H)[:, 3:1034]  # rows begin anywhere, and others' columns lie between
    columns = random_logits(1031, 4).T
    terms = [Logits(wide, -0.5, softcap=3.0), Logits(columns, 0.7)]
    with on(arch, 2):
        check(terms, random_target(4, V=1031), "triton", **EVERYTHING)
        bad = random_logits(4, 1031)
        bad[1], bad[2, 7], bad[3, :1000] = math.nan, math.inf, -math.inf
        target = torch.tensor([5, IGNORE, IGNORE, 1030])
        result = ours([bad], target, "triton", reduction="sum")
    good = formula([bad[[0, 3]]], target[[0, 3]], reduction="sum")
    torch.testing.assert_close(result.loss.double(), good.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.gradients[0][[0, 3]].double(), good.gradients[0], rtol=1e-4, atol=1e-9)
    assert torch.equal(result.gradients[0][1:3], torch.zeros(2, 1031))


SHAPES = {"1 row": (1, 7), "a tile and 1": (33, 129), "prime": (37, 131)}
HEADS = {
    "fp16": {"dtypes": (H, H)},
    "bf16": {"dtypes": (B, B)},
    "fp32": {"dtypes": (F, F)},
    "fp16+fp32": {"dtypes": (H, F)},
    "bf16+fp16": {"dtypes": (B, H)},
    "fp32 x bf16, beside fp32": {"dtypes": ((F, B), F)},
    "fp32 x fp16, beside its mirror": {"dtypes": ((F, H), (H, F))},
    "bf16 x fp32, capped, beside bf16 x fp16": {
        "dtypes": ((B, F), (B, H)),
        "softcaps": (3.0, None),
        "biases": (1, 1),
    },
    "bf16, capped": {"dtypes": (B, B), "softcaps": (3.0, None), "biases": (1, 1)},
}


# Of what is left out each part is in one of these: float32 beside 16 bits, a bias, a cap.
QUICK_HEADS = {"bf16", "fp16+fp32", "fp32 x bf16, beside fp32", "bf16 x fp32, capped, beside bf16 x fp16"}


@pytest.mark.parametrize("arch", one_compiled())
@pytest.mark.parametrize("name", _quick(HEADS, QUICK_HEADS))
def test_losses_of_heads(on, arch, name):
    # 80 is a step of a product and a part of one.
    options = EVERYTHING if "capped" in name else {}
    with on(arch, 132):
        for N, V in SHAPES.values() if name == "bf16" else [SHAPES["prime"]]:
            run_heads(heads(N, V, (80, 16), **HEADS[name]), targets(N, V), **options)


@pytest.mark.parametrize("arch", compiled())
def test_losses_of_heads_in_tf32(on, arch):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with on(arch, 132):
            # Operands are cut to 10 bits behind the point.
            for widths in ((80, 16), (64, 32)):
                run_heads(heads(37, 131, widths, (F, F)), targets(37, 131), tolerance=2.0**-9)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("arch", one_compiled())
def test_draws(on, arch):
    terms = [logits(3, 2049), Logits(logits(3, 2049, 1, H), scale=0.5, softcap=4.0)]
    with on(arch, PROCESSORS[arch]):
        for settings in PARAMS.values():
            assert_equal(terms, SamplingParams(**settings), seed=seeds(3))


@pytest.mark.parametrize("arch", one_compiled())
def test_draws_with_penalties_and_bad_rows(on, arch):
    N, V = 5, 300
    g = torch.Generator().manual_seed(5)
    history = torch.randint(-1, V, (N, 300), generator=g)  # longer than a block, ids repeated
    z = logits(N, V)
    z[1, 7], z[2, 299], z[3] = math.nan, math.inf, -math.inf
    params = SamplingParams(repetition_penalty=1.4, presence_penalty=0.5, logit_bias={3: 4.0, 5: -math.inf})
    terms = [z, Sparse(torch.randint(0, V, (N, 5), generator=g), torch.randn(N, 5, generator=g))]
    with on(arch, 2):
        assert_equal(terms, params, seed=seeds(N), history=history, prompt=history[:, :7])


@pytest.mark.parametrize("arch", one_compiled())
@pytest.mark.parametrize(
    "dtypes",
    [
        pytest.param((B, B), id="bf16"),
        pytest.param((F, F), id="fp32", marks=pytest.mark.slow),
        pytest.param((F, B), id="fp32 x bf16", marks=pytest.mark.slow),
        pytest.param((F, H), id="fp32 x fp16", marks=pytest.mark.slow),
        pytest.param((B, F), id="bf16 x fp32", marks=pytest.mark.slow),
        pytest.param((H, F), id="fp16 x fp32", marks=pytest.mark.slow),
    ],
)
def test_draws_of_heads(on, arch, dtypes):
    g = torch.Generator().manual_seed(7)
    with on(arch, 132):
        for rows in (3, 20):
            hidden, weight = torch.randn(rows, 80, generator=g), torch.randn(290, 80, generator=g)
            terms = [
                Head(hidden.to(dtypes[0]), weight.to(dtypes[1])),
                Sparse(torch.randint(0, 290, (rows, 3), generator=g), torch.randn(rows, 3, generator=g)),
            ]
            for params in (None, SamplingParams(top_k=7, top_p=0.9))[: 1 + (rows > 3)]:
                assert_equal(terms, params, seed=seeds(rows))


@pytest.mark.parametrize("arch", one_compiled())
def test_approximate_instructions_may_err_as_far_as_they_may(on, arch):
    with on(arch, 2, Noise(1)):
        terms = [random_logits(3, 2049, dtype=dtype, seed=i) for i, dtype in enumerate((H, F))]
        check(terms, torch.tensor([2048, IGNORE, 5]), "triton", **EVERYTHING)
        run_heads(heads(37, 131, (80, 16), (B, B)), targets(37, 131))
        assert_equal(logits(3, 2049), SamplingParams(**PARAMS["all"]), seed=seeds(3))


@pytest.mark.slow
@pytest.mark.parametrize("arch", compiled())
@pytest.mark.parametrize("V", [1, 7, 127, 128, 129, 200])
@pytest.mark.parametrize("N", [1, 33])
@pytest.mark.parametrize(
    "dtypes", [(B, B), (B, F), (B, H), (B,) * 4], ids=["bf16", "bf16+fp32", "bf16+fp16", "4"]
)
def test_heads_that_the_interpreter_cannot_multiply(on, arch, dtypes, N, V):
    with on(arch, 2):
        given = heads(N, V, (80, 16, 48, 64)[: len(dtypes)], dtypes, biases=(1,))
        run_heads(given, targets(N, V), **EVERYTHING)
