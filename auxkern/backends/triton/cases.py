"""What stands for the launches of a kernel: one for each binary, on tensors without memory.

The launches come from the functions that the backend itself uses, so they cannot drift from what users run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from auxkern.backends.triton import configs
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.launch import Launch
from auxkern.core.loss import Coefficients, Loss, RowSlopes, RowSums
from auxkern.core.sums import Sum
from auxkern.core.terms import Head, Logits, unchecked

VOCABULARIES = {"SmolLM2": 49152, "GPT-2": 50257, "Llama-3": 128256, "Gemma": 262144}
H100 = Gpu(
    "H100 SXM",
    configs.H100,
    multiprocessors=132,
    cache_bytes=50 << 20,
    configs=configs.Configs.of(configs.H100),
)
# D of a language model's and of an auxiliary model's hidden states.
WIDTHS = {"768+256": (768, 256), "576+256": (576, 256), "4096+512": (4096, 512)}

H, B, F = torch.float16, torch.bfloat16, torch.float32
_SHORT = {H: "fp16", B: "bf16", F: "fp32"}


@dataclass(frozen=True)
class Case:
    """One launch that stands for many.

    Attributes:
        label: what is special about it, such as "fp16+fp32, smooth".
        model: key of ``VOCABULARIES``.
        rows: N.
        launch: as the backend would launch it.
        columns: that a program comes by; None for its share of the vocabulary.
    """

    label: str
    model: str
    rows: int
    launch: Launch
    columns: int | None = None

    @property
    def half_operands(self) -> list[bool]:
        """For each product of matrices in the launch, whether its operands have 16 bits, or parts that do."""
        heads: Any = self.launch.arguments.get("heads", ())
        cut = self.launch.constants.get("PRECISION") == configs.BF16X6
        return [cut or head.hidden.dtype != F or head.weight.dtype != F for head in heads]


@dataclass(frozen=True)
class Kernel:
    """A registered kernel.

    Attributes:
        function: the ``triton.jit`` entry point.
        launches: yields labels and representative launches for V ids on a GPU.
        rows: N of the launches.
        vectors: whether, on contiguous logits, its traffic must move 16 bytes at a time.
        dot: whether it multiplies matrices and must use tensor cores.
        any_row: whether ``vectors`` holds for rows that begin anywhere, not only at 16-byte boundaries.
        passes: how often it may read what it reads.
        sums: whether its inner loop also stores a few numbers of a tile, which need not be wide.
        columns: that a program comes by, of a kernel that takes lists; None for its share of the vocabulary.
    """

    function: Any
    launches: Callable[[int, Gpu], Iterator[tuple[str, Launch]]]
    rows: int
    vectors: bool = False
    dot: bool = False
    any_row: bool = True
    passes: int = 1
    sums: bool = False
    columns: int | None = None

    @property
    def name(self) -> str:
        """Of the function."""
        name: str = self.function.fn.__name__
        return name

    def cases(self, model: str, gpu: Gpu = H100) -> Iterator[Case]:
        """The launches for a model of ``VOCABULARIES`` on a GPU."""
        for label, launch in self.launches(VOCABULARIES[model], gpu):
            yield Case(label, model, self.rows, launch, self.columns)


def gpu_of(capability: int, exact: str = configs.BF16X6) -> Gpu:
    """An H100 of another major compute capability: what is compiled for it, whatever its size."""
    return replace(H100, capability=capability, configs=configs.Configs.of(capability), exact=exact)


def named(*dtypes: torch.dtype) -> str:
    """How a label names the dtypes of terms."""
    names = [_SHORT[dtype] for dtype in dtypes]
    return f"{len(names)} x {names[0]}" if len(names) > 2 else "+".join(names)


def float_row(rows: int) -> Tensor:
    """(N,) float32."""
    return torch.empty(rows, device="meta")


def target_of(rows: int) -> Tensor:
    """(N,) targets."""
    return torch.empty(rows, dtype=torch.int64, device="meta")


def coefficients_of(rows: int) -> Coefficients:
    """Of rows' gradients."""
    return Coefficients(*[float_row(rows)] * 4)


def slopes_of(rows: int, V: int, *, ready: bool = False) -> RowSlopes:
    """Of rows' losses; ``ready`` if gradients are written already."""
    row, counts = float_row(rows), torch.empty(rows, dtype=torch.bool, device="meta")
    return RowSlopes(row, RowSums(row, row, row), counts, Loss(), V, row if ready else None)


def logits_of(
    rows: int, V: int, dtypes: Sequence[torch.dtype], *, cap: float | None = None, scale: float | Tensor = 1.0
) -> Sum:
    """A sum of (1, N, V) logits of these dtypes."""
    values = [torch.empty(1, rows, V, dtype=dtype, device="meta") for dtype in dtypes]
    return Sum(tuple(unchecked(Logits, values=x, scale=scale, softcap=cap) for x in values), V)


def heads_of(
    rows: int,
    V: int,
    widths: Sequence[int],
    dtypes: Sequence[torch.dtype],
    *,
    cap: float | None = None,
    scales: Sequence[float | Tensor] = (1.0, 1.0, -1.0),
    hidden: torch.dtype | None = None,
) -> Sum:
    """A sum of heads of these widths and dtypes; those of all hidden states are ``hidden``, if given."""
    heads = [
        Head(
            torch.empty(rows, D, dtype=hidden or dtype, device="meta"),
            torch.empty(V, D, dtype=dtype, device="meta"),
            scale=scale,
            softcap=cap,
        )
        for D, dtype, scale in zip(widths, dtypes, scales, strict=False)
    ]
    return Sum(tuple(heads), V)
