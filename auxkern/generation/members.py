"""The members of a mixture: models that read contexts of their own and share the text that is written.

    p(x_t | x_<t)  is proportional to  exp( sum_m weight_m z_m(x_<t, context_m) )

A pair is the mixture of a base and an auxiliary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from auxkern.core.terms import as_number
from auxkern.core.unicode import check_unicode

BASE = "base"  # the name of a pair's language model among members
FIRST = "the base's first layers"  # what a pair of last layers needs of it, at weight 1; no member's model


@dataclass(frozen=True)
class Member:
    """One model of a mixture, what it reads before the text, and its weight.

    Attributes:
        model: "base", the name of another language model of the engine, or that of an auxiliary.
        prompt: of a language model, what the text continues; None for the request's. An auxiliary reads that
            of the first member of the base.
        condition: of an auxiliary, what it sees; None for no condition.
        weight: of its logits; None for 1, and of an auxiliary for the one that it was trained with.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: the name is empty, or the weight is not finite.
    """

    model: str = BASE
    prompt: str | None = None
    condition: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", as_number(self.weight))
        for name in ("model", "prompt", "condition"):
            value = getattr(self, name)
            if value is None and name != "model":
                continue
            check_text(f"a member's {name}", value)
        if not self.model:
            raise ValueError(f"a member's model is empty; name one, such as {BASE!r}")
        check_weight(f"the weight of member {self.model!r}", self.weight)

    def as_record(self) -> dict[str, Any]:
        """The same as a JSON object, which ``members_from`` reads; without what is None."""
        return {name: value for name, value in vars(self).items() if value is not None}


def check_text(name: str, value: Any) -> None:
    """Refuses what is no str, or no Unicode text.

    Raises:
        TypeError, ValueError: so it is.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}: {value!r:.60}")
    check_unicode(name, value)


