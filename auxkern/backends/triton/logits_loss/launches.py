"""From checked tensors to kernel launches: what the backend runs, and what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auxkern.backends.triton.configs import WARP, Config
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.launch import (
    MAX_SPLITS,
    Alignment,
    Launch,
    RowsArgument,
    alignment,
    as_argument,
    as_arguments,
    splits,
    term_constants,
)
from auxkern.backends.triton.logits_loss.kernels import (
    backward_kernel,
    combine_kernel,
    count_kernel,
    forward_kernel,
    fused_kernel,
)
from auxkern.backends.triton.running import TritonKernels
from auxkern.core.backend import Route
from auxkern.core.loss import Loss, RowLosses, RowSlopes
from auxkern.core.sums import Sum, Wanted

ONE_PASS = "logits, read once"
# Scale, add: per share. Maximum, difference, product, exp, add: per logit.
_SHARE_FLOPS, _LOGIT_FLOPS = 2, 5


class _Partial(NamedTuple):
    """What programs that share a row leave for ``combine_kernel``."""

    sums: Tensor  # (5 + 2 I, N, splits) float32
    best: Tensor  # (N, splits) int32


class _Slope(NamedTuple):
    """The numbers in ``RowSlopes.coefficients``."""

    kept: float  # 1 - smoothing
    smoothing: float
    uniform: float  # smoothing / V
    z_slope: float  # 2 z_loss


class LogitsLoss(TritonKernels):
    """Losses and gradients of logits that exist."""

    def logits_route(self, sum: Sum, loss: Loss) -> Route:
        reason = one_pass_refusal(sum, loss, self.gpu(sum.device))
        if reason is None:
            return Route(ONE_PASS, fused=True, mends=True)
        return Route("logits", refusals={ONE_PASS: reason})

    def counted(self, target: Tensor, ignore_index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        gpu = self.gpu(target.device)
        (number,) = self.run_plan(
            lambda: count(target, ignore_index, gpu), [target], ("count", ignore_index, gpu)
        )
        return number[0], number[1]

    def logits_losses(
        self, sum: Sum, target: Tensor, loss: Loss, weight: Tensor | None, wanted: Wanted
    ) -> RowLosses:
        gpu = self.gpu(target.device)
        inputs, facts = [target, *sum.every_tensor], (sum.facts, loss, gpu)
        if weight is None or not any(wanted):
            return self.run_plan(lambda: forward(sum, target, loss, gpu), inputs, ("forward", *facts))
        memory, names = _memory_of(wanted)
        return self.run_plan(
            lambda: fused(sum, target, loss, weight, wanted, gpu),
            [*inputs, weight, *memory],
            ("fused", *facts, names),
        )

    def logits_gradients(self, sum: Sum, target: Tensor, slopes: RowSlopes, wanted: Wanted) -> None:
        gpu = self.gpu(target.device)
        written = [] if slopes.written is None else [slopes.written]
        memory, names = _memory_of(wanted)
        self.run_plan(
            lambda: ((), [backward(sum, target, slopes, wanted, gpu)]),
            [target, *sum.every_tensor, slopes.g, *slopes.sums, *written, *memory],
            ("backward", sum.facts, slopes.loss, slopes.V, gpu, len(written), names),
        )


def _memory_of(wanted: Wanted) -> tuple[list[Tensor], Hashable]:
    """The tensors in which gradients are written, and whose they are."""
    return (
        [x for gradients in wanted for x in gradients.values()],
        tuple([tuple(gradients) for gradients in wanted]),
    )


def one_pass_refusal(logits: Sum, loss: Loss, gpu: Gpu) -> str | None:
    """Why losses and gradients are not made in one pass; None if they are.

    One pass moves R + W bytes a row, the logits and the gradients, two passes 2 R + W. But it holds up only
    while a row that is read again is still in the cache: between, the programs of the other rows in flight
    have each moved (R + W) / 2 bytes on average, R where all gradients are wanted. And its programs take
    whole rows, so that the last of them leave multiprocessors idle.
    """
    values, N = [term.values for term in logits.logits], logits.N
    if torch.version.hip is not None:
        return "the L2 cache of an AMD GPU is cut over its dies"
    if any([x.stride(2) != 1 for x in values]):
        return "the columns of a term do not lie side by side"
    row = logits.V * sum_of_sizes(values)
    share = gpu.configs.cache_share
    in_flight = gpu.multiprocessors * _fused_config(len(values), loss, gpu).programs
    if in_flight * row > share * gpu.cache_bytes:
        return (
            f"{in_flight} rows of {row:,} bytes are in flight; they take more than "
            f"{share:.0%} of a cache of {gpu.cache_bytes:,} bytes"
        )
    one, two = one_pass_bytes(N, row, in_flight), 3 * N * row
    if one >= two:
        return f"{N:,} rows leave multiprocessors idle: as if {one:,} bytes were moved in place of {two:,}"
    return None


def one_pass_bytes(N: int, row: int, in_flight: int) -> int:
    """What N rows of so many bytes cost in one pass, gradients of all terms among them.

    Rows that are missing to a full round of ``in_flight`` take as long as others.
    """
    return 2 * row * -(-N // in_flight) * in_flight


def sum_of_sizes(tensors: Sequence[Tensor]) -> int:
    """Bytes of an element of each, together."""
    return sum([x.element_size() for x in tensors])


def count(target: Tensor, ignore_index: int, gpu: Gpu) -> tuple[tuple[Tensor], list[Launch]]:
    """(2,) what ``counted`` returns, and the launch that writes it."""
    number = target.new_empty(2, dtype=torch.float32)
    N = target.shape[0]
    launch = Launch(
        count_kernel,
        (1,),
        {"target": target, "out": number, "N": N, "ignore_index": ignore_index},
        {"BLOCK": gpu.configs.count.block},
        gpu.configs.count.warps,
        bytes_moved=N * target.element_size(),
        flops=N,
    )
    return (number,), [launch]


def forward(logits: Sum, target: Tensor, loss: Loss, gpu: Gpu) -> tuple[RowLosses, list[Launch]]:
    """The launches of ``logits_losses``, in order, and the rows they fill."""
    terms, N, V = logits.logits, target.shape[0], logits.V
    values, want_smooth, want_stats = [t.values for t in terms], loss.smooth, loss.stats
    cut = alignment(values)
    config = _first_that_fits(gpu.configs.forward_stats if want_stats else gpu.configs.forward, len(terms))
    block = _block(config, cut.granule)
    programs = splits(N, -(-V // block), gpu.multiprocessors, config.programs)

    rows = RowLosses.empty(target, torch.float32, len(terms), loss)
    fields = 5 + 2 * len(terms) if want_stats else 4 if want_smooth else 2
    shared = (N, programs) if programs > 1 else (0, 0)
    arguments = {
        "terms": as_arguments(terms),
        "target": target,
        "out": RowsArgument(*rows),
        "partial": _Partial(
            sums=target.new_empty((fields, *shared), dtype=torch.float32),
            best=target.new_empty(shared if want_stats else 0, dtype=torch.int32),
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
            bytes_moved=N * V * sum_of_sizes(values),
            flops=N * V * (len(terms) * _SHARE_FLOPS + _LOGIT_FLOPS),
        )
    ]
    if programs > 1:
        lanes = {"G": cut.granule, "LANES": MAX_SPLITS}
        sizes = fields * N * programs
        launches.append(
            Launch(combine_kernel, (N,), arguments, constants | lanes, 1, bytes_moved=4 * sizes, flops=sizes)
        )
    return rows, launches


def backward(logits: Sum, target: Tensor, slopes: RowSlopes, wanted: Wanted, gpu: Gpu) -> Launch:
    """The launch of ``logits_gradients``."""
    streams, N, V = _Streams.of(logits, wanted), target.shape[0], logits.V
    config = _first_that_fits(gpu.configs.backward, len(logits.logits))
    block = _block(config, streams.cut.granule)
    programs = splits(N, -(-V // block), gpu.multiprocessors, config.programs)
    g, ready = slopes.g.float(), slopes.written is not None
    written = g if slopes.written is None else slopes.written.float()
    sums = {name: x.float().contiguous() for name, x in slopes.sums._asdict().items()}
    return Launch(
        backward_kernel,
        (N, programs),
        {
            **streams.arguments,
            "target": target,
            "g": g,
            "g_step": g.stride(0),
            "written": written,
            "written_step": written.stride(0),
            **sums,
            "slope": _slope(slopes.loss, slopes.V),
            "V": V,
            "ignore_index": slopes.loss.ignore_index,
            "splits": programs,
        },
        streams.constants | {"READY": ready, "BLOCK": block},
        config.warps,
        bytes_moved=N * streams.row_bytes,
        flops=N * V * streams.flops,
    )


def fused(
    logits: Sum, target: Tensor, loss: Loss, weight: Tensor, wanted: Wanted, gpu: Gpu
) -> tuple[RowLosses, list[Launch]]:
    """The launch of ``logits_losses`` that writes gradients, and the rows it fills.

    Args:
        weight: (N,) the gradient of the rows' losses that is expected.
    """
    streams, N, V = _Streams.of(logits, wanted), target.shape[0], logits.V
    config, weight = _fused_config(len(logits.logits), loss, gpu), weight.float()
    rows = RowLosses.empty(target, torch.float32, len(logits.logits), loss)
    launch = Launch(
        fused_kernel,
        (min(N, gpu.multiprocessors * config.programs),),
        {
            **streams.arguments,
            "target": target,
            "weight": weight,
            "weight_step": weight.stride(0),
            "out": RowsArgument(*rows),
            "slope": _slope(loss, V),
            "N": N,
            "V": V,
            "ignore_index": loss.ignore_index,
        },
        streams.constants
        | {"SMOOTH": loss.smooth, "STATS": loss.stats, "BLOCK": _block(config, streams.cut.granule)},
        config.warps,
        bytes_moved=N * streams.row_bytes,
        flops=N * V * (streams.flops + len(logits.logits) * _SHARE_FLOPS + _LOGIT_FLOPS),
        registers=config.registers,
    )
    return rows, [launch]


def _fused_config(terms: int, loss: Loss, gpu: Gpu) -> Config:
    return _first_that_fits(gpu.configs.fused_stats if loss.stats else gpu.configs.fused, terms)


class _Streams(NamedTuple):
    """The terms that a kernel reads and the gradients that it writes.

    Attributes:
        cut: where rows are cut.
        arguments, constants: of the kernel.
        row_bytes: of a row, each logit read once and each gradient written once.
        flops: of a column's gradients.
    """

    cut: Alignment
    arguments: dict[str, object]
    constants: dict[str, Any]
    row_bytes: int
    flops: int

    @classmethod
    def of(cls, logits: Sum, wanted: Wanted) -> _Streams:
        """For gradients that go where ``wanted`` says."""
        terms, V = logits.logits, logits.V
        values, places = [t.values for t in terms], [i for i, gradient in enumerate(wanted) if gradient]
        gradients = [wanted[i]["values"] for i in places]
        cut = alignment(values + gradients)
        constants = {
            "WANTED": tuple(places),
            "ALIGNED": cut.aligned[: len(terms)],
            "ALIGNED_OUT": cut.aligned[len(terms) :],
            "PADDED": tuple(g.shape[2] > V for g in gradients),
            "LEADER": cut.leader,
            "G": cut.granule,
        }
        return cls(
            cut,
            {"terms": as_arguments(terms), "gradients": tuple(map(as_argument, gradients))},
            term_constants(terms) | constants,
            V * sum_of_sizes(values) + sum(g.shape[2] * g.element_size() for g in gradients),
            len(terms) * _SHARE_FLOPS + _LOGIT_FLOPS + 2 * len(places),
        )


def _slope(loss: Loss, V: int) -> _Slope:
    s = loss.label_smoothing
    return _Slope(1.0 - s, float(s), s / V, 2.0 * loss.z_loss)


def _first_that_fits(table: Mapping[int, Config], terms: int) -> Config:
    return next(config for limit, config in table.items() if terms <= limit)


def _block(config: Config, granule: int) -> int:
    """Columns in a tile, where a vector holds ``granule`` of them."""
    return config.vectors * config.warps * WARP * granule
