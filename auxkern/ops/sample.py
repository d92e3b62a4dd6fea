"""The next token of each row, from a sum of terms."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from auxkern.backends.choice import backend_of
from auxkern.core.backend import Backend
from auxkern.core.draws import ROW_NUMBERS, Draws, RowTokens
from auxkern.core.repeats import are_plain, facts_of, is_eager
from auxkern.core.sums import (
    Sum,
    check_rows,
    check_sparse_ids,
    checked_vocabulary,
    flat_rows,
    one_device,
    row_dtype,
    tensors_of,
    vocabulary_of,
)
from auxkern.core.terms import INTEGER_DTYPES, Logits, Sparse, Term, Terms, as_number, as_terms, has_dtensors
from auxkern.ops.cross_entropy import cross_entropy
from auxkern.ops.dense import dense_logits
from auxkern.ops.parallel.agreement import fingerprint
from auxkern.ops.parallel.sample import drawn_over_ranks
from auxkern.ops.parallel.vocabulary import CutVocabulary, VocabularyShard, group_of, with_own_entries
from auxkern.ops.sampling_params import SamplingParams
from auxkern.ops.torch_ops import apart_from_autocast, is_transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_NO_TOKEN = -1
_PLAIN = SamplingParams()
_CACHED_IDS = 2**18
_LEAST = 2.0**-149  # float32's smallest number above 0


@dataclass(frozen=True)
class Sample:
    """What ``auxkern.sample`` returns; (...) are the rows as given.

    Attributes:
        tokens: (...) int64; -1 where the status is not 0.
        status: (...) int32: 0 all is well, 1 a logit is NaN, 2 no logit is finite, 3 a logit is +inf.
        logprob: (...) log softmax(z)[token], before any penalty, bias or filter; None unless asked for.
        processed_logprob: (...) log-probability among what penalties, temperature and filters left;
            0 for temperature 0; None unless asked for.
        term_logprobs: (I, ...) the token's log-probability under each term alone, times its scale.
        top_ids, top_logprobs: (..., top_logprobs) the ids of the largest z, by falling z and rising id, so
            that a greedy token without penalty and bias comes first; and log softmax(z) of each.
    """

    tokens: Tensor
    status: Tensor
    logprob: Tensor | None = None
    processed_logprob: Tensor | None = None
    term_logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


@torch.no_grad()
@apart_from_autocast
def sample(
    terms: Sequence[Term | Tensor] | Term | Tensor,
    params: SamplingParams | None = None,
    *,
    seed: int | Tensor,
    position: int | Tensor,
    history: Tensor | None = None,
    prompt: Tensor | None = None,
    vocab_size: int | None = None,
    return_logprobs: bool = False,
    top_logprobs: int = 0,
    process_group: ProcessGroup | DeviceMesh | VocabularyShard | None = None,
    backend: str | None = None,
) -> Sample:
    """Draws one token for each row from softmax(z / temperature), z the sum of the terms, filtered.

        token = argmax over v of (z[v] - max z) / temperature - log(-log1p(-u[v]))      (Gumbel-max)

    u[v] in (0, 1) comes from Philox4x32-10 (Salmon et al. 2011) with the row's seed as key and
    (position, v) as counter. So a row's token depends on its logits, parameters, seed and position,
    and on nothing else: not on the batch, the row's place in it, or the backend.

    In a CUDA graph give seed, position and whatever changes as tensors, and a ``logit_bias`` as
    ``Sparse``: numbers become constants of the graph. Nothing stops the device.

    Args:
        terms: 1 to 8 ``Logits`` (..., V), ``Head`` (..., D) and ``Sparse`` (..., K), as in
            ``cross_entropy``; a ``scale`` may be a tensor (...), one for each row. A bare tensor is
            ``Logits``.
        params: ``SamplingParams``; plain sampling at temperature 1 if None.
        seed: int64 for each row, (...); an int where there is one row. Rows with equal seeds draw
            equal noise.
        position: of the token in its text, int or (...); another one for each token of a row.
        history: (..., H) integer ids generated so far, which all penalties count; ids outside
            [0, V), such as -1, are padding.
        prompt: (..., P) integer ids that the repetition penalty counts too, padded likewise.
        vocab_size: ids that the terms share; needed where their vocabularies differ.
        return_logprobs: whether ``logprob``, ``processed_logprob`` and ``term_logprobs`` are wanted,
            at the price of another pass over the terms.
        top_logprobs: how many of the largest log-probabilities are wanted.
        process_group: as in ``cross_entropy``; ids, here and in what comes back, count from 0 to V. Every
            rank draws the token that one device would draw, with the same seeds. Plain sampling exchanges
            a few numbers a row; filters, penalties, ``top_logprobs`` and a backend by name gather the
            logits (N, V) on every rank first.
        backend: name of a backend, or None to choose.

    Returns:
        ``Sample``.

    Raises:
        TypeError: something is of a wrong type.
        ValueError: shapes or devices disagree, or a value is out of range.
        RuntimeError: the backend asked for cannot run.
    """
    seed, position = as_number(seed), as_number(position)
    vocab_size, top_logprobs = as_number(vocab_size), as_number(top_logprobs)
    params = _PLAIN if params is None else params
    asked = _Asked(
        params, seed, position, history, prompt, vocab_size, return_logprobs, top_logprobs, backend
    )
    if process_group is not None or has_dtensors(terms):
        group = group_of(process_group, terms)
        if group is not None:
            return _over_ranks(terms, asked, CutVocabulary(group, process_group, vocab_size))
    known = _known(terms, asked)
    if known is None:
        listed, draws, V = _given(terms, asked)
        leading, drawn = listed[0].leading, _drawn(backend, listed, draws, V, return_logprobs)
    else:
        leading, drawn = known.leading, known.drawn()
    result = Sample(_shaped(drawn.token, leading), _shaped(drawn.status, leading))
    if return_logprobs or top_logprobs:
        listed = as_terms(terms)
        V = vocabulary_of(listed, vocab_size)
    if return_logprobs:
        result = _with_logprobs(result, listed, V, drawn.logprob.view(leading))
    if top_logprobs:
        result = _with_top(result, listed, V, top_logprobs)
    return result


class _Asked(NamedTuple):
    """The arguments of ``sample`` beside the terms."""

    params: SamplingParams
    seed: int | Tensor
    position: int | Tensor
    history: Tensor | None
    prompt: Tensor | None
    vocab_size: int | None
    return_logprobs: bool
    top_logprobs: int
    backend: str | None

    @property
    def is_plain(self) -> bool:
        """Whether all but tensors are of the types they should be, and no bias is among the parameters."""
        params = self.params
        return (
            type(params) is SamplingParams
            and params.logit_bias is None
            and type(self.return_logprobs) is bool
            and type(self.top_logprobs) is int
            and (self.vocab_size is None or type(self.vocab_size) is int)
        )


class _Known(NamedTuple):
    """A call of which a backend may have seen one like it: nothing of it has been checked."""

    kernel: Backend
    terms: Terms
    asked: _Asked  # with tensors of seeds and positions
    inputs: Sequence[Tensor]
    facts: Hashable
    leading: torch.Size

    def drawn(self) -> RowTokens:
        """A token for each row."""
        return self.kernel.draw_given(self._given, self.inputs, self.facts, self.asked.return_logprobs)

    def _given(self) -> tuple[Sum, Draws]:
        terms, draws, V = _given(self.terms, self.asked)
        return Sum.of(terms, V), draws


def _known(terms: Terms, asked: _Asked) -> _Known | None:
    """None where more has to be known of a call than kinds, shapes and numbers, or no backend keeps these."""
    params, seed, position = asked[:3]
    stated = facts_of(terms)
    if stated is None or not asked.is_plain:
        return None
    kernel = backend_of(asked.backend, stated.tensors)
    first = stated.tensors[0]
    if not kernel.remembers or not first.numel() or not is_eager():
        return None
    leading, device = first.shape[:-1], first.device
    N = leading.numel()
    if type(seed) is int and N == 1:
        asked = asked._replace(seed=_integers("seed", seed, N, device))
    if type(position) is int:
        asked = asked._replace(position=_integers("position", position, N, device))
    given = [x for x in asked[1:5] if x is not None]
    inputs = [*stated.tensors, *stated.scales, *params.row_tensors, *given]
    if not are_plain(inputs):
        return None
    absent = (asked.history is None, asked.prompt is None)
    facts = (stated.facts, params.facts, asked.vocab_size, asked.top_logprobs, absent)
    return _Known(kernel, terms, asked, inputs, facts, leading)


def _shaped(rows: Tensor, leading: torch.Size) -> Tensor:
    """(...) of (N,)."""
    return rows if len(leading) == 1 else rows.view(leading)


class _Given(NamedTuple):
    """A call that has been checked."""

    terms: list[Term]
    draws: Draws
    V: int


def _given(terms: Terms, asked: _Asked) -> _Given:
    """The call, checked; raises as ``sample``."""
    listed = as_terms(terms)
    _check_rows(listed, asked)
    V = vocabulary_of(listed, checked_vocabulary(listed, asked.vocab_size))
    return _Given(listed, _draws(listed, asked, V), V)


def _check_rows(terms: Sequence[Term], asked: _Asked) -> None:
    one_device(terms)
    if is_transformed(tensors_of(terms)):
        raise RuntimeError(
            "auxkern.sample has no forward-mode derivatives and takes no transforms of torch.func (jvp, "
            "grad, vmap, ...); draw outside of them"
        )
    if not isinstance(asked.params, SamplingParams):
        raise TypeError(f"params must be auxkern.SamplingParams or None, got {type(asked.params).__name__}")
    check_rows(terms)


def _over_ranks(terms: Terms, asked: _Asked, cut: CutVocabulary) -> Sample:
    """``sample`` of terms whose vocabulary is cut over ranks."""

    def checked(terms: list[Term]) -> tuple[list[Term], dict[str, object]]:
        _check_rows(terms, asked)
        return terms, {
            "return_logprobs": asked.return_logprobs,
            "top_logprobs": asked.top_logprobs,
            "backend": asked.backend,
            "seed": fingerprint(asked.seed) if isinstance(asked.seed, Tensor) else asked.seed,
        }

    def within(terms: list[Term], V: int) -> tuple[list[Term], Draws]:
        backend_of(asked.backend, tensors_of(terms))  # its refusal is raised on every rank
        return terms, _draws(terms, asked, V)

    (given, draws), shard, V = cut.agreed(terms, checked, within)
    leading = given[0].leading
    # Sparse terms and scales of rows go into the logits.
    z = dense_logits(with_own_entries(given, shard), vocab_size=shard.used_sizes(V)[shard.rank])
    z = z.reshape(leading.numel(), z.shape[-1])
    whole: list[Term] = []
    params = asked.params
    temperature_alone = params.is_plain and not params.penalises and not params.logit_bias
    if temperature_alone and not asked.top_logprobs and asked.backend is None:
        drawn = drawn_over_ranks(z, draws, shard, asked.return_logprobs)
    else:
        # What acts on all ids needs the logits of all.
        whole = [Logits(shard.whole(z)[:, :V].reshape(*leading, V))]
        drawn = _drawn(asked.backend, whole, draws, V, asked.return_logprobs)
    result = Sample(drawn.token.view(leading), drawn.status.view(leading))
    if asked.return_logprobs:
        result = _with_logprobs(result, given, V, drawn.logprob.view(leading), shard)
    if asked.top_logprobs:
        result = _with_top(result, whole, V, asked.top_logprobs)
    return result


def _drawn(backend: str | None, terms: Sequence[Term], draws: Draws, V: int, want_logprob: bool) -> RowTokens:
    """A token for each row."""
    kernel = backend_of(backend, tensors_of(terms))
    if draws.seed.shape[0] == 0:
        return RowTokens(draws.seed, draws.seed.int(), draws["temperature"])
    return kernel.draw(Sum.of(terms, V), draws, want_logprob)


def _per_row(name: str, value: Tensor, N: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N,) of a tensor with one entry for each row."""
    if value.numel() != N:
        raise ValueError(f"{name} has {value.numel()} entries but there are {N} rows; give each row one")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but the terms are on {device}; move it there")
    if value.dtype == torch.float64 and device.type == "cpu":  # a look would stop another device
        _check_range(name, value.tolist(), dtype)
    return flat_rows(value.resolve_neg(), dtype)


