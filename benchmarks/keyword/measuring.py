"""Texts for held-out keywords, and what is measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from auxkern.core.seeds import mixed_seed
from auxkern.evaluation.diversity import distinct_n, self_bleu
from auxkern.evaluation.slor import UnigramCounts, slor
from auxkern.generation import Engine, Request
from auxkern.model import AuxTunedForCausalLM
from auxkern.model.text import Example, TextFormat, padded
from auxkern.tasks.keywords import contains_keyword

_SLOTS = 64


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


def texts_of_pair(
    model: AuxTunedForCausalLM,
    text_format: TextFormat,
    keywords: Sequence[str],
    *,
    seed: int,
    max_new_tokens: int,
    aux_scale: float | None = None,
) -> list[str]:
    """A text of the pair for each keyword, drawn at temperature 1 from all of its distribution.

    Args:
        model, text_format: the pair, and how it reads conditions.
        keywords: what the texts are for.
        seed: a text depends on it and on its keyword alone.
        max_new_tokens: a text ends there.
        aux_scale: mixing weight instead of the pair's own.
    """
    longest = max(len(text_format.example(keyword, "")["condition_ids"]) for keyword in keywords)
    engine = Engine(
        model,
        text_format,
        slots=min(_SLOTS, len(keywords)),
        max_length=max_new_tokens + 2,
        max_condition=longest,
    )
    requests = [
        Request(
            keyword,
            condition=keyword,
            seed=mixed_seed(seed, f"text for {keyword}"),
            max_new_tokens=max_new_tokens,
            aux_scale=aux_scale,
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
def texts_of_lm(
    lm: Any, text_format: TextFormat, prompts: Sequence[Sequence[int]], *, seed: int, max_new_tokens: int
) -> list[str]:
    """A text of a causal LM after each prompt's ids, drawn at temperature 1 from all of its distribution.

    Hugging Face's ``generate``; all prompts are one batch, and the seed is its.
    """
    ids, mask = padded(prompts, text_format.pad_id, side="left")
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(mixed_seed(seed, "texts"))
        written = lm.generate(
            input_ids=ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=text_format.end_id,
            pad_token_id=text_format.pad_id,
        )
    return [text_format.decode(row[ids.shape[1] :]) for row in written.cpu()]
