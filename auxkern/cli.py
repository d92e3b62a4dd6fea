"""The console command ``auxkern``, which is ``python -m auxkern`` too."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from types import FrameType

from auxkern import __version__
from auxkern.terminal import INTERRUPTED

COMMANDS = {
    "train": ("auxkern.commands.train", "train an auxiliary for a frozen language model"),
    "generate": ("auxkern.commands.generate", "write texts with a trained pair"),
    "evaluate": ("auxkern.commands.evaluate", "nll and perplexity of a pair, its base and its auxiliary"),
    "bench": ("auxkern.bench.__main__", "time the operators against eager, torch.compile and peers"),
    "inspect": ("auxkern.inspect.__main__", "compile every Triton kernel and print what came of it"),
    "env": ("auxkern.env", "print versions, backends and why each was chosen"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    foot = "auxkern COMMAND --help says more; auxkern --version prints the version."
    return "\n".join(["usage: auxkern COMMAND [OPTIONS]", "", *lines, "", foot])


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for an unknown command, 130 after Ctrl-C.

    Args:
        argv: arguments after the program's name; those of the process when None.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"auxkern {__version__}")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        if arguments:
            close = difflib.get_close_matches(arguments[0], [*COMMANDS, "--help", "--version"], n=1)
            remedy = f"; did you mean {close[0]}?" if close else ""
            print(f"auxkern: there is no command {arguments[0]!r}{remedy}\n", file=sys.stderr)
        print(_usage(), file=sys.stderr)
        return 2
    if argv is None:  # a process that is this command and nothing else
        # Read when tqdm is imported: transformers' bar for GGUF files knows no other switch.
        os.environ.setdefault("TQDM_DISABLE", "1")
        # An exception in the middle of an import comes out as whatever the importing code makes of it. A
        # shell's background job ignores SIGINT on purpose.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _leave)
    try:
        module = importlib.import_module(COMMANDS[arguments[0]][0])
        if argv is None and signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return int(module.main(arguments[1:]))
    except KeyboardInterrupt:
        print(f"auxkern {arguments[0]}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"auxkern: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    raise SystemExit(main())
