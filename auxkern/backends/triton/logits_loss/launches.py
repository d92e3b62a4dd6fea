"""From checked tensors to kernel launches: what dispatch runs, and what is compiled ahead of time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from auxkern.backends.triton import configs
from auxkern.backends.triton.device.rows import alignment, as_term
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_loss.kernels import backward_kernel, combine_kernel, forward_kernel
from auxkern.backends.triton.losses import Coefficients, loss_rows
from auxkern.backends.triton.sums import LogitsSum, as_terms, term_constants
from auxkern.ops.registry import Rows

# Scale, add: per share. Maximum, difference, product, exp, add: per logit.
_SHARE_FLOPS, _LOGIT_FLOPS = 2, 5


class _Partial(NamedTuple):
    """What programs that share a row leave for ``combine_kernel``."""

    sums: Tensor  # (4 + 2 I, N, splits) float32
    best: Tensor  # (2, N, splits) int32


def forward(
    logits: LogitsSum,
    target: Tensor,
    ignore_index: int,
    want_smooth: bool,
    want_stats: bool,
    multiprocessors: int,
) -> tuple[Rows, list[Launch]]:
    """The launches of ``Backend.cross_entropy_forward``, in order, and the rows they fill.

    Args:
        multiprocessors: of the device; decides over how many programs a row is split.
    """
    N, terms, V = target.shape[0], len(logits.values), logits.vocab_size
    cut = alignment(logits.values)
    config = configs.forward(terms, want_stats)
    block = config.block(cut.granule)
    splits = configs.splits(N, -(-V // block), multiprocessors, config)

    out = loss_rows(target, terms, want_smooth, want_stats)
    fields = 4 + 2 * terms if want_stats else 4 if want_smooth else 2
    shared = (N, splits) if splits > 1 else (0, 0)
    arguments = {
        "terms": as_terms(logits),
        "target": target,
        "out": out,
        "partial": _Partial(
            sums=target.new_empty((fields, *shared), dtype=torch.float32),
            best=target.new_empty((2 if want_stats else 0, *shared), dtype=torch.int32),
        ),
        "N": N,
        "V": V,
        "ignore_index": ignore_index,
        "splits": splits,
    }
    constants = term_constants(logits) | {"SMOOTH": want_smooth, "STATS": want_stats}
    launches = [
        Launch(
            forward_kernel,
            (N, splits),
            arguments,
            constants | {"ALIGNED": cut.aligned, "LEADER": cut.leader, "G": cut.granule, "BLOCK": block},
            config.warps,
            bytes_moved=N * V * sum(x.element_size() for x in logits.values),
            flops=N * V * (terms * _SHARE_FLOPS + _LOGIT_FLOPS),
        )
    ]
    if splits > 1:
        lanes = {"LANES": configs.MAX_SPLITS}
        sizes = fields * N * splits
        launches.append(
            Launch(combine_kernel, (N,), arguments, constants | lanes, 1, bytes_moved=4 * sizes, flops=sizes)
        )
    return Rows(*out), launches


def backward(
    logits: LogitsSum, target: Tensor, coefficients: Coefficients, wanted: list[int], multiprocessors: int
) -> tuple[list[Tensor], Launch]:
    """The launch of ``Backend.cross_entropy_backward`` and the gradients it fills.

    Args:
        multiprocessors: of the device; decides over how many programs a row is split.
    """
    values, V = logits.values, logits.vocab_size
    N, terms = target.shape[0], len(values)
    gradients = [values[i].new_empty(values[i].shape) for i in wanted]
    cut = alignment(values + gradients)
    config = configs.backward(terms)
    block = config.block(cut.granule)
    splits = configs.splits(N, -(-V // block), multiprocessors, config)
    moved = sum(V * x.element_size() for x in values)
    moved += sum(g.shape[2] * g.element_size() for g in gradients)
    launch = Launch(
        backward_kernel,
        (N, splits),
        {
            "terms": as_terms(logits),
            "gradients": tuple(map(as_term, gradients)),
            "target": target,
            **coefficients._asdict(),
            "V": V,
            "splits": splits,
        },
        term_constants(logits)
        | {
            "WANTED": tuple(wanted),
            "ALIGNED": cut.aligned[:terms],
            "ALIGNED_OUT": cut.aligned[terms:],
            "PADDED": tuple(g.shape[2] > V for g in gradients),
            "LEADER": cut.leader,
            "G": cut.granule,
            "BLOCK": block,
        },
        config.warps,
        bytes_moved=N * moved,
        flops=N * V * (terms * _SHARE_FLOPS + _LOGIT_FLOPS + 2 * len(wanted)),
    )
    return gradients, launch
