"""Tokens for rows with sampling parameters of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from auxkern.core.terms import Sparse, Term
from auxkern.generation.request import Request, Sequence, Sequences
from auxkern.model.text import padded
from auxkern.ops.dense import dense_logits
from auxkern.ops.sample import sample
from auxkern.ops.sampling_params import SamplingParams

_NUMBERS = tuple(one.name for one in fields(SamplingParams) if one.name != "logit_bias")

_FLOAT32 = torch.finfo(torch.float32)

Logprob = tuple[float, float, float, float | None]


@dataclass(frozen=True)
class Drawn:
    """One token for each row.

    Attributes:
        tokens: ids.
        status: 0 where all is well, see ``auxkern.Sample``.
        logprobs: (raw, processed, LM alone, auxiliary alone) of each token; empty if no row wants them.
    """

    tokens: list[int]
    status: list[int]
    logprobs: list[Logprob]


class Drawer:
    """Keeps what does not change from step to step while the same sequences run.

    Args:
        model: an ``AuxTunedForCausalLM``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._known: tuple[list[Sequence], SamplingParams, Tensor] | None = None

    def scales(self, sequences: Sequences) -> Tensor | None:
        """(n,) mixing weights; None if no request has one of its own."""
        if all(one.request.aux_scale is None for one in sequences):
            return None
        return torch.tensor([self.scale(one) for one in sequences], device=self.model.device)

    def draw(self, terms: list[Term], sequences: Sequences) -> Drawn:
        """One token for each sequence.

        Args:
            terms: of rows (n,).
            sequences: n of them.
        """
        device = self.model.device
        if self._known is None or [*map(id, self._known[0])] != [*map(id, sequences)]:
            seed = torch.tensor([s.seed for s in sequences], dtype=torch.int64, device=device)
            self._known = [*sequences], _params_of_rows([s.request.params for s in sequences], device), seed
        _, params, seed = self._known
        penalised = any(s.request.params.penalises for s in sequences)
        wanted = any(s.request.logprobs for s in sequences)
        drawn = sample(
            terms,
            params,
            seed=seed,
            position=torch.tensor([s.length for s in sequences], device=device),
            history=padded([s.generated for s in sequences], -1)[0].to(device) if penalised else None,
            prompt=padded([s.prompt_ids for s in sequences], -1)[0].to(device) if penalised else None,
            vocab_size=self.model.config.vocab_size,
            return_logprobs=wanted,
        )
        logprobs = self._logprobs(terms, drawn, sequences) if wanted else []
        return Drawn(drawn.tokens.tolist(), drawn.status.tolist(), logprobs)

    def scale(self, sequence: Sequence) -> float:
        """Its mixing weight."""
        request = sequence.request
        if request.aux_scale is not None:
            return request.aux_scale
        return 1.0 if request.auxiliary is None else self.model.auxiliary_scale(request.auxiliary)

    def _logprobs(self, terms: list[Term], drawn: Any, sequences: Sequences) -> list[Logprob]:
        """Of the terms as ``model.terms(separate=True)`` gives them: the base's first."""
        V = self.model.config.vocab_size
        picked = drawn.tokens.clamp_min(0)[:, None]  # a failed row has token -1

        def alone(some: list[Term]) -> list[float]:
            z = dense_logits(some, vocab_size=V).log_softmax(-1)
            return [float(x) for x in z.gather(1, picked)[:, 0]]

        lm = alone(terms[:1])
        auxiliary: list[float | None] = [*alone(terms[1:])] if len(terms) > 1 else [None] * len(lm)
        own = [None if s.request.auxiliary is None else x for s, x in zip(sequences, auxiliary, strict=True)]
        return list(zip(drawn.logprob.tolist(), drawn.processed_logprob.tolist(), lm, own, strict=True))


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
            settings[name] = torch.tensor(values, dtype=dtype, device=device)
    return SamplingParams(**settings, logit_bias=_bias_rows(each, device))


def _bias_rows(each: list[SamplingParams], device: torch.device) -> Sparse | None:
    listed = [dict(params.logit_bias or {}) for params in each]  # type: ignore[arg-type]
    longest = max(map(len, listed), default=0)
    if not longest:
        return None
    ids = [[*bias] + [0] * (longest - len(bias)) for bias in listed]
    values = [[*bias.values()] + [0.0] * (longest - len(bias)) for bias in listed]
    return Sparse(torch.tensor(ids, device=device), torch.tensor(values, dtype=torch.float32, device=device))
