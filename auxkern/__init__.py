"""auxkern: sums of logits from several models, fused into one loss and one sampler.

Auxiliary Tuning (Zeldes et al. 2020, arXiv 2006.16823) adds the logits of a small trainable
model to those of a frozen one. ``auxkern.cross_entropy`` trains such a sum without writing it, and
``auxkern.sample`` draws from it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auxkern import nn
    from auxkern.backends.choice import Explanation, explain
    from auxkern.core.memory import GradientMemory
    from auxkern.core.terms import Head, Logits, Sparse
    from auxkern.ops.cross_entropy import CrossEntropyStats, cross_entropy
    from auxkern.ops.mixtures import mixed_probabilities, plausible
    from auxkern.ops.parallel.vocabulary import VocabularyShard
    from auxkern.ops.sample import Sample, sample
    from auxkern.ops.sampling_params import SamplingParams

__version__ = "0.2.0"

__all__ = [
    "CrossEntropyStats",
    "Explanation",
    "GradientMemory",
    "Head",
    "Logits",
    "Sample",
    "SamplingParams",
    "Sparse",
    "VocabularyShard",
    "__version__",
    "cross_entropy",
    "explain",
    "mixed_probabilities",
    "nn",
    "plausible",
    "sample",
]

# torch takes seconds to import, and a command that prints its usage, or is interrupted, needs none of it.
_MODULES = {
    "CrossEntropyStats": "ops.cross_entropy",
    "Explanation": "backends.choice",
    "GradientMemory": "core.memory",
    "Head": "core.terms",
    "Logits": "core.terms",
    "Sample": "ops.sample",
    "SamplingParams": "ops.sampling_params",
    "Sparse": "core.terms",
    "VocabularyShard": "ops.parallel.vocabulary",
    "cross_entropy": "ops.cross_entropy",
    "explain": "backends.choice",
    "mixed_probabilities": "ops.mixtures",
    "plausible": "ops.mixtures",
    "sample": "ops.sample",
}


def __getattr__(name: str) -> Any:
    """A public name or a module, imported when it is first asked for (PEP 562)."""
    if name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
