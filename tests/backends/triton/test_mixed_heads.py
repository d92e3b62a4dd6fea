"""Heads whose hidden states and weight differ in dtype: one of them is multiplied in parts.

They are held to what torch makes of the same head in float32. The interpreter cannot multiply bfloat16
matrices.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head
from tests.support import heads as formula
from tests.support.heads import D32 as F
from tests.support.heads import B, H, heads, run, targets
from tests.support.machines import INTERPRETED

pytest.importorskip("triton")

from auxkern.backends.triton.heads import heads_sum
from auxkern.core.sums import Sum

pytestmark = [
    pytest.mark.usefixtures("machine", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

# (hidden states, weight) of each head.
PAIRS = {
    "fp32 x fp16": (F, H),
    "fp16 x fp32": (H, F),
    "fp32 x bf16": (F, B),
    "bf16 x fp32": (B, F),
    "fp16 x bf16": (H, B),
    "bf16 x fp16": (B, H),
}
if INTERPRETED:
    # It multiplies the bits of bfloat16 matrices, not their values.
    PAIRS = {name: dtypes for name, dtypes in PAIRS.items() if B not in dtypes}
FLOAT32 = [name for name in PAIRS if "fp32" in name]
BOTH_FLOAT32 = "fp32 x fp32"  # which is multiplied in parts of both


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beside": (F, F), "scales": (0.5, -2.0)},
        {"beside": (F, F), "softcaps": (3.0, None), "biases": (1, 1)},
        {"beside": None, "biases": (1, 1), "scales": (1.0, 0.7)},
    ],
    ids=["alone", "beside fp32", "capped", "two of them"],
)
def test_losses_and_gradients(name, settings):
    settings, dtypes = dict(settings), PAIRS[name]
    beside = [settings.pop("beside") or dtypes] if settings else []
    given = heads(9, 200, (200, 48)[: 1 + len(beside)], (dtypes, *beside), **settings)
    run(given, targets(9, 200), return_stats=bool(settings), label_smoothing=0.1, z_loss=1e-3)


@pytest.mark.parametrize("name", FLOAT32)
def test_strides_and_a_shared_vocabulary(name):
    first, second = heads(9, 140, (32, 16), (PAIRS[name],) * 2)
    turned = Head(first.hidden.T.contiguous().T, first.weight.T.contiguous().T)
    sliced = Head(second.hidden[:, 3:15], second.weight[:, 1:13])
    # Ids that are not shared, however large, do not count.
    turned.weight[131:] *= 100
    run([turned, sliced], targets(9, 131), vocab_size=131)


def confident(N: int, V: int, D: int, p: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight and targets, of probability about ``p`` unless that is None."""
    source = torch.Generator().manual_seed(D)
    hidden = torch.randn(N, D, generator=source, dtype=torch.float64)
    weight = torch.randn(V, D, generator=source, dtype=torch.float64) / math.sqrt(D / 4)
    y = torch.randint(V, (N,), generator=source)
    if p is not None:
        z = hidden @ weight.T
        rest = z.scatter(-1, y[:, None], -math.inf).logsumexp(-1)
        missing = rest + math.log(p / (1 - p)) - z.gather(-1, y[:, None])[:, 0]
        hidden += (missing / weight[y].square().sum(-1))[:, None] * weight[y]
    return hidden, weight, y


def errors(head: Head, y: Tensor) -> dict[str, tuple[float, float]]:
    """Errors of ours and of torch's in float32, as shares of the largest entry.

    Returns:
        For the rows' losses, and for the gradient of the operand that is float32.
    """
    wanted = "hidden" if head.hidden.dtype == F else "weight"

    def of(dtype: torch.dtype | None) -> list[Tensor]:
        inputs = {name: x.detach().clone().to(dtype or x.dtype) for name, x in head.tensors.items()}
        leaf = inputs[wanted].requires_grad_()
        if dtype is None:
            row = auxkern.cross_entropy(Head(**inputs), y, reduction="none", backend="triton")
        else:
            z = inputs["hidden"] @ inputs["weight"].T
            row = torch.nn.functional.cross_entropy(z, y, reduction="none")
        row.sum().backward()
        assert leaf.grad is not None
        return [row.detach().double(), leaf.grad.double()]

    exact, torchs, ours = of(torch.float64), of(F), of(None)
    scales = [x.abs().max() for x in exact]
    return {
        what: (
            float((ours[i] - exact[i]).abs().max() / scales[i]),
            float((torchs[i] - exact[i]).abs().max() / scales[i]),
        )
        for i, what in enumerate(("loss", "gradient"))
    }


@pytest.mark.parametrize("p", [None, 0.9, 0.999])
@pytest.mark.parametrize("name", [*FLOAT32, BOTH_FLOAT32])
@pytest.mark.parametrize("D", [200, 4096])
def test_as_exact_as_torch_in_float32(name, D, p):
    hidden, weight, y = confident(3, 70, D, p)
    dtypes = PAIRS.get(name, (F, F))
    head = Head(hidden.to(dtypes[0]), weight.to(dtypes[1]))
    # A logit is rounded with every 16 products of a part: four units in the last place of the largest one at
    # the most. A part less would leave several times as much.
    rounding = 2.0**-21 * float((hidden @ weight.T).abs().max())
    for what, (ours, torchs) in errors(head, y).items():
        assert ours <= torchs + rounding, what


@pytest.mark.parametrize("size", [1e5, 1e-6, 1e30, 1e-30])
@pytest.mark.parametrize("name", ["fp32 x fp16", "fp16 x fp32"])
def test_rows_of_any_size_are_cut_into_float16(name, size):
    """Every other float32 row is so large or small, where the 16-bit operand makes up for it as it can."""
    source = torch.Generator().manual_seed(3)
    wide, narrow = torch.randn(70, 48, generator=source), torch.randn(70, 48, generator=source)
    wide[::2, 24:], wide[1::2, :24] = 0.0, 0.0
    wide[::2] *= size
    narrow[:, :24] *= min(max(1 / size, 1e-4), 1e4)
    hidden, weight = (narrow.half(), wide) if name == "fp16 x fp32" else (wide, narrow.half())
    # The second head finds the first one's logits in its accumulator.
    given, y = [Head(hidden, weight), Head(hidden, weight, scale=0.5)], torch.arange(70)
    loss, gradients, _ = formula.ours(given, y, torch.ones(70), reduction="none")
    right, exact, *_ = formula.exact(given, y, torch.ones(70), reduction="none")
    torch.testing.assert_close(loss.double(), right, rtol=2e-6, atol=1e-6)
    for i in (1, 3) if name == "fp16 x fp32" else (0, 2):
        formula.close(gradients[i], exact[i], 4e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_no_product_is_left_to_float32(name):
    mixed = heads(3, 40, (16, 32), (PAIRS[name],) * 2)
    beside = [*mixed, *heads(3, 40, (16,), (F,))]
    assert heads_sum(mixed, 40, False, "ieee").in_tensor_cores
    assert not heads_sum(beside, 40, False, "ieee").in_tensor_cores
    cut = heads_sum(beside, 40, False)
    assert cut.in_tensor_cores
    # The compiler cuts operands that are both of float32, the kernel the others.
    assert (cut.parts[2], cut.constants["PARTS"][2], cut.constants["PRECISION"]) == (6, 1, "bf16x6")


def test_bfloat16_weights_are_refused_by_the_interpreter(machine):
    given = heads(5, 67, (16,), ((F, B),))
    refusal = machine.backend.heads_refusal(Sum.of(given, 67))
    assert refusal is None if machine.compiled else "interpreter" in refusal
    run(given, targets(5, 67))
