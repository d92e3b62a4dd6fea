"""What is measured: operator, vocabulary, widths, rows and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

VOCABULARIES = {"gpt2": 50_257, "llama3": 128_256, "gemma": 262_144, "smollm2": 49_152}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# D of the LM's head and of the auxiliary's.
WIDTHS = {"gpt2": (768, 256), "llama3": (4096, 512), "gemma": (2304, 256), "smollm2": (576, 256)}
OPERATORS = ("cross_entropy", "linear")


@dataclass(frozen=True)
class Case:
    """One line of work.

    Attributes:
        op: a name in ``OPERATORS``.
        model: a name in ``VOCABULARIES``.
        N: rows.
        dtype: a name in ``DTYPES``, of every term.
        terms: how many terms are summed; the last one asks for a gradient. 2 for "linear".
    """

    op: str
    model: str
    N: int
    dtype: str
    terms: int = 2

    @property
    def V(self) -> int:
        return VOCABULARIES[self.model]

    @property
    def widths(self) -> tuple[int, ...]:
        """D of each head; empty where the terms are logits."""
        return WIDTHS[self.model] if self.op == "linear" else ()

    @property
    def term_bytes(self) -> int:
        """Bytes of one term's logits."""
        return self.N * self.V * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.op} {self.model} N={self.N} {self.dtype}"


# (model, N, dtype) measured when nothing is asked for, by operator and device type. On a CPU logits
# lie well beyond its caches and leave eager PyTorch under half a second a step; a GPU is filled.
_DEFAULT = {
    ("cross_entropy", "cpu"): [
        ("gpt2", 512, "float32"),
        ("gpt2", 512, "bfloat16"),
        ("gpt2", 512, "float16"),
        ("llama3", 256, "bfloat16"),
        ("gemma", 128, "float32"),
    ],
    ("cross_entropy", "cuda"): [
        ("gpt2", 8192, "float32"),
        ("gpt2", 8192, "bfloat16"),
        ("gpt2", 8192, "float16"),
        ("llama3", 8192, "bfloat16"),
        ("llama3", 64, "bfloat16"),
        ("gemma", 4096, "bfloat16"),
    ],
    ("linear", "cpu"): [("smollm2", 1024, "float32")],
    ("linear", "cuda"): [
        ("smollm2", 8192, "bfloat16"),
        ("gpt2", 8192, "bfloat16"),
        ("gpt2", 8192, "float32"),
        ("llama3", 8192, "bfloat16"),
        ("gemma", 4096, "bfloat16"),
    ],
}
_QUICK = {
    ("cross_entropy", "cpu"): [("gpt2", 256, "float32"), ("gpt2", 256, "bfloat16")],
    ("cross_entropy", "cuda"): [("gpt2", 4096, "bfloat16"), ("llama3", 64, "bfloat16")],
    ("linear", "cpu"): [("smollm2", 256, "float32")],
    ("linear", "cuda"): [("gpt2", 4096, "bfloat16")],
}
# What stands for an option that was left out where another was given.
_DEFAULT_MODEL = {"cross_entropy": "gpt2", "linear": "smollm2"}
_DEFAULT_N = {
    ("cross_entropy", "cpu"): 512,
    ("cross_entropy", "cuda"): 8192,
    ("linear", "cpu"): 1024,
    ("linear", "cuda"): 8192,
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
) -> list[Case]:
    """The cases to run.

    Without ``models``, ``rows`` and ``dtypes`` these are the device's standard cases. With any
    of them it is every combination, and what was left out is float32 and, for cross_entropy,
    gpt2 and 512 rows (8,192 on a GPU), for linear smollm2 and 1,024 rows (8,192 on a GPU).

    Args:
        device_type: "cpu" or "cuda".
        ops: names in ``OPERATORS``; cross_entropy when None.
        models, dtypes: names in ``VOCABULARIES``, ``DTYPES``.
        rows: numbers of rows.
        terms: number of terms; linear has 2 in any case.
        quick: the shorter list of standard cases.
    """
    cases: list[Case] = []
    for op in ops or ["cross_entropy"]:
        key = (op, device_type)
        if models or rows or dtypes:
            shapes = list(
                product(models or [_DEFAULT_MODEL[op]], rows or [_DEFAULT_N[key]], dtypes or ["float32"])
            )
        else:
            shapes = (_QUICK if quick else _DEFAULT)[key]
        cases += [Case(op, *shape, terms if op == "cross_entropy" else 2) for shape in shapes]
    # A name given twice is measured once.
    return list(dict.fromkeys(cases))