def _check_range(name: str, values: Iterable[float], dtype: torch.dtype) -> None:
    """Refuses finite numbers that would be 0 or infinity in ``dtype`` and are not."""
    if dtype != torch.float32:
        return
    finfo = torch.finfo(dtype)
    for value in values:
        if value and math.isfinite(value) and not _LEAST <= abs(value) <= finfo.max:
            raise ValueError(
                f"{name} is {value:.3g}, which float32 does not have; choose 0, or a size between "
                f"{finfo.smallest_normal:.3g} and {finfo.max:.3g}"
            )


def _integers(name: str, value: object, N: int, device: torch.device, *, each: bool = False) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype not in INTEGER_DTYPES:
            raise TypeError(f"{name} has dtype {value.dtype}; it must be integers")
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or an integer tensor, got {type(value).__name__}")
    elif not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} is {value}; it must fit 64 bits")
    elif each and N != 1:
        raise ValueError(
            f"{name} is the int {value} but there are {N} rows, which would draw equal noise; give each "
            f"row its own, such as {name}={value} + torch.arange({N})"
        )
    else:
        value = value - 2**64 if value >= 2**63 else value
    if not isinstance(value, Tensor):
        return torch.full((N,), value, dtype=torch.int64, device=device)
    return _per_row(name, value, N, torch.int64, device)


