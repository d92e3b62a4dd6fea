"""The Triton backend on CPU tensors: its launches run as compiled code in the executor."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from auxkern.backends import choice
from auxkern.backends.triton import Triton
from auxkern.backends.triton.configs import Configs
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.launch import Launch
from auxkern.core.draws import Draws, RowTokens
from auxkern.core.loss import Loss, RowLosses, RowSlopes
from auxkern.core.sums import Sum, Wanted
from tests.support import cases
from tests.support.ptx.fresh import Fresh
from tests.support.ptx.lanes import SAME_VALUE
from tests.support.ptx.report import Benign
from tests.support.ptx.runner import Executor

_COPIES = "a row's or a tile's number in several lanes: each stores its copy where a layout changes"
_TILES = "a tile's logits in more warps than it has 16 rows: each stores its copy where a layout changes"
_PARTS = "parts of an operand, which several threads make of the same numbers and store for a product"
BENIGN = (
    *(
        Benign(kernel, f"shared: {SAME_VALUE}", text, _COPIES)
        for kernel, texts in {
            "heads_forward_kernel": (
                "tl.store(at, e.to(at.dtype.element_ty), mask=present",
                "tl.store(at, top, mask=present)",
                "tl.store(at + plane, total, mask=present)",
                "tl.store(at + 2 * plane, gaps, mask=present)",
                "tl.store(at + (3 + 2 * g) * plane, top, mask=present)",
                "tl.store(at + (4 + 2 * g) * plane, total, mask=present)",
                "column = tl.min(tl.where(key == top[:, None], columns, NO_COLUMN), axis=1)",
                "better = (top > best[0]) | ((top == best[0]) & (column < best[1]))",
                "return tl.where(better, top, best[0]), tl.where(better, column, best[1])",
                "tl.store(best, key, mask=present)",
                "tl.store(best + plane, lowest, mask=present)",
                "tl.store(partial.target + rows, goal, mask=here)",
                "tl.store(entries.z + at, tl.sum(",
                "tl.store(partial.target + (1 + g) * N.to(tl.int64) + rows, goal,",
            ),
            "heads_gradient_kernel": (
                "tl.store(d_out[j] + (at + s * WIDTH), d.to(d_out[j].dtype.",
                "tl.store(entries.z + at, tl.sum(",
            ),
            "entries_order_kernel": (
                "before += tl.sum(",
                "up_to += tl.sum(",
                "below += tl.sum(",
            ),
            "seen_kernel": (
                "sooner += tl.sum((same & (place[None, :] <",
                "sooner += tl.sum((same & ((P + place)[None, :] <",
                "times += tl.sum(same",
            ),
            "heads_draw_kernel": (
                "accumulator *= _of_rows(heads[i].rows_rescale, rows) * heads[i].rescale",
                "tl.store(at, z, mask=present[:, None])",
                "tl.store(partial.z + at, tl.where(bad",
                "tl.store(partial.ids + at, token, mask=present)",
                "tl.store(partial.parts + 2 * at, largest, mask=present)",
                "tl.store(partial.parts + 2 * at + 1, total, mask=present)",
            ),
            "draw_kernel": ("tl.store(parts + at, tl.reshape(tl.join(largest, total)",),
        }.items()
        for text in texts
    ),
    # A chain of products, as those of cut operands are, has all of its warps along the rows.
    *(
        Benign(kernel, f"shared: {SAME_VALUE}", text, _TILES)
        for kernel, text in (
            ("heads_forward_kernel", "return scale * x"),
            ("heads_forward_kernel", "return tl.exp2(x * _LOG2_E)"),
            ("heads_gradient_kernel", "return scale * x"),
            ("heads_gradient_kernel", "d = tl.where(live[:, None], d, 0.0)"),
        )
    ),
    *(
        Benign(kernel, f"shared: {SAME_VALUE}", text, _PARTS)
        for kernel in ("heads_forward_kernel", "heads_gradient_kernel", "heads_draw_kernel")
        for text in (
            "accumulator = tl.dot(part, w, accumulator)",
            "accumulator = tl.dot(x, part, accumulator)",
            "part = rest.to(dtype)",
        )
    ),
    Benign(
        "adjust_kernel",
        "global z_out: race, write after read",
        "tl.store(z_row + at, before +",
        "a scalar is read by every thread and stored by thread 0 from its own read; the others' are not used",
    ),
)


class Executed(Triton):
    """``Triton`` as on a GPU with so many multiprocessors."""

    interpreted = False

    def __init__(self, executor: Executor, processors: int = 132) -> None:
        self.executor, self.processors = executor, processors

    def refusal(self, device: torch.device, dtypes: Iterable[torch.dtype]) -> str | None:
        return super().refusal(torch.device("cuda"), dtypes)

    @cached_property
    def _gpu(self) -> Gpu:
        capability = self.executor.arch // 10
        return Gpu("executor", capability, self.processors, sys.maxsize, Configs.of(capability))

    def gpu(self, device: torch.device) -> Gpu:
        return self._gpu

    def run(self, launches: Iterable[Launch], device: torch.device) -> list[None]:
        """A list of None: there are no binaries, whose launches could be made again."""
        return [self.executor.run(launch) for launch in launches]

    # Gradients come to a backend without contents, and all else that is empty it allocates itself.

    def losses(
        self, sum: Sum, target: Tensor, loss: Loss, weight: Tensor | None, wanted: Wanted
    ) -> RowLosses:
        with self._watched(wanted):
            return super().losses(sum, target, loss, weight, wanted)

    def gradients(self, sum: Sum, target: Tensor, slopes: RowSlopes, wanted: Wanted) -> Any:
        with self._watched(wanted):
            return super().gradients(sum, target, slopes, wanted)

    def draw(self, sum: Sum, draws: Draws, want_logprob: bool) -> RowTokens:
        with self._watched([]):
            return super().draw(sum, draws, want_logprob)

    def _watched(self, wanted: Wanted) -> Fresh:
        fresh = Fresh()
        for gradients in wanted:
            for tensor in gradients.values():
                fresh.add(tensor)
        self.executor.fresh = fresh
        return fresh


@dataclass(frozen=True)
class Machine:
    """What a test of kernels runs on.

    Attributes:
        backend: what ``backend="triton"`` is, for tests that do not go through an operator.
        compiled: whether compiled code runs, with the arithmetic of a GPU.
    """

    backend: Triton
    compiled: bool

    def launch(self, kernel: Any, arguments: dict[str, object], **constants: Any) -> None:
        """One program of a ``triton.jit`` function."""
        launch = Launch(kernel, (1,), arguments, constants, num_warps=4, bytes_moved=0, flops=0)
        self.backend.run([launch], torch.device("cpu"))


@contextmanager
def executed(executor: Executor, monkeypatch: pytest.MonkeyPatch, processors: int = 132) -> Iterator[Machine]:
    """While it lasts ``backend="triton"`` is executed, and held to the tolerances of a GPU."""
    backend, others = Executed(executor, processors), choice._import
    with monkeypatch.context() as patch:
        patch.setattr(choice, "_import", lambda name: backend if name == "triton" else others(name))
        held_as_on_a_gpu(patch)
        yield Machine(backend, compiled=True)


def held_as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Results on a CPU get a GPU's tolerances: the kernels' exp is the same there, product and exp2."""
    for errors in (cases.EXP_ERROR, cases.SLOPE_ERROR):
        patch.setitem(errors, "cpu", errors["cuda"])
