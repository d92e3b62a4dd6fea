"""Filters over many programs: the reference's tokens, whatever the split, and where lists are too short."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Sample, SamplingParams
from tests.support.draws import assert_equal, logits, seeds

pytest.importorskip("triton")

from auxkern.backends.triton.configs import DEFAULT
from tests.support.gpus import choosing, seen_as

pytestmark = [
    pytest.mark.usefixtures("machine", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]

FILTERS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 40},
    "top-p": {"top_p": 0.9},
    "both": {"temperature": 0.8, "top_k": 60, "top_p": 0.7},
    "all": {"temperature": 1.7, "top_k": 700, "top_p": 0.95, "min_p": 0.03},
}


@pytest.fixture
def split(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the device one of so many multiprocessors."""

    def split(processors: int) -> None:
        seen_as(monkeypatch, machine.backend, multiprocessors=processors)

    return split


@pytest.fixture
def short_lists(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of 4 ids, so that most rows are read again."""
    choosing(
        monkeypatch, machine.backend, filter=dataclasses.replace(DEFAULT.filter, listed=4, least_listed=4)
    )


def draw(z: Tensor, params: SamplingParams) -> Sample:
    return auxkern.sample(z, params, seed=seeds(len(z)), position=5, return_logprobs=True, backend="triton")


def crowded(N: int, V: int) -> Tensor:
    """Rows of which a bin holds everything: logits alike, nearly alike, and of few values."""
    z = 1e-4 * logits(N, V)
    z[0] = 7.5
    z[1] = (1000 * z[1]).round() / 100
    return z


@pytest.mark.parametrize("name", FILTERS)
def test_any_split_gives_the_same_bits(split, name):
    z, params = logits(4, 6149), SamplingParams(**FILTERS[name])
    drawn = []
    for processors in (1, 2, 6, 132):  # 7 tiles: 1, 2, 6 and 7 programs for a row
        split(processors)
        drawn.append(draw(z, params))
    for other in drawn[1:]:
        assert torch.equal(other.tokens, drawn[0].tokens)
        assert torch.equal(other.processed_logprob, drawn[0].processed_logprob)
    assert_equal(z, params, seed=seeds(4))


def test_smaller_tiles_and_many_programs(machine, split, monkeypatch):
    z, params = logits(2, 16300), SamplingParams(top_k=200, top_p=0.8)
    whole = draw(z, params)
    choosing(monkeypatch, machine.backend, filter=dataclasses.replace(DEFAULT.filter, block=256, warps=2))
    split(132)  # 64 tiles, and as many programs
    parted = draw(z, params)
    assert torch.equal(parted.tokens, whole.tokens)
    assert torch.equal(parted.processed_logprob, whole.processed_logprob)


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("name", FILTERS)
def test_lists_that_are_too_short(split, short_lists, name, processors):
    split(processors)
    z = torch.cat([crowded(3, 1100), logits(1, 1100)])
    assert_equal(z, SamplingParams(**FILTERS[name]), seed=seeds(4))


def test_long_and_short_lists_keep_the_same(machine, split, monkeypatch):
    split(1)  # for 4 rows 4 programs: a list of ids from two tiles
    z, params = crowded(4, 1100), SamplingParams(top_k=700, top_p=0.3)
    before = draw(z, params)
    choosing(
        monkeypatch, machine.backend, filter=dataclasses.replace(DEFAULT.filter, listed=4, least_listed=4)
    )
    after = draw(z, params)
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.processed_logprob, after.processed_logprob)


def test_of_equal_logits_the_lowest_ids_stay(split):
    split(2)
    z = torch.full((16, 1100), -30.0)
    z[:, ::7] = 1.25  # 158 ids
    tied = torch.arange(0, 1100, 7)
    drawn = draw(z, SamplingParams(top_p=torch.arange(1, 17) / 158 - 1e-3))
    # Whatever the noise, no id behind the first 1, 2, ... is drawn; of the last ones some are.
    place = torch.searchsorted(tied, drawn.tokens)
    assert (place < torch.arange(1, 17)).all()
    assert (place > 0).sum() > 8
    torch.testing.assert_close(drawn.processed_logprob, -torch.arange(1, 17).float().log(), rtol=0, atol=1e-6)
    # Top-k keeps all of them.
    assert_equal(z, SamplingParams(top_k=torch.arange(1, 17), top_p=0.9), seed=seeds(16))


@pytest.mark.nan
def test_rows_of_every_kind_in_one_call(split):
    split(6)
    N, V = 10, 2100
    z = logits(N, V)
    z[1, 7], z[2, 2099], z[3] = torch.nan, torch.inf, -torch.inf
    z[4, 5:] = -torch.inf  # fewer than k are possible
    z[5, 100:] = torch.finfo(torch.float32).min
    z[6] += 1e4
    params = SamplingParams(
        temperature=torch.tensor([0.0, 1, 1, 1, 1, 1, 0.5, 1e-3, 60, 1]),
        top_k=torch.tensor([4, 5, 0, 9, 50, 300, 0, 3, 0, 2**40]),
        top_p=torch.tensor([0.5, 0.5, 0.9, 1, 1, 0.99, 0.3, 1, 0.6, 1e-6]),
        min_p=torch.tensor([0.0, 0, 0, 0.1, 0, 0, 0.2, 0, 0.9, 0]),
    )
    assert_equal(z, params, seed=seeds(N))


@pytest.mark.parametrize("V", [1, 1023, 1025])
def test_one_id_and_the_ends_of_tiles(V):
    z = logits(3, V)
    for params in (SamplingParams(**FILTERS["all"]), SamplingParams(top_k=1), SamplingParams(top_p=1e-9)):
        assert_equal(z, params, seed=seeds(3))


def test_temperatures_at_the_ends_of_their_range(split):
    split(2)
    temperature = torch.tensor([1e-42, 1e-35, 1e-6, 1e6, 1e35])
    for settings in ({"top_k": 9}, {"top_p": 0.6}):
        assert_equal(logits(5, 1100), SamplingParams(temperature, **settings), seed=seeds(5))
