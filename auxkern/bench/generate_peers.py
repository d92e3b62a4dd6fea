"""What is written in ``python -m auxkern.bench --op generate``, and the other ways to write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from auxkern.bench.operators import warpers
from auxkern.bench.results import LM, LOOP

SHORTEST, LONGEST = 8, 128
FILTERS: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}


@dataclass(frozen=True)
class Work:
    """What is asked for.

    Attributes:
        model: the pair.
        text_format: makes its ids.
        conditions, prompts: one of each for every request.
        lengths: tokens that are wanted of each text.
        plain_lm, plain_auxiliary: the same two models with torch's own layers, for the others.
    """

    model: Any
    text_format: Any
    conditions: list[str]
    prompts: list[str]
    lengths: list[int]
    plain_lm: Any
    plain_auxiliary: Any

    def first(self, count: int) -> Work:
        """The first ``count`` requests only."""
        part = {name: getattr(self, name)[:count] for name in ("conditions", "prompts", "lengths")}
        return replace(self, **part)


def encoded(work: Work, rows: list[int]) -> dict[str, Tensor]:
    """What the models are given for some requests: ids and masks, padded, on the model's device."""
    found = work.text_format.prompts([work.conditions[i] for i in rows], [work.prompts[i] for i in rows])
    return {name: tensor.to(work.model.device) for name, tensor in found.items()}


Way = Callable[[Work, int], dict[str, float]]  # (work, batch) -> shares of the time, {} if not known


def peers(work: Work) -> dict[str, Way]:
    """The other ways by their names, on torch's kernels, then on ours where the engine runs on them."""
    ways = {
        LOOP: _in_batches(two_model_loop),
        LM: _in_batches(generate_lm),
        "generate, pair": _in_batches(generate_pair),
    }
    if work.plain_lm is not work.model.lm:
        ways |= {
            "loop, our kernels": _in_batches(two_model_loop, our_kernels=True),
            "LM alone, our kernels": _in_batches(generate_lm, our_kernels=True),
        }
    return ways


def _in_batches(write: Callable[[Work, list[int]], None], our_kernels: bool = False) -> Way:
    """All requests, batch after batch, each until its longest text is done."""

    def way(work: Work, batch: int) -> dict[str, float]:
        if our_kernels:
            work = replace(work, plain_lm=work.model.lm, plain_auxiliary=work.model.auxiliary)
        # In the order of arrival: how long a text will be is not known before it is written.
        rows = list(range(len(work.lengths)))
        for first in range(0, len(rows), batch):
            write(work, rows[first : first + batch])
        return {}

    return way


def _generation(work: Work, length: int, end: int | None) -> dict[str, Any]:
    """Options of Hugging Face's ``generate`` for texts of one length."""
    pad = work.text_format.pad_id
    return {"do_sample": True, "max_new_tokens": length, "eos_token_id": end, "pad_token_id": pad, **FILTERS}


def _longest(work: Work, rows: list[int]) -> int:
    return max(work.lengths[i] for i in rows)


def generate_lm(work: Work, rows: list[int]) -> None:
    """Hugging Face's ``generate`` of the LM alone."""
    inputs = {name: encoded(work, rows)[name] for name in ("input_ids", "attention_mask")}
    work.plain_lm.generate(**inputs, **_generation(work, _longest(work, rows), None))


def generate_pair(work: Work, rows: list[int]) -> None:
    """Hugging Face's ``generate`` of the pair."""
    work.model.generate(**encoded(work, rows), **_generation(work, _longest(work, rows), None))


@torch.no_grad()
def two_model_loop(work: Work, rows: list[int]) -> None:
    """In the manner of the published code of proxy tuning (Liu et al. 2024)."""
    from auxkern.model.inputs import PairInputs

    model, inputs, warped = work.model, encoded(work, rows), warpers()
    embedding = work.plain_lm.get_input_embeddings().weight
    project = work.plain_lm.get_output_embeddings()
    new = ids = inputs["input_ids"]
    mask, lm_cache, aux_cache = inputs["attention_mask"], None, None
    for _ in range(_longest(work, rows)):
        lm = work.plain_lm(
            input_ids=new,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :],
            past_key_values=lm_cache,
            use_cache=True,
            logits_to_keep=1,
        )
        pair = PairInputs(new, mask, inputs["condition_ids"], inputs["condition_mask"])
        nothing = embedding.new_zeros(*new.shape, 0, embedding.shape[1])
        aux = work.plain_auxiliary(pair.for_auxiliary(nothing, embedding, None, aux_cache, True))
        lm_cache, aux_cache = lm.past_key_values, aux.cache
        pointer = aux.pointer[:, -1] * inputs["condition_mask"]
        aux_logits = project(model.head(aux.hidden[:, -1])).scatter_add(1, inputs["condition_ids"], pointer)
        aux_logits[:, model.config.eos_token_id] += aux.end[:, -1]
        scores = warped(lm.logits[:, -1] + aux_logits, **FILTERS)
        new = torch.multinomial(scores.softmax(-1), 1)
        ids = torch.cat([ids, new], 1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)


def continuous_refusal(work: Work) -> str | None:
    """Why transformers' continuous batching does not run here; None if it does."""
    if not hasattr(work.plain_lm, "generate_batch"):
        return "this version of transformers has none"
    return "it needs a GPU" if work.model.device.type == "cpu" else None


def continuous(work: Work, batch: int) -> dict[str, float]:
    """Transformers' continuous batching of the LM alone; it chooses its batches itself.

    Args:
        work: with one length for all, for its call takes no length of each request.
        batch: not used.

    Raises:
        RuntimeError: texts are missing or too short; the library only logs what went wrong.
    """
    from transformers import GenerationConfig

    length = max(work.lengths)
    config = GenerationConfig(**_generation(work, length, -1))
    prompts = [encoded(work, [i])["input_ids"][0].tolist() for i in range(len(work.lengths))]
    done = work.plain_lm.generate_batch(inputs=prompts, generation_config=config)
    whole = [one for one in done.values() if len(one.generated_tokens) == length]
    if len(whole) != len(prompts):
        raise RuntimeError(
            f"generate_batch wrote {len(whole)} texts of {length} tokens, not {len(prompts)}: see its log"
        )
    return {}
