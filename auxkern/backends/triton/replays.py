"""Launches of a call that looks like an earlier one, without planning it again.

A plan says which kernels a call launches and on what; Triton then finds out what of it a binary has been
compiled for. Both take many times as long as the launch itself. Where two calls differ in nothing but the
addresses of their tensors, so do their launches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from auxkern.backends.triton.launch import Launch

_ALIGNMENT = 16  # bytes: by addresses modulo these rows are cut, and Triton compiles anew
_BOUNDARY = 256  # bytes, of a tensor in the workspace: where an allocation of its own would begin


class _Address(NamedTuple):
    """Where a tensor lies: so many bytes behind the beginning of an input, a result or the workspace."""

    place: int
    offset: int


class _Replayed(NamedTuple):
    """A launch but for its tensors' addresses."""

    kernel: CompiledKernel
    grid: tuple[int, ...]
    arguments: Callable[[list[int]], tuple[Any, ...]]  # as the kernel takes them, of places' addresses
    launch: Callable[..., None]  # the kernel on the grid


def key_of(inputs: Sequence[Tensor], facts: Hashable) -> Hashable:
    """Equal for calls whose launches differ in nothing but addresses.

    Args:
        inputs: every tensor that a plan is given.
        facts: everything else that it depends on.
    """
    addresses = [x.data_ptr() for x in inputs]
    return (
        facts,
        inputs[0].device,
        tuple([(x.dtype, x.shape, x.stride()) for x in inputs]),
        tuple([address % _ALIGNMENT for address in addresses]),
        # Which inputs are one: from addresses alone they could not be told apart.
        tuple(map(addresses.index, addresses)),
    )


class Constant(NamedTuple):
    """Memory that a plan has filled with one number."""

    filled: Tensor
    shape: tuple[int, ...]
    number: float
    options: dict[str, Any]  # of ``torch.full``


class Replay:
    """The launches of one call, to be made again with other tensors.

    Attributes:
        possible: whether they can be: binaries ran, and every tensor among their arguments is an input, a
            result, a constant, or memory of the plan's own.

    Args:
        inputs: that the call was given.
        result: tensors that it returned, a named tuple maybe.
        launches: of the call, in order.
        kernels: the binary of each; None where an interpreter ran it.
        constants: of the plan.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        result: tuple[Tensor, ...],
        launches: Sequence[Launch],
        kernels: Sequence[CompiledKernel | None],
        constants: Sequence[Constant] = (),
    ) -> None:
        given = (*inputs, *result, *[constant.filled for constant in constants])
        self.possible = all(x.is_contiguous() for x in result) and None not in kernels
        self._made: Callable[[list[Tensor]], tuple[Tensor, ...]] = getattr(type(result), "_make", tuple)
        self._result = [(x.shape, x.dtype) for x in result]
        self._constants = [constant[1:] for constant in constants]
        self._last = len(given)
        self._addresses = {x.data_ptr(): _Address(place, 0) for place, x in enumerate(given) if x.numel()}
        self._storages = {x.untyped_storage().data_ptr() for x in given}
        self._begun: dict[int, int] = {}  # of each storage in the workspace, where it begins
        self._workspace = 0
        self._launches = [
            self._replayed(launch, kernel)
            for launch, kernel in zip(launches, kernels, strict=True)
            if self.possible and kernel is not None
        ]

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Launches on the current device; a result of new tensors.

        Args:
            inputs: of a call with an equal ``key_of``.
        """
        device = inputs[0].device
        result = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self._result]
        given = [*inputs, *result]
        for shape, number, options in self._constants:
            given.append(torch.full(shape, number, **options))
        if self._workspace:
            given.append(torch.empty(self._workspace, dtype=torch.uint8, device=device))
        addresses = [x.data_ptr() for x in given]
        for _, _, arguments, launch in self._launches:
            launch(*arguments(addresses))
        return self._made(result)

    def _replayed(self, launch: Launch, kernel: CompiledKernel) -> _Replayed:
        named = launch.arguments | launch.constants
        arguments = tuple([self._without_tensors(named[name]) for name in launch.kernel.arg_names])
        grid = (*launch.grid, 1, 1)[:3]
        return _Replayed(kernel, grid, _filling(arguments), kernel[grid])

    def _without_tensors(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._address(value)
        if isinstance(value, tuple):
            return tuple(map(self._without_tensors, value))
        self.possible &= isinstance(value, (int, float, str))  # anything else may hold a tensor
        return value

    def _address(self, x: Tensor) -> _Address | int:
        if not x.numel():
            return 0  # of memory that nobody reads
        address = x.data_ptr()
        if address not in self._addresses:
            storage = x.untyped_storage()
            begin = storage.data_ptr()
            # Part of an input: which one of two that share their memory cannot be told.
            self.possible &= begin not in self._storages
            if begin not in self._begun:
                self._begun[begin] = self._workspace
                self._workspace += -(-storage.nbytes() // _BOUNDARY) * _BOUNDARY
            self._addresses[address] = _Address(self._last, self._begun[begin] + address - begin)
        return self._addresses[address]


def _filling(arguments: tuple[Any, ...]) -> Callable[[list[int]], tuple[Any, ...]]:
    """The arguments of addresses.

    Written out as one expression: walking through nested tuples would take longer than the launch.
    """
    constants: list[Any] = []

    def written(value: Any) -> str:
        if type(value) is _Address:
            return f"a[{value.place}] + {value.offset}" if value.offset else f"a[{value.place}]"
        if type(value) is tuple and value:
            return f"({', '.join(map(written, value))},)"
        constants.append(value)
        return f"c[{len(constants) - 1}]"

    filling: Callable[[list[int]], tuple[Any, ...]] = eval(
        f"lambda a: {written(arguments)}", {"c": constants}
    )
    return filling
