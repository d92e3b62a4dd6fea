"""``python -m auxkern.inspect.ways``: what a loss of heads takes by tiles and by a library's products."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from auxkern.inspect import ways
from auxkern.inspect.targets import TARGETS
from auxkern.inspect.ways import Library

N, V = 1000, 1000
# A byte of each logit takes 1 µs; products of D = 3 in tensor cores take 8, in float32 80.
ROUND = replace(TARGETS["sm_90"], bandwidth=1e12, tensor_flops=1e12, flops=1e11)


def library(*widths: int) -> Library:
    return Library(ROUND, widths, N, V)


def test_one_head_is_written_read_written_and_read():
    assert library(3).forward == pytest.approx(8 + 4 * 4)
    assert library(3).least_forward == pytest.approx(8 + 2 * 4)


def test_a_further_head_is_written_and_added():
    more = library(3, 3).forward - library(3).forward
    assert more == pytest.approx(8 + 4 * 4)
    assert library(3, 3).least_forward - library(3).least_forward == pytest.approx(8 + 2 * 4)


def test_gradients_bring_the_last_head_back_twice_and_add_up_its_weight():
    weight = N * 2 * 4 * V * 3 / 1e12 * 1e6  # read and written in float32 for each chunk
    assert library(1, 3).back == pytest.approx(2 * 8 + weight / 2048)
    # Logits twice but for the last reading, then losses, dz from a second reading, and float32 products.
    logits = 8 + 3 * 4
    assert library(3).trained == pytest.approx(2 * logits + 4 + 4 + 4 + 4 + 2 * 80 + weight / 1024)
    assert library(3).least_trained == pytest.approx(8 + 4 + 4 + 2 + library(3).back)


def test_a_narrow_head_comes_back_as_fast_as_its_dz_is_read():
    narrow = replace(ROUND, tensor_flops=1e15)
    assert Library(narrow, (3,), N, V).back == pytest.approx(2 * 2, rel=0.01)


def test_tiles_of_an_h100_beat_a_library_that_moves_logits():
    *_, row = ways.table([(768, 256)], ["sm_90"])
    label, tiles, chunks, least, trained, *others = [cell.strip() for cell in row.strip("|").split("|")]
    assert label == "H100, 768 + 256"
    together, in_turn = map(float, tiles.split(" to "))
    # 2.2 ms are what tensor cores need for 2 * 8,192 * 128,256 * 1,024 operations.
    assert together == pytest.approx(2.2, abs=0.05)
    assert together < in_turn < float(least) < float(chunks)
    assert float(trained.split(" to ")[1]) < min(map(float, others))
