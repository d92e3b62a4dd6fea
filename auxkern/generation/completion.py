"""What a batch run answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from auxkern.generation.request import Request, check_id, check_integer

FinishReason = Literal["end", "stop", "length", "error"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities of a text's tokens, one float for each of its token_ids.

    Attributes:
        raw: log softmax(z), z the sum of both models' logits, before bias, penalties and filters.
        processed: among what bias, penalties, temperature and filters left; 0 for temperature 0.
        lm: of the language model alone; of a mixture, of the first member of the base alone.
        auxiliary: of the auxiliary alone, times its scale, or of all auxiliaries' weighted sum; None where
            there is none.
        members: of a request with members, those of each member in the request's order: log softmax of its
            model's own logits, which its weight does not enter; None for a pair.
    """

    raw: tuple[float, ...]
    processed: tuple[float, ...]
    lm: tuple[float, ...]
    auxiliary: tuple[float, ...] | None = None
    members: tuple[tuple[float, ...], ...] | None = None

    def as_record(self) -> dict[str, Any]:
        """The same as a JSON object, with null for -infinity; without members where there are none.

        Raises:
            ValueError: a number is NaN or infinity.
        """
        record: dict[str, Any] = {}
        for name in ("raw", "processed", "lm", "auxiliary"):
            values = getattr(self, name)
            record[name] = None if values is None else _finite(name, values)
        if self.members is not None:
            record["members"] = [_finite(f"members[{i}]", values) for i, values in enumerate(self.members)]
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TokenLogprobs:
        """What ``as_record`` returned.

        Raises:
            ValueError: a field is missing.
        """
        values: dict[str, Any] = {}
        for name in ("raw", "processed", "lm", "auxiliary"):
            if name not in record:
                raise ValueError(f"logprobs has no field {name!r}")
            values[name] = None if record[name] is None else _numbers(record[name])
        members = record.get("members")
        return cls(**values, members=None if members is None else tuple(map(_numbers, members)))


def _finite(name: str, values: Iterable[float]) -> list[float | None]:
    """As JSON has them."""
    listed: list[float | None] = []
    for value in values:
        if not value < math.inf:
            raise ValueError(f"logprobs.{name} holds {value}, which is no log-probability")
        listed.append(None if value == -math.inf else value)
    return listed


def _numbers(listed: Iterable[float | None]) -> tuple[float, ...]:
    """Of JSON."""
    return tuple(-math.inf if number is None else float(number) for number in listed)


@dataclass(frozen=True)
class Completion:
    """One text of a request.

    Attributes:
        id: of the request.
        sample: number of the text among the request's, from 0.
        text: what follows the prompt, without special tokens, and without the stop string.
        token_ids: what was drawn, the end token and the tokens of a stop string among them.
        finish_reason: "end" (an end token), "stop" (a stop string or token), "length" or "error".
        prompt_tokens: tokens of the prompt with the start token.
        seed: what this text was drawn with; None after an error before the first draw.
        error: what went wrong; None unless finish_reason is "error".
        logprobs: one number for each of token_ids; None unless asked for.

    Raises:
        ValueError: finish_reason is another word, or is "error" without an error or the reverse.
    """

    id: str | int
    sample: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int | None = None
    error: str | None = None
    logprobs: TokenLogprobs | None = None

    def __post_init__(self) -> None:
        check_id(self.id)
        check_integer("sample", self.sample, 0)
        if self.finish_reason not in get_args(FinishReason):
            raise ValueError(
                f"finish_reason is {self.finish_reason!r}; it is one of {', '.join(get_args(FinishReason))}"
            )
        if (self.finish_reason == "error") != (self.error is not None):
            raise ValueError(
                f"finish_reason is {self.finish_reason!r} but error is {self.error!r}; they go together"
            )

    @classmethod
    def failed(cls, request: Request, sample: int, error: str) -> Completion:
        """The answer to a request that cannot be served."""
        return cls(request.id, sample, "", (), "error", 0, error=error)

    @property
    def new_tokens(self) -> int:
        """Tokens that were drawn."""
        return len(self.token_ids)

    def as_record(self) -> dict[str, Any]:
        """The same as a JSON object; error and logprobs are absent where they are None."""
        record: dict[str, Any] = {
            "id": self.id,
            "sample": self.sample,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "seed": self.seed,
            "token_ids": list(self.token_ids),
        }
        if self.error is not None:
            record["error"] = self.error
        if self.logprobs is not None:
            record["logprobs"] = self.logprobs.as_record()
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Completion:
        """What ``as_record`` returned.

        Raises:
            TypeError: it is not an object.
            ValueError: a field is missing or unknown, or the numbers disagree.
        """
        if not isinstance(record, Mapping):
            raise TypeError(f"a completion must be an object, got {type(record).__name__}")
        values = dict(record)
        new_tokens = values.pop("new_tokens", None)
        known = {one.name for one in fields(cls)}
        required = known - {"seed", "error", "logprobs"}
        for problem, names in (("no", required - set(values)), ("an unknown", set(values) - known)):
            if names:
                raise ValueError(f"the completion has {problem} field {min(names)!r}")
        values["token_ids"] = tuple(values["token_ids"])
        if new_tokens != len(values["token_ids"]):
            raise ValueError(f"new_tokens is {new_tokens} but there are {len(values['token_ids'])} token_ids")
        if values.get("logprobs") is not None:
            values["logprobs"] = TokenLogprobs.from_record(values["logprobs"])
        return cls(**values)
