"""From checked tensors to kernel launches: what dispatch runs, and what is compiled ahead of time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from auxkern.backends.triton import configs
from auxkern.backends.triton.device.rows import alignment, as_term
from auxkern.backends.triton.launch import Launch
from auxkern.backends.triton.logits_loss.kernels import backward_kernel, combine_kernel, forward_kernel
from auxkern.ops.registry import Rows

# Scale, add: per share. Maximum, difference, product, exp, add: per logit.
_SHARE_FLOPS, _LOGIT_FLOPS = 2, 5


class _Out(NamedTuple):
    """``registry.Rows`` as a kernel takes it."""

    nll: Tensor
    row_max: Tensor
    log_sum: Tensor
    smooth: Tensor
    argmax: Tensor
    term_nll: Tensor


class _Partial(NamedTuple):
    """What programs that share a row leave for ``combine_kernel``."""

    sums: Tensor  # (4 + 2 I, N, splits) float32
    best: Tensor  # (2, N, splits) int32


def forward(
    values: list[Tensor],
    target: Tensor,
    scales: list[float],
    softcaps: list[float],
    vocab_size: int,
    ignore_index: int,
    want_smooth: bool,
    want_stats: bool,
    multiprocessors: int,
) -> tuple[Rows, list[Launch]]:
    """The launches of ``Backend.cross_entropy_forward``, in order, and the rows they fill.

    Args:
        multiprocessors: of the device; decides over how many programs a row is split.
    """
    N, terms = target.shape[0], len(values)
    cut = alignment(values)
    config = configs.forward(terms, want_stats)
    block = config.block(cut.granule)
    splits = configs.splits(N, -(-vocab_size // block), multiprocessors, config)

    out = _Out(
        nll=target.new_empty(N, dtype=torch.float32),
        row_max=target.new_empty(N, dtype=torch.float32),
        log_sum=target.new_empty(N, dtype=torch.float32),
        smooth=target.new_empty(N if want_smooth else 0, dtype=torch.float32),
        argmax=target.new_empty(N if want_stats else 0),
        term_nll=target.new_empty((terms, N) if want_stats else (0, 0), dtype=torch.float32),
    )
    fields = 4 + 2 * terms if want_stats else 4 if want_smooth else 2
    shared = (N, splits) if splits > 1 else (0, 0)
    arguments = {
        "terms": tuple(map(as_term, values, scales, softcaps)),
        "target": target,
        "out": out,
        "partial": _Partial(
            sums=target.new_empty((fields, *shared), dtype=torch.float32),
            best=target.new_empty((2 if want_stats else 0, *shared), dtype=torch.int32),
        ),
        "N": N,
        "V": vocab_size,
        "ignore_index": ignore_index,
        "splits": splits,
    }
    constants = {
        "UNIT": tuple(x.stride(2) == 1 for x in values),
        "CAPPED": tuple(softcap > 0 for softcap in softcaps),
        "SMOOTH": want_smooth,
        "STATS": want_stats,
    }
    launches = [
        Launch(
            forward_kernel,
            (N, splits),
            arguments,
            constants | {"ALIGNED": cut.aligned, "LEADER": cut.leader, "G": cut.granule, "BLOCK": block},
            config.warps,
            bytes_moved=N * vocab_size * sum(x.element_size() for x in values),
            flops=N * vocab_size * (terms * _SHARE_FLOPS + _LOGIT_FLOPS),
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
    values: list[Tensor],
    target: Tensor,
    row_max: Tensor,
    exp_coefficient: Tensor,
    constant: Tensor,
    target_gradient: Tensor,
    scales: list[float],
    softcaps: list[float],
    vocab_size: int,
    wanted: list[int],
    multiprocessors: int,
) -> tuple[list[Tensor], Launch]:
    """The launch of ``Backend.cross_entropy_backward`` and the gradients it fills.

    Args:
        multiprocessors: of the device; decides over how many programs a row is split.
    """
    N, terms = target.shape[0], len(values)
    gradients = [values[i].new_empty(values[i].shape) for i in wanted]
    cut = alignment(values + gradients)
    config = configs.backward(terms)
    block = config.block(cut.granule)
    splits = configs.splits(N, -(-vocab_size // block), multiprocessors, config)
    arguments = {
        "terms": tuple(map(as_term, values, scales, softcaps)),
        "gradients": tuple(map(as_term, gradients)),
        "target": target,
        "row_max": row_max,
        "exp_coefficient": exp_coefficient,
        "constant": constant,
        "target_gradient": target_gradient,
        "V": vocab_size,
        "splits": splits,
    }
    constants = {
        "WANTED": tuple(wanted),
        "ALIGNED": cut.aligned[:terms],
        "ALIGNED_OUT": cut.aligned[terms:],
        "PADDED": tuple(g.shape[2] > vocab_size for g in gradients),
        "UNIT": tuple(x.stride(2) == 1 for x in values),
        "CAPPED": tuple(softcap > 0 for softcap in softcaps),
        "LEADER": cut.leader,
        "G": cut.granule,
        "BLOCK": block,
    }
    moved = sum(vocab_size * x.element_size() for x in values)
    moved += sum(g.shape[2] * g.element_size() for g in gradients)
    launch = Launch(
        backward_kernel,
        (N, splits),
        arguments,
        constants,
        config.warps,
        bytes_moved=N * moved,
        flops=N * vocab_size * (terms * _SHARE_FLOPS + _LOGIT_FLOPS + 2 * len(wanted)),
    )
    return gradients, launch
