"""Tokens for rows with sampling parameters of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auxkern.core.draws import ROW_NUMBERS
from auxkern.core.terms import Sparse, Term
from auxkern.generation.reading import AloneTerms
from auxkern.generation.request import Request, Sequence, Sequences
from auxkern.generation.rows import BIASES, Rows
from auxkern.generation.transfers import HostCopy, to_device
from auxkern.model.mixing import Alone
from auxkern.ops.dense import dense_logits
from auxkern.ops.mixtures import plausible
from auxkern.ops.sample import Sample, sample
from auxkern.ops.sampling_params import SamplingParams

_NUMBERS = tuple(one.name for one in fields(SamplingParams) if one.name != "logit_bias")

_FLOAT32 = torch.finfo(torch.float32)


class Logprob(NamedTuple):
    """Of one token; as ``TokenLogprobs``, of many."""

    raw: float
    processed: float
    lm: float
    auxiliary: float | None
    members: tuple[float, ...] = ()


class Acts(NamedTuple):
    """What acts on some row of a draw beside its temperature.

    Attributes:
        filters: whether a filter does.
        penalties: whether a penalty does.
        biases: most biases of a row.
    """

    filters: bool = False
    penalties: bool = False
    biases: int = 0

    @classmethod
    def of(cls, sequences: Sequences) -> Acts:
        params = [sequence.request.params for sequence in sequences]
        return cls(
            any(not one.is_plain for one in params),
            any(one.penalises for one in params),
            max((len(one.logit_bias or ()) for one in params), default=0),  # type: ignore[arg-type]
        )

    def within(self, other: Acts) -> bool:
        """Whether a draw for the other serves these rows too."""
        return all(ours <= theirs for ours, theirs in zip(self, other, strict=True))


# Kinds of steps that are worth a graph of their own, the cheapest first: the draw alone, which writes no
# logits; filters, of which most requests have one; and all, which counts every id of the text besides.
RECORDED_ACTS = (Acts(), Acts(filters=True), Acts(filters=True, penalties=True, biases=BIASES))


@dataclass(frozen=True)
class Drawn:
    """One token for each row.

    Attributes:
        tokens: ids.
        status: 0 where all is well, see ``auxkern.Sample``.
        logprobs: of a row's token, by row, where they are known.
    """

    tokens: list[int]
    status: list[int]
    logprobs: dict[int, Logprob]


class Pending:
    """Tokens that the device may still be drawing.

    Args:
        sequences: n that they are for, by row.
        numbers: (2, at least n) tokens and statuses.
        logprobs: (n', 4 + M) of some rows, by the first one's number: those of ``Logprob`` with at most M
            members; NaN where there is no auxiliary or no such member.
    """

    def __init__(self, sequences: Sequences, numbers: HostCopy, logprobs: dict[int, HostCopy]) -> None:
        self.sequences = sequences
        self._numbers, self._logprobs = numbers, logprobs

    def result(self) -> Drawn:
        """The tokens; waits for the device."""
        n = len(self.sequences)
        tokens, status = self._numbers.tolist()
        logprobs: dict[int, Logprob] = {}
        for first, numbers in self._logprobs.items():
            for row, (raw, processed, lm, auxiliary, *alone) in enumerate(numbers.tolist(), first):
                sequence = self.sequences[row]
                own = auxiliary if sequence.has_auxiliary else None
                members = tuple(alone[: len(sequence.members)])
                logprobs[row] = Logprob(raw, processed, lm, own, members)
        return Drawn(tokens[:n], status[:n], logprobs)


class Said(NamedTuple):
    """What the models say of the next tokens.

    Attributes:
        terms: of the sum, rows (n,).
        sides: of either side, where log-probabilities are wanted.
        judge: of each sequence's first member of the base alone, where a plausibility is asked for.
        members: of each by itself, model by model, of sequences that want log-probabilities.
    """

    terms: list[Term]
    sides: Alone | None = None
    judge: list[Term] | None = None
    members: AnySequence[AloneTerms] = ()


class _Known(NamedTuple):
    """What does not change while the same sequences run."""

    acts: Acts
    params: SamplingParams


class Drawer:
    """Draws tokens for slots, and keeps what they are drawn with.

    Args:
        model: an ``AuxTunedForCausalLM``.
        slots: most sequences.
        length: most tokens of a sequence.

    Attributes:
        rows: what the slots are drawn with, on the device.
        results: (2, slots) int64 tokens and statuses of the last draw of each slot, on the device.
    """

    def __init__(self, model: Any, slots: int, length: int) -> None:
        self.model = model
        self.rows = Rows(slots, length, model.device)
        self.results = torch.zeros(2, slots, dtype=torch.int64, device=model.device)
        self._sequences: list[Sequence] = []
        self._known: dict[tuple[int, int], _Known] = {}

    def clear(self) -> None:
        """All sequences leave."""
        self._known, self._sequences = {}, []
        self.rows.clear()

    def join(self, newcomers: Sequences) -> None:
        """Newcomers take the next slots."""
        self.rows.join(len(self._sequences), newcomers, [self.scale(one) for one in newcomers])
        self._sequences += newcomers
        self._known = {}

    def leave(self, moves: AnySequence[tuple[int, int]], left: int) -> None:
        """Sequences have ended; ``left`` go on, after these moves of (source, destination)."""
        self.rows.leave(moves, left)
        for source, destination in moves:
            self._sequences[destination] = self._sequences[source]
        del self._sequences[left:]
        self._known = {}

    def acts(self, rows: slice) -> Acts:
        """What acts on the sequences of these slots."""
        return self._of(rows).acts

    def scale(self, sequence: Sequence) -> float:
        """Its mixing weight."""
        request = sequence.request
        if request.aux_scale is not None:
            return request.aux_scale
        return 1.0 if request.auxiliary is None else self.model.auxiliary_scale(request.auxiliary)

    def scales(self, sequences: Sequences) -> Tensor | None:
        """(n,) mixing weights; None if no request has one of its own."""
        if all(one.request.aux_scale is None for one in sequences):
            return None
        return to_device([self.scale(one) for one in sequences], self.model.device)

    def draw(self, said: Said, rows: slice) -> Tensor | None:
        """One token for each of these slots, which fills ``results`` and is fed to ``rows``.

        Args:
            said: by the models, of rows (n,).
            rows: the slots, all taken.

        Returns:
            (n, 4 + M) float64 as ``Pending`` takes them; None if not wanted.
        """
        sequences, (acts, params) = self._sequences[rows], self._of(rows)
        # The token that the host has not seen yet may be one more.
        seen = 1 + max(len(one.generated) for one in sequences), max(len(one.prompt_ids) for one in sequences)
        counted, wanted = seen if acts.penalties else None, said.sides is not None
        drawn = self._sampled(said.terms, rows, params, counted, wanted)
        shares = [one.request.plausibility for one in sequences]
        if said.judge is not None and any(shares):
            drawn = self._judged(said.terms, said.judge, drawn, shares, rows, params, counted)
        self._take(drawn, rows)
        return None if said.sides is None else self._logprobs(said.sides, said.members, drawn)

    def _judged(
        self,
        terms: list[Term],
        judge: list[Term],
        drawn: Sample,
        shares: AnySequence[float],
        rows: slice,
        params: SamplingParams,
        seen: tuple[int, int] | None,
    ) -> Sample:
        """With the tokens of rows that have a ``plausibility`` drawn among what the judge finds plausible.

        All rows are drawn again, and the others' are left as they are: a row's token is its own.
        """
        V, device = self.model.config.vocab_size, self.model.device
        share = to_device(shares, device, torch.float32)
        among = plausible(terms, judge, share, vocab_size=V)
        other = self._sampled([among], rows, params, seen, drawn.logprob is not None)
        own = share > 0
        values: dict[str, Any] = {}
        for name in ("tokens", "status", "processed_logprob"):
            ours, theirs = getattr(drawn, name), getattr(other, name)
            values[name] = None if ours is None else torch.where(own, theirs, ours)
        if drawn.logprob is not None:
            # Of the whole sum, as everybody's.
            z = dense_logits(terms, vocab_size=V).log_softmax(-1)
            raw = z.gather(1, values["tokens"].clamp_min(0)[:, None])[:, 0]
            values["logprob"] = torch.where(own, raw, drawn.logprob)
        return replace(drawn, **values, term_logprobs=None)

    def draw_recorded(self, terms: list[Term], rows: slice, acts: Acts) -> None:
        """``draw`` for whatever sequences may stand in these slots, taken or not; nothing depends on which.

        Args:
            acts: what may act on them.
        """
        names = ["temperature"]
        names += [number.param for number in ROW_NUMBERS if acts.filters and number.filters]
        names += [number.param for number in ROW_NUMBERS if acts.penalties and number.penalises]
        settings: dict[str, Any] = {name: self.rows[name][rows] for name in names}
        if acts.biases:
            settings["logit_bias"] = Sparse(self.rows["bias_ids"][rows], self.rows["bias"][rows].float())
        length = self.rows["history"].shape[1]
        seen = (length, length) if acts.penalties else None
        self._take(self._sampled(terms, rows, SamplingParams(**settings), seen), rows)

    def _of(self, rows: slice) -> _Known:
        key = rows.start, rows.stop
        if key not in self._known:
            sequences = self._sequences[rows]
            params = _params_of_rows([one.request.params for one in sequences], self.model.device)
            self._known[key] = _Known(Acts.of(sequences), params)
        return self._known[key]

    def _sampled(
        self,
        terms: list[Term],
        rows: slice,
        params: SamplingParams,
        seen: tuple[int, int] | None,
        logprobs: bool = False,
    ) -> Sample:
        """``seen``: columns of the history and of the prompt that penalties count; None without them."""
        return sample(
            terms,
            params,
            seed=self.rows["seed"][rows],
            position=self.rows["position"][rows],
            history=None if seen is None else self.rows["history"][rows, : seen[0]],
            prompt=None if seen is None else self.rows["prompt"][rows, : seen[1]],
            vocab_size=self.model.config.vocab_size,
            return_logprobs=logprobs,
        )

    def _take(self, drawn: Sample, rows: slice) -> None:
        """Keeps what was drawn, and has it read next."""
        self.results[0, rows].copy_(drawn.tokens)
        self.results[1, rows].copy_(drawn.status)
        self.rows.feed(rows, drawn.tokens)

    def _logprobs(self, sides: Alone, members: AnySequence[AloneTerms], drawn: Sample) -> Tensor:
        """(n, 4 + M): of the draw, of either side, and of members."""
        V, device = self.model.config.vocab_size, self.model.device
        picked = drawn.tokens.clamp_min(0)[:, None]  # a failed row has token -1

        def alone(some: list[Term], ids: Tensor) -> Tensor:
            z = dense_logits(some, vocab_size=V).log_softmax(-1)
            return z.gather(1, ids)[:, 0].double()

        lm = alone(sides.lm, picked)
        auxiliary = alone(sides.auxiliary, picked) if sides.auxiliary else torch.full_like(lm, math.nan)
        if drawn.logprob is None or drawn.processed_logprob is None:
            raise RuntimeError("sample returned no log-probabilities although they were asked for")
        both = torch.stack([drawn.logprob.double(), drawn.processed_logprob.double(), lm, auxiliary], 1)
        M = 1 + max((max(one.places) for one in members), default=-1)
        each = both.new_full((len(both), M), math.nan)
        for one in members:
            rows, places = to_device(one.rows, device), to_device(one.places, device)
            each[rows, places] = alone(one.terms, picked[rows])
        return torch.cat([both, each], 1)


def check_drawable(request: Request, V: int) -> None:
    """Refuses what is right alone but cannot stand in a batch: its rows share float32 and int64 tensors.

    Args:
        V: tokens that can be drawn.

    Raises:
        ValueError: a number is none of float32's, top_k is beyond int64, or logit_bias or stop_token_ids
            have an id that is no token.
    """
    params = request.params
    numbers = [(name, getattr(params, name)) for name in _NUMBERS if name != "top_k"]
    numbers.append(("aux_scale", request.aux_scale or 0.0))
    for place, member in enumerate(request.members):
        numbers.append((f"the weight of members[{place}] ({member.model!r})", member.weight or 0.0))
    for token, bias in dict(params.logit_bias or {}).items():  # type: ignore[arg-type]
        if token >= V:
            raise ValueError(f"logit_bias has the id {token}, but there are {V} tokens; leave it out")
        if bias != -math.inf:
            numbers.append((f"logit_bias[{token}]", bias))
    for name, value in numbers:
        # Alone the number would be exact and in a batch it would be 0 or infinity: another text.
        if value and not _FLOAT32.smallest_normal <= abs(value) <= _FLOAT32.max:
            raise ValueError(
                f"{name} is {value:.3g}, which float32 does not have; choose 0, or a size between "
                f"{_FLOAT32.smallest_normal:.3g} and {_FLOAT32.max:.3g}"
            )
    for token in request.stop_token_ids:
        if token >= V:
            raise ValueError(f"stop_token_ids has the id {token}, but there are {V} tokens; leave it out")
    if params.top_k >= 2**63:
        raise ValueError(f"top_k is {params.top_k}; it must be below 2**63, and 0 keeps all tokens")


def _params_of_rows(each: list[SamplingParams], device: torch.device) -> SamplingParams:
    """The parameters of all rows in one; numbers stay numbers where all rows agree."""
    settings: dict[str, Any] = {}
    for name in _NUMBERS:
        values = [getattr(params, name) for params in each]
        if len(set(values)) == 1:
            settings[name] = values[0]
        else:
            dtype = torch.int64 if name == "top_k" else torch.float64  # top_p is one
            settings[name] = to_device(values, device, dtype)
    return SamplingParams(**settings, logit_bias=_bias_rows(each, device))


def _bias_rows(each: list[SamplingParams], device: torch.device) -> Sparse | None:
    listed = [dict(params.logit_bias or {}) for params in each]  # type: ignore[arg-type]
    longest = max(map(len, listed), default=0)
    if not longest:
        return None
    ids = [[*bias] + [0] * (longest - len(bias)) for bias in listed]
    values = [[*bias.values()] + [0.0] * (longest - len(bias)) for bias in listed]
    return Sparse(to_device(ids, device), to_device(values, device, torch.float32))
