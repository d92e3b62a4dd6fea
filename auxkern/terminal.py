"""What commands share: exit status of Ctrl-C, a parser, kinds of arguments, errors in words, a console."""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

# The others are imported where they are needed: a usage line waits for none of them.
from auxkern.core.files import is_descriptor
from auxkern.core.unicode import check_unicode

if TYPE_CHECKING:
    import torch
    from rich.console import Console

_ERRNO = re.compile(r"^\[Errno \d+\] ")
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


class CommandParser(argparse.ArgumentParser):
    """With errors of one line: the usage of many flags would bury it."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """First what was given and means nothing: argparse would name what is missing instead."""
        given = list(sys.argv[1:] if args is None else args)
        for word in given:
            try:
                check_unicode("an argument", word)
            except ValueError as error:
                self.error(str(error))
        known = self._option_string_actions
        for word in itertools.takewhile(lambda word: word != "--", given):
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                close = difflib.get_close_matches(flag, known, n=1)
                remedy = f"; did you mean {close[0]}?" if close else ""
                self.error(f"unrecognized arguments: {flag}{remedy}")
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def command_parser(prog: str, description: str, epilog: str) -> CommandParser:
    """A parser that knows no abbreviations and shows the epilog as it is written."""
    return CommandParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
    return value


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN, for argparse."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{value} is not finite")
    return value


def input_file(name: str) -> Path:
    """The file or pipe that an option names, for argparse; "-" is standard input.

    Raises:
        argparse.ArgumentTypeError: there is nothing to read; the message says why.
    """
    path = Path("/dev/stdin" if name == "-" else name)
    problem = None
    if not name:
        problem = "the name is empty"
    elif not path.exists():
        problem = f"{name} does not exist"
    elif path.is_dir():
        problem = f"{name} is a folder"
    if problem:
        raise argparse.ArgumentTypeError(f"{problem}; name a file, or - for standard input")
    return path


def output_file(name: str) -> Path:
    """The file that an option names, for argparse.

    Raises:
        argparse.ArgumentTypeError: nothing can be written there; the message says why.
    """
    path, folder = Path(name), Path(name).resolve().parent
    problem = None
    if not name:
        problem = "the name is empty"
    elif name == "-":
        problem = "- is no file; /dev/stdout is standard output"
    elif path.is_dir():
        problem = f"{name} is a folder"
    elif not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{name}: the folder {folder} does not exist; make it first")
    elif not is_descriptor(path) and path.is_fifo():
        problem = f"{name} is a pipe, which may have no reader; pipe /dev/stdout"
    elif not is_descriptor(path) and not path.is_char_device() and not _writable(path.parent):
        # A file that is there is replaced by a new one beside it.
        raise argparse.ArgumentTypeError(f"{name}: nothing can be written to {folder}; name another folder")
    if problem:
        raise argparse.ArgumentTypeError(f"{problem}; give a file name")
    return path


def sentence(error: Exception) -> str:
    """What an error says, on one line, and without the number that the system has for it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(_ERRNO.sub("", str(error)).split())


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def device_from(parser: argparse.ArgumentParser, name: str | None) -> torch.device:
    """The device of ``--device``: the one named, or CUDA if there is one, or the CPU.

    One that is not there ends the program with a message.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device {name}: no such device; use cpu, cuda or cuda:N")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {name}: only cpu and cuda are measured")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {name}: PyTorch {torch.__version__} sees no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def console_for_stdout() -> Console:
    """A console that is 100 columns wide where nobody says how wide it is."""
    from rich.console import Console

    # FORCE_COLOR makes rich take anything for a terminal.
    return Console() if sys.stdout.isatty() else Console(width=100)
