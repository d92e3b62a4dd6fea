"""The reference backend against PyTorch's own losses, the formulas written out, and gradcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from tests.support.cases import check, formula, generator, ours, random_logits, random_target

# Two float64 evaluations of one formula differ by their order of summation only.
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def loss64(terms: list[auxkern.Logits | Tensor], target: Tensor, **options: object) -> Tensor:
    return auxkern.cross_entropy(terms, target, backend="reference", **options)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_one_term_is_functional_cross_entropy(
    reduction: str, label_smoothing: float, ignore_index: int
) -> None:
    z = random_logits(13, 11, dtype=torch.float64).requires_grad_()
    y = random_target(13, V=11, ignored=0.3, ignore_index=ignore_index)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": ignore_index}

    got = loss64([z], y, **options)
    want = F.cross_entropy(z, y, **options)
    grad_output = torch.randn(want.shape, dtype=torch.float64, generator=generator(3))

    torch.testing.assert_close(got, want, **EXACT)
    (got_gradient,) = torch.autograd.grad(got, z, grad_output)
    (want_gradient,) = torch.autograd.grad(want, z, grad_output)
    torch.testing.assert_close(got_gradient, want_gradient, **EXACT)


def test_every_row_counts_when_the_ignored_id_does_not_occur() -> None:
    z, y = random_logits(5, 7, dtype=torch.float64), random_target(5, V=7)
    torch.testing.assert_close(loss64([z], y, ignore_index=-1), F.cross_entropy(z, y), **EXACT)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_terms_are_added(count: int) -> None:
    terms = [random_logits(6, 9, dtype=torch.float64, seed=i) for i in range(count)]
    y = random_target(6, V=9)
    torch.testing.assert_close(loss64(terms, y), F.cross_entropy(sum(terms), y), **EXACT)


def test_scale_and_softcap_follow_their_formula() -> None:
    a, b = (random_logits(6, 9, dtype=torch.float64, seed=i) for i in range(2))
    y = random_target(6, V=9)
    z = -0.5 * a + 1.5 * (2.0 * torch.tanh(b / 2.0))
    got = loss64([auxkern.Logits(a, scale=-0.5), auxkern.Logits(b, scale=1.5, softcap=2.0)], y)
    torch.testing.assert_close(got, F.cross_entropy(z, y), **EXACT)


def test_z_loss_adds_the_squared_lse_of_rows_that_count() -> None:
    z, y = random_logits(12, 9, dtype=torch.float64), random_target(12, V=9, ignored=0.4)
    counts = y != -100
    lse = z.exp().sum(-1).log()
    want = F.cross_entropy(z, y) + 0.3 * (lse[counts] ** 2).mean()
    torch.testing.assert_close(loss64([z], y, z_loss=0.3), want, **EXACT)


def test_token_weight_is_a_weighted_mean() -> None:
    z, y = random_logits(12, 9, dtype=torch.float64), random_target(12, V=9, ignored=0.4)
    weight = torch.rand(12, dtype=torch.float64, generator=generator(4))
    nll = F.cross_entropy(z, y, reduction="none")
    counts = y != -100
    want = (weight * nll)[counts].sum() / weight[counts].sum()
    torch.testing.assert_close(loss64([z], y, token_weight=weight), want, **EXACT)
    torch.testing.assert_close(loss64([z], y, token_weight=weight, reduction="none"), weight * nll, **EXACT)
    total = loss64([z], y, token_weight=weight, reduction="sum")
    torch.testing.assert_close(total, (weight * nll).sum(), **EXACT)


def test_the_weight_of_an_ignored_row_is_not_read() -> None:
    z, y = random_logits(3, 9, dtype=torch.float64).requires_grad_(), torch.tensor([4, -100, 2])
    loss = loss64([z], y, token_weight=torch.tensor([1.0, torch.nan, 3.0], dtype=torch.float64))
    want = F.cross_entropy(z, y, reduction="none") @ torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64) / 4
    torch.testing.assert_close(loss, want, **EXACT)
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_token_weight_gets_a_gradient() -> None:
    z, y = random_logits(5, 9, dtype=torch.float64), random_target(5, V=9)
    weight = torch.rand(5, dtype=torch.float64, generator=generator(4)).requires_grad_()
    loss64([z.requires_grad_()], y, token_weight=weight, reduction="sum").backward()
    torch.testing.assert_close(weight.grad, F.cross_entropy(z, y, reduction="none").detach(), **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalizer", [7.5, 3, torch.tensor(7.5), torch.tensor(3)])
def test_normalizer_divides_the_sum(reduction: str, normalizer: float | Tensor) -> None:
    z, y = random_logits(12, 9, dtype=torch.float64), random_target(12, V=9, ignored=0.4)
    want = F.cross_entropy(z, y, reduction="sum") / normalizer
    torch.testing.assert_close(loss64([z], y, normalizer=normalizer, reduction=reduction), want, **EXACT)


def test_vocab_size_leaves_padding_out() -> None:
    a, b = random_logits(6, 9, dtype=torch.float64), random_logits(6, 12, dtype=torch.float64, seed=1)
    y = random_target(6, V=7)
    want = F.cross_entropy(a[:, :7] + b[:, :7], y, label_smoothing=0.2)
    torch.testing.assert_close(loss64([a, b], y, vocab_size=7, label_smoothing=0.2), want, **EXACT)


def test_shift_scores_a_position_against_the_next_token() -> None:
    z = random_logits(3, 5, 9, dtype=torch.float64)
    y = random_target(3, 5, V=9, ignored=0.3)
    want = F.cross_entropy(z[:, :-1].reshape(-1, 9), y[:, 1:].reshape(-1))
    torch.testing.assert_close(loss64([z], y, shift=True), want, **EXACT)
    rows = loss64([z], y, shift=True, reduction="none")
    assert rows.shape == (3, 5)
    assert torch.equal(rows[:, -1], torch.zeros(3, dtype=torch.float64))


def test_shift_moves_the_weights_with_the_targets() -> None:
    z, y = random_logits(3, 5, 9, dtype=torch.float64), random_target(3, 5, V=9)
    weight = torch.rand(3, 5, dtype=torch.float64, generator=generator(4))
    nll = F.cross_entropy(z[:, :-1].reshape(-1, 9), y[:, 1:].reshape(-1), reduction="none")
    used = weight[:, 1:].reshape(-1)
    want = (nll * used).sum() / used.sum()
    torch.testing.assert_close(loss64([z], y, shift=True, token_weight=weight), want, **EXACT)


def test_stats_follow_their_formulas() -> None:
    a, b = (random_logits(2, 4, 9, dtype=torch.float64, seed=i) for i in range(2))
    y = random_target(2, 4, V=9, ignored=0.3)
    terms = [auxkern.Logits(a, scale=0.5), auxkern.Logits(b, softcap=2.0)]
    _, stats = loss64(terms, y, z_loss=0.1, return_stats=True)

    shares = [0.5 * a, 2.0 * torch.tanh(b / 2.0)]
    z, counts = sum(shares), y != -100
    lse = z.logsumexp(-1).where(counts, 0)
    nlls = [F.cross_entropy(s.flatten(0, 1), y.flatten(), reduction="none").view(2, 4) for s in [z, *shares]]
    torch.testing.assert_close(stats.nll, nlls[0], **EXACT)
    torch.testing.assert_close(stats.lse, lse, **EXACT)
    torch.testing.assert_close(stats.z_loss, 0.1 * lse**2, **EXACT)
    torch.testing.assert_close(stats.term_nll, torch.stack(nlls[1:]), **EXACT)
    assert torch.equal(stats.argmax, z.argmax(-1).where(counts, -1))


def test_argmax_is_the_lowest_id_among_equals() -> None:
    z = torch.zeros(2, 9)
    z[1, [3, 5]] = 1.0
    _, stats = auxkern.cross_entropy([z], torch.tensor([0, 0]), return_stats=True, backend="reference")
    assert stats.argmax.tolist() == [0, 3]


OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "smooth": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.05},
    "normalizer": {"normalizer": 2.5},
    "weight": {"token_weight": torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)},
    "vocab_size": {"vocab_size": 4},
    "shift": {"shift": True},
    "all": {"reduction": "sum", "label_smoothing": 0.2, "z_loss": 0.05, "vocab_size": 4, "normalizer": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options: dict[str, object]) -> None:
    y = torch.tensor([1, -100, 3, 0])
    a = random_logits(4, 5, dtype=torch.float64, spread=1).requires_grad_()
    b = random_logits(4, 5, dtype=torch.float64, spread=1, seed=1).requires_grad_()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return loss64(
            [auxkern.Logits(a, scale=0.7), auxkern.Logits(b, scale=-1.3, softcap=1.5)], y, **options
        )

    assert torch.autograd.gradcheck(loss, (a, b))


def test_gradcheck_of_two_equal_terms() -> None:
    """Terms with equal gradients share one computation; both must get it."""
    y, x = torch.tensor([1, 3]), random_logits(2, 5, dtype=torch.float64, spread=1).requires_grad_()
    b = random_logits(2, 5, dtype=torch.float64, spread=1, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: loss64([x, b, x], y), (x, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_inputs_meet_the_contract(dtype: torch.dtype) -> None:
    terms = [random_logits(6, 101, dtype=dtype), random_logits(6, 101, dtype=dtype, seed=1)]
    check(terms, random_target(6, V=101, ignored=0.2), "reference", return_stats=True)


def test_one_float64_term_makes_everything_float64() -> None:
    terms = [random_logits(6, 11), random_logits(6, 11, dtype=torch.float64, seed=1)]
    y = random_target(6, V=11)
    result, exact = ours(terms, y, None), formula(terms, y)
    assert result.loss.dtype == torch.float64
    torch.testing.assert_close(result.loss, exact.loss, **EXACT)
    assert [g.dtype for g in result.gradients] == [torch.float32, torch.float64]
    torch.testing.assert_close(result.gradients[1], exact.gradients[1], **EXACT)


def test_a_second_derivative_is_refused() -> None:
    """Never taken for zero: a penalty on the gradient would train on a wrong derivative."""
    z, y = random_logits(2, 5, dtype=torch.float64).requires_grad_(), torch.tensor([1, 3])
    loss = loss64([z], y)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    torch.testing.assert_close(gradient.detach(), formula([z], y).gradients[0], **EXACT)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        (loss + gradient.square().sum()).backward()
