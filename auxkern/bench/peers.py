"""Peers that every operator's benchmark has in the same way: torch.compile, and other packages."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from auxkern.bench.operators import Implementation

# What calls a function of tensors with the tensors of a case.
Adapter = Callable[[Callable[..., Tensor]], Callable[[Any], Tensor]]


def compiled_peers(
    eager: Callable[..., Tensor], device: torch.device, adapt: Adapter
) -> list[Implementation]:
    """``torch.compile`` of ``eager``, in the modes that differ on ``device``."""
    modes = [("torch.compile", "default")]
    if device.type == "cuda":
        # On a CPU the mode changes nothing here: it tunes GPU reductions and matrix products.
        modes.append(("compile, tuned", "max-autotune-no-cudagraphs"))
    return [
        Implementation(
            name,
            f'torch.compile(eager, mode="{mode}")',
            False,
            adapt(torch.compile(eager, mode=mode, fullgraph=True, dynamic=False)),
        )
        for name, mode in modes
    ]


def is_installed(package: str) -> bool:
    """Whether Python finds ``package``; it is not imported."""
    return importlib.util.find_spec(package) is not None


def imported(module: str, function: str, **options: Any) -> Callable[..., Tensor]:
    """``module.function`` with ``options``, imported at the first call.

    A package that cannot be imported is one failed row of the table that way. Later calls find it
    in ``sys.modules``.
    """

    def call(*arguments: Tensor) -> Tensor:
        run: Any = getattr(importlib.import_module(module), function)
        result: Tensor = run(*arguments, **options)
        return result

    return call


def warpers() -> Callable[..., Tensor]:
    """Hugging Face's filters for one step, those that are on: (logits, temperature, top_k, ...) -> logits."""
    from transformers.generation import logits_process as hf

    none: Any = None  # token ids so far, which these warpers ignore

    def warped(
        z: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
    ) -> Tensor:
        z = hf.TemperatureLogitsWarper(temperature)(none, z)
        if top_k:
            z = hf.TopKLogitsWarper(top_k)(none, z)
        if top_p < 1:
            z = hf.TopPLogitsWarper(top_p)(none, z)
        if min_p:
            z = hf.MinPLogitsWarper(min_p)(none, z)
        return z

    return warped
