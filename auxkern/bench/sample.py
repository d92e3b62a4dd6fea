"""The benchmark of ``auxkern.sample`` on logits: inputs, peers, check of the tokens, floor."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

import auxkern
from auxkern.bench import operators
from auxkern.bench.cases import FILTERS, TEMPERATURE
from auxkern.bench.operators import Errors, Floor, Implementation, Operator, is_installed, step, warped
from auxkern.bench.results import CaseResult
from auxkern.core.draws import gumbel, random_bits

_CHUNK_ELEMENTS = 2**21  # of a term, taken to float64 or to the reference at a time
_CHECKED_TOKENS, _MOST_DRAWS = 1024, 16  # of a peer, whose draws differ from call to call
_POSITION = 7


@dataclass(frozen=True)
class SampleInputs:
    """What tokens are drawn from."""

    terms: list[Tensor]  # (N, V) of one dtype
    seed: Tensor  # (N,) int64, another one for each row
    filters: str  # a name in ``FILTERS``

    @property
    def params(self) -> auxkern.SamplingParams:
        return FILTERS[self.filters]

    @property
    def sizes(self) -> dict[str, Any]:
        return {"N": self.seed.numel(), "V": self.terms[0].shape[1], "filters": self.filters}

    def leaves(self) -> list[Tensor]:
        return []

    def arguments(self) -> tuple[Any, ...]:
        return self.terms, self.params.top_k, self.params.top_p, self.params.min_p


@dataclass(frozen=True)
class Exact:
    """What is right."""

    tokens: Tensor  # (N,) the reference's, with the inputs' seeds
    logprob: Tensor  # (N, V) float32, of float64, among the tokens that the filters keep; -inf for others
    surprise: float  # mean over the rows of the mean of -logprob, and
    variance: float  # of its variance
    rounding: float  # how far z / temperature may be off in the terms' dtype


class Sample(Operator):
    def needed_bytes(self, case: CaseResult) -> int:
        # Hugging Face's top-p holds the sum, the scaled sum, both sorted with int64 ids, a softmax,
        # its cumulative sum, two masks and the result, at worst at one time; the check float32.
        return case.N * case.V * (case.terms * getattr(torch, case.dtype).itemsize + 48) + 2**29

    def inputs(self, case: CaseResult, device: torch.device) -> SampleInputs:
        """The LM's logits 3 N(0, 1), the others N(0, 1)."""
        shapes = [((case.N, case.V), std) for std in [3.0] + [1.0] * (case.terms - 1)]
        terms, _ = operators.normal(shapes, case, device)
        return inputs_of(terms, case.filters)

    def implementations(
        self, device: torch.device, dtype: torch.dtype, backends: Sequence[str]
    ) -> list[Implementation]:
        """Eager is one step of transformers' ``generate``, with the filters that are on."""

        known = is_installed("transformers")
        hf = importlib.import_module("transformers.generation.logits_process") if known else None

        def pipeline(terms: list[Tensor], top_k: int, top_p: float, min_p: float) -> Tensor:
            z = warped(hf, reduce(add, terms).float(), TEMPERATURE, top_k, top_p, min_p)
            return torch.multinomial(z.softmax(-1), 1)[:, 0]

        logits = "(lm + aux).float()" if dtype != torch.float32 else "lm + aux"
        steps = f"{logits}, transformers' logits warpers, softmax, torch.multinomial"
        call = "(lm + aux).float() / temperature, flashinfer.sampling"
        there = device.type == "cuda" and is_installed("flashinfer")
        return [ours(backend) for backend in backends] + operators.peers(
            device,
            [("eager", steps, pipeline)] if known else [],
            [("FlashInfer", call, _flashinfer)] if there else [],
        )

    def exact(self, inputs: SampleInputs) -> Exact:
        """The reference's tokens, and in float64 what the filters keep, widened by rounding.

        Code that sums the terms in their own dtype, as many do, moves a logit by u |z| of it for
        each term, and float32 sums over V are off by about u sqrt(V) (Higham 2002, section 4.2).
        A token that some such error lets through is kept here.
        """
        N, V = inputs.terms[0].shape
        largest = max(t.abs().amax().item() for t in inputs.terms) * len(inputs.terms)
        eps = torch.finfo(inputs.terms[0].dtype).eps  # 2 u
        rounding = (len(inputs.terms) * eps / 2 + 4 * 2**-24) * largest / TEMPERATURE
        tokens, logprob, surprise, variance = [], [], 0.0, 0.0
        for rows in torch.arange(N, device=inputs.seed.device).split(max(1, _CHUNK_ELEMENTS // V)):
            part = SampleInputs([t[rows] for t in inputs.terms], inputs.seed[rows], inputs.filters)
            log_p = kept_logprob(_scaled(part.terms), inputs.params, rounding)
            bits = -log_p.masked_fill(log_p == -torch.inf, 0)
            mean = (log_p.exp() * bits).sum(-1)
            surprise += mean.sum().item() / N
            variance += ((log_p.exp() * bits**2).sum(-1) - mean**2).sum().item() / N
            tokens.append(_draw(part, "reference"))
            logprob.append(log_p.float())
        return Exact(torch.cat(tokens), torch.cat(logprob), surprise, variance, rounding)

    def check(
        self, inputs: Any, exact: Any, implementation: Implementation, outputs: Mapping[str, Tensor]
    ) -> Errors:
        """Whether tokens are those that may come, and whether they come as often as they should.

        "draw": ours, share of rows whose token is not the reference's; else as "miss".
        "miss": share of tokens that no rounding explains. Ours must be the reference's token unless
        the two score alike; every token must be one that the filters keep in float64.
        "surprise": |mean of -logprob over the tokens - its expectation|, in nats, which sees a
        forgotten term or temperature. Bernstein's inequality bounds it, exceeded once in e**14.
        """
        drawn = [outputs["draw"]]
        if not implementation.ours:
            more = min(_MOST_DRAWS, math.ceil(_CHECKED_TOKENS / inputs.seed.numel()))
            drawn += [step(inputs, implementation, "draw") for _ in range(more - 1)]
        tokens = torch.stack([t.long() for t in drawn])  # (draws, N)
        V = exact.logprob.shape[1]
        log_p = exact.logprob.gather(1, tokens.T.clamp(0, V - 1)).T.double()
        miss = other = (tokens < 0) | (tokens >= V) | (log_p == -torch.inf)
        if implementation.ours:
            other = tokens != exact.tokens
            miss = miss | (other & ~tied(inputs, exact, tokens[0])[None])
        surprises = -log_p[log_p > -torch.inf]
        # P(-logprob > s) <= V exp(-s), so one in e**14 is larger than this.
        n, confidence = max(1, surprises.numel()), 14.0
        largest = math.log(V) + confidence
        bound = math.sqrt(2 * exact.variance * confidence / n) + largest * confidence / (3 * n)
        surprise = abs(surprises.mean().item() - exact.surprise) if surprises.numel() else math.nan
        shares = {"draw": other.double().mean().item(), "miss": miss.double().mean().item()}
        return Errors(shares | {"surprise": surprise}, {"miss": 0.0, "surprise": bound + 2 * exact.rounding})

    def floors(self, inputs: SampleInputs) -> dict[str, Floor]:
        """Every term is read once."""
        return {"draw": operators.reading(inputs.terms)}


OPERATOR = Sample()


def inputs_of(terms: list[Tensor], filters: str) -> SampleInputs:
    """Inputs with seeds 0 to N - 1."""
    return SampleInputs(terms, torch.arange(terms[0].shape[0], device=terms[0].device), filters)


def _scaled(terms: Sequence[Tensor]) -> Tensor:
    """(N, V) float64 (z - max z) / temperature."""
    z = reduce(add, (t.double() for t in terms))
    return (z - z.amax(-1, keepdim=True)) / TEMPERATURE


def kept_logprob(scaled: Tensor, filters: auxkern.SamplingParams, rounding: float) -> Tensor:
    """(N, V) float64 log-probabilities among what top-k, top-p and min-p keep, in this order.

    ``scaled`` are (N, V) float64 logits over the temperature, largest 0. What they would keep if entries
    were off by ``rounding`` is kept too.
    """
    V, slack = scaled.shape[1], 2 * rounding
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if filters.top_k:
        kept = scaled >= scaled.topk(min(V, int(filters.top_k))).values[:, -1:] - slack
    if filters.top_p < 1:
        falling = scaled.masked_fill(~kept, -torch.inf).sort(-1, descending=True).values
        mass = falling.softmax(-1).cumsum(-1)
        # How many surely come before each token: those that lie above it by more than the slack.
        before = torch.searchsorted(-falling, -(scaled + slack))
        share = torch.where(before > 0, mass.gather(1, (before - 1).clamp(min=0)), 0.0)
        kept &= share * math.exp(-slack) < filters.top_p + 4 * 2**-24 * math.sqrt(V)
    if filters.min_p:
        kept &= scaled >= math.log(filters.min_p) - slack
    return scaled.masked_fill(~kept, -torch.inf).log_softmax(-1)


def tied(inputs: SampleInputs, exact: Exact, tokens: Tensor) -> Tensor:
    """(N,) where another token than the reference's scores as high as that, up to float32's rounding."""
    ties = torch.zeros_like(tokens, dtype=torch.bool)
    V = exact.logprob.shape[1]
    for row in ((tokens != exact.tokens) & (tokens >= 0) & (tokens < V)).nonzero()[:, 0].tolist():
        here = slice(row, row + 1)
        position = torch.full_like(inputs.seed[here], _POSITION)
        noise = gumbel(random_bits(inputs.seed[here], position, V))
        scaled = _scaled([t[here] for t in inputs.terms])
        mine, theirs = ((scaled + noise)[0, t[row]] for t in (tokens, exact.tokens))
        size = scaled[0, tokens[row]].abs() + mine.abs() + theirs.abs()
        float32 = 4 * 2**-24 * sum(t[row].abs().amax().item() for t in inputs.terms) / TEMPERATURE
        ties[row] = (mine - theirs).abs() <= 8 * 2**-24 * size + 2 * float32
    return ties


def ours(backend: str) -> Implementation:
    """``auxkern.sample`` on one backend."""
    call = f'auxkern.sample([lm, aux], params, seed=seed, position=position, backend="{backend}")'
    return Implementation(f"auxkern {backend}", call, True, partial(_draw, backend=backend))


def _draw(inputs: SampleInputs, backend: str) -> Tensor:
    options: dict[str, Any] = {"seed": inputs.seed, "position": _POSITION, "backend": backend}
    return auxkern.sample(inputs.terms, inputs.params, **options).tokens


def _flashinfer(terms: list[Tensor], top_k: int, top_p: float, min_p: float) -> Any:
    """Its samplers for what is on; it has none for top-k or top-p together with min-p."""
    sampling: Any = importlib.import_module("flashinfer.sampling")
    z = reduce(add, terms).float() / TEMPERATURE
    if top_k and top_p < 1:
        return sampling.top_k_top_p_sampling_from_logits(z, top_k, top_p, filter_apply_order="top_k_first")
    if top_k:
        return sampling.top_k_sampling_from_probs(z.softmax(-1), top_k)
    if top_p < 1:
        return sampling.top_p_sampling_from_probs(z.softmax(-1), top_p)
    if min_p:
        return sampling.min_p_sampling_from_probs(z.softmax(-1), min_p)
    return sampling.sampling_from_logits(z)
