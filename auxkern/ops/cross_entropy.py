"""Cross-entropy of a sum of logit terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from auxkern.backends.choice import backend_of
from auxkern.core.loss import Loss
from auxkern.core.memory import GradientMemory
from auxkern.core.sums import (
    check_sparse_terms,
    check_target_range,
    checked_vocabulary,
    first_name,
    flat_rows,
    layout_of,
    one_device,
    row_dtype,
    tensors_of,
)
from auxkern.core.terms import INTEGER_DTYPES, Sparse, Term, Terms, as_number, as_terms, has_dtensors
from auxkern.ops.dense import dense_rows
from auxkern.ops.parallel.agreement import fingerprint
from auxkern.ops.parallel.cross_entropy import rows_over_ranks
from auxkern.ops.parallel.share import Share
from auxkern.ops.parallel.vocabulary import CutVocabulary, VocabularyShard, group_of
from auxkern.ops.torch_ops import (
    Expected,
    is_transformed,
    loss_rows,
    refuse_transforms,
    rows_that_count,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_Value = TypeVar("_Value")

REDUCTIONS = ("none", "mean", "sum")


class CrossEntropyStats(NamedTuple):
    """Per-row figures of one ``cross_entropy`` call, detached; shaped like ``target``.

    They describe the plain nll, before label smoothing, weights and reduction. Ignored rows
    hold 0 (argmax -1). With ``shift=True`` position t describes the prediction of token t + 1.

    Attributes:
        nll: (...) float32, ``lse - z[target]`` in nats.
        lse: (...) float32, ``logsumexp_v z[v]``.
        argmax: (...) int64, lowest id among the largest logits.
        z_loss: (...) float32, ``z_loss * lse**2``, what the option added to the row's loss.
        term_nll: (I, ...) float32, nll of the target under ``softmax`` of each term alone
            (with its scale and softcap): what the LM alone and the auxiliary alone gave it.
    """

    nll: Tensor
    lse: Tensor
    argmax: Tensor
    z_loss: Tensor
    term_nll: Tensor


class _Problem(NamedTuple):
    """A checked call: everything resolved that a backend need not know about."""

    terms: list[Term]
    target: Tensor  # (N,) int64, shifted if asked
    token_weight: Tensor | None  # (N,) float32 or float64, shifted if asked
    shape: torch.Size  # of the target as given
    vocab_size: int | None  # checked; None for all ids
    backend: str
    transformed: bool = False  # forward mode or a transform of torch.func follows a tensor


def cross_entropy(
    terms: Sequence[Term | Tensor] | Term | Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = False,
    vocab_size: int | None = None,
    return_stats: bool = False,
    chunk_rows: int | None = None,
    gradient_memory: GradientMemory | None = None,
    process_group: ProcessGroup | DeviceMesh | VocabularyShard | None = None,
    backend: str | None = None,
) -> Any:  # by return_stats a tensor or a pair: overloads would say all else three times
    """Cross-entropy of a sum of logit terms, without materialising the sum.

        z[n, v] = sum of the terms, see ``auxkern.core.terms``
        nll[n]  = logsumexp_v z[n, v] - z[n, target[n]]               (Zeldes et al. 2020, eq. 1)
        row[n]  = (1 - label_smoothing) * nll[n]
                + label_smoothing * mean_v (logsumexp z[n] - z[n, v])     (Szegedy et al. 2016)
                + z_loss * logsumexp_v(z[n, v])**2                     (Chowdhery et al. 2022)

    Logits are summed in float32, float64 if any of them is float64. A gradient is computed, and
    its memory taken, only for terms that require one. Inputs are never written to. Under forward mode
    and transforms of ``torch.func`` (jvp, jacfwd, grad, vmap, ...) the logits (N, V) are written, and
    torch's own functions make the loss: right in every mode, but slow; a target outside [0, V) is NaN.

    Args:
        terms: 1 to 8 ``Logits``, ``Head``, ``Sparse`` or bare tensors (..., V) with equal leading
            dimensions, on one device; dtypes may differ. Strides of logits are honoured; nothing
            of their size is copied. With heads, the logits exist for a chunk of rows at a time.
        target: (...) integer ids in [0, V), or ``ignore_index``.
        ignore_index: rows with this target add nothing to the loss and get zero gradient.
        reduction: "mean" (over rows that are not ignored, weighted by ``token_weight``), "sum"
            or "none".
        normalizer: positive number, or 0-d tensor on the terms' device or a CPU, that divides the
            summed loss instead of the number of rows (Hugging Face's ``num_items_in_batch``); not
            with reduction="none". If no row counts, the loss is 0 whatever it is; otherwise a tensor,
            which is not looked at, divides as it does in torch: by 0 to inf, or 0 / 0 to NaN.
        token_weight: (...) floating-point weight of each row's loss.
        label_smoothing: in [0, 1]; the share of the uniform distribution over the V ids.
        z_loss: weight of ``lse**2``; reported apart in the stats.
        shift: the causal shift: position t is scored against target t + 1 of the last leading
            dimension, the last position is ignored. Nothing of the size of the logits is copied.
        vocab_size: use ids [0, vocab_size) only; needed when terms are padded differently.
        chunk_rows: with heads, rows whose logits exist at a time: the call needs chunk_rows * V * 4
            bytes, times the number of terms with ``return_stats``, beside its results. Default:
            on a CPU 16 MiB of logits, but 64 rows at least (48 MiB where the library makes the
            products, see docs/loss.md), on a GPU 512 MiB.
        gradient_memory: a ``GradientMemory`` that a training loop passes to every call, so that the
            gradients of logits on a CPU use the same memory again.
        return_stats: also return a ``CrossEntropyStats``, from the same pass.
        process_group: where logits, weights and biases are cut over the vocabulary: the
            ``ProcessGroup``, ``DeviceMesh`` of one dimension or ``VocabularyShard`` of the ranks that have
            the parts, in the order of the ranks. DTensors with a shard of the vocabulary tell it
            themselves if their mesh dimension is called "tp"; FSDP2's parameters are no vocabulary shards.
            Everything else is the same on all ranks, targets and sparse ids from 0 to V; so is what comes
            back. What one rank refuses, or ranks have differently, raises on all of them. Gradients of
            what is cut are cut alike, those of hidden states and sparse values whole on every rank. A call
            exchanges a few numbers a row, and backward the gradients of hidden states; making the
            ``VocabularyShard`` once saves another exchange. ``gradient_memory`` takes no part.
        backend: "triton", "cpu", "reference", or None to choose (see ``auxkern.explain``).

    Returns:
        0-d float32 loss (float64 if any term is), or (...) for reduction="none"; 0, still
        connected to the graph, if every row is ignored. With ``return_stats`` a pair of it and
        a ``CrossEntropyStats``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or vocabularies disagree, an option is out of range, or (CPU
            tensors only; elsewhere the check would stop the device, and the row's loss and
            gradient are NaN) a target lies outside [0, V); or a DTensor is placed in another way.
        RuntimeError: the backend asked for cannot run on these inputs; or a derivative is asked for that
            there is none of: a second one by ``create_graph``, a transform with a named backend or a group.
    """
    ignore_index, label_smoothing, z_loss = _number(ignore_index), _number(label_smoothing), _number(z_loss)
    shift, vocab_size, chunk_rows = _number(shift), _number(vocab_size), _number(chunk_rows)
    normalizer = _number(normalizer)
    group = None
    if process_group is not None or has_dtensors(terms):
        group = group_of(process_group, terms)

    def checked(terms: list[Term], vocab_size: int | None) -> _Problem:
        given = (*tensors_of(terms), target, token_weight, normalizer)
        transformed = is_transformed(given)
        if transformed and (group is not None or backend not in (None, "reference")):
            refuse_transforms("a process_group" if group is not None else f"backend={backend!r}")
        _check_options(reduction, normalizer, label_smoothing, z_loss, ignore_index, chunk_rows)
        _check_memory(gradient_memory)
        problem = _check(terms, target, token_weight, normalizer, ignore_index, shift, vocab_size, backend)
        return problem._replace(transformed=True) if transformed else problem

    loss = Loss(ignore_index, label_smoothing, z_loss, return_stats)
    if group is None:
        problem = checked(as_terms(terms), vocab_size)
        weight, denominator, share = _weighting(problem, ignore_index, reduction, normalizer)
        if problem.transformed:
            rows = dense_rows(problem.terms, problem.target, vocab_size, loss)
        else:
            gradient = _expected_gradient(problem, weight, share, reduction)
            expected = None if gradient is None else Expected(gradient, gradient_memory)
            call = (loss, chunk_rows, problem.vocab_size, problem.backend)
            rows = loss_rows(problem.terms, problem.target, expected, *call)
    else:
        facts = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "return_stats": return_stats,
            "reduction": reduction,
            "shift": shift,
            "normalizer": type(normalizer).__name__,
        }
        cut = CutVocabulary(group, process_group, vocab_size)
        problem, shard, V = _agreed(cut, terms, checked, facts, ignore_index)
        weight, denominator, _ = _weighting(problem, ignore_index, reduction, normalizer)
        part = Share(layout_of(problem.terms), shard, V, chunk_rows, problem.backend)
        rows = rows_over_ranks(part, tensors_of(problem.terms), problem.target, loss)
    row, nll, lse, argmax, term_nll = rows
    result = row if weight is None else row * weight
    if reduction == "none":
        result = result.view(problem.shape)
    else:
        result = result.sum() if denominator is None else result.sum() / denominator
    if not return_stats:
        return result
    shape = problem.shape
    stats = CrossEntropyStats(
        nll=nll.view(shape),
        lse=lse.view(shape),
        argmax=argmax.view(shape),
        z_loss=(z_loss * lse.square()).view(shape),
        term_nll=term_nll.view(len(problem.terms), *shape),
    )
    return result, stats


def _number(value: _Value) -> _Value:
    """A Python number in place of NumPy's; a tensor, which may want a gradient, stays one."""
    return value if isinstance(value, Tensor) else as_number(value)


def _agreed(
    cut: CutVocabulary,
    terms: Terms,
    checked: Callable[[list[Term], int | None], _Problem],
    facts: dict[str, object],
    ignore_index: int,
) -> tuple[_Problem, VocabularyShard, int]:
    """The call as every rank of a group has checked it, this rank's shard, and V over all ranks."""

    def local(terms: list[Term]) -> tuple[_Problem, dict[str, object]]:
        problem = checked(terms, None)
        weighted = problem.token_weight is not None
        return problem, {**facts, "target": fingerprint(problem.target), "token_weight": weighted}

    def within(problem: _Problem, V: int) -> _Problem:
        if problem.target.device.type == "cpu":
            check_target_range(problem.target, V, ignore_index)
            check_sparse_terms(problem.terms, V)
        return problem

    return cut.agreed(terms, local, within)


def _check_memory(gradient_memory: object) -> None:
    if gradient_memory is not None and not isinstance(gradient_memory, GradientMemory):
        raise TypeError(
            f"gradient_memory must be an auxkern.GradientMemory, got {type(gradient_memory).__name__}"
        )


def _check_options(
    reduction: str,
    normalizer: float | Tensor | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    chunk_rows: int | None,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; choose one of {', '.join(map(repr, REDUCTIONS))}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index}, which no int64 target can hold")
    for name, value, upper in (("label_smoothing", label_smoothing, 1.0), ("z_loss", z_loss, math.inf)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not (0 <= value <= upper and value < math.inf):
            bound = f"in [0, {upper:g}]" if upper < math.inf else "finite and not negative"
            raise ValueError(f"{name} is {value}; it must be {bound}")
    if chunk_rows is not None:
        if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
            raise TypeError(f"chunk_rows must be an int, got {type(chunk_rows).__name__}")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows is {chunk_rows}; it must be at least 1, or None for the default")
    if normalizer is None:
        return
    if reduction == "none":
        raise ValueError('normalizer divides a summed loss; use it with reduction="mean" or "sum"')
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}; pass a number or a 0-d tensor")
    elif isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise TypeError(f"normalizer must be a number or a 0-d tensor, got {type(normalizer).__name__}")
    elif not (0 < normalizer < math.inf):
        raise ValueError(f"normalizer is {normalizer}; it must be positive and finite")


def _check(
    terms: list[Term],
    target: object,
    token_weight: object,
    normalizer: float | Tensor | None,
    ignore_index: int,
    shift: bool,
    vocab_size: int | None,
    backend: str | None,
) -> _Problem:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor of ids, got {type(target).__name__}")
    if target.dtype not in INTEGER_DTYPES:
        raise TypeError(f"target has dtype {target.dtype}; ids must be integers (torch.int64)")
    device = one_device(terms)
    for index, term in enumerate(terms):
        if not isinstance(term, Sparse) and isinstance(term.scale, Tensor):
            raise TypeError(
                f"terms[{index}].scale is a tensor; pass a Python float. A scale for each row is for "
                "auxkern.sample; to learn one, multiply the values by it before they become a term"
            )
    for index, term in enumerate(terms):
        if term.leading != target.shape:
            name, tensor = next(iter(term.tensors.items()))
            raise ValueError(
                f"terms[{index}].{name} has shape {tuple(tensor.shape)}, so target must have shape "
                f"{tuple(term.leading)}, but it has {tuple(target.shape)}; reshape one of them"
            )
    if target.device != device:
        raise ValueError(
            f"target is on {target.device} but {first_name(terms)} is on {device}; move it there"
        )
    if isinstance(normalizer, Tensor) and normalizer.device not in (device, torch.device("cpu")):
        raise ValueError(
            f"normalizer is on {normalizer.device} but {first_name(terms)} is on {device}; move it there"
        )
    if not isinstance(shift, bool):
        raise TypeError(f"shift must be a bool, got {type(shift).__name__}")
    if shift and target.dim() == 0:
        raise ValueError("shift=True needs a position dimension; target is 0-d")
    shape = target.shape
    weight = _checked_weight(token_weight, target, terms)
    rows = target
    if shift:
        rows = _shifted(rows.to(torch.int64), ignore_index)
        weight = None if weight is None else _shifted(weight, 0.0)
    return _Problem(
        terms=terms,
        target=flat_rows(rows, torch.int64),
        token_weight=None if weight is None else weight.reshape(-1),
        shape=shape,
        vocab_size=checked_vocabulary(terms, vocab_size),
        backend=_chosen(backend, terms),
    )


def _chosen(backend: str | None, terms: list[Term]) -> str:
    """The name of the backend to run; under torch.compile the name as asked for, "" for any.

    A graph holds no imports: the operators in it choose when they run.
    """
    return backend or "" if torch.compiler.is_compiling() else backend_of(backend, tensors_of(terms)).name


def _checked_weight(token_weight: object, target: Tensor, terms: list[Term]) -> Tensor | None:
    if token_weight is None:
        return None
    if not isinstance(token_weight, Tensor) or not token_weight.is_floating_point():
        kind = token_weight.dtype if isinstance(token_weight, Tensor) else type(token_weight).__name__
        raise TypeError(f"token_weight must be a floating-point tensor, got {kind}")
    if token_weight.shape != target.shape:
        raise ValueError(
            f"token_weight has shape {tuple(token_weight.shape)} but target has {tuple(target.shape)}; "
            "give each target one weight"
        )
    if token_weight.device != target.device:
        raise ValueError(
            f"token_weight is on {token_weight.device} but target is on {target.device}; move it there"
        )
    return token_weight.to(row_dtype(tensors_of(terms)))


def _shifted(rows: Tensor, fill: float) -> Tensor:
    """(..., T): entry t holds entry t + 1, the last holds ``fill``."""
    return torch.cat([rows[..., 1:], torch.full_like(rows[..., :1], fill)], dim=-1)


class _Weighting(NamedTuple):
    """How rows become a loss: ``sum of weight * row / denominator``."""

    weight: Tensor | None  # (N,), None for 1
    denominator: float | Tensor | None  # None for 1
    share: Callable[[], Tensor]  # 0-d, 1 / denominator as autograd makes it


def _weighting(
    problem: _Problem, ignore_index: int, reduction: str, normalizer: float | Tensor | None
) -> _Weighting:
    weight, target = problem.token_weight, problem.target
    dtype = row_dtype(tensors_of(problem.terms))

    def one() -> Tensor:
        return torch.ones((), dtype=dtype, device=target.device)

    if weight is not None:
        # An ignored row's weight is not read: a NaN there must not reach the loss.
        weight = torch.where(target != ignore_index, weight, 0.0)
    if normalizer is None:
        if reduction != "mean":
            return _Weighting(weight, None, one)
        if weight is None:
            call = (target, ignore_index, dtype, problem.backend, problem.transformed)
            number, reciprocal = rows_that_count(*call)
            return _Weighting(None, number, lambda: reciprocal)
        normalizer = weight.sum()
    if not isinstance(normalizer, Tensor):
        divisor = float(normalizer)
        return _Weighting(weight, divisor, lambda: one() / divisor)
    counts = target != ignore_index if weight is None else weight != 0
    # Where no row counts the sum is 0, and 0 / 0 would turn "nothing" into NaN.
    denominator = torch.where(counts.any(), normalizer.to(target.device, dtype), 1.0)
    return _Weighting(weight, denominator, lambda: one() / denominator)


def _expected_gradient(
    problem: _Problem, weight: Tensor | None, share: Callable[[], Tensor], reduction: str
) -> Callable[[], Tensor] | None:
    """Makes the (N,) d loss / d row, to the last bit what autograd will bring if the loss is the root.

    None where no gradient will come or none can be foreseen, or a graph would be broken. What comes is always
    a multiple of it.
    """
    tensors = tensors_of(problem.terms)
    if (
        reduction == "none"
        or torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or not any(t.requires_grad for t in tensors)
    ):
        return None

    def gradient() -> Tensor:
        each = share().detach().expand(problem.target.shape)
        return each if weight is None else each * weight.detach()

    return gradient
