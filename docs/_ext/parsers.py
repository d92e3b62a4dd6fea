"""The parsers of auxkern's commands, as their ``main`` makes them."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from unittest import mock

from auxkern.cli import COMMANDS

# Options of its own, behind an option of another's.
BENCH_GENERATE = "bench --op generate"


class _MadeError(Exception):
    """Carries the parser out of ``main``, which goes no further."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each command's name behind ``auxkern``, and its parser."""
    for name, (module, _) in COMMANDS.items():
        yield name, _parser(module)
        if name == "bench":
            yield BENCH_GENERATE, _parser("auxkern.bench.generate")


def _parser(module: str) -> argparse.ArgumentParser:
    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _MadeError(parser)

    # Some commands make their parser within main; all of them hand the arguments to it first.
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            importlib.import_module(module).main([])
        except _MadeError as made:
            return made.parser
    raise RuntimeError(f"{module}.main([]) parsed no arguments")
