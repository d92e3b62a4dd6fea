"""What a batch run is asked for, and a text on its way."""

from __future__ import annotations

import difflib
from collections import Counter, abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from auxkern.core.draws import ROW_NUMBERS
from auxkern.core.seeds import mixed_seed
from auxkern.core.terms import Sparse, as_number
from auxkern.generation.members import (
    BASE,
    SHORTHANDS,
    Member,
    Part,
    check_text,
    check_weight,
    members_from,
)
from auxkern.ops.sampling_params import SamplingParams

State = Literal["new", "waiting", "running", "ended"]

_SAMPLING = tuple(one.name for one in fields(SamplingParams))
_FILTERS = tuple(number.param for number in ROW_NUMBERS if number.filters)
_SEEDS = 2**63


@dataclass(frozen=True)
class Request:
    """One condition and prompt, and how texts for them are drawn.

    Attributes:
        id: names the request in the output; an int or a str that is not empty.
        condition: what the auxiliary sees; not read where there is no auxiliary.
        prompt: what the text continues.
        params: how a token is drawn; numbers only, no tensors.
        seed: of the first sample, in [0, 2**63); the others' are made from it.
        max_new_tokens: most tokens of a text, the end token counted.
        stop: a text ends before the first of these strings; special tokens count as they are spelled.
        auxiliary: name of the auxiliary; None for the language model alone.
        members: of a mixture of several models or contexts, in place of condition, auxiliary and aux_scale;
            empty for the pair. The first language model must be the base.
        plausibility: of a mixture: only tokens are drawn whose probability under the first member of the base
            alone is at least this share of the largest, in [0, 1]; see ``auxkern.plausible``.
        aux_scale: weight of the auxiliary's logits; None for the one that it was trained with.
        samples: texts that are wanted.
        logprobs: whether the answer holds log-probabilities.
        ignore_eos: whether the end tokens (``TextFormat.end_ids``) are ones like any other.
        stop_token_ids: a text ends with the first of these ids, of which it has the text; also where
            ``ignore_eos`` is true.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two contradict each other.
    """

    id: str | int
    condition: str = ""
    prompt: str = ""
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    auxiliary: str | None = "default"
    aux_scale: float | None = None
    samples: int = 1
    logprobs: bool = False
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    members: tuple[Member, ...] = ()
    plausibility: float = 0.0

    def __post_init__(self) -> None:
        for name in ("id", "seed", "max_new_tokens", "samples", "aux_scale", "plausibility"):
            object.__setattr__(self, name, as_number(getattr(self, name)))
        check_id(self.id)
        for name in ("condition", "prompt"):
            check_text(name, getattr(self, name))
        if not isinstance(self.params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, got {type(self.params).__name__}")
        for name in _SAMPLING:
            if isinstance(getattr(self.params, name), (Tensor, Sparse)):
                raise TypeError(
                    f"params.{name} is of many rows; a request takes one number, or a dict of biases"
                )
        check_integer("seed", self.seed, 0, _SEEDS)
        for name in ("max_new_tokens", "samples"):
            check_integer(name, getattr(self, name), 1)
        for name in ("logprobs", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r:.60}")
        if not isinstance(self.stop, tuple):
            raise TypeError(f"stop must be a tuple of str, got {type(self.stop).__name__}; write (text,)")
        for text in self.stop:
            check_text("stop", text)
            if not text:
                raise ValueError("stop holds an empty str, which would end every text at once; leave it out")
        if not isinstance(self.stop_token_ids, tuple):
            kind = type(self.stop_token_ids).__name__
            raise TypeError(f"stop_token_ids must be a tuple of int, got {kind}; write (id,)")
        for token in self.stop_token_ids:
            check_integer("stop_token_ids", token, 0)
        self._check_auxiliary()
        self._check_members()
        if self.samples > 1 and self.params.temperature == 0:
            raise ValueError(
                f"samples is {self.samples} but temperature is 0, which always finds the same text; "
                "ask for one sample, or give a temperature"
            )

    @classmethod
    def from_record(
        cls, record: Mapping[str, Any], defaults: Request | None = None, id: str | int | None = None
    ) -> Request:
        """The request that a JSON object stands for.

        Its fields are those of ``Request``, with the fields of ``SamplingParams`` in place of params.
        A field that is absent or null has the default's value, but an auxiliary of null is none. In place of
        members there may be a shorthand, such as "guidance": {"scale": 1.5, "negative_prompt": "..."}, with
        the arguments of the function of that name in ``auxkern.generation.members``.
        ``stop`` may be one str, ``stop_token_ids`` one int. A "text" is not read, so a file of training
        examples will do.

        Without a seed the request has one made from the default's and its id, so that what is drawn
        depends neither on the order of requests nor on their number.

        Args:
            record: the object.
            defaults: what absent fields are; its id does not count. Filters of its params do not hold
                for a record with temperature 0.
            id: the id of a record without one.

        Raises:
            TypeError: the record is not an object, or a field has the wrong type.
            ValueError: a field is unknown (the message names the closest) or out of range.
        """
        if not isinstance(record, Mapping):
            raise TypeError(f"a request must be an object with named fields, got {type(record).__name__}")
        _check_field_names(record)
        given = {name: value for name, value in record.items() if value is not None or name == "auxiliary"}
        given.pop("text", None)
        given.setdefault("id", id)
        given["id"] = as_number(given["id"])
        if given["id"] is None:
            raise ValueError("the request has no id; give it one")
        check_id(given["id"])
        if defaults is None:
            defaults = cls(id=given["id"])
        sampling = {name: given.pop(name) for name in _SAMPLING if name in given}
        if sampling:
            given["params"] = _merged_params(sampling, defaults.params)
        if "stop" in given:
            given["stop"] = _as_tuple("stop", given["stop"], str)
        if "stop_token_ids" in given:
            given["stop_token_ids"] = _as_tuple("stop_token_ids", given["stop_token_ids"], int)
        given |= _mixture_of(given, defaults.prompt)
        if "members" not in given and any(name in given for name in ("condition", "auxiliary", "aux_scale")):
            given |= {"members": (), "plausibility": 0.0}  # the record means a pair
        if "seed" not in given:
            given["seed"] = mixed_seed(defaults.seed, f"request {given['id']!r}")
        if "auxiliary" in given and given["auxiliary"] is None:
            given.setdefault("aux_scale", None)  # the default's is about an auxiliary
        return replace(defaults, **given)

    def as_record(self) -> dict[str, Any]:
        """The same as a JSON object, which ``from_record`` reads."""
        record = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "params"}
        record |= {name: list(getattr(self, name)) for name in ("stop", "stop_token_ids")}
        del record["members"]
        if self.members:
            record["members"] = [member.as_record() for member in self.members]
        record |= {name: getattr(self.params, name) for name in _SAMPLING}
        if self.params.logit_bias is not None:
            biases = self.params.logit_bias
            record["logit_bias"] = {str(token): bias for token, bias in dict(biases).items()}  # type: ignore[arg-type]
        return record

    def sequences(
        self,
        prompt_ids: Iterable[int],
        condition_ids: Iterable[int],
        samples: Iterable[int] | None = None,
        members: Iterable[Part] = (),
        told: int = 0,
        base: str = BASE,
    ) -> list[Sequence]:
        """The request's samples as sequences to be scheduled.

        Args:
            prompt_ids: (T), the start token and the prompt.
            condition_ids: (K) of the condition; none where there is no auxiliary.
            samples: numbers of the samples that are wanted; all of them if None.
            members: of a mixture, what each reads.
            told: as of ``Part``, of prompt_ids.
            base: of a pair, as of ``Sequence``.

        Raises:
            ValueError: there are no prompt_ids, or no such sample.
        """
        prompt, condition = tuple(prompt_ids), tuple(condition_ids)
        wanted = range(self.samples) if samples is None else samples
        parts = tuple(members)
        return [Sequence(self, index, prompt, condition, parts, told, base) for index in wanted]

    def _check_members(self) -> None:
        if not isinstance(self.members, tuple) or any(not isinstance(one, Member) for one in self.members):
            raise TypeError("members must be a tuple of Member; write (Member(...), ...)")
        share = self.plausibility
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise TypeError(f"plausibility must be a number, got {type(share).__name__}: {share!r:.60}")
        if not 0 <= share <= 1:
            raise ValueError(f"plausibility is {share}; it must be in [0, 1]")
        if not self.members:
            if share:
                raise ValueError(
                    f"plausibility is {share}, but there are no members that could judge; give members"
                )
            return
        for name, default in (("condition", ""), ("aux_scale", None)):
            if getattr(self, name) != default:
                raise ValueError(f"{name} is of a pair, and members say it themselves; leave one of them out")
        if self.auxiliary not in (None, "default"):
            raise ValueError(
                f"auxiliary is {self.auxiliary!r} beside members; name it among them, or leave members out"
            )
        if all(one.model != BASE for one in self.members):
            named = ", ".join(one.model for one in self.members)
            raise ValueError(f"members are {named}, without the base; add a member of the model {BASE!r}")
        if all(one.weight == 0 for one in self.members):
            raise ValueError("every member's weight is 0; give one of them some")

    def _check_auxiliary(self) -> None:
        if self.auxiliary is not None:
            check_text("auxiliary", self.auxiliary)
            if not self.auxiliary:
                raise ValueError("auxiliary is empty; name one, or pass None for the language model alone")
        scale = self.aux_scale
        check_weight("aux_scale", scale)
        if scale is not None and self.auxiliary is None:
            raise ValueError(f"aux_scale is {scale} but auxiliary is None; leave one of them out")