def check_weight(name: str, value: Any) -> None:
    """Refuses what is neither None nor a finite number.

    Raises:
        TypeError, ValueError: so it is.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or None, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")


def check_reads(member: Member, lms: Collection[str], auxiliaries: Collection[str]) -> None:
    """Refuses a member of an unknown model, or one that does not read what the member has for it.

    Args:
        member: of a mixture.
        lms, auxiliaries: names of the models that there are.

    Raises:
        ValueError: so it is.
    """
    name = member.model
    if name in auxiliaries:
        if member.prompt is not None:
            raise ValueError(
                f"member {name!r} is an auxiliary, which reads the prompt of the first base; leave its "
                "prompt out"
            )
        return
    if member.condition is not None:
        raise ValueError(f"member {name!r} reads no condition; leave it out, or name an auxiliary")
    if name not in lms:
        can = ", ".join([*lms, *auxiliaries])
        raise ValueError(f"there is no model {name!r} for a member; choose one of {can}")


class Part(NamedTuple):
    """A member of a sequence, in ids.

    Attributes:
        model: as of ``Member``.
        prompt_ids: (T), the start token and the prompt.
        condition_ids: (K), of an auxiliary.
        weight: as of ``Member``.
        base: of an auxiliary, the place of the member of the base whose hidden states it reads; -1 of a
            language model.
        told: how many of the prompt's ids are the base prompt, which stands behind the base's prefix; 0 for a
            prompt without both.
    """

    model: str
    prompt_ids: tuple[int, ...]
    condition_ids: tuple[int, ...] = ()
    weight: float | None = None
    base: int = -1
    told: int = 0


def members_from(records: Any) -> tuple[Member, ...]:
    """Members of JSON objects; a field that is null has its default, as tables have it in all rows.

    Raises:
        TypeError: they are no list of objects, or a field has the wrong type.
        ValueError: a field is unknown or out of range.
    """
    if not isinstance(records, (list, tuple)):
        raise TypeError(f"members must be a list of objects, got {type(records).__name__}: {records!r:.60}")
    known = [one.name for one in fields(Member)]
    members = []
    for record in records:
        if isinstance(record, Member):
            members.append(record)
            continue
        if not isinstance(record, Mapping):
            raise TypeError(f"a member must be an object, got {type(record).__name__}: {record!r:.60}")
        for name in record:
            if name not in known:
                raise ValueError(f"a member has no field {name!r}; known are {', '.join(known)}")
        members.append(Member(**{name: value for name, value in record.items() if value is not None}))
    return tuple(members)


class Mixture(NamedTuple):
    """Fields of a ``Request``: ``Request(id, **guidance("a", "b")._asdict())``.

    Attributes:
        members, plausibility: as there.
    """

    members: tuple[Member, ...]
    plausibility: float = 0.0


def guidance(prompt: str, negative_prompt: str = "", scale: float = 1.5) -> Mixture:
    """Classifier-free guidance of a language model (Sanchez et al. 2023, equation 7).

        z = z(negative) + scale (z(prompt) - z(negative))

    Args:
        prompt: what the text continues.
        negative_prompt: what it is led away from; the start token alone if empty.
        scale: 1 is the prompt alone.
    """
    return Mixture((Member(BASE, prompt, weight=scale), Member(BASE, negative_prompt, weight=1 - scale)))


def contrast(prompt: str, amateur: str, beta: float = 0.5, alpha: float = 0.1) -> Mixture:
    """Contrastive decoding (Li et al. 2023, with the scale of O'Brien and Lewis 2023, equation 2).

        z = (1 + beta) z(base) - beta z(amateur),  where p_base >= alpha max p_base

    Args:
        prompt: what the text continues.
        amateur: name of a smaller language model.
        beta: how strongly.
        alpha: the least share of the base's largest probability.
    """
    return Mixture((Member(BASE, prompt, weight=1 + beta), Member(amateur, prompt, weight=-beta)), alpha)


def experts(prompt: str, expert: str, anti_expert: str, alpha: float = 1.0) -> Mixture:
    """Steering by two small models (DExperts, Liu et al. 2021, equation 2; proxy tuning, Liu et al. 2024).

        z = z(base) + alpha (z(expert) - z(anti-expert))

    Args:
        prompt: what the text continues.
        expert, anti_expert: names of language models.
        alpha: how strongly.
    """
    each = ((BASE, 1.0), (expert, alpha), (anti_expert, -alpha))
    return Mixture(tuple(Member(name, prompt, weight=weight) for name, weight in each))


def context(prompt: str, text: str, alpha: float = 0.5) -> Mixture:
    """Context-aware decoding (Shi et al. 2024, equation 3): what a context changes counts more.

        z = (1 + alpha) z(text, prompt) - alpha z(prompt)

    Args:
        prompt: what the text continues.
        text: the context, read before the prompt.
        alpha: how much more; 0 is the base that reads both.
    """
    return Mixture((Member(BASE, text + prompt, weight=1 + alpha), Member(BASE, prompt, weight=-alpha)))


def _shorthand(make: Callable[..., Mixture]) -> Callable[[str, Any], dict[str, Any]]:
    """Of a prompt and of the other arguments, as JSON has them."""
    known = {name: one for name, one in inspect.signature(make).parameters.items() if name != "prompt"}
    needed = [name for name, one in known.items() if one.default is inspect.Parameter.empty]

    def fields_of(prompt: str, options: Any) -> dict[str, Any]:
        if not isinstance(options, Mapping):
            raise TypeError(
                f"{make.__name__} must be an object with some of {', '.join(known)}, "
                f"got {type(options).__name__}: {options!r:.60}"
            )
        for name in options:
            if name not in known:
                raise ValueError(f"{make.__name__} has no field {name!r}; known are {', '.join(known)}")
        given = {name: value for name, value in options.items() if value is not None}
        for name, value in given.items():
            is_text = known[name].annotation == "str"
            if isinstance(value, bool) or not isinstance(value, str if is_text else (int, float)):
                kind = "a str" if is_text else "a number"
                raise TypeError(f"{make.__name__}'s {name} must be {kind}, got {type(value).__name__}")
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"{make.__name__} has no {' and no '.join(missing)}; give each")
        return make(prompt, **given)._asdict()

    return fields_of


# Objects that a JSON line may have in place of "members", and the fields that they stand for.
SHORTHANDS = {make.__name__: _shorthand(make) for make in (guidance, contrast, experts, context)}
