"""Texts of every mixture for held-out conditions, by the engine, and what is measured of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auxkern.core.seeds import mixed_seed
from auxkern.generation import Engine, Request
from auxkern.generation.members import Member
from auxkern.model import AuxTunedForCausalLM
from auxkern.model.native import native_refusal
from auxkern.model.text import Example
from auxkern.tasks.lengths import count_words
from benchmarks.compose.presets import AUXILIARIES, BOTH, REFERENCES, Preset, Row
from benchmarks.compose.training import conditions_of
from benchmarks.keyword.measuring import Judge, write_texts
from benchmarks.keyword.runs import Workplace

_SLOTS = 64


class Writer:
    """Writes texts with the auxiliaries of one seed, for the conditions that are this seed's.

    Args:
        preset, place: of the study.
        folders: of the trained auxiliaries, by name.
        seed: that they were trained with.
    """

    def __init__(self, preset: Preset, place: Workplace, folders: Mapping[str, Path], seed: int) -> None:
        data, self._seed = place.data, seed
        self._asked = data.asked[seed :: preset.seeds]
        self._most = preset.keyword.max_new_tokens
        self._judge = Judge(place.lm, place.tokenizer, data.unigram_texts, self._asked, place.lm_fingerprint)
        text_format = place.text_format(told=False)
        conditions = [text for one in self._asked for text in conditions_of(one).values()]
        self._engine = Engine(
            _loaded(place, folders),
            text_format,
            slots=_SLOTS,
            max_length=self._most + 2,
            max_condition=max(len(one["condition_ids"]) for one in _encoded(text_format, conditions)),
        )

    def facts(self, row: Row) -> dict[str, Any]:
        """What a row's texts come to, in the order of the conditions.

        Returns:
            conditions, what ``Judge.measure`` says, words of each text and those that are asked for, and
            seconds of writing.
        """
        began = time.monotonic()
        if row == REFERENCES:
            texts = [example.text for example in self._asked]
        else:
            texts = write_texts(self._engine, [self._request(row, example) for example in self._asked])
        seconds = time.monotonic() - began
        return {
            "row": row.name,
            "seed": self._seed,
            "seconds": seconds,
            "conditions": [conditions_of(example)[BOTH] for example in self._asked],
            **self._judge.measure(texts),
            "words": [count_words(text) for text in texts],
            "words_asked": [count_words(example.text) for example in self._asked],
        }

    def _request(self, row: Row, example: Example) -> Request:
        return Request(
            example.condition,
            # The same noise for every row.
            seed=mixed_seed(self._seed, f"text for {example.condition}"),
            max_new_tokens=self._most,
            members=members_of(row, example),
        )


def members_of(row: Row, example: Example) -> tuple[Member, ...]:
    """A row's mixture for the conditions of an example."""
    conditions = conditions_of(example)
    return (
        Member(),
        *(
            Member(one.auxiliary, condition=conditions[one.auxiliary] if one.told else "", weight=one.weight)
            for one in row.addends
        ),
    )


def _loaded(place: Workplace, folders: Mapping[str, Path]) -> AuxTunedForCausalLM:
    """The base with all auxiliaries under their names."""
    model = AuxTunedForCausalLM.from_pretrained(folders[AUXILIARIES[0]], lm=place.lm)
    for name in AUXILIARIES:
        model.load_auxiliary(name, folders[name])
    if place.device is None and native_refusal() is None:
        model.use_native_kernels()
    return model


def _encoded(text_format: Any, conditions: Sequence[str]) -> list[dict[str, list[int]]]:
    return text_format.examples([Example(condition, "") for condition in conditions])