# What ``Request.from_record`` reads, beside a "text" that it passes over.
REQUEST_FIELDS = (
    *(one.name for one in fields(Request) if one.name != "params"),
    *_SAMPLING,
    *SHORTHANDS,
)


@dataclass(eq=False)
class Sequence:
    """One sample of a request on its way, from the queue through a slot to its end.

    Attributes:
        request: what it is a sample of.
        sample: its number among the request's samples.
        prompt_ids: (T), the start token and the prompt.
        condition_ids: (K).
        members: of a mixture: what each reads; empty for a pair, of which ``parts`` makes them.
        told: how many of the prompt_ids are the base prompt, see ``Part``.
        base: of a pair: what of the base reads the text, BASE or FIRST.
        generated: what was drawn so far.
        state: "new", "waiting", "running" or "ended"; the scheduler's to change.
        slot: where it runs, or None; the scheduler's to change.

    Raises:
        ValueError: there are no prompt_ids, or the request has no such sample.
    """

    request: Request
    sample: int
    prompt_ids: tuple[int, ...]
    condition_ids: tuple[int, ...] = ()
    members: tuple[Part, ...] = ()
    told: int = 0
    base: str = BASE
    generated: list[int] = field(default_factory=list)
    state: State = "new"
    slot: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(
                f"request {self.request.id!r}: prompt_ids is empty; a sequence begins with the start token"
            )
        if not 0 <= self.sample < self.request.samples:
            raise ValueError(
                f"request {self.request.id!r} has {self.request.samples} samples, "
                f"none with number {self.sample}"
            )

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What each model that writes it reads, the base first where there is no mixture."""
        if self.members:
            return self.members
        request = self.request
        base = Part(self.base, self.prompt_ids, told=self.told)
        if request.auxiliary is None:
            return (base,)
        own = (self.prompt_ids, self.condition_ids, request.aux_scale, 0, self.told)
        return base, Part(request.auxiliary, *own)

    @cached_property
    def width(self) -> int:
        """Rows that it takes of the model of which it takes most."""
        return max(Counter(part.model for part in self.parts).values())

    @cached_property
    def has_auxiliary(self) -> bool:
        """Whether an auxiliary is among its members."""
        return any(part.base >= 0 for part in self.parts)

    @cached_property
    def contexts(self) -> tuple[int, ...]:
        """Tokens of each context that is read before the first draw.

        One for every prompt that a language model reads, with the conditions of the auxiliaries that read it
        too. Members of one model that read the same do so once.
        """
        lengths = {
            (part.model, part.prompt_ids): len(part.prompt_ids) for part in self.parts if part.base < 0
        }
        for part in dict.fromkeys(part for part in self.parts if part.base >= 0):
            read = self.parts[part.base]
            lengths[read.model, read.prompt_ids] += len(part.condition_ids)
        return tuple(lengths.values())

    def named(self, part: Part) -> str:
        """Which of its members this is, for a message; nothing of a pair, which has one of a kind."""
        if not self.members:
            return ""
        return f" of members[{self.members.index(part)}] ({part.model!r})"

    @property
    def key(self) -> tuple[str | int, int]:
        """The request's id and the sample's number."""
        return self.request.id, self.sample

    @property
    def seed(self) -> int:
        """What it is drawn with: the request's own seed for the first sample."""
        return mixed_seed(self.request.seed, "sample", self.sample) if self.sample else self.request.seed

    @property
    def max_new_tokens(self) -> int:
        """Most tokens that are drawn."""
        return self.request.max_new_tokens

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt, and what was drawn so far."""
        return (*self.prompt_ids, *self.generated)

    @property
    def length(self) -> int:
        """Tokens of the prompt, and those drawn so far."""
        return len(self.prompt_ids) + len(self.generated)


Sequences = abc.Sequence[Sequence]  # as the rows of a batch have them


def check_id(id: Any) -> None:
    """Refuses what cannot name a request.

    Raises:
        TypeError: it is neither a str nor an int.
        ValueError: it is empty, or no Unicode text.
    """
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise TypeError(f"id must be a str or an int, got {type(id).__name__}: {id!r:.60}")
    if isinstance(id, str):
        check_text("id", id)
        if not id:
            raise ValueError("id is empty; leave it out, or name the request")


def check_integer(name: str, value: Any, least: int, below: int | None = None) -> None:
    """Refuses what is no number of something.

    Raises:
        TypeError: it is no int.
        ValueError: it is below ``least``, or not below ``below``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r:.60}")
    if value < least or (below is not None and value >= below):
        limit = f"{least} or more" if below is None else f"in [{least}, {below})"
        raise ValueError(f"{name} is {value}; it must be {limit}")


