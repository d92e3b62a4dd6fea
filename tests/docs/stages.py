"""What the names on each page stand for: tiny models, small tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import GenerationConfig

import auxkern
from auxkern.model import TextFormat, load_base
from auxkern.model.text import Example
from auxkern.training.examples import write_jsonl
from auxkern.training.settings import LoopSettings
from tests.support.launching import group_of
from tests.support.tiny import KIND, byte_tokenizer, tiny_lm_for, tiny_pair

Names = dict[str, Any]
BASE = "HuggingFaceTB/SmolLM2-135M"
B, T, V, K = 2, 5, 31, 3


def lm(seed: int = 0, **options: Any) -> Any:
    return tiny_lm_for(byte_tokenizer(), seed=seed, **options)


def base_folder(name: str = BASE, **options: Any) -> str:
    """Saves a model and its tokenizer where transformers looks before it asks the Hub."""
    lm(**options).save_pretrained(name)
    byte_tokenizer().save_pretrained(name)
    return name


def saved_pair(folder: str, base: str, kind: str = "own head") -> Any:
    pair = tiny_pair(kind, load_base(base, native=False), base_model_name_or_path=base)
    pair.save_pretrained(folder)
    return pair


def tensors(*leading: int) -> Names:
    """Logits of two models over V ids, and targets."""
    return {
        "torch": torch,
        "auxkern": auxkern,
        "vocab_size": V,
        "lm_logits": torch.randn(*leading, V),
        "aux_logits": torch.randn(*leading, V, requires_grad=True),
        "labels": torch.randint(V, leading),
    }


def readme(stack: ExitStack) -> Names:
    base_folder(num_hidden_layers=20)
    return {}


def index(stack: ExitStack) -> Names:
    return tensors(B, T)


def loss(stack: ExitStack) -> Names:
    stack.enter_context(group_of(Path.cwd(), 0, 1))
    names, embedding = tensors(B, T), torch.randn(V, 8)
    return {
        **names,
        "num_items_in_batch": torch.tensor(B * T),
        "lm_hidden": torch.randn(B, T, 16),
        "lm_embedding": (lm_embedding := torch.randn(V, 16)),
        "lm_embedding_part": lm_embedding,
        "aux_hidden": torch.randn(B, T, 8, requires_grad=True),
        "aux_embedding": embedding,
        "aux_embedding_part": embedding,
        "condition_ids": torch.randint(V, (B, T, K)),
        "pointer": torch.randn(B, T, K, requires_grad=True),
        "batches": [(names["lm_logits"], names["aux_logits"], names["labels"])] * 2,
        "mesh": init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)),
    }


def sampling(stack: ExitStack) -> Names:
    return {
        **tensors(B),
        "mix": 0.7,
        "seeds": torch.tensor([1, 2]),
        "step": 3,
        "generated": torch.tensor([[4, 5, -1], [6, 7, 8]]),
        "generation_config": GenerationConfig(do_sample=True, temperature=0.7),
    }


def pairs(stack: ExitStack) -> Names:
    saved_pair("my-other-auxiliary", base_folder(num_hidden_layers=20))
    return {}


def training(stack: ExitStack) -> Names:
    lines = [Example("rain", " It rained all day."), Example("sea", " The sea was calm.")]
    for name in ("train.jsonl", "held_out.jsonl"):
        write_jsonl(name, lines)
    return {"model": tiny_pair("own head", lm(), trained=False), "text": TextFormat(byte_tokenizer())}


def your_model(stack: ExitStack) -> Names:
    base_folder()
    return {}


def batch_generation(stack: ExitStack) -> Names:
    model = tiny_pair(KIND, lm())
    return {"model": model, "text": TextFormat(byte_tokenizer()), "conditions": ["sea", "rain"]}


def mixtures(stack: ExitStack) -> Names:
    model, tokenizer = tiny_pair("own head", lm()), byte_tokenizer()
    for name in ("keyword", "length"):
        model.save_pretrained(f"out/{name}")
        model.load_auxiliary(name, f"out/{name}")
    # lm-eval is not installed; tests/generation/test_lm_eval.py holds it to the mixture's own logits.
    harness = ModuleType("lm_eval.models.huggingface")
    harness.HFLM = lambda **given: given  # type: ignore[attr-defined]
    put_module(stack, harness)
    return {
        "model": model,
        "lm": lm(),
        "small": lm(7),
        "smaller": lm(8),
        "text_format": (text := TextFormat(tokenizer)),
        "text": text,
        "tuned_small": lm(8),
        "tokenizer": tokenizer,
        "input_ids": torch.tensor([[256, 72, 105]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.int64),
        "pair": tiny_pair("own head", lm(), trained=False),
        "examples": [Example("12 words", "It rains.", conditions={"keyword": "rain"})] * 2,
        "settings": LoopSettings(output="out/trained", steps=1, batch_size=2),
    }


def cpu_engine(stack: ExitStack) -> Names:
    base_folder(hidden_size=64)
    return {"my_model": lm(), "pair": tiny_pair(KIND, lm())}


def gpu(stack: ExitStack) -> Names:
    return {"torch": torch, "auxkern": auxkern}


class OneMapper:
    """A Ray Data set of one row, which one worker maps; tests/examples has a real Ray."""

    def map_batches(self, mapper: Any, *, fn_constructor_kwargs: Names, **resources: int) -> OneMapper:
        row = {"id": np.array([1]), "condition": np.array(["sea"]), "source": np.array(["a book"])}
        self.texts = mapper(**fn_constructor_kwargs, device="cpu")(row)
        return self

    def write_json(self, folder: str) -> None:
        assert list(self.texts["source"]) == ["a book"]
        assert len(self.texts["text"][0]) > 3


def scaling(stack: ExitStack) -> Names:
    stack.enter_context(group_of(Path.cwd(), 0, 1))
    ray = ModuleType("ray")
    ray.data = SimpleNamespace(read_json=lambda file: OneMapper())  # type: ignore[attr-defined]
    put_module(stack, ray)
    return {"pair": saved_pair("out/mine", base_folder()), "mesh": init_device_mesh("cpu", (1,))}


def put_module(stack: ExitStack, module: ModuleType) -> None:
    """Lets ``import`` find a module that is not installed."""
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setitem(sys.modules, module.__name__, module)


def told(stack: ExitStack) -> Names:
    examples = [Example(word, f"It was {word}.") for word in ("rain", "snow", "fog")] * 5
    return {"lm": lm(), "tokenizer": byte_tokenizer(), "examples": examples}


STAGES: dict[str, Callable[[ExitStack], Names]] = {
    "README": readme,
    "index": index,
    "loss": loss,
    "sampling": sampling,
    "pairs": pairs,
    "training": training,
    "told": told,
    "your-model": your_model,
    "batch-generation": batch_generation,
    "mixtures": mixtures,
    "cpu-engine": cpu_engine,
    "gpu": gpu,
    "scaling": scaling,
}
# What a page has for people, and how the test runs it.
SHORTER = {
    "training": {"steps=1000": "steps=2"},
    "README": {"seed=number": "seed=number, max_new_tokens=4", "max_new_tokens=32": "max_new_tokens=4"},
}
