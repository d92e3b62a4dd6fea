"""What the study of composed auxiliaries trains, and the mixtures that it writes texts with, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from benchmarks.keyword.presets import DECODER, PAPER, decoder_pair
from benchmarks.keyword.presets import PRESETS as KEYWORD_PRESETS
from benchmarks.keyword.presets import Preset as KeywordPreset

KEYWORD, LENGTH, BOTH = "keyword", "length", "both"
AUXILIARIES = (KEYWORD, LENGTH, BOTH)  # each is trained by itself, on the same sentences


class Addend(NamedTuple):
    """An auxiliary in a mixture beside the base.

    Attributes:
        auxiliary: one of ``AUXILIARIES``.
        weight: of its logits.
        told: whether it is given its condition; otherwise an empty one.
    """

    auxiliary: str
    weight: float = 1.0
    told: bool = True


@dataclass(frozen=True)
class Row:
    """One way to write the texts: softmax(base + the sum of the addends).

    Attributes:
        name: of its folder and in the record.
        label: what a reader sees.
        addends: beside the base.
    """

    name: str
    label: str
    addends: tuple[Addend, ...]


COMPOSED, SHARED_ONCE, ONE, BASE = "composed", "shared-once", "one", "base"
ROWS = (
    Row(COMPOSED, "keyword + length, trained apart", (Addend(KEYWORD), Addend(LENGTH))),
    Row(
        SHARED_ONCE,
        "keyword + length - keyword without its condition",
        (Addend(KEYWORD), Addend(LENGTH), Addend(KEYWORD, -1.0, told=False)),
    ),
    Row(ONE, "one auxiliary, trained on both", (Addend(BOTH),)),
    Row(KEYWORD, "keyword alone", (Addend(KEYWORD),)),
    Row(LENGTH, "length alone", (Addend(LENGTH),)),
    Row(BASE, "LM alone", ()),
)
REFERENCES = Row("references", "reference sentences", ())  # which nobody writes


def guidance_row(scale: float) -> Row:
    """The keyword pair with its condition against itself without: scale 1 is the pair.

    scale (LM + aux(condition)) + (1 - scale) (LM + aux(no condition)), of which the LM's part is the LM.
    """
    addends = (Addend(KEYWORD, scale), Addend(KEYWORD, 1.0 - scale, told=False))
    return Row(f"guidance-{scale:g}", f"guidance {scale:g}", addends)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of the study.

    Attributes:
        name: of the preset.
        keyword: of the keyword study: base, data, and how each auxiliary is made and trained. Its samples
            are the conditions that texts are written for.
        learning_rate: of every auxiliary.
        seeds: trainings of each auxiliary, with the seeds 0, 1, ...; the conditions are shared out among
            them, so that each is asked once.
        without_condition: one training sentence in so many has no condition, so that an auxiliary knows
            what there is without one (Ho & Salimans 2022).
        scales: of guidance on the keyword pair, above 1.
    """

    name: str
    keyword: KeywordPreset
    learning_rate: float
    seeds: int
    without_condition: int = 10
    scales: tuple[float, ...] = (1.5, 2.0, 3.0)

    @property
    def steps(self) -> int:
        """Optimizer steps of each auxiliary."""
        return self.keyword.steps_of(PAPER, self.keyword.size)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All that texts are written with."""
        return (*ROWS, *map(guidance_row, self.scales))


# An LM that is told one condition in its prompt serves auxiliaries of that condition only: here it is told
# nothing, the paper's form.
_RATE = 1e-3  # the best of three that the keyword study's first edition tried, for keywords
_CPU = dataclasses.replace(
    KEYWORD_PRESETS["cpu"],
    untrained=(),
    sizes=(12_800,),
    steps={PAPER: (200,)},
    rates={PAPER: (_RATE,)},
    tried_at=12_800,
    evaluations=5,
    patience=0,
    shots=0,
    validation=200,
    test=0,
    samples=1_000,
)
_TINY = dataclasses.replace(
    _CPU,
    name="tiny",
    sizes=(40,),
    steps={PAPER: (4,)},
    tried_at=40,
    evaluations=2,
    sentences=8,
    micro_batch=4,
    validation=10,
    samples=6,
    max_new_tokens=6,
    pairs={DECODER: decoder_pair(32, 1, 2, lm_layers=(1, 3))},
)
PRESETS = MappingProxyType(
    {
        # The rate was tuned for keywords; the other auxiliaries take it as it is.
        "cpu": Preset(name="cpu", keyword=_CPU, learning_rate=_RATE, seeds=2),
        # A look at every part of the study: its numbers say nothing.
        "tiny": Preset(name="tiny", keyword=_TINY, learning_rate=_RATE, seeds=1, scales=(2.0,)),
    }
)