def _numbers(
    values: tuple[float | Tensor, ...], V: int, N: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float | Tensor]:
    """``Draws.numbers`` from the values of their fields, in the order of ``ROW_NUMBERS``."""
    fixed = tuple([None if isinstance(value, Tensor) else value for value in values])
    numbers: dict[str, float | Tensor] = {**_fixed_numbers(fixed, V, dtype)}
    for number, value in zip(ROW_NUMBERS, values, strict=True):
        if isinstance(value, Tensor):
            taken = cast(Tensor, number.taken(value, V))
            numbers[number.name] = _per_row(number.param, taken, N, number.dtype or dtype, device)
    return numbers


@lru_cache(256)
def _fixed_numbers(values: tuple[float | None, ...], V: int, dtype: torch.dtype) -> dict[str, float]:
    """Those that all rows share, checked."""
    numbers = {}
    for number, value in zip(ROW_NUMBERS, values, strict=True):
        if value is not None:
            numbers[number.name] = taken = cast(float, number.taken(value, V))
            _check_range(number.param, [taken], number.dtype or dtype)
    return numbers


def _row_ids(name: str, ids: object, leading: torch.Size, device: torch.device) -> Tensor:
    N = leading.numel()
    if ids is None:
        return torch.empty((N, 0), dtype=torch.int64, device=device)
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGER_DTYPES:
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be an integer tensor (..., ids), got {kind}")
    if ids.shape[:-1] != leading:
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)} but the rows have {tuple(leading)}; give each row its "
            "ids, padded with -1"
        )
    if ids.device != device:
        raise ValueError(f"{name} is on {ids.device} but the terms are on {device}; move it there")
    return ids.reshape(N, ids.shape[-1]).long().contiguous()


