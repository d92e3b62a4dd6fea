"""Lines of ``--op generate --mixtures``: guidance, and a base steered by an expert and an anti-expert.

Each in the engine and in the way that it is done without one; and each of the three models by itself in the
engine, for what their own costs allow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from auxkern.bench.operators import warped
from auxkern.bench.results import ENGINE_LM, GenerateRun
from auxkern.bench.work import FILTERS, PLAIN, Work, encoded, engine, text_options

GUIDED, GUIDED_GENERATE = "guidance, engine", "guidance, generate"
STEERED, STEERED_LOOP = "proxy tuning, engine", "proxy tuning, three-model loop"
SMALL = {"expert": "expert alone, engine", "anti_expert": "anti-expert alone, engine"}
OTHERS = (GUIDED_GENERATE, STEERED_LOOP)
NEGATIVE, SCALE = "The opposite:", 1.5
_SHARE = 3  # of the base's layers that an expert has: one in three


class Line(NamedTuple):
    """A mixture that the engine writes texts of.

    Attributes:
        name: of the implementation.
        model: the pair whose base it has.
        models: others.
        members: of a prompt, fields of a request.
        places: slots of one model that a text takes.
    """

    name: str
    model: Any
    models: dict[str, Any]
    members: Callable[[str], dict[str, Any]]
    places: int

    def engine(self, work: Work, slots: int) -> Any:
        """With room for so many texts."""
        return engine(replace(work, model=self.model), self.places * slots, self.models)

    def requests(self, work: Work) -> list[Any]:
        """The work as the engine takes it."""
        from auxkern import SamplingParams
        from auxkern.generation import Request

        params = SamplingParams(**FILTERS)
        return [
            Request(i, params=params, seed=i, max_new_tokens=length, ignore_eos=True, **self.members(prompt))
            for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=False))
        ]


def small_model(lm: Any, seed: int, compute: str | None) -> Any:
    """A language model of the first layers of another, its own embedding, and some noise in its norms.

    Args:
        lm: of transformers, with layers that are alike.
        seed: of the noise.
        compute: of the native kernels; None for torch's own layers.
    """
    from auxkern.model import use_native_kernels

    config = copy.deepcopy(lm.config)
    config.num_hidden_layers = max(1, config.num_hidden_layers // _SHARE)
    small = type(lm)(config).to(lm.dtype).eval().requires_grad_(False)
    # What the other layers hold has no place in it.
    small.load_state_dict(lm.state_dict(), strict=False)
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in small.named_parameters():
        if "norm" in name:
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=noise))
    small.to(lm.device)
    return small if compute is None else use_native_kernels(small, compute)


def engine_lines(work: Work) -> list[Line]:
    """What the engine is measured with, in every compute."""
    from auxkern.model import AuxTunedForCausalLM
    from auxkern.model.native import compute_of

    lines: list[Line] = []
    for compute, one in work.pairs().items():
        native = compute_of(one.model.lm)
        models = {name: small_model(work.plain_lm, seed, native) for seed, name in enumerate(SMALL)}
        end = "" if compute == PLAIN else f", {compute}"
        lines.append(Line(f"{GUIDED}{end}", one.model, {}, _guided, 2))
        lines.append(Line(f"{STEERED}{end}", one.model, models, _steered, 1))
        for name, line in SMALL.items():
            sizes = {
                "model_type": "llama",
                "hidden_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
            }
            pair = AuxTunedForCausalLM.from_lm(models[name], auxiliary_config=sizes).eval()
            lines.append(Line(f"{line}{end}", pair, {}, _alone, 1))
    return lines


def _guided(prompt: str) -> dict[str, Any]:
    from auxkern.generation.members import guidance

    return guidance(prompt, NEGATIVE, SCALE)._asdict()


def _steered(prompt: str) -> dict[str, Any]:
    from auxkern.generation.members import experts

    expert, anti_expert = SMALL
    return experts(prompt, expert, anti_expert)._asdict()


def _alone(prompt: str) -> dict[str, Any]:
    from auxkern.generation.members import Member

    return {"members": (Member(prompt=prompt),)}


def others(work: Work) -> list[tuple[str, Callable[[Work, list[int]], None]]]:
    """The other ways, by name: each writes texts of some requests, until the longest is done."""
    small = [small_model(work.plain_lm, seed, None) for seed, _ in enumerate(SMALL)]
    models = list(zip((work.plain_lm, *small), (1.0, 1.0, -1.0), strict=True))
    return [(GUIDED_GENERATE, guided_generate), (STEERED_LOOP, partial(steered_loop, models))]


def guided_generate(work: Work, rows: list[int]) -> None:
    """transformers' ``generate`` with ``guidance_scale``."""
    inputs = encoded(work, rows)
    negative = encoded(replace(work, prompts=[NEGATIVE] * len(work.prompts)), rows)
    work.plain_lm.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        guidance_scale=SCALE,
        negative_prompt_ids=negative["input_ids"],
        negative_prompt_attention_mask=negative["attention_mask"],
        **text_options(work, max(work.lengths[i] for i in rows)),
    )


