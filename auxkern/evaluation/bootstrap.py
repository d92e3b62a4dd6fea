"""Confidence intervals of means, by resampling what was measured."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auxkern.core.seeds import DATA_SEED, mixed_seed

_DRAWS_AT_ONCE = 1 << 20  # 8 MiB of indices


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile bootstrap interval, in the unit of the values.

    Attributes:
        mean: of the values.
        low, high: its ends; the mean lies between them but for a very skewed distribution.
        confidence: in (0, 1), the share of such intervals that would hold the true mean.
        values: how many there were.
        clusters: how many were resampled.
    """

    mean: float
    low: float
    high: float
    confidence: float
    values: int
    clusters: int


def bootstrap_mean(
    values: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = DATA_SEED,
) -> Interval:
    """Percentile bootstrap interval of a mean (Efron 1979), of whole clusters where values are related.

    As many clusters as there are are drawn with replacement, each with all of its values; the mean of
    the values drawn is one resample, and the quantiles (1 - confidence) / 2 and (1 + confidence) / 2 of
    the resamples, interpolated, are the ends.

    It is too narrow for few clusters: with 10 of a normal distribution a 95% interval holds the mean 90
    times in 100. Where all values are equal it has no width, and says nothing: 0 of n could be up to
    about 3 / n (95%).

    Args:
        values: measurements, finite; True and False count 1 and 0.
        clusters: a name for each value; values of one name are drawn together, as all samples of one
            condition should be. None: each value by itself.
        confidence: in (0, 1).
        resamples: how many means are drawn; the ends are of float64 and repeat with the seed.
        seed: of the draws.

    Raises:
        ValueError: fewer than two clusters, a value that is not finite, not as many names as values,
            or an option out of range.
    """
    x = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if not bool(x.isfinite().all()):
        i = int((~x.isfinite()).nonzero()[0])
        raise ValueError(f"values[{i}] is {x[i].item()}; leave out what was not measured")
    sums, sizes = _cluster_sums(x, clusters)
    ends = _ends(sums, sizes, confidence, resamples, seed)
    return Interval((sums.sum() / sizes.sum()).item(), *ends, confidence, len(x), len(sums))


def bootstrap_ratio(
    sums: Sequence[float],
    sizes: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = DATA_SEED,
) -> Interval:
    """Interval of a mean of which only the sum over each cluster is known, and how many values it has.

    ``bootstrap_mean`` of the values, with these clusters.

    Args:
        sums: of the clusters, finite.
        sizes: values of each; one at least must have some.
        confidence, resamples, seed: as there.

    Raises:
        ValueError: sums and sizes have other lengths, all sizes are 0, or as ``bootstrap_mean``.
    """
    if len(sums) != len(sizes):
        raise ValueError(f"there are {len(sums)} sums and {len(sizes)} sizes; pass as many")
    known = [(total, size) for total, size in zip(sums, sizes, strict=True) if size > 0]
    if not known:
        raise ValueError(f"none of the {len(sizes)} clusters has a value; there is no mean")
    x = torch.tensor(known, dtype=torch.float64)
    if not bool(x.isfinite().all()):
        raise ValueError("a sum or a size is not finite; leave out what was not measured")
    totals, counts = x.unbind(1)
    ends = _ends(totals, counts, confidence, resamples, seed)
    mean = (totals.sum() / counts.sum()).item()
    return Interval(mean, *ends, confidence, int(counts.sum().item()), len(totals))


def _ends(sums: Tensor, sizes: Tensor, confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    """Ends of the interval of clusters with (C,) sums and sizes."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1, such as 0.95")
    least = math.ceil(2 / (1 - confidence))
    if resamples < least:
        raise ValueError(
            f"resamples is {resamples}, too few for the tails of confidence={confidence}; "
            f"pass {least} or more, better 10,000"
        )
    if len(sums) < 2:
        raise ValueError(f"there are {len(sums)} clusters; resampling needs 2 at least, better 20")
    means = _resampled(sums, sizes, resamples, seed)
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, ends).tolist()
    return low, high


def bootstrap_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = DATA_SEED,
) -> Interval:
    """Interval of mean(first) - mean(second), where first[i] and second[i] belong together.

    Such as two models on the same condition: what is common to a pair falls out, so the interval is
    narrower than two intervals side by side suggest. It is ``bootstrap_mean`` of the differences.

    Args:
        first, second: as many values each.
        clusters, confidence, resamples, seed: as there.

    Raises:
        ValueError: the lengths differ, or what ``bootstrap_mean`` refuses.
    """
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} values and second {len(second)}; pass pairs")
    differences = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    return bootstrap_mean(
        differences, clusters=clusters, confidence=confidence, resamples=resamples, seed=seed
    )


def _cluster_sums(x: Tensor, clusters: Sequence[Hashable] | None) -> tuple[Tensor, Tensor]:
    """(C,) float64 sums and sizes of the clusters, in the order of their first values."""
    if clusters is None:
        return x, torch.ones_like(x)
    if len(clusters) != len(x):
        raise ValueError(f"there are {len(clusters)} names of clusters and {len(x)} values; pass as many")
    numbers: dict[Hashable, int] = {}
    index = torch.tensor([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=torch.int64)
    sums = x.new_zeros(len(numbers)).index_add(0, index, x)
    return sums, x.new_zeros(len(numbers)).index_add(0, index, torch.ones_like(x))


def _resampled(sums: Tensor, sizes: Tensor, resamples: int, seed: int) -> Tensor:
    """(resamples,) float64 means of as many clusters, drawn with replacement."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, "bootstrap"))
    count = len(sums)
    at_once = max(1, _DRAWS_AT_ONCE // count)
    means = []
    for first in range(0, resamples, at_once):
        shape = (min(at_once, resamples - first), count)
        drawn = torch.randint(count, shape, generator=generator)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return torch.cat(means)
