"""From checked tensors to kernel launches: what the backend runs, and what is compiled ahead of time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from auxkern.backends.triton import configs
from auxkern.backends.triton.launch import (
    MAX_SPLITS,
    Launch,
    RowsArgument,
    TritonKernels,
    alignment,
    as_argument,
    as_arguments,
    splits,
    term_constants,
)
from auxkern.backends.triton.logits_loss.kernels import backward_kernel, combine_kernel, forward_kernel
from auxkern.core.loss import Coefficients, Loss, RowLosses
from auxkern.core.sums import Sum, Wanted

# Scale, add: per share. Maximum, difference, product, exp, add: per logit.
_SHARE_FLOPS, _LOGIT_FLOPS = 2, 5


class _Partial(NamedTuple):
    """What programs that share a row leave for ``combine_kernel``."""

    sums: Tensor  # (4 + 2 I, N, splits) float32
    best: Tensor  # (2, N, splits) int32


class LogitsLoss(TritonKernels):
    """Losses and gradients of logits that exist."""

    def logits_losses(
        self, sum: Sum, target: Tensor, loss: Loss, weight: Tensor | None, wanted: Wanted
    ) -> RowLosses:
        rows, launches = forward(sum, target, loss, self.multiprocessors(target.device))
        self.run(launches, target.device)
        return rows.summed()

    def logits_gradients(self, sum: Sum, target: Tensor, rows: Coefficients, wanted: Wanted) -> None:
        self.run([backward(sum, target, rows, wanted, self.multiprocessors(target.device))], target.device)


def forward(logits: Sum, target: Tensor, loss: Loss, processors: int) -> tuple[RowLosses, list[Launch]]:
    """The launches of ``logits_losses``, in order, and the rows they fill.

    Args:
        processors: of the device; they decide over how many programs a row is split.
    """
    terms, N, V = logits.logits, target.shape[0], logits.V
    values, want_smooth, want_stats = [t.values for t in terms], loss.smooth, loss.stats
    cut = alignment(values)
    config = _first_that_fits(configs.FORWARD_STATS if want_stats else configs.FORWARD, len(terms))
    block = _block(config, cut.granule)
    programs = splits(N, -(-V // block), processors, config.programs)

    rows = RowLosses.empty(target, torch.float32, len(terms), loss)
    fields = 4 + 2 * len(terms) if want_stats else 4 if want_smooth else 2
    shared = (N, programs) if programs > 1 else (0, 0)
    arguments = {
        "terms": as_arguments(terms),
        "target": target,
        "out": RowsArgument(*rows[:-1]),
        "partial": _Partial(
            sums=target.new_empty((fields, *shared), dtype=torch.float32),
            best=target.new_empty((2 if want_stats else 0, *shared), dtype=torch.int32),
        ),
        "N": N,
        "V": V,
        "ignore_index": loss.ignore_index,
        "splits": programs,
    }
    constants = term_constants(terms) | {"SMOOTH": want_smooth, "STATS": want_stats}
    launches = [
        Launch(
            forward_kernel,
            (N, programs),
            arguments,
            constants | {"ALIGNED": cut.aligned, "LEADER": cut.leader, "G": cut.granule, "BLOCK": block},
            config.warps,
            bytes_moved=N * V * sum(x.element_size() for x in values),
            flops=N * V * (len(terms) * _SHARE_FLOPS + _LOGIT_FLOPS),
        )
    ]
    if programs > 1:
        lanes = {"LANES": MAX_SPLITS}
        sizes = fields * N * programs
        launches.append(
            Launch(combine_kernel, (N,), arguments, constants | lanes, 1, bytes_moved=4 * sizes, flops=sizes)
        )
    return rows, launches


def backward(logits: Sum, target: Tensor, rows: Coefficients, wanted: Wanted, processors: int) -> Launch:
    """The launch of ``logits_gradients``.

    Args:
        processors: of the device; they decide over how many programs a row is split.
    """
    terms, N, V = logits.logits, target.shape[0], logits.V
    values, places = [t.values for t in terms], [i for i, gradient in enumerate(wanted) if gradient]
    gradients = [wanted[i]["values"] for i in places]
    cut = alignment(values + gradients)
    config = _first_that_fits(configs.BACKWARD, len(terms))
    block = _block(config, cut.granule)
    programs = splits(N, -(-V // block), processors, config.programs)
    moved = sum(V * x.element_size() for x in values)
    moved += sum(g.shape[2] * g.element_size() for g in gradients)
    return Launch(
        backward_kernel,
        (N, programs),
        {
            "terms": as_arguments(terms),
            "gradients": tuple(map(as_argument, gradients)),
            "target": target,
            **rows._asdict(),
            "V": V,
            "splits": programs,
        },
        term_constants(terms)
        | {
            "WANTED": tuple(places),
            "ALIGNED": cut.aligned[: len(terms)],
            "ALIGNED_OUT": cut.aligned[len(terms) :],
            "PADDED": tuple(g.shape[2] > V for g in gradients),
            "LEADER": cut.leader,
            "G": cut.granule,
            "BLOCK": block,
        },
        config.warps,
        bytes_moved=N * moved,
        flops=N * V * (len(terms) * _SHARE_FLOPS + _LOGIT_FLOPS + 2 * len(places)),
    )


def _first_that_fits(table: dict[int, configs.Config], terms: int) -> configs.Config:
    return next(config for limit, config in table.items() if terms <= limit)


def _block(config: configs.Config, granule: int) -> int:
    """Columns in a tile, where a vector holds ``granule`` of them."""
    return config.vectors * config.warps * configs.WARP * granule
