"""Draws without filters: the same bits for any split and batch, and no column overlooked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Logits, Sample, SamplingParams
from auxkern.core.draws import gumbel, random_bits
from tests.support.draws import assert_equal, logits, seeds
from tests.support.machines import INTERPRETED

pytest.importorskip("triton")

from auxkern.backends.triton.configs import DEFAULT
from tests.support.gpus import choosing, seen_as

pytestmark = [
    pytest.mark.usefixtures("machine", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]
TILE = 1024


@pytest.fixture
def split(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the device one of so many multiprocessors, of one program each, and tiles short."""
    small = dataclasses.replace(DEFAULT.sample, block=TILE, programs=1)
    choosing(monkeypatch, machine.backend, sample=small)

    def split(processors: int) -> None:
        seen_as(monkeypatch, machine.backend, multiprocessors=processors)

    return split


def draw(terms: Any, params: SamplingParams, N: int, **options: Any) -> Sample:
    return auxkern.sample(
        terms, params, seed=seeds(N), position=2**35 + 1, return_logprobs=True, backend="triton", **options
    )


def same(drawn: list[Sample]) -> None:
    for other in drawn[1:]:
        assert torch.equal(other.tokens, drawn[0].tokens)
        assert torch.equal(other.processed_logprob, drawn[0].processed_logprob)


def test_any_split_gives_the_same_bits(split):
    N, V = 3, 6 * TILE + 5
    terms = [logits(N, V, 0, torch.float16), Logits(logits(N, V, 1), scale=torch.tensor([0.5, 1.0, 2.0]))]
    params = SamplingParams(temperature=torch.tensor([0.4, 1.0, 3.0]))
    drawn = []
    for processors in (1, 2, 6, 18, 396):  # a row in 1, 1, 2, 6 and 7 programs
        split(processors)
        drawn.append(draw(terms, params, N))
    same(drawn)
    assert_equal(terms, params, seed=seeds(N))


def test_as_many_programs_as_may_share_a_row(split):
    V = 32 * TILE if INTERPRETED else 8 * TILE
    drawn = []
    for processors in (1, 132):
        split(processors)
        drawn.append(draw(logits(1, V), SamplingParams(), 1))
    same(drawn)


def test_penalties_leave_a_draw_to_many_programs(split):
    N, V = 2, 5 * TILE
    history = torch.arange(0, 2 * V, 8).view(N, -1) % V
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.2)
    drawn = []
    for processors in (1, 8):
        split(processors)
        drawn.append(draw(logits(N, V), params, N, history=history))
    same(drawn)
    assert_equal(logits(N, V), params, seed=seeds(N), history=history)


@pytest.mark.parametrize("rows", ["drawn at random", "of equal logits"])
def test_temperatures_at_the_ends_of_their_range(split, rows):
    split(2)
    temperature = torch.tensor([0, 1e-42, 1e-35, 1e-20, 1e-6, 1, 1e6, 1e35, 3e38])
    z = logits(9, 67) if rows == "drawn at random" else torch.full((9, 67), 1e4)
    assert_equal(z, SamplingParams(temperature), seed=seeds(9))


def bits_of(V: int, position: int) -> Tensor:
    """(V,) the random bits of a row of seed 1."""
    return random_bits(torch.tensor([1]), torch.tensor([position]), V)[0]


@pytest.mark.parametrize("apart", [1, TILE, TILE // 2], ids=["beside it", "a tile before it", "elsewhere"])
def test_a_bound_far_above_its_score_does_not_win(split, apart):
    """Where u is near 1 the bound of the noise is far above it; its column is looked at first, and loses."""
    split(1)
    V = 3 * TILE
    for position in range(5000):
        bits = bits_of(V, position)
        losers = torch.arange(V - apart)[(bits[:-apart] > 0.97 * 2**32) & (bits[apart:] < 2**28)]
        losers = losers[losers // 8 == (losers + 1) // 8] if apart == 1 else losers
        if len(losers):
            break
    loser = int(losers[0])
    winner = loser + apart
    g = gumbel(bits)
    z = torch.full((1, V), -40.0)
    z[0, winner] = 0
    z[0, loser] = float(g[winner]) + 0.5
    assert g[loser] < -1  # its score is lower by more than 0.5, its bound higher by more than 0.3
    options: dict[str, Any] = {"seed": torch.tensor([1]), "position": position}
    drawn = auxkern.sample(z, SamplingParams(), backend="triton", **options)
    assert drawn.tokens.tolist() == [winner]
    assert auxkern.sample(z, SamplingParams(), backend="reference", **options).tokens.tolist() == [winner]


@pytest.mark.nan
def test_a_nan_among_infinite_logits_is_reported(split):
    split(6)
    z = torch.full((4, 3 * TILE), torch.inf)
    z[0, 700] = z[1, 3] = torch.nan
    z[2, ::2] = -torch.inf
    z[3] = torch.nan
    drawn = draw(z, SamplingParams(temperature=torch.tensor([1.0, 0.0, 1.0, 1.0])), 4)
    assert drawn.status.tolist() == [1, 1, 3, 1]


def test_a_row_of_heads_is_drawn_alone_as_among_others(machine):
    """One kind of matrix instruction for every batch: another one would add up in another order."""
    N, V, dtype = 70, 290, torch.bfloat16 if machine.compiled else torch.float16
    g = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 80, generator=g).to(dtype) for n in (N, V))
    seed = seeds(N)

    def drawn(rows: slice) -> Sample:
        return auxkern.sample(
            [Head(hidden[rows], weight)], seed=seed[rows], position=1, return_logprobs=True, backend="triton"
        )

    together = drawn(slice(0, N))
    for n in (0, 69):
        alone = drawn(slice(n, n + 1))
        assert torch.equal(alone.tokens, together.tokens[n : n + 1])
        assert torch.equal(alone.processed_logprob, together.processed_logprob[n : n + 1])
