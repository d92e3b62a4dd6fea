"""A tiny pair on top of three auxiliaries held frozen, and examples with a condition for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from auxkern.model.text import Example, TextFormat
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import encode
from auxkern.training.frozen import hold_frozen
from tests.support.tiny import PAD, WORDS, tiny_lm, tiny_pair, word_tokenizer

POINTER, T5 = "shared head, features, pointer", "encoder-decoder"
WEIGHTS = {"keyword": 0.7, "t5": -0.4, "own": 1.0}
KINDS = {"keyword": POINTER, "t5": T5, "own": "own head"}
SETTINGS: dict[str, Any] = {
    "steps": 4,
    "batch_size": 3,
    "gradient_accumulation": 2,
    "learning_rate": 0.01,
    "eval_every": 2,
    "save_every": 1,
}


def save_auxiliaries(folder: Path) -> Path:
    """Writes an auxiliary of each of KINDS on ``tiny_lm``; returns the folder."""
    for seed, (name, kind) in enumerate(KINDS.items()):
        model = tiny_pair(kind, tiny_lm())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.1 * seed)
        model.save_pretrained(folder / name)
    return folder


def on_top(saved: Path, kind: str = "own head", *, trained: bool = True, lm: Any = None) -> Any:
    """A pair with all auxiliaries of KINDS held frozen, and how examples become ids."""
    model = tiny_pair(kind, tiny_lm() if lm is None else lm, trained=trained)
    text_format = TextFormat(word_tokenizer())
    sources = {name: f"{saved / name}:{weight}" for name, weight in WEIGHTS.items() if name != "own"}
    formats = hold_frozen(model, {**sources, "own": str(saved / "own")}, text_format)
    return model, lambda examples: encode(examples, text_format, frozen=formats)


def examples(count: int = 10, seed: int = 0) -> list[Example]:
    """Texts of 1 to 8 words; the keyword's condition stands in the text, the T5's does not."""
    generator = torch.Generator().manual_seed(seed)

    def words(most: int) -> list[str]:
        length = int(torch.randint(1, most + 1, (), generator=generator))
        return [WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)]

    made = []
    for _ in range(count):
        text = words(8)
        conditions = {"keyword": " ".join(text[:2]), "t5": " ".join(words(4)), "own": ""}
        made.append(Example(" ".join(words(3)), " ".join(text), conditions=conditions))
    return made


def batch_of(encoded: Any) -> dict[str, Any]:
    return AuxCollator(PAD)([encoded[i] for i in range(len(encoded))])