@torch.no_grad()
def steered_loop(models: list[tuple[Any, float]], work: Work, rows: list[int]) -> None:
    """In the manner of the published code of proxy tuning (Liu et al. 2024): language models and weights."""
    from transformers.generation import logits_process

    from auxkern.model.caches import CACHE_NAME

    inputs, caches = encoded(work, rows), [None] * len(models)
    new, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(max(work.lengths[i] for i in rows)):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :]
        total: Any = 0.0
        for place, (lm, weight) in enumerate(models):
            options = {"attention_mask": mask, "position_ids": positions, CACHE_NAME: caches[place]}
            output = lm(input_ids=new, use_cache=True, logits_to_keep=1, **options)
            caches[place] = output[CACHE_NAME]
            total = total + weight * output.logits[:, -1]
        scores = warped(logits_process, total, **FILTERS)
        new = torch.multinomial(scores.softmax(-1), 1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)


def differing(work: Work, lines: list[Line], count: int = 2) -> list[str]:
    """Lines whose texts are others than those of the same mixture as one model, which writes each alone."""
    from auxkern.generation.members import Mixture
    from auxkern.generation.mixture_model import MixtureForCausalLM

    wrong: list[str] = []
    few = replace(work, lengths=[min(length, 24) for length in work.lengths[:count]])
    for line in lines:
        asked = line.requests(few)
        for request, done in zip(asked, line.engine(few, count).generate(asked), strict=True):
            mixture = Mixture(request.members, request.plausibility)
            model = MixtureForCausalLM(line.model, work.text_format, mixture, line.models)
            begin = work.text_format.prompts([""], [""])["input_ids"].to(line.model.device)
            options = text_options(few, request.max_new_tokens)
            ids = model.generate(input_ids=begin, seeds=[request.seed], **options)
            if ids[0, begin.shape[1] :].tolist() != list(done.token_ids):
                wrong.append(f"{line.name} (request {request.id})")
    return wrong


def notes(run: GenerateRun) -> list[str]:
    """What the mixtures' speeds say."""
    speeds = {(one.implementation, one.batch): one.speed for one in run.results}
    guided, looped = run.best(GUIDED_GENERATE), run.best(STEERED_LOOP)
    told: list[str] = []
    for (name, batch), speed in speeds.items():
        where = f"{name}, batch {batch}"
        if name.startswith(GUIDED) and guided:
            told.append(f"{where}: {speed / guided:.1f} times transformers' guidance at its best batch.")
        if name.startswith(STEERED) and looped:
            told.append(f"{where}: {speed / looped:.1f} times the loop at its best batch.")
        end = name.removeprefix(STEERED)
        alone = [speeds.get((f"{one}{end}", batch), 0.0) for one in (ENGINE_LM, *SMALL.values())]
        if name.startswith(STEERED) and all(alone):
            share = speed * sum(1 / one for one in alone)
            told.append(
                f"{where}: {share:.2f} of what its models' own costs allow, each alone in the engine."
            )
    return told
