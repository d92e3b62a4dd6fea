"""What ``auxkern generate`` and ``auxkern evaluate`` share: loading a pair, drawing texts, ending well."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from auxkern.core.packed import COMPUTES
from auxkern.core.seeds import mixed_seed
from auxkern.machine import machine_facts, version
from auxkern.model.text import Example
from auxkern.terminal import INTERRUPTED, device_from, finite, sentence
from auxkern.training.settings import DTYPES


class Continuation(NamedTuple):
    """A text that a pair wrote.

    Attributes:
        text: what follows the prompt, without special tokens.
        finished: whether the pair ended it; False where it was cut off.
    """

    text: str
    finished: bool


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and the options that say how it is loaded and mixed."""
    parser.add_argument("model", metavar="MODEL", help="folder that auxkern train wrote, or a Hub name")
    parser.add_argument("--base", metavar="NAME", help="where the base is, if it has moved (name or folder)")
    parser.add_argument(
        "--allow-other-base", action="store_true", help="take a base with other weights than it was made for"
    )
    parser.add_argument("--aux-scale", type=finite, metavar="X", help="weight of the auxiliary's logits")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the base (default: the checkpoint's on a GPU, float32 on a CPU)"
    )
    parser.add_argument(
        "--compute",
        choices=COMPUTES,
        default="float32",
        help="how a CPU multiplies: float32, or bfloat16 or int8, which are faster (default float32)",
    )


def run(prog: str, work: Callable[[], int]) -> int:
    """The exit status of ``work``; 2 after an error, of which one line is printed, 130 after Ctrl-C."""
    try:
        with quiet():
            return work()
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, RuntimeError, FloatingPointError, ModuleNotFoundError) as error:
        print(f"{prog}: {sentence(error)}", file=sys.stderr)
        return 2


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and warnings of transformers, which would break up ours.

    What it says of weights that a checkpoint lacks is an exception: it goes on with random ones.
    """
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    shown, level, hub_level = logging.is_progress_bar_enabled(), logging.get_verbosity(), hub.get_verbosity()
    weights = logging.get_logger("transformers.modeling_utils")
    own = weights.level
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    weights.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        weights.setLevel(own)
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if shown:
            logging.enable_progress_bar()


def load_pair(
    parser: argparse.ArgumentParser, options: argparse.Namespace, max_length: int | None = None
) -> tuple[Any, Any]:
    """The model that the options name, in evaluation mode, and its ``TextFormat``.

    Raises:
        OSError, ValueError: there is no such model or base, it is damaged, or the base is another one.
    """
    from auxkern.model import open_pair

    device = device_from(parser, options.device)
    return open_pair(
        options.model,
        base=options.base,
        device=device,
        dtype=options.dtype,
        compute=options.compute,
        allow_other_base=options.allow_other_base,
        max_length=max_length,
    )


def texts(
    model: Any,
    text_format: Any,
    requests: Sequence[Example],
    *,
    batch_size: int,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> Iterator[list[Continuation]]:
    """Texts for the requests, in their order, a batch at a time.

    Args:
        model, text_format: what ``load_pair`` returned.
        requests: condition and prompt for each text, unless ``num_return_sequences`` asks for more.
        batch_size: requests that are answered at a time; it changes the texts by rounding only.
        seeds: one int for each request; None where nothing is drawn.
        options: for ``model.generate``.

    Raises:
        ValueError: an option is out of range or a condition does not fit.
        RuntimeError: logits are NaN or infinite.
    """
    ends = text_format.end_ids(model)
    for first in range(0, len(requests), batch_size):
        some = requests[first : first + batch_size]
        inputs = text_format.prompts([one.condition for one in some], [one.prompt for one in some])
        if seeds is not None:
            options["seeds"] = seeds[first : first + batch_size]
        ids = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            eos_token_id=ends,
            pad_token_id=text_format.pad_id,
            **options,
        )
        start = inputs["input_ids"].shape[1]
        yield [_continuation(text_format, row, start, ends) for row in ids.cpu()]


def _continuation(text_format: Any, ids: torch.Tensor, start: int, ends: Sequence[int]) -> Continuation:
    """What follows the first ``start`` ids of (T) ids, up to the first of the end tokens."""
    ended = torch.isin(ids[start:], torch.tensor(ends)).nonzero()
    if len(ended):
        ids = ids[: start + int(ended[0])]
    prompt, whole = text_format.decode(ids[:start]), text_format.decode(ids)
    # Decoded apart, a text would lose the space before its first word with some tokenizers.
    text = whole[len(prompt) :] if whole.startswith(prompt) else text_format.decode(ids[start:])
    return Continuation(text, len(ended) > 0)


def sample_seeds(seed: int, count: int) -> list[int]:
    """The seeds of ``count`` samples; each depends on ``seed`` and its place alone."""
    return [mixed_seed(seed, "sample", index) for index in range(count)]


def versions(device: torch.device) -> dict[str, str]:
    """The machine, and the versions of what a pair runs on."""
    return {**machine_facts(device), "transformers": version("transformers")}
