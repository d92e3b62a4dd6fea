"""Bootstrap intervals: against enumeration of all resamples, and by how often they hold the true mean."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import pytest
import torch

from auxkern.evaluation.bootstrap import bootstrap_difference, bootstrap_mean


def enumerated(values: Sequence[float], clusters: Sequence[Hashable]) -> list[float]:
    """The mean of every possible resample, in order."""
    names = list(dict.fromkeys(clusters))
    members = [[v for v, c in zip(values, clusters, strict=True) if c == name] for name in names]
    means = []
    for chosen in itertools.product(members, repeat=len(members)):
        drawn = [v for some in chosen for v in some]
        means.append(sum(drawn) / len(drawn))
    return sorted(means)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("clusters", ["abcde", "aabcc", "ababc"])
def test_the_ends_are_quantiles_of_all_resamples(confidence: float, clusters: str) -> None:
    values = [0.3, 1.9, 4.2, 7.7, 16.1]
    means = enumerated(values, clusters)
    found = bootstrap_mean(values, clusters=list(clusters), confidence=confidence, resamples=40_000)
    assert found.mean == pytest.approx(sum(values) / 5)
    assert (found.values, found.clusters, found.confidence) == (5, len(set(clusters)), confidence)
    # 4 standard errors of a share of 40,000 draws: the end lies between quantiles that near.
    slack = 4 * math.sqrt(0.25 / 40_000)
    for end, share in ((found.low, (1 - confidence) / 2), (found.high, (1 + confidence) / 2)):
        low = means[max(0, math.floor((share - slack) * len(means)))]
        high = means[min(len(means) - 1, math.ceil((share + slack) * len(means)))]
        assert low - 1e-12 <= end <= high + 1e-12


def test_two_clusters_by_hand() -> None:
    # Both drawn twice with probability 1/4, which is more than the tails: the ends are their means.
    found = bootstrap_mean([1, 2, 3, 10], clusters=["x", "x", "x", "y"])
    assert (found.mean, found.low, found.high) == (4.0, 2.0, 10.0)


def test_clusters_that_are_named_by_anything_and_stand_in_any_order() -> None:
    values = [1.0, 5.0, 2.0, 8.0, 3.0, 9.0]
    names = [("a", 1), None, ("a", 1), 7, None, 7]
    found = bootstrap_mean(values, clusters=names)
    together = bootstrap_mean([1.0, 2.0, 5.0, 3.0, 8.0, 9.0], clusters=[0, 0, 1, 1, 2, 2])
    assert (found.low, found.high) == pytest.approx((together.low, together.high))


def coverage(draw: Any, truth: float, trials: int = 600, **options: Any) -> float:
    generator = torch.Generator().manual_seed(3)
    held = 0
    for trial in range(trials):
        values, clusters = draw(generator)
        found = bootstrap_mean(values, clusters=clusters, resamples=1000, seed=trial, **options)
        held += found.low <= truth <= found.high
    return held / trials


def exponential(generator: torch.Generator) -> tuple[list[float], None]:
    return torch.empty(80).exponential_(generator=generator).tolist(), None


def coins(generator: torch.Generator) -> tuple[list[float], None]:
    return (torch.rand(100, generator=generator) < 0.3).double().tolist(), None


def related(generator: torch.Generator) -> tuple[list[float], list[int]]:
    """50 clusters of 4 values that share most of their deviation."""
    common = torch.randn(50, 1, generator=generator).expand(50, 4)
    own = 0.5 * torch.randn(50, 4, generator=generator)
    return (common + own).flatten().tolist(), [i for i in range(50) for _ in range(4)]


# The standard error of a share of 0.95 over 600 trials is 0.009; the bootstrap's own shortfall at these
# sizes is 0.01 to 0.02.
@pytest.mark.parametrize(
    ("draw", "truth"), [(exponential, 1.0), (coins, 0.3), (related, 0.0)], ids=["skewed", "share", "clusters"]
)
def test_95_percent_intervals_hold_the_mean_95_times_in_100(draw: Any, truth: float) -> None:
    assert 0.905 <= coverage(draw, truth) <= 0.98


def test_half_of_the_50_percent_intervals_hold_the_mean() -> None:
    assert coverage(exponential, 1.0, confidence=0.5) == pytest.approx(0.5, abs=0.07)


def test_related_values_without_their_clusters_deceive() -> None:
    def careless(generator: torch.Generator) -> tuple[list[float], None]:
        return related(generator)[0], None

    # The mean's true standard error is nearly twice what 200 independent values would have.
    assert coverage(careless, 0.0) < 0.8


def test_a_difference_of_pairs_is_sharper_than_two_intervals() -> None:
    generator = torch.Generator().manual_seed(0)
    common = 5 * torch.randn(60, generator=generator)
    first = (common + 1 + 0.1 * torch.randn(60, generator=generator)).tolist()
    second = common.tolist()
    found = bootstrap_difference(first, second)
    assert found.mean == pytest.approx(sum(first) / 60 - sum(second) / 60)
    # 1.96 standard errors of 0.1 / sqrt(60), give or take what 60 values leave open.
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(60), rel=0.35)
    assert 0.9 < found.low < 1.0 < found.high < 1.1
    assert bootstrap_mean(first).low < bootstrap_mean(second).high


def test_seeds() -> None:
    values = torch.randn(30, generator=torch.Generator().manual_seed(1)).tolist()
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4)
    assert bootstrap_mean(values, seed=4) != bootstrap_mean(values, seed=5)
    state = torch.get_rng_state()
    bootstrap_mean(values)
    assert torch.equal(torch.get_rng_state(), state)


def test_many_values_are_drawn_in_parts() -> None:
    # More than 2**20 draws in one resample.
    values = torch.arange(1_200_000) % 2
    found = bootstrap_mean(values.tolist(), confidence=0.5, resamples=8)
    assert found.mean == 0.5
    assert 0 < found.high - found.low < 0.004


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([]), "there are 0 clusters"),
        (lambda: bootstrap_mean([1.0]), "there are 1 clusters"),
        (lambda: bootstrap_mean([1.0, 2.0], clusters=["a", "a"]), "there are 1 clusters"),
        (lambda: bootstrap_mean([1.0, math.nan]), r"values\[1\] is nan"),
        (lambda: bootstrap_mean([1.0, 2.0], clusters=["a"]), "1 names of clusters and 2 values"),
        (lambda: bootstrap_mean([1.0, 2.0], confidence=1.0), "confidence is 1.0"),
        (lambda: bootstrap_mean([1.0, 2.0], resamples=39), "resamples is 39, too few"),
        (lambda: bootstrap_difference([1.0, 2.0], [1.0]), "first has 2 values and second 1"),
    ],
)
def test_what_cannot_be_resampled_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
