"""How a next token is chosen from a row of logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from auxkern.terms import INTEGER_DTYPES, Sparse

# Fields of a Hugging Face GenerationConfig that change which token is drawn and have no counterpart
# here, with the values that switch them off.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "top_h": (None, 1.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "force_words_ids": (None,),
    "constraints": (None,),
    "exponential_decay_length_penalty": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
}


@dataclass(frozen=True, eq=False)
class SamplingParams:
    """How a token is drawn from z, the sum of the terms; each field one number, or one for each row.

    In Hugging Face's order: ``logit_bias``, the penalties, temperature, top-k, top-p, min-p.

    Args:
        temperature: what z is divided by; 0 takes the largest logit, the lowest id among equals.
        top_k: keeps the k largest logits, and all that equal the last of them; 0 keeps all.
        top_p: keeps the fewest tokens, by falling probability and rising id, whose probabilities
            reach p, in (0, 1] (Holtzman et al. 2020).
        min_p: keeps tokens with at least this share of the largest probability, in [0, 1] (Nguyen
            et al. 2024).
        repetition_penalty: of ids in the prompt or the history: a positive logit is divided by it,
            another one multiplied (Keskar et al. 2019); 1 is none.
        presence_penalty: subtracted from logits of ids in the history; 0 is none.
        frequency_penalty: subtracted once for each time that an id is in the history; 0 is none.
        logit_bias: {id: bias}, or ``Sparse(ids (N, K), values (N, K))``, added first; -inf forbids
            an id.

    Numbers are Python numbers or tensors (N,). A tensor on a GPU is not looked at, which would stop
    the GPU; what it holds must be in range.

    Raises:
        TypeError: a field is neither a number nor a tensor.
        ValueError: a number is out of range, or contradicts another one: with temperature 0 for all
            rows no filter has an effect.
    """

    temperature: float | Tensor = 1.0
    top_k: int | Tensor = 0
    top_p: float | Tensor = 1.0
    min_p: float | Tensor = 0.0
    repetition_penalty: float | Tensor = 1.0
    presence_penalty: float | Tensor = 0.0
    frequency_penalty: float | Tensor = 0.0
    logit_bias: Mapping[int, float] | Sparse | None = None

    def __post_init__(self) -> None:
        self._check("temperature", 0.0, math.inf, closed=(True, False))
        self._check("top_k", 0, math.inf, integer=True)
        self._check("top_p", 0.0, 1.0, closed=(False, True))
        self._check("min_p", 0.0, 1.0)
        self._check("repetition_penalty", 0.0, math.inf, closed=(False, False))
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, -math.inf, math.inf, closed=(False, False))
        self._check_bias()
        if not isinstance(self.temperature, Tensor) and self.temperature == 0:
            for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
                value = getattr(self, name)
                if isinstance(value, Tensor) or value != off:
                    raise ValueError(
                        f"temperature is 0, which takes the largest logit, but {name} is {value}; "
                        f"drop {name}, or give a temperature"
                    )

    @classmethod
    def from_generation_config(cls, config: Any) -> SamplingParams:
        """The same as a transformers ``GenerationConfig`` says.

        Args:
            config: where ``do_sample`` is not true, temperature 0.

        Raises:
            ValueError: it asks for something that has no counterpart here, such as beams.
        """
        for name, off in _UNSUPPORTED.items():
            value = getattr(config, name, None)
            if value not in off:
                raise ValueError(
                    f"generation_config.{name} is {value!r}, which auxkern.sample cannot honour; "
                    "unset it, or use transformers' generate"
                )
        settings: dict[str, Any] = {"logit_bias": _single_tokens(getattr(config, "sequence_bias", None))}
        names = ["repetition_penalty"]
        if getattr(config, "do_sample", None):
            names += ["temperature", "top_k", "top_p", "min_p"]
        else:
            settings["temperature"] = 0.0
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                settings[name] = value
        return cls(**settings)

    @property
    def is_plain(self) -> bool:
        """Whether no row has a filter; numbers in tensors are not looked at, and may be filters."""
        filters = ((self.top_k, 0), (self.top_p, 1.0), (self.min_p, 0.0))
        return all(not isinstance(value, Tensor) and value == off for value, off in filters)

    def _check(
        self,
        name: str,
        low: float,
        high: float,
        *,
        closed: tuple[bool, bool] = (True, True),
        integer: bool = False,
    ) -> None:
        value = getattr(self, name)
        allowed = f"{'[' if closed[0] else '('}{low}, {high}{']' if closed[1] else ')'}"
        if isinstance(value, Tensor):
            self._check_tensor(name, value, integer)
            if value.device.type != "cpu" or value.numel() == 0:
                return
            worst = value[~_inside(value, low, high, closed)]
            if worst.numel():
                raise ValueError(f"{name} holds {worst[0].item()}; it must lie in {allowed}")
            return
        kinds = (int,) if integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            kind = "an int" if integer else "a number"
            raise TypeError(f"{name} must be {kind} or a tensor (N,), got {type(value).__name__}")
        if not bool(_inside(torch.tensor(float(value), dtype=torch.float64), low, high, closed)):
            raise ValueError(f"{name} is {value}; it must lie in {allowed}")

    def _check_tensor(self, name: str, value: Tensor, integer: bool) -> None:
        if value.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; give one number, or a tensor (N,)")
        fits = value.dtype in INTEGER_DTYPES if integer else value.is_floating_point()
        if not fits:
            kind = "integers" if integer else "floating-point"
            raise TypeError(f"{name} has dtype {value.dtype}; it must be {kind}")
        for field in fields(self):
            other = getattr(self, field.name)
            if isinstance(other, Tensor) and other.dim() == 1 and other.shape != value.shape:
                raise ValueError(
                    f"{name} has {value.shape[0]} entries but {field.name} has {other.shape[0]}; "
                    "give each row one of both"
                )

    def _check_bias(self) -> None:
        bias = self.logit_bias
        if bias is None or isinstance(bias, Sparse):
            return
        if not isinstance(bias, Mapping):
            raise TypeError(
                f"logit_bias must be a dict {{id: bias}}, auxkern.Sparse or None, got {type(bias).__name__}"
            )
        for token, value in bias.items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ValueError(f"logit_bias has the key {token!r}; keys are token ids")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value < math.inf:
                raise ValueError(f"logit_bias[{token}] is {value!r}; it must be a number below infinity")


def _inside(value: Tensor, low: float, high: float, closed: tuple[bool, bool]) -> Tensor:
    above = value >= low if closed[0] else value > low
    below = value <= high if closed[1] else value < high
    return above & below


def _single_tokens(sequence_bias: Any) -> dict[int, float] | None:
    if not sequence_bias:
        return None
    pairs = sequence_bias.items() if isinstance(sequence_bias, Mapping) else sequence_bias
    bias = {}
    for ids, value in pairs:
        if len(ids) != 1:
            raise ValueError(
                f"generation_config.sequence_bias has the sequence {tuple(ids)}, which auxkern.sample cannot "
                "honour: a bias is of one token"
            )
        bias[int(ids[0])] = float(value)
    return bias
