"""``auxkern generate``: texts of a trained pair for a few conditions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from auxkern.bench.session import positive
from auxkern.commands import pair
from auxkern.commands.pair import Request, Text
from auxkern.files import replace_file
from auxkern.ops.sampling_params import SamplingParams

_EPILOG = """\
Without options it draws from the pair's own distribution: temperature 1, no filter. Each sample has a seed
of its own, made from --seed and its number, so the same command writes the same texts, whatever the batch
size. Beam search and --greedy draw nothing.
A line of --file is a JSON object with condition and, if you like, prompt; a text in it is not read.
A line of --json is an object with condition, prompt, text (without the prompt), finished (false where
--max-new-tokens cut it off) and seed.
Exit status: 0; 2 for bad options or a model that cannot be loaded; 130 after Ctrl-C, when the texts so far
are printed and written.
"""
_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # and what each is if not given


def main(argv: list[str] | None = None) -> int:
    """Prints conditions and texts, and writes them as JSON lines if asked.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0; 2 if a file cannot be read or written or a model cannot be loaded; 130 after Ctrl-C. Bad
        options exit with 2 (``SystemExit``, as argparse does).
    """
    parser = _parser()
    options = parser.parse_args(argv)
    _check(parser, options)
    return pair.run(parser.prog, lambda: _generate(parser, options))


def read_requests(path: Path) -> list[Request]:
    """The requests in a file with one JSON object a line, with condition and optional prompt.

    Empty lines count for nothing, a prompt of null is an empty one, and a text is not read, so a file
    of training examples will do.

    Raises:
        OSError: there is no such file.
        ValueError: a line is not such an object, or there is none; the message names file and line.
    """
    requests = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                requests.append(_request(json.loads(line.decode("utf-8"))))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not requests:
        raise ValueError(f"{path} holds no line; give each condition one")
    return requests


def _request(record: Any) -> Request:
    if not isinstance(record, dict) or not isinstance(record.get("condition"), str):
        raise ValueError('a line is an object with a str "condition" and, if you like, a str "prompt"')
    unknown = [name for name in record if name not in ("condition", "prompt", "text")]
    if unknown:
        raise ValueError(f"the field {unknown[0]!r} is unknown; known are condition, prompt and text")
    prompt = record.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"prompt is {prompt!r:.60}; it must be a str")
    return Request(record["condition"], prompt or "")


def _generate(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    conditions: list[str] = options.condition or []
    requests = [Request(condition, options.prompt) for condition in conditions]
    if options.file is not None:
        requests = read_requests(options.file)
    model, text_format = pair.load_pair(parser, options)
    records: list[dict[str, Any]] = []
    total = len(requests) * options.number
    try:
        for record in _records(model, text_format, requests, options):
            _print(record, len(records), total)
            records.append(record)
    finally:
        # What is done stays, however the rest ended.
        if options.json is not None and records:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            replace_file(options.json, "".join(lines))
            print(f"wrote {options.json}", file=sys.stderr)
    return 0


def _records(
    model: Any, text_format: Any, requests: list[Request], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    if options.repetition_penalty is not None:
        settings["repetition_penalty"] = options.repetition_penalty
    if options.aux_scale is not None:
        settings["aux_scale"] = options.aux_scale
    seeds = None
    if options.num_beams > 1:
        # The beams of one search are different texts; searches of their own would all find the same.
        settings |= {"num_beams": options.num_beams, "num_return_sequences": options.number}
    else:
        requests = [one for one in requests for _ in range(options.number)]
        if not options.greedy:
            seeds = pair.sample_seeds(options.seed or 0, len(requests))
            settings |= {"do_sample": True, **_sampling(options)}
    found = pair.texts(model, text_format, requests, batch_size=options.batch_size, seeds=seeds, **settings)
    repeated = settings.get("num_return_sequences", 1)
    for index, one in enumerate(text for some in found for text in some):
        yield _record(requests[index // repeated], one, None if seeds is None else seeds[index])


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in _SAMPLING}
    return {name: _SAMPLING[name] if value is None else value for name, value in given.items()}


def _record(request: Request, one: Text, seed: int | None) -> dict[str, Any]:
    return {**request._asdict(), **one._asdict(), "seed": seed}


def _print(record: dict[str, Any], index: int, total: int) -> None:
    if index:
        print()
    cut = "" if record["finished"] else ", cut off"
    print(f"[{index + 1}/{total}{cut}] {record['condition']}")
    print(record["prompt"] + record["text"], flush=True)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    pair.check_json_option(parser, options.json)
    if options.file is not None and options.prompt:
        parser.error("--prompt goes with --condition; write prompts into the lines of --file")
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
    penalty = options.repetition_penalty
    try:
        SamplingParams(repetition_penalty=1.0 if penalty is None else penalty, **_sampling(options))
    except ValueError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = pair.CommandParser(
        prog="auxkern generate",
        description="Write texts with a trained pair, for conditions.",
        epilog=_EPILOG,
    )
    pair.add_model_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--condition", action="append", metavar="TEXT", help="a condition (repeatable)")
    source.add_argument("--file", type=Path, metavar="FILE.jsonl", help="conditions and prompts")
    parser.add_argument(
        "--prompt", default="", metavar="TEXT", help="what the text of every condition continues"
    )
    for flag, kind, letter, what in (
        ("--number", positive, "N", "texts for each condition (default 1)"),
        ("--max-new-tokens", positive, "N", "longest text (default 64)"),
        ("--batch-size", positive, "N", "texts, or searches, at a time (default 16)"),
        ("--num-beams", positive, "N", "beam search with so many beams"),
        ("--temperature", float, "X", "divides the logits, above 0"),
        ("--top-k", positive, "N", "draw among the N most likely tokens"),
        ("--top-p", float, "X", "draw among the most likely tokens that reach this probability"),
        ("--min-p", float, "X", "draw among tokens with this share of the largest probability"),
        ("--repetition-penalty", float, "X", "above 1: tokens of prompt and text so far are less likely"),
        ("--seed", pair.natural, "N", "of the draws (default 0)"),
    ):
        parser.add_argument(flag, type=kind, metavar=letter, help=what)
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
    parser.add_argument("--json", type=Path, metavar="FILE.jsonl", help="write the texts there too")
    parser.set_defaults(number=1, max_new_tokens=64, batch_size=16, num_beams=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
