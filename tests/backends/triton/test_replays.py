"""Launches that are made again with other tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.replays import Constant, Replay, key_of


class Strided(NamedTuple):
    x: Tensor
    stride: int
    scale: float


class Kernel:
    arg_names = ("inputs", "out", "partial", "best", "N", "BLOCK")


class Result(NamedTuple):
    out: Tensor
    rest: Tensor


class Binary:
    """Stands for a compiled kernel; keeps what it is launched with."""

    def __init__(self) -> None:
        self.launched: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *given: self.launched.append((grid, given))


class Reading(list[Any]):
    """Reads the doubles at the address that a launch is given, while they are there."""

    def __init__(self, read: list[list[float]]) -> None:
        super().__init__()
        self.read = read

    def append(self, launch: tuple[tuple[int, ...], tuple[Any, ...]]) -> None:
        self.read.append(list((ctypes.c_double * 3).from_address(launch[1][3])))


def planned(*inputs: Tensor) -> tuple[Result, Launch]:
    result = Result(torch.empty(3), torch.empty(0))
    workspace = torch.empty(4, 100)
    arguments = {
        "inputs": tuple(Strided(x, x.stride(0), 0.5) for x in inputs),
        "out": result,
        "partial": workspace,
        "best": workspace[1],
        "N": 3,
    }
    return result, Launch(Kernel, (3, 2), arguments, {"BLOCK": (True, 64)}, 4, 0, 0)


def replay_of(*inputs: Tensor) -> tuple[Replay, Binary]:
    result, launch = planned(*inputs)
    binary = Binary()
    return Replay(inputs, result, [launch], [binary]), binary


def test_other_tensors_stand_where_the_first_stood():
    replay, binary = replay_of(torch.zeros(3, 5), torch.zeros(3, 7))
    assert replay.possible
    a, b = torch.ones(3, 5), torch.ones(3, 7)
    result = replay([a, b])
    assert isinstance(result, Result)
    assert result.out.shape == (3,)
    assert result.rest.shape == (0,)
    [(grid, (inputs, out, partial, best, N, block))] = binary.launched
    assert grid == (3, 2, 1)
    assert (N, block) == (3, (True, 64))
    assert inputs == ((a.data_ptr(), 5, 0.5), (b.data_ptr(), 7, 0.5))
    assert out == (result.out.data_ptr(), 0)
    assert best == partial + 400
    assert partial not in (a.data_ptr(), b.data_ptr(), result.out.data_ptr())


def test_each_call_has_results_of_its_own():
    replay, _ = replay_of(torch.zeros(3, 5))
    x = torch.ones(3, 5)
    first, second = replay([x]), replay([x])
    assert first[0].data_ptr() != second[0].data_ptr()


@pytest.mark.parametrize(
    "other",
    [
        lambda memory: memory[:12].view(3, 4),
        lambda memory: memory[:15].view(5, 3).T,
        lambda memory: memory[1:16].view(3, 5),
        lambda memory: memory[:15].view(3, 5).view(torch.int32),
    ],
    ids=["shape", "strides", "alignment", "dtype"],
)
def test_a_tensor_of_another_kind_is_another_call(other):
    memory = torch.zeros(64)
    x = memory[16:31].view(3, 5)
    assert key_of([x], "loss") == key_of([memory[32:47].view(3, 5)], "loss")
    assert key_of([x], "loss") != key_of([other(memory)], "loss")
    assert key_of([x], "loss") != key_of([x], "draw")


def test_one_tensor_twice_is_another_call_than_two():
    x, y = torch.zeros(2, 8, 8)
    assert key_of([x, x], "") != key_of([x, y], "")
    assert key_of([x, x], "") == key_of([y, y], "")


def test_part_of_an_input_is_planned_again():
    x = torch.zeros(6, 5)
    result, launch = planned(x[3:])
    assert not Replay([x], result, [launch], [Binary()]).possible


def test_what_may_hold_a_tensor_is_planned_again():
    x = torch.zeros(6, 5)
    result, launch = planned(x)
    launch.arguments["N"] = object()
    assert not Replay([x], result, [launch], [Binary()]).possible


def test_the_interpreter_plans_each_call():
    x = torch.zeros(3, 5)
    result, launch = planned(x)
    assert not Replay([x], result, [launch], [None]).possible


def test_a_constant_is_filled_again():
    x = torch.zeros(6, 5)
    result, launch = planned(x)
    constant = torch.full((3,), 0.9, dtype=torch.float64)
    launch.arguments["best"] = constant
    binary = Binary()
    options = {"dtype": torch.float64}
    replay = Replay([x], result, [launch], [binary], [Constant(constant, (3,), 0.9, options)])
    assert replay.possible
    constant.zero_()
    given = []
    binary.launched = Reading(given)
    replay([x])
    assert given == [[0.9] * 3]
