"""A tiny study for the tests of this folder."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from benchmarks.keyword.presets import (
    ALL_LAYERS,
    DECODER,
    LAST_LAYERS,
    PRESETS,
    Preset,
    decoder_pair,
)
from benchmarks.keyword.runs import Workplace
from tests.support.tiny import WORDS, word_lm, word_tokenizer


@pytest.fixture(scope="session")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    """The tiny preset on sentences of four words, one of them the keyword, for a base of three layers."""
    folder = tmp_path_factory.mktemp("study")
    tokenizer = word_tokenizer((*WORDS, ":"))
    word_lm(vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    draw = random.Random(0)
    records = []
    for keyword in WORDS:
        for _ in range(4):
            words = [*draw.sample(WORDS, 3), keyword]
            draw.shuffle(words)
            records.append({"condition": keyword, "text": " ".join(words)})
        shouted = [word for word in words if word != keyword]
        records.append({"condition": keyword, "text": " ".join([keyword.upper(), *shouted])})
    (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    layers = {"architecture": "last-layers", "lora_rank": 2, "pointer": True}
    return dataclasses.replace(
        PRESETS["tiny"],
        base=str(folder / "base"),
        task_source=f"jsonl:{folder / 'texts.jsonl'}?condition=condition",
        pairs={
            LAST_LAYERS: {**layers, "last_layers": 2},
            ALL_LAYERS: {**layers, "last_layers": 3},
            DECODER: decoder_pair(16, 2, 2, lm_layers=(1, 3)),
        },
        lora_rank=2,
    )


@pytest.fixture
def place(preset: Preset, tmp_path: Path) -> Workplace:
    return Workplace.open(preset, tmp_path / "study")
