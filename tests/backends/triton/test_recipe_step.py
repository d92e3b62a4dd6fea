"""The recipe's own training step: a frozen 16-bit head, an auxiliary in float32, a pointer."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Sparse
from tests.support.cases import IGNORE
from tests.support.heads import D32 as F
from tests.support.heads import B, H, close, exact, targets
from tests.support.machines import INTERPRETED

pytest.importorskip("triton")

from auxkern.backends.triton.heads import PARTS

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

N, V, D, K, CHUNK = 9, 131, (64, 80), 3, 5
# (hidden states, output embedding) of the frozen head; the model hands its states over in float32.
FROZEN = [(H, H), (F, H)] if INTERPRETED else [(H, H), (B, B), (F, H), (F, B)]


@pytest.fixture
def launched(machine: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches of a test, in order."""
    listed: list[Any] = []
    run = type(machine.backend).run
    monkeypatch.setattr(
        type(machine.backend),
        "run",
        lambda self, launches, device: run(self, listed.extend(own := list(launches)) or own, device),
    )
    return listed


def step(frozen: tuple[torch.dtype, torch.dtype]) -> tuple[list[Head | Sparse], Tensor]:
    """Terms, leaves that are trained, and targets."""
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.5 * torch.randn(shape, generator=source)

    lm = Head(random(N, D[0]).to(frozen[0]), random(V, D[0]).to(frozen[1]))
    aux = Head(random(N, D[1]).requires_grad_(), random(V, D[1]).requires_grad_())
    pointer = Sparse(torch.randint(0, V, (N, K), generator=source), random(N, K).requires_grad_())
    return [lm, aux, pointer], targets(N, V)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_goes_by_tiles_and_makes_them_once(machine, launched, frozen, autocast):
    terms, y = step(frozen)
    assert auxkern.explain(terms, backend="triton").route == "tiles"
    with torch.autocast("cpu", dtype=B) if autocast else contextlib.nullcontext():
        loss = auxkern.cross_entropy(terms, y, backend="triton", chunk_rows=CHUNK)
    loss.backward()
    counted = int((y != IGNORE).sum())  # those that are ignored are left out of the chunks
    made = [launch for launch in launched if "heads" in launch.arguments]
    assert [launch.kernel.fn.__name__ for launch in made] == ["heads_forward_kernel"] * -(-counted // CHUNK)
    # The frozen head's products, each in so many parts, and those of the auxiliary's parts, cut by the
    # compiler: but for the interpreter all of them are tensor cores'.
    parts = 1 if frozen[0] == frozen[1] else PARTS[frozen[1]]
    of_parts = 6 if machine.compiled else 0
    assert {launch.constants["PARTS"] for launch in made} == {(parts, 1)}
    assert {launch.constants["PRECISION"] for launch in made} == {"bf16x6" if machine.compiled else "ieee"}
    assert sum(launch.tensor_flops for launch in made) == 2 * counted * V * (D[0] * parts + D[1] * of_parts)
    right = exact(terms, y)
    close(loss.detach(), right[0], 1e-6)
    leaves = [x for term in terms[1:] for x in term.tensors.values() if x.is_floating_point()]
    for leaf, gradient in zip(leaves, right[1][2:], strict=True):
        assert leaf.grad is not None
        close(leaf.grad, gradient, 2e-6)
