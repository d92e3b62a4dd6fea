"""What is measured: operator, vocabulary, widths, rows, dtype and filters."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

from auxkern import SamplingParams
from auxkern.bench.results import CaseResult

VOCABULARIES = {"gpt2": 50_257, "llama3": 128_256, "gemma": 262_144, "smollm2": 49_152}
DTYPES = ("float32", "bfloat16", "float16")
# D of the LM's head and of the auxiliary's.
WIDTHS = {"gpt2": (768, 256), "llama3": (4096, 512), "gemma": (2304, 256), "smollm2": (576, 256)}
TEMPERATURE = 0.8  # of every draw
FILTERS = {  # what tokens are drawn from
    "temperature only": SamplingParams(TEMPERATURE),
    "top-k 50": SamplingParams(TEMPERATURE, top_k=50),
    "top-p 0.9": SamplingParams(TEMPERATURE, top_p=0.9),
    "min-p 0.05": SamplingParams(TEMPERATURE, min_p=0.05),
    "top-k 50 + top-p 0.9": SamplingParams(TEMPERATURE, top_k=50, top_p=0.9),
}
_PLAIN_AND_FILTERED = ("temperature only", "top-k 50 + top-p 0.9")


def new_case(op: str, model: str, N: int, dtype: str, terms: int = 2, filters: str = "") -> CaseResult:
    """One line of work, with names of the tables above; nothing is measured in it yet."""
    widths = WIDTHS[model] if op == "linear" else ()
    return CaseResult(op, model, VOCABULARIES[model], N, dtype, terms, widths=widths, filters=filters)


def _draws(model: str, rows: Iterable[int], filters: Iterable[str] = _PLAIN_AND_FILTERED) -> list[Any]:
    return [(model, N, "float32", name) for N in rows for name in filters]


_GPT2_DRAWS = _draws("gpt2", [64], FILTERS) + _draws("gpt2", [1, 512])
# What is measured when nothing is asked for: (model, N, dtype), of draws with the filters' name. On a CPU
# logits lie well beyond its caches and leave eager PyTorch under half a second a step; a GPU is filled.
# Decoding has few rows, so they fit a GPU's caches.
_STANDARD: dict[tuple[str, str], list[tuple[Any, ...]]] = {
    ("cross_entropy", "cpu"): [
        *product(["gpt2"], [512], DTYPES),
        ("llama3", 256, "bfloat16"),
        ("gemma", 128, "float32"),
    ],
    ("cross_entropy", "cuda"): [
        *product(["gpt2"], [8192], DTYPES),
        *product(["llama3"], [8192, 64], ["bfloat16"]),
        ("gemma", 4096, "bfloat16"),
    ],
    ("linear", "cpu"): [("smollm2", 1024, "float32")],
    ("linear", "cuda"): [
        ("smollm2", 8192, "bfloat16"),
        *product(["gpt2"], [8192], ["bfloat16", "float32"]),
        ("llama3", 8192, "bfloat16"),
        ("gemma", 4096, "bfloat16"),
    ],
    ("sample", "cpu"): _GPT2_DRAWS + _draws("gemma", [16]),
    ("sample", "cuda"): _GPT2_DRAWS + _draws("gemma", [1, 64, 512]),
}
_QUICK: dict[tuple[str, str], list[tuple[Any, ...]]] = {
    ("cross_entropy", "cpu"): [("gpt2", 256, "float32"), ("gpt2", 256, "bfloat16")],
    ("cross_entropy", "cuda"): [("llama3", 8192, "bfloat16"), ("gpt2", 8192, "bfloat16")],
    ("linear", "cpu"): [("smollm2", 256, "float32")],
    ("linear", "cuda"): [("smollm2", 8192, "bfloat16")],
    ("sample", "cpu"): _draws("gpt2", [64]),
    ("sample", "cuda"): _draws("gpt2", [64]),
}


def select_cases(
    device_type: str,
    *,
    ops: list[str] | None = None,
    models: list[str] | None = None,
    rows: list[int] | None = None,
    dtypes: list[str] | None = None,
    terms: int = 2,
    quick: bool = False,
) -> list[CaseResult]:
    """The cases to run, each once.

    Without ``models``, ``rows`` and ``dtypes`` these are the device's standard cases, of the shorter list
    if ``quick``. With any of them it is every combination, with each of the ``FILTERS`` for sample; what
    was left out is float32 and the standard model and rows. linear has 2 ``terms`` in any case.
    """
    each: list[tuple[Any, ...]] = []
    for op in ops or ["cross_entropy"]:
        standard = _STANDARD[op, device_type]
        shapes: Iterable[tuple[Any, ...]] = _QUICK[op, device_type] if quick else standard
        if models or rows or dtypes:
            # The first standard case stands for what was left out.
            choices = (models or [standard[0][0]], rows or [standard[0][1]], dtypes or ["float32"])
            shapes = product(*choices, FILTERS if op == "sample" else [""])
        for model, N, dtype, *filters in shapes:
            each.append((op, model, N, dtype, 2 if op == "linear" else terms, *filters))
    return [new_case(*one) for one in dict.fromkeys(each)]
