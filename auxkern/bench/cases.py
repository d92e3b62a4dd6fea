"""What is measured: operator, vocabulary, rows and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

VOCABULARIES = {"gpt2": 50_257, "llama3": 128_256, "gemma": 262_144, "smollm2": 49_152}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPERATORS = ("cross_entropy",)


@dataclass(frozen=True)
class Case:
    """One line of work.

    Attributes:
        op: a name in ``OPERATORS``.
        model: a name in ``VOCABULARIES``.
        N: rows.
        dtype: a name in ``DTYPES``, of every term.
        terms: how many terms are summed; the last one asks for a gradient.
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
    def term_bytes(self) -> int:
        """Bytes of one term."""
        return self.N * self.V * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.op} {self.model} N={self.N} {self.dtype}"


# (model, N, dtype) measured when nothing is asked for, by device type. A CPU's lie well beyond
# its caches and leave eager PyTorch under half a second a step; a GPU's fill the device.
_DEFAULT = {
    "cpu": [
        ("gpt2", 512, "float32"),
        ("gpt2", 512, "bfloat16"),
        ("gpt2", 512, "float16"),
        ("llama3", 256, "bfloat16"),
        ("gemma", 128, "float32"),
    ],
    "cuda": [
        ("gpt2", 8192, "float32"),
        ("gpt2", 8192, "bfloat16"),
        ("gpt2", 8192, "float16"),
        ("llama3", 8192, "bfloat16"),
        ("llama3", 64, "bfloat16"),
        ("gemma", 4096, "bfloat16"),
    ],
}
_QUICK = {
    "cpu": [("gpt2", 256, "float32"), ("gpt2", 256, "bfloat16")],
    "cuda": [("gpt2", 4096, "bfloat16"), ("llama3", 64, "bfloat16")],
}
_DEFAULT_N = {"cpu": 512, "cuda": 8192}


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
    of them it is every combination, and what was left out is gpt2, 512 rows (8,192 on a GPU)
    and float32.

    Args:
        device_type: "cpu" or "cuda".
        ops, models, dtypes: names in ``OPERATORS``, ``VOCABULARIES``, ``DTYPES``.
        rows: numbers of rows.
        terms: number of terms.
        quick: the shorter list of standard cases.
    """
    ops = ops or list(OPERATORS)
    if not (models or rows or dtypes):
        standard = (_QUICK if quick else _DEFAULT)[device_type]
        return [Case(op, *shape, terms) for op in ops for shape in standard]
    combinations = product(ops, models or ["gpt2"], rows or [_DEFAULT_N[device_type]], dtypes or ["float32"])
    # A name given twice is measured once.
    return list(dict.fromkeys(Case(*combination, terms) for combination in combinations))