def _check_field_names(record: Mapping[str, Any]) -> None:
    for name in record:
        if name not in REQUEST_FIELDS and name != "text":
            close = difflib.get_close_matches(str(name), REQUEST_FIELDS, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(REQUEST_FIELDS)}"
            raise ValueError(f"a request has no field {name!r}; {remedy}")


def _mixture_of(given: dict[str, Any], prompt: str) -> dict[str, Any]:
    """The fields of a mixture, of "members" or of a shorthand, which is taken out of ``given``."""
    named = [name for name in (*SHORTHANDS, "members") if name in given]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} each say what the members are; give one of them")
    found: dict[str, Any] = {}
    for name, make in SHORTHANDS.items():
        options = given.pop(name, None)
        if options is not None:
            found = make(given.get("prompt", prompt), options)
    if "members" in given:
        found = {"members": members_from(given["members"])}
    if found:
        given.setdefault("aux_scale", None)  # the default's is about a pair
    return found


def _merged_params(given: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    values = {name: getattr(defaults, name) for name in _SAMPLING}
    if given.get("temperature") == 0:
        off = SamplingParams()
        values |= {name: getattr(off, name) for name in _FILTERS}
    if isinstance(given.get("logit_bias"), Mapping):
        given = {**given, "logit_bias": {_token_id(key): bias for key, bias in given["logit_bias"].items()}}
    return SamplingParams(**{**values, **given})


def _token_id(key: Any) -> Any:
    """A token id; JSON has only text for the names in an object."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and str(int(key)) == key:
        return int(key)
    return key  # SamplingParams says what is wrong with another one


def _as_tuple(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    if isinstance(value, kind):
        return (value,)
    if not isinstance(value, (list, tuple)):
        one = "an int" if kind is int else "a str"
        raise TypeError(f"{name} must be {one} or a list of them, got {type(value).__name__}: {value!r:.60}")
    return tuple(value)
