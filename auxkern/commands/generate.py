"""``auxkern generate``: texts of a trained pair for a few conditions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from auxkern.commands import pair
from auxkern.commands.ranks import Launched
from auxkern.core.files import is_descriptor, replace_file
from auxkern.model.text import Example
from auxkern.ops.sampling_params import SamplingParams
from auxkern.terminal import command_parser, input_file, natural, output_file, positive

_EPILOG = """\
Without options it draws from the pair's own distribution: temperature 1, no filter. Each sample has a seed
of its own, made from --seed and its number, so the same command writes the same texts, whatever the batch
size. Beam search and --greedy draw nothing.
A line of --input is a JSON object with condition and, if you like, id, prompt, seed, max_new_tokens, stop,
samples, aux_scale, auxiliary, logprobs, ignore_eos and the fields of SamplingParams; other options say what
a line leaves out. A prompt may be empty, for every text begins with the start token. Lines of any number
go through an engine that keeps --batch-size texts going. A line of
--output is an object with id, sample, text, finish_reason, token_ids and more. Stopped at any moment and
started again with the same command it goes on, and skips what failed as what is done; with --retry-errors
it first takes lines with an error out of --output, all at once, and asks for them again. Bad lines go to
OUTPUT.errors.jsonl and stay there.
Under torchrun (torchrun --nproc-per-node 4 -m auxkern generate ...) processes share the lines of --input;
the output is the same, and any number of processes may go on with it.
A line of --json is an object with condition, prompt, text (without the prompt), finished (false where
--max-new-tokens cut it off) and seed.
Exit status: 0; 1 if lines of --input were bad or could not be answered; 2 for bad options or a model that
cannot be loaded; 130 after Ctrl-C, when the texts so far are printed and written.
"""
_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # and what each is if not given


def main(argv: list[str] | None = None) -> int:
    """Prints conditions and texts, and writes them as JSON lines if asked.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0; 1 if lines of --input were bad or failed; 2 if a file cannot be read or written or a model
        cannot be loaded; 130 after Ctrl-C. Bad options exit with 2 (``SystemExit``, as argparse does).
    """
    parser = _parser()
    options = parser.parse_args(argv)
    _check_arguments(parser, options)
    return pair.run(parser.prog, lambda: _generate(parser, options))


def _generate(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    launched = Launched.from_environment()
    if options.input is None:
        launched.check_alone("--condition, unlike --input,")
        return _answer_conditions(options, *pair.load_pair(parser, options))
    from auxkern.commands import generate_file

    options.device = launched.device(options.device)
    model, text_format = pair.load_pair(parser, options)
    # They only wait for each other, which no GPU is needed for.
    with launched.joined("gloo") as joined, launched.first_speaks():
        return generate_file.answer_file(options, model, text_format, _sampling_params(options), joined)


def _answer_conditions(options: argparse.Namespace, model: Any, text_format: Any) -> int:
    requests = [Example(condition, "", options.prompt) for condition in options.condition]
    records: list[dict[str, Any]] = []
    total = len(requests) * options.number
    try:
        for record in _records(model, text_format, requests, options):
            if records:
                print()
            records.append(record)
            cut = "" if record["finished"] else ", cut off"
            print(f"[{len(records)}/{total}{cut}] {record['condition']}")
            print(record["prompt"] + record["text"], flush=True)
    finally:
        # What is done stays, however the rest ended.
        if options.json is not None and records:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            replace_file(options.json, "".join(lines))
            print(f"wrote {options.json}", file=sys.stderr)
    return 0


def _records(
    model: Any, text_format: Any, requests: list[Example], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    given = {"repetition_penalty": options.repetition_penalty, "aux_scale": options.aux_scale}
    settings |= {name: value for name, value in given.items() if value is not None}
    seeds = None
    if options.num_beams > 1:
        # The beams of one search are different texts; searches of their own would all find the same.
        settings |= {"num_beams": options.num_beams, "num_return_sequences": options.number}
    else:
        requests = [one for one in requests for _ in range(options.number)]
        if not options.greedy:
            seeds = pair.sample_seeds(options.seed or 0, len(requests))
            settings |= {"do_sample": True, **_filters(options)}
    texts = pair.texts(model, text_format, requests, batch_size=options.batch_size, seeds=seeds, **settings)
    repeated = settings.get("num_return_sequences", 1)
    for index, one in enumerate(text for some in texts for text in some):
        asked, seed = requests[index // repeated], None if seeds is None else seeds[index]
        yield {"condition": asked.condition, "prompt": asked.prompt, **one._asdict(), "seed": seed}


def _filters(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in _SAMPLING}
    return {name: _SAMPLING[name] if value is None else value for name, value in given.items()}


def _check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    _check_input(parser, options)
    if options.greedy and options.num_beams > 1:
        parser.error("--greedy and --num-beams are two ways to search; leave one out")
    if options.greedy and options.number > 1:
        parser.error(f"--greedy finds one text, but --number is {options.number}; leave one out")
    if 1 < options.num_beams < options.number:
        parser.error(f"--num-beams {options.num_beams} gives at most as many texts, lower --number")
    if options.greedy or options.num_beams > 1:
        for name in (*_SAMPLING, "seed"):
            if getattr(options, name) is not None:
                flag = name.replace("_", "-")
                parser.error(f"--{flag} is for drawing, which --greedy and --num-beams do not; drop it")
    if options.temperature == 0:
        parser.error("--temperature 0 draws nothing; use --greedy")
    try:
        _sampling_params(options)
    except ValueError as error:
        parser.error(str(error))


def _check_input(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for_input = ("output", "max_length", "max_condition", "mixture", "stop_on_error", "retry_errors")
    if options.input is None:
        for name in for_input:
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')} goes with --input")
        return
    if options.output is None:
        parser.error("--input needs --output, the file for the texts")
    if options.prompt:
        parser.error("--prompt goes with --condition; write prompts into the lines of --input")
    if options.json is not None:
        parser.error("--json goes with --condition; --output is what --input writes")
    if options.num_beams > 1:
        parser.error("--num-beams goes with --condition; the engine draws, or takes the likeliest token")
    if str(options.input) != "-" and not options.input.exists():
        parser.error(f"--input {options.input} does not exist; name a file with a request on each line")
    if not options.input.is_file():
        parser.error(
            f"--input {options.input} is no file, which is read several times and gone on with; what comes "
            "from a pipe has to be written to one first"
        )
    path = options.output
    # A run goes on with its output, and has files beside it: a pipe or a device has neither.
    if str(path) == "-" or is_descriptor(path) or (path.exists() and not path.is_file()):
        parser.error(f"--output {path} is no plain file, which a stopped run could go on with; name one")
    try:
        output_file(str(path))
    except argparse.ArgumentTypeError as error:
        parser.error(f"--output {error}")
    if path.exists() and path.samefile(options.input):
        parser.error(f"--input and --output are both {options.input}; the texts need a file of their own")
    options.max_length = options.max_length or 512
    options.max_condition = options.max_condition or 64


def _file(name: str) -> Path:
    """The name of a file, for argparse."""
    if not name:
        raise argparse.ArgumentTypeError("the name is empty; name a file")
    return Path(name)


def _sampling_params(options: argparse.Namespace) -> SamplingParams:
    penalty = 1.0 if options.repetition_penalty is None else options.repetition_penalty
    if options.greedy:
        return SamplingParams(temperature=0.0, repetition_penalty=penalty)
    return SamplingParams(repetition_penalty=penalty, **_filters(options))


def _parser() -> argparse.ArgumentParser:
    description = "Write texts with a trained pair, for conditions."
    parser = command_parser("auxkern generate", description, _EPILOG)
    pair.add_model_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--condition", action="append", metavar="TEXT", help="a condition (repeatable)")
    source.add_argument("--input", type=_file, metavar="FILE.jsonl", help="requests, any number of them")
    for flag, kind, letter, what in (
        ("--prompt", str, "TEXT", "what the text of every condition continues"),
        ("--number", positive, "N", "texts for each condition (default 1)"),
        ("--max-new-tokens", positive, "N", "longest text (default 64)"),
        ("--batch-size", positive, "N", "texts, or searches, at a time (default 16)"),
        ("--num-beams", positive, "N", "beam search with so many beams"),
        ("--temperature", float, "X", "divides the logits, above 0"),
        ("--top-k", positive, "N", "draw among the N most likely tokens"),
        ("--top-p", float, "X", "draw among the most likely tokens that reach this probability"),
        ("--min-p", float, "X", "draw among tokens with this share of the largest probability"),
        ("--repetition-penalty", float, "X", "above 1: tokens of prompt and text so far are less likely"),
        ("--seed", natural, "N", "of the draws (default 0)"),
        ("--output", _file, "FILE.jsonl", "with --input: the texts"),
        (
            "--mixture",
            input_file,
            "FILE.yaml",
            "with --input: models beside the pair's; see docs/mixtures.md",
        ),
        ("--max-length", positive, "N", "with --input: most tokens of a text and its prompt (default 512)"),
        ("--max-condition", positive, "N", "with --input: most tokens of a condition (default 64)"),
    ):
        parser.add_argument(flag, type=kind, metavar=letter, help=what)
    for flag, what in (
        ("--stop-on-error", "with --input: end at the first bad line"),
        (
            "--retry-errors",
            "with --input: take texts that are errors out of --output, and ask for them again",
        ),
        ("--greedy", "always take the most likely token"),
    ):
        parser.add_argument(flag, action="store_true", help=what)
    parser.add_argument("--json", type=output_file, metavar="FILE.jsonl", help="write the texts there too")
    parser.set_defaults(prompt="", number=1, max_new_tokens=64, batch_size=16, num_beams=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
