"""Python on the pages runs as it stands there, from top to bottom of each page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from auxkern.model import TextFormat, load_base
from auxkern.model.text import Example
from auxkern.training.settings import LoopSettings
from tests.docs.pages import MADE, PAGES, fences, prose
from tests.support.launching import group_of
from tests.support.tiny import byte_tokenizer, tiny_lm_for, tiny_pair

LANGUAGES = {"python", "sh", "json", "yaml", "text"}
Names = dict[str, Any]


def lm(seed: int = 0) -> Any:
    return tiny_lm_for(byte_tokenizer(), seed=seed)


def base_folder(name: str) -> str:
    """Saves a model and its tokenizer where the Hub's name looks for them first."""
    lm().save_pretrained(name)
    byte_tokenizer().save_pretrained(name)
    return name


def mixtures(stack: ExitStack) -> Names:
    model, tokenizer = tiny_pair("own head", lm()), byte_tokenizer()
    for name in ("keyword", "length"):
        model.save_pretrained(f"out/{name}")
        model.load_auxiliary(name, f"out/{name}")
    # lm-eval is not installed; tests/generation/test_lm_eval.py holds it to the mixture's own logits.
    harness = ModuleType("lm_eval.models.huggingface")
    harness.HFLM = lambda **given: given  # type: ignore[attr-defined]
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setitem(sys.modules, harness.__name__, harness)
    return {
        "model": model,
        "lm": lm(),
        "small": lm(7),
        "smaller": lm(8),
        "text_format": TextFormat(tokenizer),
        "tokenizer": tokenizer,
        "input_ids": torch.tensor([[256, 72, 105]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.int64),
        "pair": tiny_pair("own head", lm(), trained=False),
        "examples": [Example("12 words", "It rains.", conditions={"keyword": "rain"})] * 2,
        "settings": LoopSettings(output="out/trained", steps=1, batch_size=2),
    }


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
    base = base_folder("base")
    pair = tiny_pair("own head", load_base(base, native=False), base_model_name_or_path=base)
    pair.save_pretrained("out/mine")
    ray = ModuleType("ray")
    ray.data = SimpleNamespace(read_json=lambda file: OneMapper())  # type: ignore[attr-defined]
    stack.enter_context(pytest.MonkeyPatch.context()).setitem(sys.modules, "ray", ray)
    return {"pair": pair, "mesh": init_device_mesh("cpu", (1,))}


def told(stack: ExitStack) -> Names:
    examples = [Example(word, f"It was {word}.") for word in ("rain", "snow", "fog")] * 5
    return {"lm": lm(), "tokenizer": byte_tokenizer(), "examples": examples}


STAGES: dict[str, Callable[[ExitStack], Names]] = {"mixtures": mixtures, "scaling": scaling, "told": told}
WITH_PYTHON = [name for name, path in PAGES.items() if any(one.language == "python" for one in fences(path))]


@contextmanager
def stage(name: str, folder: Path) -> Iterator[Names]:
    """What the names on a page stand for, in a folder of its own."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield STAGES[name](stack) if name in STAGES else {}


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_on_a_page_runs(name: str, tmp_path: Path) -> None:
    with stage(name, tmp_path) as names:
        for one in fences(PAGES[name]):
            if one.language == "python":
                # Lines before it, so that a traceback names the page's.
                code = "\n" * (one.line - 1) + one.code
                exec(compile(code, str(PAGES[name]), "exec"), names)


@pytest.mark.parametrize("name", sorted(PAGES.keys() - set(MADE)))
def test_code_says_its_language(name: str) -> None:
    """So none that is Python passes for something that nothing runs."""
    assert {one.language for one in fences(PAGES[name])} <= LANGUAGES
    before = ""
    for line in prose(PAGES[name]).splitlines():
        assert before or not line.startswith("    "), f"code without a fence: {line}"
        before = line
