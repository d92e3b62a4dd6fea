"""Between operators and torch: how one is declared, autocast, derivatives, the loss's Function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from auxkern.backends.choice import backend_of, load
from auxkern.core.backend import Backend
from auxkern.core.loss import Loss, RowLosses, RowSlopes, RowSums
from auxkern.core.memory import GradientMemory
from auxkern.core.sums import (
    Layout,
    Sum,
    empty,
    layout_of,
    look_at_ids,
    row_dtype,
    tensors_of,
    vocabulary_of,
)
from auxkern.core.terms import Logits, Term

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def apart_from_autocast(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``function`` with autocast off for the device of its first tensor; a term or list may hold it."""

    @functools.wraps(function)
    def apart(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        tensor = _first_tensor(arguments)
        kind = "meta" if tensor is None else tensor.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(*arguments, **options)
        with torch.autocast(kind, enabled=False):
            return function(*arguments, **options)

    return apart


def operator(
    schema: str, fake: Callable[..., _Result]
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Makes a function the ``torch.library`` operator of a schema, on every device.

    A kernel runs under the autocast of whoever calls the operator, which would round the products in it;
    so it is put apart. Autograd Functions call operators with gradients off. Where one is reached with
    gradients on, as by ``torch.func.grad`` in compiled code, torch would take its results for constants:
    to ask for a derivative there is an error.

    What comes back calls the operator where a graph, a mode, a subclass of tensors or the profiler has to see
    it, and else the function itself: torch's dispatcher would cost a small call half as much again.

    Args:
        schema: name, arguments and results, without the namespace.
        fake: makes results without memory from the same arguments.
    """

    def declare(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        name, parenthesis, rest = schema.partition("(")
        qualified = f"auxkern::{name}"
        torch.library.define(qualified, parenthesis + rest)
        apart = apart_from_autocast(function)
        torch.library.impl(qualified, "default")(apart)
        torch.library.register_fake(qualified)(fake)
        torch.library.register_autograd(qualified, functools.partial(_refuse, qualified))
        dispatched = getattr(torch.ops.auxkern, name)

        @functools.wraps(function)
        def call(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
            if not _is_seen((*arguments, *options.values())):
                return apart(*arguments, **options)
            result: _Result = dispatched(*arguments, **options)
            return result

        return call

    return declare


def _is_seen(arguments: Iterable[object]) -> bool:
    """Whether something has to see a call as one operator."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd._profiler_enabled()
    ):
        return True
    return _dispatches(arguments)


def _dispatches(arguments: Iterable[object]) -> bool:
    for x in arguments:
        kind = type(x)
        if kind is list:
            if _dispatches(cast("list[object]", x)):
                return True
        elif kind is Tensor or kind is torch.nn.Parameter:
            tensor = cast(Tensor, x)
            if tensor.is_meta or tensor.is_neg():
                return True
        elif isinstance(x, Tensor) and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return True
    return False


def _refuse(name: str, *_: object) -> NoReturn:
    raise RuntimeError(
        f"the operator {name} has no derivative; auxkern's own functions have, but for transforms "
        "of torch.func in compiled code; there use torch's functions on auxkern.ops.dense.dense_logits(terms)"
    )


def _first_tensor(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    for x in value if isinstance(value, (tuple, list)) else getattr(value, "tensors", {}).values():
        first = _first_tensor(x)
        if first is not None:
            return first
    return None


def is_transformed(values: Iterable[object]) -> bool:
    """Whether forward mode or a transform of ``torch.func`` (jvp, grad, vmap, ...) follows a tensor of these.

    ``requires_grad`` tells neither; a kernel that reads the memory would drop tangents without a word.
    """
    compiling = torch.compiler.is_compiling()
    if (
        not compiling
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
    ):
        return False  # none goes on
    # torch.compile, which cannot trace the first question, resolves the transforms itself.
    return any(
        (not compiling and torch._C._functorch.is_functorch_wrapped_tensor(x))
        or forward_ad.unpack_dual(x).tangent is not None
        for x in values
        if isinstance(x, Tensor)
    )


def is_differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a derivative of any order or mode may be asked with respect to one of these."""
    given = [t for t in tensors if t is not None]
    return (torch.is_grad_enabled() and any(t.requires_grad for t in given)) or is_transformed(given)


def refuse_transforms(what: str) -> None:
    """Raises RuntimeError for what takes no transform.

    Args:
        what: the argument that is in the way.
    """
    raise RuntimeError(
        f"{what} takes no forward mode and no transforms of torch.func (jvp, jacfwd, grad, vmap, ...); "
        "leave it out, or use torch.nn.functional.cross_entropy on auxkern.ops.dense.dense_logits(terms)"
    )


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient made with ``create_graph=True``: differentiating it again is an error.

    torch's ``once_differentiable`` raises only if the incoming gradient requires one; otherwise a
    penalty on this gradient would take it for a constant and train on a wrong derivative.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(
            "auxkern.cross_entropy has no second derivatives; for a penalty on its gradient use "
            "torch.nn.functional.cross_entropy on auxkern.ops.dense.dense_logits(terms)"
        )


def refuse_second_derivatives(
    gradients: tuple[Tensor | None, ...], inputs: Iterable[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients as they are, but differentiating them again, under ``create_graph``, is an error.

    torch.compile refuses second derivatives itself, and traces a backward under enabled gradients.

    Args:
        inputs: all that the gradients depend on, the incoming gradient among them.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    once: Callable[..., Tensor] = _OnceDifferentiable.apply
    return tuple(None if d is None else once(d, *inputs) for d in gradients)


class _Call(NamedTuple):
    """What an operator is told of a call beside tensors and V."""

    layout: Layout
    loss: Loss
    chunk_rows: int | None


def _encoded(terms: Sequence[Term], loss: Loss, chunk_rows: int | None) -> tuple[list[int], list[float]]:
    """A ``_Call`` as numbers, which is what torch's operators take."""
    kinds, scales, softcaps = layout_of(terms)
    integers = [loss.ignore_index, int(loss.stats), chunk_rows or 0, *kinds]
    return integers, [loss.label_smoothing, loss.z_loss, *scales, *softcaps]


@lru_cache(256)
def _decoded(integers: tuple[int, ...], numbers: tuple[float, ...]) -> _Call:
    (ignore_index, stats, chunk_rows, *kinds), (smoothing, z_loss, *factors) = integers, numbers
    scales, softcaps = factors[: len(kinds)], factors[len(kinds) :]
    loss = Loss(ignore_index, smoothing, z_loss, bool(stats))
    return _Call(Layout(tuple(kinds), tuple(scales), tuple(softcaps)), loss, chunk_rows or None)


def _fake_counted(
    target: Tensor, ignore_index: int, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    return target.new_empty((), dtype=dtype), target.new_empty((), dtype=dtype)


@operator(
    "counted(Tensor target, int ignore_index, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _fake_counted,
)
def _counted(target: Tensor, ignore_index: int, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    return load(backend).counted(target, ignore_index, dtype)


def rows_that_count(
    target: Tensor, ignore_index: int, dtype: torch.dtype, backend: str, transformed: bool
) -> tuple[Tensor, Tensor]:
    """0-d number of rows whose target (N,) counts, 1 if none does, and its reciprocal.

    Args:
        dtype: of both.
        backend: its name; "" where a graph is traced.
        transformed: whether a transform of ``torch.func`` follows a tensor.
    """
    if backend and not transformed and target.numel():
        return _counted(target, ignore_index, dtype, backend)
    number = (target != ignore_index).sum().clamp(min=1).to(dtype)
    return number, number.reciprocal()


_Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _as_outputs(rows: RowLosses, loss: Loss, *, apart: bool = True) -> _Rows:
    """Row, nll, lse, argmax, term_nll, row_max, log_sum; ``apart`` none of them is another."""
    row = loss.of_rows(rows.nll, rows.lse, rows.smooth)
    row = row.clone() if apart and row is rows.nll else row
    return row, rows.nll, rows.lse, rows.argmax, rows.term_nll, rows.row_max, rows.log_sum


def _fake_losses(
    tensors: list[Tensor], target: Tensor, integers: list[int], numbers: list[float], V: int, backend: str
) -> _Rows:
    call = _decoded(tuple(integers), tuple(numbers))
    rows = RowLosses.empty(target, row_dtype(tensors), len(call.layout.kinds), call.loss)
    return _as_outputs(rows, call.loss)


@operator(
    "losses(Tensor[] tensors, Tensor target, int[] integers, float[] numbers, SymInt V, str backend) -> "
    "(Tensor row, Tensor nll, Tensor lse, Tensor argmax, Tensor term_nll, Tensor row_max, Tensor log_sum)",
    _fake_losses,
)
def _losses(
    tensors: list[Tensor], target: Tensor, integers: list[int], numbers: list[float], V: int, backend: str
) -> _Rows:
    if target.numel() == 0:
        return _fake_losses(tensors, target, integers, numbers, V, backend)
    call, kernel = _decoded(tuple(integers), tuple(numbers)), backend_of(backend or None, tensors)
    return _rows_of(target, call.layout.sum(tensors, V, call.chunk_rows), call.loss, kernel)


@apart_from_autocast
def _rows_of(target: Tensor, sum: Sum, loss: Loss, kernel: Backend, *, apart: bool = True) -> _Rows:
    look_at_ids(sum, target, loss.ignore_index)
    rows = kernel.losses(sum, target, loss, None, [{}] * len(sum.terms))
    return _as_outputs(rows, loss, apart=apart)


def _fake_gradients(tensors: list[Tensor], *rest: object) -> list[Tensor]:
    wanted = cast("list[int]", rest[-2])
    return [tensors[i].new_empty(tensors[i].shape) for i in wanted]


@operator(
    "gradients(Tensor[] tensors, Tensor target, Tensor g, Tensor[] sums, int[] integers, float[] numbers, "
    "SymInt V, int[] wanted, str backend) -> Tensor[]",
    _fake_gradients,
)
def _gradients(
    tensors: list[Tensor],
    target: Tensor,
    g: Tensor,
    sums: list[Tensor],
    integers: list[int],
    numbers: list[float],
    V: int,
    wanted: list[int],
    backend: str,
) -> list[Tensor]:
    """Gradients of the tensors in ``wanted`` for the gradient g (N,) of the rows, of which sums are known."""
    if target.numel() == 0:
        return [torch.zeros_like(tensors[i]) for i in wanted]
    call = _decoded(tuple(integers), tuple(numbers))
    sum = call.layout.sum(tensors, V, call.chunk_rows)
    kernel, loss = backend_of(backend or None, tensors), call.loss.without_stats
    result = Gradients(sum, tensors, wanted)
    if sum.is_logits:
        slopes = RowSlopes(g, RowSums(*sums), target != loss.ignore_index, loss, V)
        kernel.gradients(sum, target, slopes, result.wanted)
    else:
        kernel.losses(sum, target, loss, g, result.wanted)
    return result.rounded(tensors)


class Gradients:
    """Memory for the gradients of some of a sum's tensors.

    Args:
        tensors: as given, of any leading dimensions.
        places: which of them, by their place in the list.
        float32: whether gradients are multiplied before they are rounded to the tensors' dtypes, but for
            those of logits, which never are.
        memory: for gradients of logits.

    Attributes:
        wanted: as a backend takes it.
        flat: by place, shaped like the tensors.
    """

    def __init__(
        self,
        sum: Sum,
        tensors: Sequence[Tensor],
        places: Sequence[int],
        *,
        float32: bool = False,
        memory: GradientMemory | None = None,
    ) -> None:
        self.wanted: list[dict[str, Tensor]] = [{} for _ in sum.terms]
        self.flat: dict[int, Tensor] = {}
        named = list(sum.places())
        for place in places:
            x, (index, name) = tensors[place], named[place]
            wide = name in ("weight", "bias") or (float32 and not isinstance(sum.terms[index], Logits))
            dtype = sum.dtype if wide else x.dtype
            if not sum.is_logits:
                gradient = empty(x.shape, dtype, x.device)
            else:
                gradient = x.new_empty(x.shape) if memory is None else memory.empty(x.shape, x.dtype)
            self.flat[place] = gradient
            self.wanted[index][name] = gradient.view(sum.tensors[place].shape)

    def rounded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What has been written, in the dtypes of the tensors."""
        return [d.to(tensors[place].dtype) for place, d in self.flat.items()]


@dataclass(eq=False)
class Expected:
    """The gradient of the rows that a backward is expected to bring, but for a factor.

    Attributes:
        make: makes it.
        memory: for gradients of logits that are made for it.
    """

    make: Callable[[], Tensor]
    memory: GradientMemory | None

    @cached_property
    def gradient(self) -> Tensor:
        """(N,)."""
        return self.make()


class _Ready(NamedTuple):
    """Gradients that were made with the losses; ``rescales`` and ``mends`` as in ``Route``."""

    gradients: list[Tensor]
    wanted: list[dict[str, Tensor]]  # the same memory, as a backend takes it
    rescales: bool
    mends: bool


@apart_from_autocast
def _with_gradients(
    tensors: list[Tensor],
    target: Tensor,
    call: _Call,
    V: int,
    places: list[int],
    backend: str,
    expected: Expected,
) -> tuple[_Rows, _Ready | None]:
    """``_losses``, and gradients where the backend makes them with the losses; in eager mode."""
    sum, kernel = call.layout.sum(tensors, V, call.chunk_rows), load(backend)
    route = kernel.route(sum, call.loss)
    if not route.fused:
        return _rows_of(target, sum, call.loss, kernel), None
    look_at_ids(sum, target, call.loss.ignore_index)
    result = Gradients(sum, tensors, places, float32=route.rescales, memory=expected.memory)
    rows = kernel.losses(sum, target, call.loss, expected.gradient, result.wanted)
    gradients = list(result.flat.values()) if route.rescales else result.rounded(tensors)
    return _as_outputs(rows, call.loss), _Ready(gradients, result.wanted, route.rescales, route.mends)


class _LossRows(torch.autograd.Function):
    """Per row: the loss, differentiable, then nll, lse, argmax and term_nll, which are not.

    A backend may make the gradient with the losses, while a row's logits are at hand, for the incoming
    gradient that is expected. If another one comes, float32 gradients are multiplied: whatever comes is a
    multiple of what was expected. Others are brought up to date where they lie if the backend mends them;
    else they, and always those of a second backward, are computed afresh.
    """

    @staticmethod
    def forward(
        ctx: Any,
        target: Tensor,
        expected: Expected | None,
        integers: list[int],
        numbers: list[float],
        vocab_size: int | None,
        backend: str,
        *given: Tensor,
    ) -> tuple[Tensor, ...]:
        tensors = list(given)
        needed = [i for i in range(len(tensors)) if ctx.needs_input_grad[_BEFORE + i]]
        # Logits that see the same dz share one gradient tensor, as the two sides of a sum do.
        kinds, factors = integers[3:], numbers[2:]
        ctx.sources = {
            i: next(
                j for j in needed if i == j or (not any(kinds) and _same_gradient(tensors, factors, i, j))
            )
            for i in needed
        }
        ctx.expected, ctx.ready = expected, None
        ctx.call = (integers, numbers, vocab_size, backend)
        V = _vocabulary(tensors, kinds, vocab_size)
        if expected is None or target.numel() == 0:
            rows = _losses(tensors, target, integers, numbers, V, backend)
        else:
            call = _decoded(tuple(integers), tuple(numbers))
            rows, ctx.ready = _with_gradients(tensors, target, call, V, _wanted(ctx), backend, expected)
        row, nll, lse, argmax, term_nll, row_max, log_sum = rows
        ctx.save_for_backward(target, nll, row_max, log_sum, *tensors)
        ctx.mark_non_differentiable(nll, lse, argmax, term_nll)
        # Zeros would be written for these four, only to be thrown away.
        ctx.set_materialize_grads(False)
        return row, nll, lse, argmax, term_nll

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        target, nll, row_max, log_sum, *tensors = ctx.saved_tensors
        if g is None:
            return (None,) * (_BEFORE + len(tensors))
        (integers, numbers, vocab_size, backend), wanted = ctx.call, _wanted(ctx)
        with torch.no_grad():
            # Handed out once: a second backward must not change what the first one gave away.
            ready, ctx.ready = ctx.ready, None
            V, sums = _vocabulary(tensors, integers[3:], vocab_size), [nll, row_max, log_sum]
            gradients = None
            if ready is not None and ready.mends:
                call, written = _decoded(tuple(integers), tuple(numbers)), ctx.expected.gradient
                gradients = _mended(tensors, target, sums, call, V, ready, (g, written), backend)
            elif ready is not None:
                gradients = _for_incoming(ready, g, ctx.expected.gradient)
            del ready  # freed before others are made
            if gradients is None:
                gradients = _gradients(tensors, target, g, sums, integers, numbers, V, wanted, backend)
            by_place = {i: d.to(tensors[i].dtype) for i, d in zip(wanted, gradients, strict=True)}
        result = tuple(by_place[ctx.sources[i]] if i in ctx.sources else None for i in range(len(tensors)))
        return (None,) * _BEFORE + refuse_second_derivatives(result, (g, *tensors))


_BEFORE = 6  # arguments of _LossRows.forward before the tensors


def _wanted(ctx: Any) -> list[int]:
    """Places of the tensors whose gradient a backend has to write."""
    return sorted(set(ctx.sources.values()))


def _same_gradient(values: Sequence[Tensor], factors: Sequence[float], i: int, j: int) -> bool:
    """Whether two terms of logits have equal gradients: a softcap's depends on the term's own values.

    Sizes are compared, not hashed: a dictionary key would fix a size that torch.compile left open.

    Args:
        factors: scales and softcaps of all terms.
    """
    scales, softcaps = factors[: len(values)], factors[len(values) :]
    return (
        softcaps[i] == softcaps[j] == 0
        and scales[i] == scales[j]
        and values[i].dtype == values[j].dtype
        and values[i].shape[-1] == values[j].shape[-1]
    )


def _vocabulary(tensors: Sequence[Tensor], kinds: Sequence[int], vocab_size: int | None) -> int:
    """V, read off the tensors where it is used: torch.compile does not carry open sizes to a backward."""
    return Layout.vocabulary(tensors, kinds) if vocab_size is None else vocab_size


@apart_from_autocast
def _mended(
    tensors: list[Tensor], target: Tensor, sums: list[Tensor], call: _Call, V: int, ready: _Ready,
    incoming: tuple[Tensor, Tensor], backend: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients that are ready, for the gradient of the rows that came; nothing waits for a GPU.

    Args:
        sums: of the rows.
        incoming: (N,) what came, and what was expected.
    """
    g, written = incoming
    sum = call.layout.sum(tensors, V, call.chunk_rows)
    counts = target != call.loss.ignore_index
    slopes = RowSlopes(g, RowSums(*sums), counts, call.loss.without_stats, V, written)
    backend_of(backend or None, tensors).gradients(sum, target, slopes, ready.wanted)
    return ready.gradients


def _for_incoming(ready: _Ready, g: Tensor, expected: Tensor) -> list[Tensor] | None:
    """The gradients that are ready, for the gradient g (N,) of the rows that came; None if they do not fit.

    Comparing would stop a GPU, whose memory multiplies 20 times as fast as a CPU's.
    """
    if not ready.rescales:
        return ready.gradients if torch.equal(g, expected) else None
    if g.device.type == "cpu" and torch.equal(g, expected):
        return ready.gradients
    factor = _common_factor(g, expected)
    return [d.mul_(factor) for d in ready.gradients]


def _common_factor(g: Tensor, expected: Tensor) -> Tensor:
    """(1,) f with g = f * expected, found where that is largest; 0 where nothing is expected."""
    if expected.numel() == 0:
        return expected.new_zeros(1)
    row = expected.abs().argmax(keepdim=True)
    largest = expected.gather(0, row)
    return torch.where(largest == 0, 0.0, g.gather(0, row) / largest)


def loss_rows(
    terms: Sequence[Term],
    target: Tensor,
    expected: Expected | None,
    loss: Loss,
    chunk_rows: int | None,
    vocab_size: int | None,
    backend: str,
) -> tuple[Tensor, ...]:
    """Per row: the loss, differentiable, then nll, lse, argmax and term_nll, which are not.

    All of them are (N,), and term_nll (I, N), as in ``CrossEntropyStats``; the last two have no elements
    without stats, and nll may be the loss itself.

    Args:
        target: (N,) int64, contiguous.
        expected: None where a backward brings nothing or what cannot be foreseen.
        backend: its name; "" for the first that can run.
    """
    tensors = tensors_of(terms)
    needed = torch.is_grad_enabled() and any([t.requires_grad for t in tensors])
    if not needed and target.numel() and not _is_seen([target, tensors]):
        sum = Sum.of(terms, vocabulary_of(terms, vocab_size), chunk_rows)
        return _rows_of(target, sum, loss, load(backend), apart=loss.stats)[:5]
    integers, numbers = _encoded(terms, loss, chunk_rows)
    if needed:
        rows: Callable[..., tuple[Tensor, ...]] = _LossRows.apply
        return rows(target, expected, integers, numbers, vocab_size, backend, *tensors)
    V = vocabulary_of(terms, vocab_size)
    return _losses(tensors, target, integers, numbers, V, backend)[:5]
