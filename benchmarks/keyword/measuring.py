"""Texts for held-out keywords and what is measured of them, and the nll of held-out sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from auxkern.core.seeds import mixed_seed
from auxkern.evaluation.diversity import distinct_n, self_bleu
from auxkern.evaluation.slor import UnigramCounts, slor
from auxkern.generation import Engine, Request
from auxkern.model import AuxTunedForCausalLM
from auxkern.model.text import IGNORED, Example, TextFormat
from auxkern.ops.sampling_params import SamplingParams
from auxkern.tasks.keywords import contains_keyword
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import Items

_SLOTS = 64
PART = 10  # sentences whose nll is one figure, which intervals resample


class Judge:
    """Measures texts, one for each keyword: whether it is contained, SLOR, diversity.

    Args:
        lm: the base; SLOR asks it how probable a text is after the start token.
        tokenizer: its own.
        unigram_texts: where words are counted.
        asked: examples whose keywords the texts are for.
        fingerprint: of the base's weights, if it is known.
    """

    def __init__(
        self,
        lm: Any,
        tokenizer: Any,
        unigram_texts: Sequence[str],
        asked: Sequence[Example],
        fingerprint: str | None = None,
    ) -> None:
        positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        self._lm, self._fingerprint = lm, fingerprint
        self._format = TextFormat(tokenizer, max_length=positions)
        self._counts = UnigramCounts.of_texts(
            unigram_texts,
            TextFormat(tokenizer),
            lm.config.get_text_config().vocab_size,
            source="training side of keyword, each text once",
        )
        self.keywords = [example.condition for example in asked]

    def measure(self, texts: Sequence[str]) -> dict[str, Any]:
        """What there is to say of one text a keyword, in JSON's types; spaces around a text do not count.

        Returns:
            texts, contains (0 or 1) and slor (nats per token, None for an empty text) in the keywords'
            order; distinct_1, distinct_2 and self_bleu_4 of all of them.
        """
        texts = [text.strip() for text in texts]
        scores = slor(self._lm, self._format, texts, self._counts, lm_fingerprint=self._fingerprint)
        worded = sum(bool(text.split()) for text in texts)
        return {
            "texts": texts,
            "contains": [int(contains_keyword(t, k)) for t, k in zip(texts, self.keywords, strict=True)],
            "slor": [None if value is None else round(value, 4) for value in scores.values],
            "distinct_1": distinct_n(texts, 1) if worded else None,
            "distinct_2": distinct_n(texts, 2) if worded else None,
            "self_bleu_4": self_bleu(texts, 4) if worded > 1 else None,
        }


def texts_of(
    model: AuxTunedForCausalLM,
    text_format: TextFormat,
    keywords: Sequence[str],
    *,
    auxiliary: str | None = "default",
    params: SamplingParams,
    seed: int,
    max_new_tokens: int,
) -> list[str]:
    """A text of a pair or of its base for each keyword; it ends at the end token or the end of a line.

    Args:
        model, text_format: the pair, and how it reads conditions.
        keywords: what the texts are for.
        auxiliary: None for the base alone, which is told the keyword where there is a base prompt.
        params: how tokens are drawn.
        seed: a text depends on it and on its keyword alone.
        max_new_tokens: a text ends there at the latest.
    """
    inputs = text_format.prompts(keywords)
    engine = Engine(
        model,
        text_format,
        slots=min(_SLOTS, len(keywords)),
        max_length=inputs["input_ids"].shape[1] + max_new_tokens,
        max_condition=inputs["condition_ids"].shape[1],
    )
    requests = [
        Request(
            keyword,
            condition=keyword,
            params=params,
            seed=mixed_seed(seed, f"text for {keyword}"),
            max_new_tokens=max_new_tokens,
            stop=("\n",),
            auxiliary=auxiliary,
        )
        for keyword in keywords
    ]
    return write_texts(engine, requests)


def write_texts(engine: Engine, requests: Sequence[Request]) -> list[str]:
    """A text for each request of one sample, in their order.

    Raises:
        RuntimeError: one of them has none.
    """
    completions = engine.generate(requests)
    for one in completions:
        if one.finish_reason == "error":
            raise RuntimeError(f"no text for {one.id!r}: {one.error}")
    return [one.text for one in completions]


@torch.no_grad()
def nll_parts(model: Any, examples: Items, collate: AuxCollator, device: torch.device) -> list[list[float]]:
    """Of each so many consecutive examples, the summed nll (nats) and the number of labels.

    The model, a pair or a ``FineTunedLM``, is in evaluation mode afterwards.
    """
    model.eval()
    one, parts = torch.tensor(1, device=device), []
    for first in range(0, len(examples), PART):
        items = [examples[i] for i in range(first, min(first + PART, len(examples)))]
        batch = {name: values.to(device) for name, values in collate(items).items()}
        nll = model(**batch, num_items_in_batch=one, return_logits=False).loss
        parts.append([float(nll), int((batch["labels"][:, 1:] != IGNORED).sum())])
    return parts


def nll_parts_of_lm(examples: Items, lm_nll: Callable[[int], Tensor]) -> list[list[float]]:
    """The same of the base alone, whose nll (T,) of what follows each token is known by example."""
    each = []
    for i in range(len(examples)):
        scored = torch.tensor(examples[i]["labels"][1:]) != IGNORED
        each.append((float(lm_nll(i)[:-1][scored].double().sum()), int(scored.sum())))
    return [
        [sum(nll for nll, _ in each[first : first + PART]), sum(n for _, n in each[first : first + PART])]
        for first in range(0, len(each), PART)
    ]