def _draws(terms: Sequence[Term], asked: _Asked, V: int) -> Draws:
    """Checks what the rows are drawn with, and V's part of it, and makes it entries of rows."""
    _check_count(asked.top_logprobs, V)
    params, leading, device = asked.params, terms[0].leading, one_device(terms)
    N, dtype = leading.numel(), row_dtype(tensors_of(terms))
    for term in terms:
        if isinstance(term, Sparse):
            _check_where_seen("Sparse.ids", term.ids, V)
        elif isinstance(term.scale, Tensor):
            _per_row("scale", term.scale, N, dtype, device)
    bias_ids, bias = _bias(params, N, V, dtype, device)
    values = tuple([getattr(params, number.param) for number in ROW_NUMBERS])
    return Draws(
        numbers=_numbers(values, V, N, dtype, device),
        seed=_integers("seed", asked.seed, N, device, each=True),
        position=_integers("position", asked.position, N, device),
        prompt=_row_ids("prompt", asked.prompt, leading, device),
        history=_row_ids("history", asked.history, leading, device),
        bias_ids=bias_ids,
        bias=bias,
        plain=params.is_plain,
    )


def _check_count(top_logprobs: object, V: int) -> None:
    if isinstance(top_logprobs, bool) or not isinstance(top_logprobs, int) or not 0 <= top_logprobs <= V:
        raise ValueError(f"top_logprobs is {top_logprobs!r}; it must be an int from 0 to V = {V}")


