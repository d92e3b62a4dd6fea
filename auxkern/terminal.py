"""What commands share: the exit status of Ctrl-C, a parser, kinds of arguments, the console."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

# The others are imported where they are needed: a usage line waits for none of them.
if TYPE_CHECKING:
    import torch
    from rich.console import Console

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def command_parser(
    prog: str, description: str, epilog: str, kind: type[argparse.ArgumentParser] = argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """A parser that knows no abbreviations and shows the epilog as it is written."""
    return kind(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number of at least 1")
    return value


def natural(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number of at least 0")
    return value


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN, for argparse."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{value} is not finite")
    return value


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

    console = Console()
    return console if console.is_terminal else Console(width=100)
