"""A file of requests into a file of texts, from Python; killed at any moment and started again it goes on.

    python examples/batch_file.py requests.jsonl texts.jsonl --pair out/keyword

A line of requests.jsonl is an object like {"condition": "glacier", "max_new_tokens": 32}. The command
``auxkern generate --input`` does the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from auxkern.generation import Completion, CompletionWriter, Engine, Request, file_fingerprint, read_requests
from auxkern.model import fingerprint, open_pair

AT_ONCE = 256  # requests that wait, several times the engine's slots


def main(argv: list[str] | None = None) -> int:
    """How many texts were written by this run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("requests", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--pair", default="out/keyword", help="folder or Hub name of an auxiliary")
    parser.add_argument("--model", help="its base, where that has moved")
    options = parser.parse_args(argv)

    model, text_format = open_pair(options.pair, base=options.model)
    engine = Engine(model, text_format)
    # Another run than the one that began the output would be refused.
    run = {"input": file_fingerprint(options.requests), "pair": fingerprint(model)}
    defaults = Request("defaults", max_new_tokens=64)
    with CompletionWriter(options.texts, run=run) as writer:
        count = 0
        for one in completions(engine, writer.pending(read_requests(options.requests, defaults))):
            writer.write(one)
            count += 1
        print(f"{count} texts written, {writer.done} were there")
    return count


def completions(engine: Engine, pending: Iterable[tuple[Request, tuple[int, ...]]]) -> Iterator[Completion]:
    """Texts as they are done; no more requests wait than keep the engine's slots full."""
    for request, samples in pending:
        yield from engine.submit(request, samples)
        while engine.scheduler.waiting >= AT_ONCE:
            yield from engine.step()
    while not engine.scheduler.idle:
        yield from engine.step()


if __name__ == "__main__":
    main()