def _check_where_seen(name: str, ids: Tensor, V: int) -> None:
    # Looking at the ids would stop a GPU.
    if ids.device.type == "cpu":
        check_sparse_ids(name, ids, V)


def _bias(
    params: SamplingParams, N: int, V: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    bias = params.logit_bias
    if isinstance(bias, Sparse):
        ids = _row_ids("logit_bias.ids", bias.ids, torch.Size((N,)), device)
        _check_where_seen("logit_bias.ids", ids, V)
        return ids, bias.values.resolve_neg().reshape(N, bias.values.shape[-1]).to(dtype).contiguous()
    listed = dict(bias or {})
    if not listed:
        return _row_ids("", None, torch.Size((N,)), device), torch.empty((N, 0), dtype=dtype, device=device)
    for token in listed:
        if token >= V:
            raise ValueError(f"logit_bias has the id {token}, outside [0, {V})")
    ids = torch.tensor(list(listed), dtype=torch.int64, device=device).expand(N, -1).contiguous()
    _check_range("logit_bias", listed.values(), dtype)
    return ids, torch.tensor(list(listed.values()), dtype=dtype, device=device).expand(N, -1).contiguous()


def _with_logprobs(
    result: Sample, terms: Sequence[Term], V: int, processed: Tensor, shard: VocabularyShard | None = None
) -> Sample:
    _, stats = cross_entropy(
        [_without_row_scale(t) for t in terms],
        result.tokens,
        ignore_index=_NO_TOKEN,
        reduction="none",
        vocab_size=V,
        return_stats=True,
        process_group=shard,
    )
    missing = result.tokens == _NO_TOKEN
    logprob, each = (torch.where(missing, torch.nan, -nll) for nll in (stats.nll, stats.term_nll))
    return replace(result, logprob=logprob, processed_logprob=processed, term_logprobs=each)


def _without_row_scale(term: Term) -> Term:
    """The same logits, as ``cross_entropy`` takes them."""
    if isinstance(term, Sparse) or not isinstance(term.scale, Tensor):
        return term
    return Logits(dense_logits([term]))


def _with_top(result: Sample, terms: Sequence[Term], V: int, count: int) -> Sample:
    z = dense_logits(terms, vocab_size=V)
    rows = z.reshape(-1, V)
    # On a CPU a few rows at a time, whose intermediates stay in the cache.
    size = max(1, _CACHED_IDS // V) if z.device.type == "cpu" else max(1, len(rows))
    ids = torch.cat([_largest(chunk, count) for chunk in rows.split(size)]).view(*z.shape[:-1], count)
    return replace(result, top_ids=ids, top_logprobs=z.log_softmax(-1).gather(-1, ids))


def _largest(z: Tensor, count: int) -> Tensor:
    """(N, count) ids of the largest entries of z (N, V), by falling z and rising id."""
    V = z.shape[1]
    top = z.topk(count, dim=-1)
    # topk takes any of the equals of its last one: theirs are replaced by the lowest ids. 0: no more equals.
    last = top.values[:, -1:]
    backwards = V - torch.arange(V, dtype=torch.int32, device=z.device)
    equals = V - ((z == last) * backwards).topk(count, dim=-1).values.long()
    above = top.values > last
    place = torch.arange(count, device=z.device) - above.sum(-1, keepdim=True)
    ids = torch.where(above, top.indices, equals.gather(-1, place.clamp(min=0)))
    ids = ids.clamp(max=V - 1).sort(dim=-1).values  # V: a row of NaN, which equals nothing
    # By z: log-probabilities are rounded, and equal where logits are not.
    return ids.gather(-1, z.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices)
