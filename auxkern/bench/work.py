"""What ``--op generate`` writes: requests, the pair that writes them, and an engine with room for them."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from auxkern.bench import peers, quality

SHORTEST, LONGEST = 8, 128
FILTERS: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
_SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
CONDITION = 16  # room for a condition, in tokens
COMPUTES = ("float32", "bfloat16", "int8")
PLAIN = "float32"


@dataclass(frozen=True)
class Work:
    """A text for each of ``lengths``, of so many tokens, from the pair ``model``.

    Conditions and prompts are taken by place, and there may be more of them. ``plain_lm`` and
    ``plain_auxiliary`` are the same two models with torch's own layers, for the others. ``engines`` are the
    pairs that the engine is measured with, by their compute. ``sentences`` are token ids to score, ``files``
    where peers find the LM.
    """

    model: Any
    text_format: Any
    conditions: list[str]
    prompts: list[str]
    lengths: list[int]
    plain_lm: Any
    plain_auxiliary: Any
    engines: dict[str, Any] = field(default_factory=dict)
    sentences: list[list[int]] = field(default_factory=list)
    files: peers.LmFiles = field(default_factory=peers.LmFiles)

    def pairs(self) -> dict[str, Work]:
        """The work of each compute's engine."""
        engines = self.engines or {PLAIN: self.model}
        return {compute: replace(self, model=model) for compute, model in engines.items()}


def encoded(work: Work, rows: list[int]) -> dict[str, Tensor]:
    """What the models are given for some requests: ids and masks, padded, on the model's device."""
    tensors = work.text_format.prompts([work.conditions[i] for i in rows], [work.prompts[i] for i in rows])
    return {name: tensor.to(work.model.device) for name, tensor in tensors.items()}


def text_options(work: Work, length: int, end: int | None = None) -> dict[str, Any]:
    """Of Hugging Face's ``generate`` for texts of one length."""
    ends = {"eos_token_id": end, "pad_token_id": work.text_format.pad_id}
    return {"do_sample": True, "max_new_tokens": length, **ends, **FILTERS}


class ComputeError(RuntimeError):
    """The pair does not run in a compute here."""


def new_work(options: argparse.Namespace, device: torch.device) -> Work:
    """Requests for WordNet's keywords, with prompts and lengths of their own, always the same.

    Raises:
        ModuleNotFoundError, FileNotFoundError: what is missing, and how to install it.
        ComputeError: a compute that was asked for does not run here.
    """
    from auxkern.model import TextFormat, load_base, load_tokenizer
    from auxkern.model.base import PACKAGED
    from auxkern.model.native import native_refusal
    from auxkern.model.smollm2 import cache_folder, smollm2_folder, smollm2_gguf
    from auxkern.tasks.keywords import keyword_examples

    count, examples = options.requests, keyword_examples()
    chosen = [examples[i * len(examples) // count] for i in range(count)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = new_pair(device, PLAIN)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (count,)).tolist()
        words = torch.randint(0, 9, (count,)).tolist()
    prompts = [" ".join(one.text.split()[:n]) for one, n in zip(chosen, words, strict=True)]
    text_format = TextFormat(load_tokenizer(PACKAGED), " {condition}")
    plain_lm, plain_auxiliary = model.lm, copy.deepcopy(model.eval().auxiliary)
    if device.type == "cpu" and native_refusal() is None:
        plain_lm = load_base(PACKAGED, native=False)
        model.use_native_kernels()
    conditions = [one.condition for one in chosen]
    work = Work(model, text_format, conditions, prompts, lengths, plain_lm, plain_auxiliary)
    return replace(
        work,
        engines={one: model if one == PLAIN else narrow_pair(device, one) for one in options.compute},
        sentences=quality.held_out_sentences(text_format, options.sentences) if options.sentences else [],
        files=peers.LmFiles(smollm2_folder(), smollm2_gguf(), cache_folder() / "peers"),
    )


def new_pair(device: torch.device, compute: str) -> Any:
    """SmolLM2 and an auxiliary whose weights are drawn from torch's generator."""
    from auxkern.model import AuxTunedForCausalLM, load_base
    from auxkern.model.base import PACKAGED

    options: dict[str, Any] = {} if compute == PLAIN else {"compute": compute}
    model = AuxTunedForCausalLM.from_lm(
        load_base(PACKAGED, device=device, **options),
        auxiliary_config={"model_type": "llama", **_SIZES},
        head="shared",
        input_embedding="shared",
        pointer=True,
        pointer_reads_lm=False,  # the peers' LM gives logits of the last position only
    )
    # An untrained head is zero, and would leave the auxiliary's logits out of the comparison.
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


def narrow_pair(device: torch.device, compute: str) -> Any:
    """The same pair in a narrower compute.

    Raises:
        ComputeError: it does not run here.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            return new_pair(device, compute).eval().use_native_kernels(compute=compute)
        except (ValueError, RuntimeError) as error:
            raise ComputeError(f"--compute {compute}: {error}") from error


def engine(work: Work, slots: int, models: dict[str, Any] | None = None) -> Any:
    """An engine with room for this work, and with other language models by name."""
    from auxkern.generation import Engine

    room: dict[str, Any] = {"slots": slots, "max_length": 192, "max_condition": CONDITION}
    return Engine(work.model, work.text_format, models=models, **room)


def requests(work: Work, auxiliary: str | None = "default") -> list[Any]:
    """The work as the engine takes it; without an auxiliary of the LM alone."""
    from auxkern import SamplingParams
    from auxkern.generation import Request

    params = SamplingParams(**FILTERS)
    fields = zip(work.conditions, work.prompts, work.lengths, strict=False)
    return [
        Request(i, condition, prompt, params, i, length, auxiliary=auxiliary, ignore_eos=True)
        for i, (condition, prompt, length) in enumerate(fields)
    ]
