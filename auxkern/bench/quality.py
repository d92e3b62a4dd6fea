"""How well a language model predicts held-out sentences, as each way of writing texts computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from auxkern.bench import session
from auxkern.bench.results import GenerateRun
from auxkern.bench.runner import Progress
from auxkern.model.base import lm_term, run_base
from auxkern.model.text import TextFormat, padded
from auxkern.ops.dense import dense_logits
from auxkern.tasks.registry import load_task

_BATCH = 16  # sentences at a time


@dataclass(frozen=True)
class ScoredLm:
    """A language model, and whose it is.

    Attributes:
        lm: a causal LM of transformers.
        own_logits: whether its own forward pass makes the logits; else its output head does, in the product
            that draws of it use.
        implementations: that write texts with it.
    """

    lm: Any
    own_logits: bool
    implementations: tuple[str, ...]


def nll_jobs(lms: Sequence[ScoredLm], sentences: list[list[int]], run: GenerateRun) -> list[session.Job]:
    """Jobs that add to ``run.nll``."""
    return [
        (f"{one.implementations[0]}, nll", partial(_scored, one, sentences, run))
        for one in lms
        if one.implementations
    ]


def _scored(one: ScoredLm, sentences: list[list[int]], run: GenerateRun, progress: Progress) -> None:
    progress(0.0, "scoring")
    nll = mean_nll(one.lm, sentences, own_logits=one.own_logits)
    run.nll |= dict.fromkeys(one.implementations, nll)


def held_out_sentences(text_format: TextFormat, count: int) -> list[list[int]]:
    """Token ids of up to ``count`` sentences of WordNet on the keyword task's test side, each once.

    Raises:
        FileNotFoundError: WordNet is not installed.
    """
    texts = dict.fromkeys(example.text for example in load_task("keyword").split().test)
    every, count = [*texts], min(count, len(texts))
    chosen = [every[i * len(every) // count] for i in range(count)]
    # Without the end token: an LM is scored on the words.
    return [text_format.example("", text)["input_ids"][:-1] for text in chosen]


@torch.inference_mode()
def mean_nll(lm: Any, sentences: list[list[int]], *, own_logits: bool) -> float:
    """Mean negative log-likelihood of all tokens but each sentence's first, in nats.

    Args:
        lm: a causal LM of transformers.
        sentences: token ids, at least two each.
        own_logits: whether the LM's own forward pass makes the logits; else its output head does in the
            product that draws of it use.
    """
    total = torch.zeros((), dtype=torch.float64)
    ordered = sorted(sentences, key=len)
    for first in range(0, len(ordered), _BATCH):
        ids, mask = (one.to(lm.device) for one in padded(ordered[first : first + _BATCH], 0))
        output = run_base(lm, ids, mask, want_logits=own_logits)
        scored = mask[:, 1:].bool()
        if output.logits is not None:
            z = output.logits[:, :-1][scored]
        else:
            z = dense_logits([lm_term(lm, output.states[:, :-1, 0][scored], None)])
        z = z.double().log_softmax(-1)
        total -= z.gather(1, ids[:, 1:][scored][:, None]).sum().cpu()
    return float(total) / sum(len(ids) - 1 for ids in sentences)
