"""auxkern: sums of logits from several models, fused into one loss and one sampler.

Auxiliary Tuning (Zeldes et al. 2020, arXiv 2006.16823) adds the logits of a small trainable
model to those of a frozen one. ``auxkern.cross_entropy`` trains such a sum without writing it, and
``auxkern.sample`` draws from it.
"""

from auxkern import nn
from auxkern.ops.cross_entropy import CrossEntropyStats, cross_entropy
from auxkern.ops.memory import GradientMemory
from auxkern.ops.parallel.vocabulary import VocabularyShard
from auxkern.ops.registry import Explanation, explain
from auxkern.ops.sample import Sample, sample
from auxkern.ops.sampling_params import SamplingParams
from auxkern.terms import Head, Logits, Sparse

__version__ = "0.1.0"

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
    "nn",
    "sample",
]
